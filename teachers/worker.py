"""Ray actor that holds frozen teachers and scores rollout groups with them.

Consumes references to rollout groups and reads them from shared memory itself; produces one `TeacherScores` per
rollout. Routes of the rollouts are never looked at: a teacher routes by itself (its scorer has no way to take any).
Every call names its checkpoint, so a restarted actor loads what it needs and goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from posttrain.config import ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from posttrain.records import Rollout, RolloutStatus, TeacherScores
from rollout.process import prepare
from teachers.backend import as_array
from teachers.teacher import Teacher

if TYPE_CHECKING:
    from teachers.backend import Backend, TokenScores
    from teachers.direct import Examination

logger = logging.getLogger(__name__)

SCORED = (RolloutStatus.completed, RolloutStatus.truncated)


@dataclass(kw_only=True, slots=True, frozen=True)
class ScoringTask:
    """Rollout groups for one teacher."""

    key: str  # of the teacher: back end and fingerprints
    teacher: Teacher
    name: str  # of the teacher in `TeacherScores`
    group_refs: list[Any]  # to `RolloutGroup`
    head_id: int | None = None  # of its LM head; signal full


class TeacherWorker:
    """Scores with one or several checkpoints and their adapters, or with one engine or server; one call at a time."""

    def __init__(
        self, cfg: TeacherWorkerConfig, model: ModelConfig, index: int = 0, has_engine: bool = False
    ) -> None:
        """``index`` counts the workers of a machine; ``has_engine``: this process will hold a vLLM engine."""
        if has_engine:
            cores = cfg.cores_per_worker or len(os.sched_getaffinity(0))
            prepare(index, cores, cfg.vllm.get("tensor_parallel_size", 1))
        else:
            import torch

            import teachers.scorer  # noqa: F401  Transformers takes seconds to import; here nobody waits for it

            torch.set_num_threads(cfg.cores_per_worker or len(os.sched_getaffinity(0)))
        self.cfg = cfg
        self.model = model
        self.device = "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"
        self.backends: dict[str, Backend] = {}  # by key of the base: a path may come to hold other weights
        context = ray.get_runtime_context() if ray.is_initialized() else None
        # Outside of an actor Ray does not answer the second question.
        self.was_restarted = bool(
            context is not None and context.get_actor_id() and context.was_current_actor_reconstructed
        )
        self._known: set[str] = set()  # keys whose files were compared after a restart
        if self.was_restarted:
            logger.warning("teacher worker was restarted; it loads its teachers again")

    def process(self) -> str:
        """HOST:PID of this worker."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def set_teachers(self, teachers: dict[str, Teacher], signal: str = "sampled") -> dict[str, Any]:
        """Hold exactly these, key -> teacher. Returns what is held, for the events of the run; for the signal ``full``
        also ``heads``: key -> hash of the LM head."""
        bases = {base_of(key) for key in teachers}
        self.backends = {base: backend for base, backend in self.backends.items() if base in bases}
        for backend in self.backends.values():
            if adapters := getattr(backend, "adapters", None):
                adapters.keep(set(teachers))
        for key, teacher in teachers.items():
            self._backend(key, teacher)
        row: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self.device,
            "paths": [backend.path for backend in self.backends.values()],
            "adapters": [teacher.adapter for teacher in teachers.values() if teacher.adapter],
        }
        if signal == "full":
            row["heads"] = {key: _digest(self.head(key, teacher)) for key, teacher in teachers.items()}
        return row

    def head(self, key: str, teacher: Teacher) -> np.ndarray:
        """LM head [V, H] of ``teacher``, in its own type. `UserError` where the back end has none to give."""
        head = self._backend(key, teacher).head()
        if head is None:
            raise UserError(
                f"algorithm.signal='full': {teacher.key}.backend={teacher.backend.value} gives no hidden states; use"
                " algorithm.signal=top_k or sampled"
            )
        return as_array(head)

    def score(self, task: ScoringTask, signal: str = "sampled", top_k: int = 64) -> list[TeacherScores]:
        """Scores of all rollouts of all groups, in order.

        A failed rollout never reaches the loss; its scores are NaN so that a use would be seen. Raises
        `TeacherScoreError`.
        """
        [scores] = self.score_all([task], signal, top_k)
        return scores

    def score_all(
        self, tasks: list[ScoringTask], signal: str = "sampled", top_k: int = 64
    ) -> list[list[TeacherScores]]:
        """As `score`, for every task. Adapters of one base are in common batches where that can be, so that a step costs
        the same with many of them as with one. An error of one task is the error of all."""
        rollouts = [[r for group in ray.get(task.group_refs) for r in group.rollouts] for task in tasks]
        scores: list[list[TeacherScores]] = [[] for _ in tasks]
        for together in self._plan(tasks):
            scored = [(tasks[i], r) for i in together for r in rollouts[i] if r.status in SCORED]
            # Each is let go as soon as what is sent of it is there: hidden states are large.
            results = deque(self._score(scored, len(together) > 1, signal, top_k) if scored else ())
            for i in together:
                scores[i] = [
                    _as_scores(tasks[i], r, results.popleft())
                    if r.status in SCORED
                    else _unscored(tasks[i], r)
                    for r in rollouts[i]
                ]
        return scores

    def _plan(self, tasks: list[ScoringTask]) -> list[list[int]]:
        """Indices of the tasks that are scored at once, each once."""
        if len(tasks) == 1:
            return [[0]]
        common: dict[str, list[int]] = defaultdict(list)
        alone = []
        for i, task in enumerate(tasks):
            adapters = getattr(self._hold(task.key, task.teacher), "adapters", None)
            if adapters is not None and (task.teacher.adapter is None or adapters.can_mix(task.key)):
                common[base_of(task.key)].append(i)
            else:
                alone.append([i])
        return [*common.values(), *alone]

    def _score(
        self, scored: list[tuple[ScoringTask, Rollout]], is_mixed: bool, signal: str, top_k: int
    ) -> list[TokenScores]:
        """Scores of each rollout by the teacher beside it: one teacher, or several that are mixed."""
        task, _ = scored[0]
        backend = self._hold(task.key, task.teacher) if is_mixed else self._backend(task.key, task.teacher)
        adapters = [task.key if task.teacher.adapter else None for task, _ in scored]
        return backend.score(
            [r.token_ids for _, r in scored],
            self.cfg.max_tokens_per_batch,
            [f"rollout {r.rollout_id!r} of domain {r.domain!r}" for _, r in scored],
            signal,
            top_k,
            [r.loss_mask for _, r in scored],
            **({"adapters": adapters} if is_mixed else {}),
        )

    def examine(
        self, key: str, teacher: Teacher, token_ids: list[np.ndarray], scores: list[np.ndarray]
    ) -> Examination:
        """``scores`` of fixed texts against a direct forward of ``teacher`` in Transformers, adapter included (preflight)."""
        from teachers.direct import examine
        from teachers.scorer import Scorer

        backend = self._backend(key, teacher)
        assert isinstance(backend, Scorer)
        return examine(backend.model, token_ids, scores)

    def _backend(self, key: str, teacher: Teacher) -> Backend:
        """What scores as ``teacher``, loaded if it is not here, with its adapter put on."""
        backend = self._hold(key, teacher)
        if adapters := getattr(backend, "adapters", None):
            adapters.use(key if teacher.adapter else None, teacher.adapter)
        return backend

    def _hold(self, key: str, teacher: Teacher) -> Backend:
        """What can score as ``teacher``: its base and its adapter, loaded if they are not here."""
        base = base_of(key)
        if self.was_restarted and key not in self._known:
            _check_files(key, teacher)
            self._known.add(key)
        if base not in self.backends:
            self.backends[base] = self._open(teacher)
        backend = self.backends[base]
        if teacher.adapter and (adapters := getattr(backend, "adapters", None)):
            try:
                adapters.hold(key, teacher.adapter)
            except UserError:
                del self.backends[base]  # part of the adapter may be on it
                raise
        return backend

    def _open(self, teacher: Teacher) -> Backend:
        if teacher.backend is TeacherBackend.vllm:
            from teachers.vllm_scorer import VllmScorer

            return VllmScorer(teacher.path, self.cfg, self.model, teacher.key)
        if teacher.backend is TeacherBackend.server:
            from teachers.server import ServerScorer

            return ServerScorer(teacher, self.cfg)
        from teachers.scorer import Scorer

        return Scorer(teacher.path, self.model, self.cfg.dtype, self.device, self.cfg.head_dtype)


def _as_scores(task: ScoringTask, rollout: Rollout, found: TokenScores) -> TeacherScores:
    """What is sent of them: rows of loss tokens alone, but for the logprobs."""
    mask = rollout.loss_mask
    return TeacherScores(
        teacher=task.name,
        logprobs=found.logprobs,
        topk_ids=None if found.topk_ids is None else found.topk_ids[mask],
        topk_logprobs=None if found.topk_logprobs is None else found.topk_logprobs[mask],
        hidden=None if found.hidden is None else found.hidden[mask],
        head_id=task.head_id,
    )


def _unscored(task: ScoringTask, rollout: Rollout) -> TeacherScores:
    num_tokens = len(rollout.token_ids) if rollout.turns else 0
    return TeacherScores(teacher=task.name, logprobs=np.full(num_tokens, np.nan, np.float32))


def _check_files(key: str, teacher: Teacher) -> None:
    """Raises `UserError` when the files are no longer those that ``key`` was made of, before the run began to use them."""
    from teachers.check import key_of

    if key_of(teacher) != key:
        raise UserError(
            f"{teacher.key}.path={teacher.name!r}: its worker was restarted and the files have changed in place since this"
            " run took them; put them back, and give a new teacher a folder of its own"
        )


def base_of(key: str) -> str:
    """Key of the base in that of a teacher, BASE or BASE+ADAPTER."""
    return key.partition("+")[0]


def _digest(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape} {hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}"
