"""The rollout workers as the driver sees them: submit prompts, wait for groups, push weights.

A prompt goes to the worker with the fewest samples in flight; what no engine has room for stays here and goes to
whoever frees up first, so a slow worker gets less work and delays nobody. Groups stay in Ray's store; only their
summaries reach the driver.

A worker that dies is started again with the present weights, and its groups are submitted again. The last of a
group's `rollout.max_retries` tries has a worker to itself, so that a prompt which kills engines is found and its
neighbours are not blamed; such a prompt is quarantined. Ray must be running.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from posttrain.config import ModelConfig, RolloutConfig, UserError
from posttrain.records import EngineInfo, GroupSummary, Prompt, SamplingSettings
from rollout.checkpoint import read_checkpoint
from rollout.worker import RolloutWorker

MAX_FAILED_STARTS = 3  # in a row, of one worker
REASON_LENGTH = 300  # characters of Ray's report on a dead actor
SAMPLES_PER_CALL = 8  # a call to an actor costs about 1 ms of CPU, as much as sampling a short answer


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """One group that has not come back."""

    prompt: Prompt
    settings: SamplingSettings
    group_id: str
    num_failures: int = 0


@dataclass(kw_only=True, slots=True, eq=False)
class _Call:
    """A few groups in flight on one actor."""

    jobs: list[_Job]
    worker: _Worker
    actor: Any
    group_refs: list[Any]


@dataclass(kw_only=True, slots=True, eq=False)
class _Worker:
    """One place for an actor. ``ready`` is the pending start, None once the actor takes work."""

    index: int
    actor: Any = None
    ready: Any = None
    max_num_seqs: int = 0
    calls: set[_Call] = field(default_factory=set)
    is_reserved: bool = False  # runs a job that must be alone
    num_failed_starts: int = 0

    @property
    def num_samples(self) -> int:
        """Samples in flight."""
        return sum(_num_samples(call.jobs) for call in self.calls)

    def has_room(self, jobs: list[_Job], alone: bool) -> bool:
        if self.ready is not None or self.is_reserved:
            return False
        return not self.calls or (not alone and self.num_samples + _num_samples(jobs) <= self.max_num_seqs)


def _num_samples(jobs: Iterable[_Job]) -> int:
    return sum(job.settings.group_size for job in jobs)


class RolloutPool:
    """Made by `start`. Not thread-safe: the driver's loop owns it."""

    def __init__(
        self, cfg: RolloutConfig, model: ModelConfig, environments: dict[str, Any], seed: int, num_gpus: float
    ) -> None:
        self._arguments = (cfg, model, environments, seed)
        self._max_retries = cfg.max_retries
        self._actor_class = ray.remote(RolloutWorker).options(
            num_cpus=0,
            num_gpus=num_gpus,
            max_concurrency=100_000,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self._bundle_ref: Any = None
        self._backlog: deque[_Job] = deque()
        self._in_flight: dict[Any, _Call] = {}  # by the reference of the summaries
        self._lost: list[str] = []
        self.quarantined: list[tuple[str, str]] = []  # (prompt_id, reason), all since the start
        self.num_restarts = 0
        self._restarts: list[tuple[str, str]] = []
        self._workers = [_Worker(index=index) for index in range(cfg.num_workers)]
        self.infos: list[EngineInfo] = []

    @classmethod
    def start(
        cls, cfg: RolloutConfig, model: ModelConfig, environments: dict[str, Any], seed: int
    ) -> RolloutPool:
        """Start all workers at once and wait until their engines are up. ``environments``: domain -> `_target_`
        block. Raises `UserError` for what the config asks for and the engine cannot do."""
        pool = cls(cfg, model, environments, seed, _gpus_per_worker(cfg))
        for worker in pool._workers:
            pool._launch(worker)
        try:
            for worker in pool._workers:
                info, worker.max_num_seqs = _get(worker.ready)
                worker.ready = None
                pool.infos.append(info)
        except BaseException:
            pool.shutdown()
            raise
        return pool

    @property
    def info(self) -> EngineInfo:
        """What the first engine says of itself; all are alike."""
        return self.infos[0]

    @property
    def num_workers(self) -> int:
        """Engines of this pool."""
        return len(self._workers)

    @property
    def num_in_flight(self) -> int:
        """Groups that were submitted and neither returned nor lost."""
        return len(self._backlog) + sum(len(call.jobs) for call in self._in_flight.values())

    def submit(self, prompt: Prompt, settings: SamplingSettings, group_id: str) -> None:
        """Have a group of ``settings.group_size`` rollouts sampled. Returns at once; small groups leave together, the
        last of them with the next `wait`."""
        self._backlog.append(_Job(prompt=prompt, settings=settings, group_id=group_id))
        self._dispatch(min_samples=SAMPLES_PER_CALL * len(self._workers))

    def wait(self, timeout_s: float) -> list[tuple[Any, GroupSummary]]:
        """Groups that have finished: (reference of the `RolloutGroup`, its summary), each once. Returns as soon as
        there is one, or when nothing is in flight, or after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        finished: list[tuple[Any, GroupSummary]] = []
        self._dispatch()
        while self.num_in_flight and not finished:
            pending = [*self._in_flight, *(w.ready for w in self._workers if w.ready is not None)]
            assert pending, "groups are waiting, but no worker is at work or starting"
            ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            done, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            for ref in done:
                if ref in self._in_flight:
                    finished += self._settle(ref)
            self._welcome_started()
            self._dispatch()
            if time.monotonic() >= deadline:
                break
        return finished

    def drain(self) -> list[tuple[Any, GroupSummary]]:
        """Wait until nothing is in flight; everything that finished meanwhile."""
        finished: list[tuple[Any, GroupSummary]] = []
        while self.num_in_flight:
            finished += self.wait(timeout_s=60.0)
        return finished

    def pop_lost(self) -> list[str]:
        """Ids of groups that will never come back (their prompts are in `quarantined`), each once."""
        lost, self._lost = self._lost, []
        return lost

    def pop_restarts(self) -> list[tuple[str, str]]:
        """(worker, reason) of the workers that died and were started again since the last call."""
        restarts, self._restarts = self._restarts, []
        return restarts

    def update_weights(self, bundle_ref: Any, policy_version: int) -> dict[str, float]:
        """Put the `WeightBundle` behind ``bundle_ref`` into every engine, in flight or not, and wait for all.

        Requests in flight follow `rollout.on_update`. Returns update_s (slowest worker) and
        num_requests_in_flight (all workers). Raises `rollout.weights.WeightMismatch` for a bundle that does not fit.
        """
        self._bundle_ref = bundle_ref
        self._finish_starts()
        self._dispatch()
        refs = [worker.actor.update_weights.remote(bundle_ref, policy_version) for worker in self._workers]
        reports = []
        for worker, ref in zip(self._workers, refs, strict=True):
            try:
                reports.append(_get(ref))
            except RayActorError as error:
                self._restart(worker, error)  # it starts with the new weights
        self._finish_starts()
        return {
            "update_s": max((report["update_s"] for report in reports), default=0.0),
            "num_requests_in_flight": sum(report["num_requests_in_flight"] for report in reports),
        }

    def load_checkpoint(self, path: str, policy_version: int) -> dict[str, float]:
        """`update_weights` with the tensors of a Hugging Face directory of the same shape."""
        return self.update_weights(ray.put(read_checkpoint(path, policy_version)), policy_version)

    def score(
        self, token_ids: list[np.ndarray], worker: int = 0
    ) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """Logprobs [T] (entry 0 is 0.0) of fixed texts under one worker's present weights, and their routes
        [T-1, L_moe, K] (None without experts). Texts leave room for one more token in the context."""
        return self._ask(worker, "score", token_ids)

    @contextmanager
    def keep_random_state(self) -> Iterator[None]:
        """What is sampled after the block draws the random numbers that it would have drawn without it. Does nothing while
        groups are in flight: they draw within the block, and nothing may be drawn twice."""
        if self.num_in_flight:
            yield
            return
        states = [self._ask(worker.index, "random_state") for worker in self._workers]
        yield
        for worker, state in zip(self._workers, states, strict=True):
            self._ask(worker.index, "set_random_state", state)

    def reseed(self, seed: int) -> None:
        """What is sampled without a seed from here on depends on ``seed`` and no longer on what was sampled before."""
        for worker in self._workers:
            self._ask(worker.index, "reseed", seed)

    def tensors(self, worker: int = 0) -> dict[str, np.ndarray]:
        """Every tensor that one engine computes with, packed layouts included; bfloat16 as its int16 bits."""
        return self._ask(worker, "tensors")

    def shutdown(self) -> None:
        """End all workers. Groups in flight are lost."""
        for worker in self._workers:
            if worker.actor is not None:
                ray.kill(worker.actor)
        self._workers, self._in_flight = [], {}
        self._backlog.clear()

    def _ask(self, index: int, method: str, *arguments: Any) -> Any:
        """Result of a question to one worker, put again to its successor if it dies of it once."""
        self._finish_starts()
        worker = self._workers[index]
        try:
            return _get(getattr(worker.actor, method).remote(*arguments))
        except RayActorError as error:
            self._restart(worker, error)
            self._finish_starts()
            return _get(getattr(worker.actor, method).remote(*arguments))

    def _dispatch(self, min_samples: int = 1) -> None:
        """Hand out the backlog in order, as far as there is room and at least ``min_samples`` are waiting."""
        while self._backlog and _num_samples(itertools.islice(self._backlog, min_samples)) >= min_samples:
            alone = self._must_be_alone(self._backlog[0])
            jobs = [self._backlog[0]] if alone else self._next_jobs()
            free = [worker for worker in self._workers if worker.has_room(jobs, alone)]
            if not free:
                return
            worker = min(free, key=lambda candidate: candidate.num_samples)
            for _ in jobs:
                self._backlog.popleft()
            requests = [(job.prompt, job.settings, job.group_id) for job in jobs]
            *group_refs, ref = worker.actor.generate.options(num_returns=len(jobs) + 1).remote(requests)
            self._in_flight[ref] = _Call(jobs=jobs, worker=worker, actor=worker.actor, group_refs=group_refs)
            worker.calls.add(self._in_flight[ref])
            worker.is_reserved = alone

    def _must_be_alone(self, job: _Job) -> bool:
        return 0 < job.num_failures == self._max_retries

    def _next_jobs(self) -> list[_Job]:
        """The front of the backlog: `SAMPLES_PER_CALL` at most, and no more than leaves a share for every worker."""
        share = -(-len(self._backlog) // len(self._workers))
        jobs: list[_Job] = []
        for job in itertools.islice(self._backlog, share):
            if jobs and (self._must_be_alone(job) or _num_samples([*jobs, job]) > SAMPLES_PER_CALL):
                break
            jobs.append(job)
        return jobs

    def _settle(self, ref: Any) -> list[tuple[Any, GroupSummary]]:
        """Take a call that came back off the books; if its worker died, see to worker and jobs."""
        call = self._in_flight.pop(ref)
        worker, is_present = call.worker, call.worker.actor is call.actor
        if is_present:
            worker.calls.discard(call)
            worker.is_reserved = False
        try:
            summaries = _get(ref)
        except RayActorError as error:
            if is_present:
                self._restart(worker, error)
            for job in call.jobs:
                self._retry(job, str(error).splitlines()[0])
            return []
        return list(zip(call.group_refs, summaries, strict=True))

    def _retry(self, job: _Job, reason: str) -> None:
        job.num_failures += 1
        if job.num_failures <= self._max_retries:
            self._backlog.append(job)
            return
        self._lost.append(job.group_id)
        self.quarantined.append(
            (job.prompt.prompt_id, f"its rollout worker died {job.num_failures} times; last: {reason}")
        )

    def _launch(self, worker: _Worker) -> None:
        """Start an actor in this place; calls in flight, if any, were its predecessor's."""
        worker.actor = self._actor_class.remote(worker.index, *self._arguments)
        worker.ready = worker.actor.start.remote(self._bundle_ref)
        worker.calls, worker.is_reserved = set(), False

    def _restart(self, worker: _Worker, error: RayActorError) -> None:
        ray.kill(worker.actor)
        self.num_restarts += 1
        self._restarts.append((f"rollout-{worker.index}", " ".join(str(error).split())[:REASON_LENGTH]))
        self._launch(worker)

    def _welcome_started(self) -> None:
        """Let workers whose start has finished take work; start again those that died in it."""
        for worker in self._workers:
            if worker.ready is None or not ray.wait([worker.ready], timeout=0)[0]:
                continue
            try:
                _, worker.max_num_seqs = _get(worker.ready)
            except RayActorError as error:
                worker.num_failed_starts += 1
                if worker.num_failed_starts == MAX_FAILED_STARTS:
                    raise RuntimeError(
                        f"rollout worker {worker.index} died in {MAX_FAILED_STARTS} starts"
                    ) from error
                self._restart(worker, error)
                continue
            worker.ready, worker.num_failed_starts = None, 0

    def _finish_starts(self) -> None:
        while starting := [worker.ready for worker in self._workers if worker.ready is not None]:
            ray.wait(starting, num_returns=1)
            self._welcome_started()


def _gpus_per_worker(cfg: RolloutConfig) -> float:
    if cfg.num_gpus_per_worker is not None:
        return cfg.num_gpus_per_worker
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return float(cfg.vllm.get("tensor_parallel_size", 1)) if has_gpus else 0.0


def _get(ref: Any) -> Any:
    """`ray.get`; a `UserError` of the worker comes out as itself, so that the command prints its one line."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        _raise_cause(error)


def _raise_cause(error: RayTaskError) -> NoReturn:
    if isinstance(error.cause, UserError):
        raise error.cause from None
    raise error
