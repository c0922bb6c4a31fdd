"""A frozen checkpoint in a vLLM engine of this process that only prefills: scores are vLLM's prompt logprobs.

Imports vLLM: set the process up first (`rollout.process`). Every method must be called from the thread that built the
engine. The engine routes by itself and records nothing; there is no prefix cache, so that a text is always computed
the same way. vLLM samples one token after a text, so the longest text is one token shorter than the engine's context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from posttrain.config import ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from rollout.cpu import use_float32_products
from rollout.head import with_head_dtype
from rollout.options import check_options
from teachers.backend import TokenScores
from teachers.options import FIXED_OPTIONS, OWNED_OPTIONS
from teachers.scores import check_finite, check_ids, check_signal, empty_scores, keep_rows
from teachers.teacher import SIGNALS


def engine_options(path: str, cfg: TeacherWorkerConfig, model: ModelConfig) -> dict[str, Any]:
    """Arguments for vLLM: what the config owns, this system's defaults, and the user's own options on top. Raises
    `UserError` for options that vLLM does not have or that are set elsewhere."""
    check_options("teacher_workers.vllm", cfg.vllm, OWNED_OPTIONS, FIXED_OPTIONS)
    options: dict[str, Any] = {
        "model": path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": cfg.dtype.value,
        "max_num_batched_tokens": cfg.max_tokens_per_batch,  # their logits over the vocabulary exist at once
        "max_num_seqs": min(256, cfg.max_tokens_per_batch),
        "max_model_len": -1,  # the checkpoint's context, or what fits into memory
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "mp" if cfg.vllm.get("tensor_parallel_size", 1) > 1 else "uni",
    }
    if current_platform.is_cpu():
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    return with_head_dtype(options | FIXED_OPTIONS | cfg.vllm, cfg.head_dtype)


class VllmScorer:
    """A `teachers.backend.Backend`. Raises `UserError` where vLLM cannot load ``path``."""

    def __init__(self, path: str, cfg: TeacherWorkerConfig, model: ModelConfig, key: str) -> None:
        options = engine_options(path, cfg, model)
        self.path = path
        self._key = key
        try:  # someone else's checkpoint, and vLLM raises half a dozen types for what it cannot do
            self._vllm = LLMEngine.from_engine_args(EngineArgs(**options))
            self._vllm.collective_rpc(use_float32_products)
            config = self._vllm.vllm_config.model_config
            self.vocab_size: int = config.get_vocab_size()
            self.max_tokens: int = config.max_model_len - 1
            self.score([np.zeros(2, np.int32)], 0)  # what attention cannot compute shows in the first forward
        except Exception as error:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            settings = "teacher_workers.vllm or teacher_workers.dtype"
            if "head_dtype" in reason:
                settings = "teacher_workers.head_dtype (null for a quantised LM head)"
            raise UserError(
                f"{key}.path={path!r}: vLLM cannot hold it ({reason}); mend {settings}, or set {key}.backend=transformers"
            ) from error

    def head(self) -> None:
        """An engine gives no LM head."""

    def score(
        self,
        token_ids: list[np.ndarray],
        max_tokens_per_batch: int,
        names: list[str] | None = None,
        signal: str = "sampled",
        top_k: int = 64,
        masks: list[np.ndarray] | None = None,
    ) -> list[TokenScores]:
        """See `teachers.backend.Backend`. vLLM batches by itself, so ``max_tokens_per_batch`` is that of the start.
        Raises `TeacherScoreError`, and `UserError` for a text that is longer than the engine's context."""
        check_signal(self._key, "vllm", signal, SIGNALS[TeacherBackend.vllm])
        k = 0 if signal == "sampled" else top_k
        scores = [empty_scores(len(ids), k) for ids in token_ids]
        for index, ids in enumerate(token_ids):
            check_ids(ids, self.path, self.vocab_size)
            if len(ids) > self.max_tokens:
                raise UserError(
                    f"{self._key}.path={self.path!r}: a text of {len(ids)} tokens, and the engine holds"
                    f" {self.max_tokens} and one more; raise teacher_workers.vllm.max_model_len or lower"
                    " rollout.max_model_len"
                )
            if len(ids) > 1:
                self._vllm.add_request(str(index), tokens_input(ids.tolist()), _parameters(k))
        while self._vllm.has_unfinished_requests():
            for output in self._vllm.step():
                if output.finished:
                    index = int(output.request_id)
                    scores[index] = _read(output.prompt_logprobs, token_ids[index], k)
        for index, score in enumerate(scores):
            check_finite(score.logprobs, self.path, names[index] if names else str(index))
            if masks is not None:
                keep_rows(score, masks[index])
        return scores


def _parameters(k: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _read(flat: Any, token_ids: np.ndarray, k: int) -> TokenScores:
    """vLLM's flat prompt logprobs: for every token but the first its own entry and then those of the top k."""
    rows = len(token_ids) - 1
    ids = np.asarray(flat.token_ids, np.int32).reshape(rows, 1 + k)
    values = np.asarray(flat.logprobs, np.float32).reshape(rows, 1 + k)
    assert np.array_equal(ids[:, 0], token_ids[1:]), "vLLM's prompt logprobs are those of another text"
    scores = empty_scores(len(token_ids), k)
    scores.logprobs[1:] = values[:, 0]
    if scores.topk_ids is not None and scores.topk_logprobs is not None:
        scores.topk_ids[1:], scores.topk_logprobs[1:] = ids[:, 1:], values[:, 1:]
    return scores
