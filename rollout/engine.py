"""One vLLM engine in this process, driven step by step. Imports vLLM: set the process up first (`rollout.process`).

Requests join, finish and are aborted between steps, and weights change between steps. Every method must be called
from the thread that built the engine, because vLLM binds that thread's OpenMP team to its cores.

Checks what comes back and pads nothing: a segment whose routes are short, out of range or unrecorded, or whose
logprobs are not finite, carries an ``error`` that names the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from posttrain.config import ModelConfig, OnUpdate, Replay, RolloutConfig, UserError
from posttrain.records import EngineInfo, WeightBundle
from rollout.checkpoint import checkpoint_shapes, local_checkpoint
from rollout.cpu import use_float32_products
from rollout.head import with_head_dtype
from rollout.options import FIXED_OPTIONS, OWNED_OPTIONS, check_options
from rollout.segment import Segment, SegmentResult, recording_problem, routes_problem
from rollout.weights import apply_bundle, check_bundle, engine_tensors

REASON_LENGTH = 400  # of what vLLM says


@dataclass(kw_only=True, slots=True)
class _Running:
    segment: Segment
    engine_id: str  # vLLM's own id
    updates: list[tuple[int, int]] = field(
        default_factory=list
    )  # (tokens sampled so far, version from there on)


def engine_options(cfg: RolloutConfig, model: ModelConfig, seed: int) -> dict[str, Any]:
    """Arguments for vLLM: what the config owns, this system's defaults, and the user's own options on top."""
    check_options("rollout.vllm", cfg.vllm, OWNED_OPTIONS, FIXED_OPTIONS)
    options: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": cfg.dtype.value,
        "max_model_len": cfg.max_model_len,
        "seed": seed,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "mp" if cfg.vllm.get("tensor_parallel_size", 1) > 1 else "uni",
    }
    if current_platform.is_cpu():
        if cfg.vllm.get("enable_chunked_prefill"):
            raise UserError(
                "rollout.vllm.enable_chunked_prefill=True: on CPUs a request with a seed that is cut there kills the"
                " engine; remove the key"
            )
        # vLLM rewinds the generator of a seeded request that it prefills in part, which a CPU generator cannot; the
        # process dies without a word. So every prompt is prefilled whole.
        options |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 30,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(2048, cfg.max_model_len),
        }
    return with_head_dtype(options | FIXED_OPTIONS | cfg.vllm, cfg.head_dtype)


def _moe_layers(worker: Any) -> list[int]:
    """Layers that choose experts, as vLLM numbers them; runs in its worker."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCaptureSource

    modules = worker.model_runner.get_model().modules()
    return sorted({m.layer_id for m in modules if isinstance(m, (MoERunner, RoutedExpertsCaptureSource))})


def _random_state(worker: Any) -> list[np.ndarray]:
    """State of torch's generators, the CPU's and its GPU's; runs in vLLM's worker."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return [state.numpy() for state in states]


def _set_random_state(worker: Any, states: list[list[np.ndarray]]) -> None:
    """Undo what was drawn since `_random_state`; ``states`` are those of all workers."""
    setters = (torch.set_rng_state, torch.cuda.set_rng_state)
    for state, setter in zip(states[worker.rank], setters, strict=False):
        setter(torch.from_numpy(state.copy()))


def _reseed(worker: Any, seed: int) -> None:
    torch.manual_seed(seed)  # of all devices


@contextmanager
def _user_options(cfg: RolloutConfig, model: ModelConfig) -> Iterator[None]:
    """A `UserError` for what vLLM raises as it starts: of half a dozen types, for a value or for the checkpoint."""
    try:  # someone else's checkpoint, and options of the user
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
        what, mend = f"model.path={model.path!r}", "see whether vLLM holds this checkpoint; for memory give"
        mend += " rollout.vllm.gpu_memory_utilization, or a smaller rollout.max_model_len"
        if cfg.vllm:
            what, mend = f"rollout.vllm={cfg.vllm!r}", "mend what it names, or leave these options out"
        raise UserError(f"{what}: vLLM does not start ({reason}); {mend}") from error


class Engine:
    """A vLLM engine with versioned weights. Raises `UserError` for options and checkpoints that vLLM refuses."""

    def __init__(
        self, cfg: RolloutConfig, model: ModelConfig, seed: int, worker_id: str = "rollout-0"
    ) -> None:
        started = time.monotonic()
        options = engine_options(cfg, model, seed)
        with _user_options(cfg, model):
            arguments = EngineArgs(**options)
            model_config = arguments.create_model_config()
        longest = (
            model_config.get_and_verify_max_len(None) if cfg.max_model_len is None else cfg.max_model_len
        )
        self.num_experts = model_config.get_num_experts()
        self.records_routes = cfg.record_routes is Replay.auto and self.num_experts > 0
        if self.records_routes and (problem := recording_problem(model_config.hf_text_config)):
            raise UserError(
                f"rollout.record_routes=auto: {problem}, so they cannot be replayed; "
                "set rollout.record_routes=off and learner.routing_replay=off"
            )
        arguments.enable_return_routed_experts = self.records_routes
        with _user_options(cfg, model):
            self.vllm = LLMEngine.from_engine_args(arguments)
        self.vllm.collective_rpc(use_float32_products)
        self.policy_version = 0
        self.on_update = cfg.on_update
        self._running: dict[str, _Running] = {}
        self._moe_layers: list[int] = self.vllm.collective_rpc(_moe_layers)[0]
        self._all_layers_moe = len(self._moe_layers) == model_config.get_total_num_hidden_layers()
        self._route_dtype = np.uint8 if self.num_experts <= 256 else np.uint16
        self._expected = checkpoint_shapes(local_checkpoint(model.path, model.revision))
        self._hf_config = model_config.hf_text_config
        self.max_num_seqs: int = self.vllm.vllm_config.scheduler_config.max_num_seqs
        self.info = EngineInfo(
            worker_id=worker_id,
            vocab_size=model_config.get_vocab_size(),
            max_model_len=longest,
            dtype=cfg.dtype.value,
            records_routes=self.records_routes,
            num_moe_layers=len(self._moe_layers),
            num_experts=self.num_experts,
            top_k=model_config.get_num_experts_per_tok() if self.num_experts else 0,
            load_s=time.monotonic() - started,
        )

    @property
    def num_running(self) -> int:
        """Segments that are not finished."""
        return len(self._running)

    def add_request(self, segment: Segment) -> None:
        """Let ``segment`` join at the next step."""
        parameters = SamplingParams(
            max_tokens=segment.max_tokens,
            temperature=segment.temperature,
            top_p=segment.top_p,
            seed=segment.seed,
            logprobs=0,
            prompt_logprobs=0 if segment.score else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            routed_experts_prompt_start=segment.routes_start,
            skip_clone=True,
        )
        # Under `keep` old KV stays in the cache; the salt hides it from requests that start under newer weights.
        salt = f"version {self.policy_version}" if self.on_update is OnUpdate.keep else None
        prompt = tokens_input(segment.token_ids, cache_salt=salt)
        engine_id = self.vllm.add_request(segment.request_id, prompt, parameters)
        self._running[segment.request_id] = _Running(
            segment=segment, engine_id=engine_id, updates=[(0, self.policy_version)]
        )

    def abort(self, request_ids: list[str]) -> None:
        """Forget unfinished segments; their tokens are lost."""
        known = [request_id for request_id in request_ids if self._running.pop(request_id, None) is not None]
        self.vllm.abort_request(known)

    def step(self) -> list[SegmentResult]:
        """One engine step; segments that it finished."""
        return [self._result(output) for output in self.vllm.step() if output.finished]

    def update_weights(self, bundle: WeightBundle) -> dict[str, float]:
        """Put new weights in place, between two steps. Requests in flight follow `rollout.on_update`.

        Raises `WeightMismatch` for a bundle that does not fit, and RuntimeError if old KV could not be dropped.
        """
        started = time.monotonic()
        num_layers = self._hf_config.num_hidden_layers
        tied = bool(getattr(self._hf_config, "tie_word_embeddings", False))
        check_bundle(bundle, self._expected, num_layers=num_layers, tied_embeddings=tied)
        self.vllm.collective_rpc(apply_bundle, args=(bundle,))
        self.vllm.collective_rpc(use_float32_products)
        if self.on_update is OnUpdate.recompute:
            if not self.vllm.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM kept old KV after new weights: the prefix cache was not dropped")
        elif not self._running and not self.vllm.reset_prefix_cache():
            raise RuntimeError("vLLM kept old KV after new weights: the prefix cache was not dropped")
        self.policy_version = bundle.policy_version
        states = self.vllm.output_processor.request_states
        for running in self._running.values():
            num_sampled = states[running.engine_id].detokenizer.num_output_tokens()
            running.updates.append((num_sampled, self.policy_version))
        return {"update_s": time.monotonic() - started, "num_requests_in_flight": float(len(self._running))}

    def random_state(self) -> list[list[np.ndarray]]:
        """What sampling without a seed draws from next, for `set_random_state`."""
        return self.vllm.collective_rpc(_random_state)

    def set_random_state(self, states: list[list[np.ndarray]]) -> None:
        """Sample on as if nothing had been drawn since `random_state`."""
        self.vllm.collective_rpc(_set_random_state, args=(states,))

    def reseed(self, seed: int) -> None:
        """Sample without a seed from here on as another engine does after the same call."""
        self.vllm.collective_rpc(_reseed, args=(seed,))

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor that the model computes with, see `rollout.weights.engine_tensors`."""
        return self.vllm.collective_rpc(engine_tensors)[0]

    def _result(self, output: RequestOutput) -> SegmentResult:
        running = self._running.pop(output.request_id)
        segment, completion = running.segment, output.outputs[0]
        token_ids = np.asarray(completion.token_ids, dtype=np.int32)
        num_prompt = len(segment.token_ids)
        if segment.score:
            logprobs, num_rows = _first_logprobs(output.prompt_logprobs, num_prompt), num_prompt - 1
        else:
            logprobs = _first_logprobs(completion.logprobs, len(token_ids))
            num_rows = num_prompt + len(token_ids) - 1 - segment.routes_start
        error = None if np.isfinite(logprobs).all() else "the engine returned a logprob that is not finite"
        routes = None
        if self.records_routes:
            routes = completion.routed_experts
            if segment.score and routes is not None:
                routes = routes[
                    :-1
                ]  # the engine samples one token after the text, and so consumes its last one
            if routes is not None and not self._all_layers_moe:
                routes = routes[:, self._moe_layers]
            error = error or routes_problem(routes, num_rows, self.num_experts)
            routes = None if routes is None or error else routes.astype(self._route_dtype, copy=False)
        versions = np.empty(len(token_ids), dtype=np.int32)
        for start, version in running.updates:
            versions[start:] = version
        return SegmentResult(
            request_id=segment.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            policy_versions=versions,
            routed_experts=routes,
            finish_reason=str(completion.finish_reason),
            error=error,
        )


def _first_logprobs(flat: Any, num_tokens: int) -> np.ndarray:
    """[num_tokens] float32: the sampled (or given) token's logprob at each position of vLLM's FlatLogprobs; 0.0
    where there is none, which is the first token of a prompt."""
    starts, ends = np.asarray(flat.start_indices), np.asarray(flat.end_indices)
    assert len(starts) == num_tokens, f"{len(starts)} logprobs for {num_tokens} tokens"
    logprobs = np.zeros(num_tokens, dtype=np.float32)
    defined = ends > starts
    logprobs[defined] = np.asarray(flat.logprobs, dtype=np.float32)[starts[defined]]
    return logprobs
