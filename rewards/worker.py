"""Scoring of rollouts in one process. Owns the rule that a failure is an error, never a reward."""

from __future__ import annotations

import math
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from posttrain.config import UserError
from posttrain.records import RewardResult, Rollout, RolloutGroup, RolloutStatus
from rewards.base import Reward
from rewards.resolve import build

SCORED = (RolloutStatus.completed, RolloutStatus.truncated)


class TooSlow(BaseException):
    """Raised in the middle of a reward. No `Exception`, so that the reward's own handlers let it pass."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises `TooSlow` in the block once it has taken ``seconds`` (None: never). Main thread only, where Ray runs the
    methods of an actor; code that never returns to Python cannot be stopped."""
    if seconds is None:
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlow

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def score_rollout(reward: Reward, rollout: Rollout, timeout_s: float | None = None) -> RewardResult:
    """Result of one rollout; whatever goes wrong in user code, or takes too long, ends up in ``error``."""
    if rollout.status not in SCORED:
        return RewardResult(reward=0.0, error=rollout.error or rollout.status.value)
    try:  # code of a user
        with time_limit(timeout_s):
            found: Any = reward.score(rollout)
        if not isinstance(found, tuple | list) or len(found) != 2 or isinstance(found[0], str):
            wanted = "return (reward, breakdown), a number and a mapping of numbers such as (1.0, {})"
            return RewardResult(reward=0.0, error=f"score returned {str(found)[:80]!r}; {wanted}")
        value, breakdown = found
        value, breakdown = float(value), {str(name): float(part) for name, part in breakdown.items()}
    except TooSlow:
        return RewardResult(
            reward=0.0, error=f"the reward took longer than reward_workers.timeout_s={timeout_s:g}"
        )
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return RewardResult(reward=0.0, error=reason)
    if not math.isfinite(value):
        return RewardResult(reward=0.0, breakdown=breakdown, error=f"the reward is {value}")
    return RewardResult(reward=value, breakdown=breakdown)


class RewardWorker:
    """Holds one reward per domain. Runs as a Ray actor (`rewards.pool`), or in process in tests."""

    def __init__(
        self, entries: dict[str, dict[str, Any]], search_path: list[str], timeout_s: float | None = None
    ) -> None:
        self._timeout_s = timeout_s
        sys.path += [folder for folder in search_path if folder not in sys.path]
        self._rewards: dict[str, Reward] = {}
        self._problem: str | None = None
        built: dict[str, Reward] = {}
        try:  # reported by `problem`: an actor that dies while starting only leaves a stack trace
            for domain, entry in entries.items():
                same = repr(sorted(entry.items(), key=lambda item: item[0]))
                if same not in built:
                    built[same] = build(entry, f"rewards.{domain}")
                self._rewards[domain] = built[same]
        except UserError as error:
            self._problem = str(error)

    def problem(self) -> str | None:
        """Why no reward could be built; None if all is well."""
        return self._problem

    def score(self, group_refs: list[Any]) -> list[list[RewardResult]]:
        """Results of every rollout of every group, in order."""
        groups: list[RolloutGroup] = ray.get(group_refs)
        return [
            [score_rollout(self._rewards[r.domain], r, self._timeout_s) for r in group.rollouts]
            for group in groups
        ]
