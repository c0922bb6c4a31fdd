"""Ray actors that score rollouts. Owns their number and who scores what; groups travel as object references.

Verifiers run apart from the driver because they are code of others: they may be slow, leak, or end their process.
An actor that dies is started again and its groups are scored once more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from posttrain.config import RewardWorkerConfig, UserError
from posttrain.records import RewardResult, RolloutGroup
from rewards.resolve import resolve
from rewards.worker import RewardWorker

__all__ = ["RewardPool", "resolve"]

GROUPS_PER_CALL = 16


class RewardPool:
    """Reward workers; calls of `score` take turns among them."""

    def __init__(self, workers: list[Any]) -> None:
        self._workers = workers
        self._next = 0

    @classmethod
    def start(
        cls, rewards_cfg: dict[str, Any], domains: list[str], cfg: RewardWorkerConfig | None = None
    ) -> RewardPool:
        """Start the actors and wait until every reward is built.

        Raises:
            UserError: from `resolve`, or from building a reward in a worker.
        """
        entries, cfg = resolve(rewards_cfg, domains), cfg or RewardWorkerConfig()
        # Zero CPUs: verifiers mostly wait for work, and must not keep engines from being placed.
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=1)(RewardWorker)
        workers = [actor.remote(entries, list(sys.path), cfg.timeout_s) for _ in range(cfg.num_workers)]
        for problem in ray.get([worker.problem.remote() for worker in workers]):
            if problem is not None:
                raise UserError(problem)
        return cls(workers)

    def score(
        self, group_refs: Sequence[ray.ObjectRef[RolloutGroup]]
    ) -> ray.ObjectRef[list[list[RewardResult]]]:
        """Score groups; the reference resolves to results [group][rollout] in the given order."""
        worker = self._workers[self._next % len(self._workers)]
        self._next += 1
        return worker.score.remote(list(group_refs))

    def score_all(
        self, groups: Sequence[tuple[ray.ObjectRef[RolloutGroup], int]]
    ) -> list[list[RewardResult]]:
        """Score groups, each with its number of rollouts, on all workers at once, and wait: results [group][rollout] in
        the given order. A group on which the worker's process dies again and again has an error in every rollout; it
        costs no other group."""
        chunks = [groups[i : i + GROUPS_PER_CALL] for i in range(0, len(groups), GROUPS_PER_CALL)]
        calls = [self.score([ref for ref, _ in chunk]) for chunk in chunks]
        return [r for chunk, call in zip(chunks, calls, strict=True) for r in self.results(chunk, call)]

    def results(
        self, chunk: Sequence[tuple[Any, int]], call: ray.ObjectRef[list[list[RewardResult]]]
    ) -> list[list[RewardResult]]:
        """Results of one `score` call, waited for; where its worker died of it, group by group."""
        try:
            return ray.get(call)
        except RayActorError:
            if len(chunk) > 1:
                return [self.results([one], self.score([one[0]]))[0] for one in chunk]
            died = RewardResult(reward=0.0, error="the reward's process died of this group, again and again")
            return [[died] * chunk[0][1]]

    def shutdown(self) -> None:
        """End the actors."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
