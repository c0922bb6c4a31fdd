"""Ray actor that holds frozen teachers and scores rollout groups with them.

Consumes references to rollout groups and reads them from shared memory itself; produces one `TeacherScores` per
rollout. Routes of the rollouts are never looked at: a teacher routes by itself (its scorer has no way to take any).
Every call names its checkpoint, so a restarted actor loads what it needs and goes on.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from posttrain.config import ModelConfig, TeacherWorkerConfig
from posttrain.records import RolloutGroup, RolloutStatus, TeacherScores

if TYPE_CHECKING:
    from teachers.direct import Examination
    from teachers.scorer import Scorer

logger = logging.getLogger(__name__)

SCORED = (RolloutStatus.completed, RolloutStatus.truncated)


class TeacherWorker:
    """Scores with one or several checkpoints, one call at a time."""

    def __init__(self, cfg: TeacherWorkerConfig, model: ModelConfig) -> None:
        import torch

        import teachers.scorer  # noqa: F401  Transformers takes seconds to import; here nobody waits for it

        torch.set_num_threads(cfg.cores_per_worker or len(os.sched_getaffinity(0)))
        self.cfg = cfg
        self.model = model
        self.device = "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"
        self.scorers: dict[str, Scorer] = {}  # by fingerprint: a path may come to hold other weights
        if ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed:
            logger.warning("teacher worker was restarted; it loads its teachers again")

    def set_teachers(self, checkpoints: dict[str, str]) -> dict[str, Any]:
        """Hold exactly these checkpoints, fingerprint -> folder. Returns what is held, for the events of the run."""
        self.scorers = {key: scorer for key, scorer in self.scorers.items() if key in checkpoints}
        for key, path in checkpoints.items():
            self._scorer(key, path)
        return {"pid": os.getpid(), "device": self.device, "paths": [s.path for s in self.scorers.values()]}

    def score(self, key: str, path: str, name: str, group_refs: list[Any]) -> list[TeacherScores]:
        """Scores of all rollouts of all groups, in order, by the checkpoint with fingerprint ``key`` in ``path``.
        ``name`` goes into `TeacherScores.teacher`.

        A failed rollout never reaches the loss; its scores are NaN so that a use would be seen. Raises
        `TeacherScoreError`.
        """
        groups: list[RolloutGroup] = ray.get(group_refs)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        token_ids = [rollout.token_ids if rollout.turns else np.zeros(0, np.int32) for rollout in rollouts]
        logprobs = [np.full(len(ids), np.nan, np.float32) for ids in token_ids]
        scored = [i for i, rollout in enumerate(rollouts) if rollout.status in SCORED]
        results = self._scorer(key, path).score(
            [token_ids[i] for i in scored],
            self.cfg.max_tokens_per_batch,
            [f"rollout {rollouts[i].rollout_id!r} of domain {rollouts[i].domain!r}" for i in scored],
        )
        for i, result in zip(scored, results, strict=True):
            logprobs[i] = result
        return [TeacherScores(teacher=name, logprobs=row) for row in logprobs]

    def examine(
        self, key: str, path: str, token_ids: list[np.ndarray], scores: list[np.ndarray]
    ) -> Examination:
        """``scores`` of fixed texts against a direct forward of the checkpoint that gave them (preflight)."""
        from teachers.direct import examine

        return examine(self._scorer(key, path).model, token_ids, scores)

    def _scorer(self, key: str, path: str) -> Scorer:
        if key not in self.scorers:
            from teachers.scorer import Scorer

            self.scorers[key] = Scorer(path, self.model, self.cfg.dtype, self.device)
        return self.scorers[key]
