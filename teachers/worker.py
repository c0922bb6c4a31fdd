"""Ray actor that holds frozen teachers and scores rollout groups with them.

Consumes references to rollout groups and reads them from shared memory itself; produces one `TeacherScores` per
rollout. Routes of the rollouts are never looked at: a teacher routes by itself (its scorer has no way to take any).
Every call names its checkpoint, so a restarted actor loads what it needs and goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from posttrain.config import ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from posttrain.records import RolloutGroup, RolloutStatus, TeacherScores
from rollout.process import prepare
from teachers.backend import as_array
from teachers.teacher import Teacher

if TYPE_CHECKING:
    from teachers.backend import Backend
    from teachers.direct import Examination

logger = logging.getLogger(__name__)

SCORED = (RolloutStatus.completed, RolloutStatus.truncated)


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

    def score(
        self,
        key: str,
        teacher: Teacher,
        name: str,
        group_refs: list[Any],
        signal: str = "sampled",
        top_k: int = 64,
        head_id: int | None = None,
    ) -> list[TeacherScores]:
        """Scores of all rollouts of all groups, in order, by ``teacher``, whose key is ``key``. ``name`` and
        ``head_id`` go into `TeacherScores`.

        A failed rollout never reaches the loss; its scores are NaN so that a use would be seen. Raises
        `TeacherScoreError`.
        """
        groups: list[RolloutGroup] = ray.get(group_refs)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        token_ids = [rollout.token_ids if rollout.turns else np.zeros(0, np.int32) for rollout in rollouts]
        scores = [
            TeacherScores(teacher=name, logprobs=np.full(len(ids), np.nan, np.float32)) for ids in token_ids
        ]
        scored = [i for i, rollout in enumerate(rollouts) if rollout.status in SCORED]
        masks = [rollouts[i].loss_mask for i in scored]
        results = self._backend(key, teacher).score(
            [token_ids[i] for i in scored],
            self.cfg.max_tokens_per_batch,
            [f"rollout {rollouts[i].rollout_id!r} of domain {rollouts[i].domain!r}" for i in scored],
            signal,
            top_k,
            masks,
        )
        for i, mask, result in zip(scored, masks, results, strict=True):
            scores[i] = TeacherScores(
                teacher=name,
                logprobs=result.logprobs,
                topk_ids=None if result.topk_ids is None else result.topk_ids[mask],
                topk_logprobs=None if result.topk_logprobs is None else result.topk_logprobs[mask],
                hidden=None if result.hidden is None else result.hidden[mask],
                head_id=head_id,
            )
        return scores

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
        base = base_of(key)
        if self.was_restarted and key not in self._known:
            _check_files(key, teacher)
            self._known.add(key)
        if base not in self.backends:
            self.backends[base] = self._open(teacher)
        backend = self.backends[base]
        if adapters := getattr(backend, "adapters", None):  # models in this process alone take LoRA
            try:
                adapters.use(key if teacher.adapter else None, teacher.adapter)
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
