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

from posttrain.config import ModelConfig, TeacherWorkerConfig, UserError
from posttrain.records import RolloutGroup, RolloutStatus, TeacherScores
from teachers.backend import as_array

if TYPE_CHECKING:
    from teachers.backend import Backend

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
        self.scorers: dict[str, Backend] = {}  # by fingerprint: a path may come to hold other weights
        if ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed:
            logger.warning("teacher worker was restarted; it loads its teachers again")

    def set_teachers(self, checkpoints: dict[str, str], signal: str = "sampled") -> dict[str, Any]:
        """Hold exactly these checkpoints, fingerprint -> folder. Returns what is held, for the events of the run.

        For the signal ``full`` also ``heads``: fingerprint -> hash of the LM head.
        """
        self.scorers = {key: scorer for key, scorer in self.scorers.items() if key in checkpoints}
        for key, path in checkpoints.items():
            self._scorer(key, path)
        row: dict[str, Any] = {
            "pid": os.getpid(),
            "device": self.device,
            "paths": [s.path for s in self.scorers.values()],
        }
        if signal == "full":
            row["heads"] = {key: _digest(self.head(key, path)) for key, path in checkpoints.items()}
        return row

    def head(self, key: str, path: str) -> np.ndarray:
        """LM head [V, H] of a checkpoint, in its own type. `UserError` where the back end has none to give."""
        head = self._scorer(key, path).head()
        if head is None:
            raise UserError(
                f"algorithm.signal='full': the back end that scores with {path!r} gives no hidden states; use"
                " algorithm.signal=top_k or sampled"
            )
        return as_array(head)

    def score(
        self,
        key: str,
        path: str,
        name: str,
        group_refs: list[Any],
        signal: str = "sampled",
        top_k: int = 64,
        head_id: int | None = None,
    ) -> list[TeacherScores]:
        """Scores of all rollouts of all groups, in order, by the checkpoint with fingerprint ``key`` in ``path``.
        ``name`` and ``head_id`` go into `TeacherScores`.

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
        results = self._scorer(key, path).score(
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

    def _scorer(self, key: str, path: str) -> Backend:
        if key not in self.scorers:
            from teachers.scorer import Scorer

            self.scorers[key] = Scorer(path, self.model, self.cfg.dtype, self.device)
        return self.scorers[key]


def _digest(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape} {hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}"
