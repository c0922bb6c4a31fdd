"""The interface that users implement to reward a rollout. Owns the protocol alone.

An exception in `score` means that no reward exists: the rollout leaves loss and baseline and is counted. It never
becomes a reward of 0, which would teach the policy something that is not so.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from posttrain.records import Rollout


@runtime_checkable
class Reward(Protocol):
    """Scores one finished rollout. Instances live in a reward worker process and may keep state there.

    A class may name the fields that its rows must have, `required_fields = ("answer",)` (`"answer|tests"` accepts
    either); rows without them are then refused, with file and line, before anything starts.
    """

    def score(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """Return the reward and named parts of it for the logs.

        ``rollout.completion`` is the last assistant message, ``rollout.messages`` everything after the prompt,
        ``rollout.prompt.answer`` and ``rollout.prompt.metadata`` the other fields of the row.
        """
        ...
