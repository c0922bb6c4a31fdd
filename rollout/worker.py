"""The rollout worker: an asynchronous Ray actor that owns one engine.

Episodes are coroutines on the actor's event loop; all engine work happens on one other thread. While segments are
unfinished, a pump hands that thread one step after another, with the segments that arrived meanwhile; new weights
and probes queue up on the same thread, so they fall between two steps. An engine that raises in a step cannot be
trusted again: the process ends and the pool starts another.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.config import ModelConfig, RolloutConfig, UserError
from posttrain.records import EngineInfo, GroupSummary, Prompt, RolloutGroup, SamplingSettings, WeightBundle
from rollout import process
from rollout.environment import Environment
from rollout.episode import EpisodeTools, run_episode
from rollout.repetition import has_repeated_tail
from rollout.segment import Segment, SegmentResult

if TYPE_CHECKING:
    from rollout.engine import Engine

ENVIRONMENT_CALLS = 64  # at once
GATHER_S = 0.005  # an idle engine waits this long for the next call of a batch


class RolloutWorker:
    """Consumes prompts, produces a `RolloutGroup` and its `GroupSummary` for each."""

    def __init__(
        self, index: int, cfg: RolloutConfig, model: ModelConfig, environments: dict[str, Any], seed: int
    ) -> None:
        self._index = index
        self._cfg = cfg
        self._model = model
        self._environment_configs = environments
        self._seed = seed
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._environment_calls = asyncio.Semaphore(ENVIRONMENT_CALLS)
        self._waiting: dict[str, asyncio.Future[SegmentResult]] = {}
        self._arrivals: list[Segment] = []
        self._aborts: list[str] = []
        self._pump: asyncio.Task[None] | None = None
        self._request_ids = itertools.count()

    async def start(self, bundle: WeightBundle | None = None) -> tuple[EngineInfo, int]:
        """Build environments, tokenizer and engine, with the weights of ``bundle`` if there is one. Returns the
        engine's description and how many sequences it runs at once."""
        process.prepare(
            self._index, self._cfg.cores_per_worker, self._cfg.vllm.get("tensor_parallel_size", 1)
        )
        return await self._on_engine_thread(self._build, bundle)

    def _build(self, bundle: WeightBundle | None) -> tuple[EngineInfo, int]:
        from posttrain.data.chat import encode_reply
        from posttrain.data.tokenizer import load_tokenizer
        from rollout.engine import Engine

        self._environments = _build_environments(self._environment_configs)
        tokenizer = load_tokenizer(self._model.path, self._model.revision, self._model.trust_remote_code)
        self._decode = lambda token_ids: tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
        self._encode_reply = lambda *messages_tools_options: encode_reply(tokenizer, *messages_tools_options)
        self._engine: Engine = Engine(
            self._cfg, self._model, seed=self._seed + self._index, worker_id=f"rollout-{self._index}"
        )
        if bundle is not None:
            self._engine.update_weights(bundle)
        return self._engine.info, self._engine.max_num_seqs

    async def generate(self, requests: list[tuple[Prompt, SamplingSettings, str]]) -> tuple[Any, ...]:
        """Sample the groups of (prompt, settings, group_id). Returns every `RolloutGroup` by itself, and then the list
        of their summaries. Raises `UserError` if a prompt fills the context."""
        finished = await asyncio.gather(*(self._generate_group(*request) for request in requests))
        return (*(group for group, _ in finished), [summary for _, summary in finished])

    async def _generate_group(
        self, prompt: Prompt, settings: SamplingSettings, group_id: str
    ) -> tuple[RolloutGroup, GroupSummary]:
        started = time.monotonic()
        limit = self._engine.info.max_model_len
        if len(prompt.token_ids) >= limit:
            raise UserError(
                f"rollout.max_model_len={limit}: prompt {prompt.prompt_id!r} alone has {len(prompt.token_ids)} tokens; "
                "raise it or set data.max_prompt_tokens"
            )
        tools = EpisodeTools(
            sample=self._sample,
            decode=self._decode,
            encode_reply=self._encode_reply,
            max_model_len=limit,
            environment=self._environments.get(prompt.domain),
            calls=self._environment_calls,
            next_request_id=self._next_request_id,
            environment_timeout_s=self._cfg.environment_timeout_s,
        )
        episodes = [
            asyncio.create_task(run_episode(prompt, settings, group_id, index, tools))
            for index in range(settings.group_size)
        ]
        try:
            rollouts = await asyncio.gather(*episodes)
        finally:
            for episode in episodes:
                episode.cancel()  # only where another one of the group raised
        group = RolloutGroup(group_id=group_id, prompt=prompt, rollouts=rollouts)
        return group, summarize(group, time.monotonic() - started)

    async def update_weights(self, bundle: WeightBundle, policy_version: int) -> dict[str, float]:
        """Put ``bundle`` into the engine between two steps, see `rollout.engine.Engine.update_weights`."""
        assert bundle.policy_version == policy_version, f"{bundle.policy_version=} is not {policy_version=}"
        return await self._on_engine_thread(self._engine.update_weights, bundle)

    async def score(self, token_ids: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """Logprobs [T] of fixed texts under the present weights, and their routes [T-1, L_moe, K]."""
        segments = [
            Segment(request_id=self._next_request_id(), token_ids=ids.tolist(), score=True)
            for ids in token_ids
        ]
        results = await asyncio.gather(*map(self._sample, segments))
        problems = [result.error for result in results if result.error is not None]
        if problems:
            raise RuntimeError(f"rollout-{self._index} could not score {len(problems)} texts: {problems[0]}")
        return [result.logprobs for result in results], [result.routed_experts for result in results]

    async def random_state(self) -> list[list[np.ndarray]]:
        """See `rollout.engine.Engine.random_state`."""
        return await self._on_engine_thread(self._engine.random_state)

    async def set_random_state(self, states: list[list[np.ndarray]]) -> None:
        """See `rollout.engine.Engine.set_random_state`."""
        await self._on_engine_thread(self._engine.set_random_state, states)

    async def reseed(self, seed: int) -> None:
        """See `rollout.engine.Engine.reseed`; every worker draws other numbers."""
        await self._on_engine_thread(self._engine.reseed, seed + self._index)

    async def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor of the engine, for the proof of a weight update."""
        return await self._on_engine_thread(self._engine.tensors)

    def _next_request_id(self) -> str:
        return str(next(self._request_ids))

    async def _on_engine_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._engine_thread, function, *arguments)

    async def _sample(self, segment: Segment) -> SegmentResult:
        """Waits for the engine to finish ``segment``; resolved by the pump."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[segment.request_id] = future
        self._arrivals.append(segment)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run_engine())
        try:
            return await future
        except asyncio.CancelledError:
            self._aborts.append(segment.request_id)
            raise
        finally:
            del self._waiting[segment.request_id]

    async def _run_engine(self) -> None:
        """The pump: consumes arrivals, produces results, ends when nothing is waited for."""
        await self._let_arrivals_gather()
        while self._waiting or self._aborts:
            arrivals, self._arrivals = self._arrivals, []
            aborts, self._aborts = self._aborts, []
            try:
                finished = await self._on_engine_thread(self._step, arrivals, aborts)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            for result in finished:
                future = self._waiting.get(result.request_id)
                if future is not None and not future.cancelled():
                    future.set_result(result)
            await asyncio.sleep(0)  # let the episodes go on, so that their next segments join the next step

    async def _let_arrivals_gather(self) -> None:
        """A batch of prompts arrives one call at a time; a step costs nearly the same for one request as for 100."""
        seen = 0
        while seen < len(self._arrivals) < self._engine.max_num_seqs:
            seen = len(self._arrivals)
            await asyncio.sleep(GATHER_S)

    def _step(self, arrivals: list[Segment], aborts: list[str]) -> list[SegmentResult]:
        for segment in arrivals:
            self._engine.add_request(segment)
        self._engine.abort(aborts)
        return self._engine.step() if self._engine.num_running else []


def _build_environments(configs: dict[str, Any]) -> dict[str, Environment]:
    """Domain -> environment, from `{_target_: ...}` blocks."""
    if not configs:
        return {}
    from hydra.utils import instantiate

    return {domain: instantiate(config) for domain, config in configs.items()}


def summarize(group: RolloutGroup, engine_s: float) -> GroupSummary:
    """The scalars of ``group`` that the driver keeps."""
    versions = [rollout.policy_versions for rollout in group.rollouts]
    sampled = np.concatenate([v[v >= 0] for v in versions])
    return GroupSummary(
        group_id=group.group_id,
        prompt_id=group.prompt.prompt_id,
        domain=group.prompt.domain,
        source=group.prompt.source,
        statuses=[rollout.status for rollout in group.rollouts],
        num_tokens=[len(rollout.token_ids) for rollout in group.rollouts],
        num_loss_tokens=[int(rollout.loss_mask.sum()) for rollout in group.rollouts],
        min_policy_version=int(sampled.min()) if len(sampled) else -1,
        max_policy_version=int(sampled.max()) if len(sampled) else -1,
        engine_s=engine_s,
        errors=[rollout.error for rollout in group.rollouts],
        repeated=[has_repeated_tail(rollout.turns[-1].token_ids) for rollout in group.rollouts],
    )
