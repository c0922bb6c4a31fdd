"""What answers the policy between two of its turns: the interface that users implement.

An environment is named in the config (`environments.<domain>._target_`), built once in every rollout worker, and
called from several threads at once, so it holds no state of an episode: everything that it needs to know is in the
prompt and in the conversation. A call that raises makes its rollout an `environment_error`, never a reward of 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.records import Prompt


@dataclass(kw_only=True, slots=True)
class EnvironmentReply:
    """Answer to one turn. ``messages`` follow the policy's message; ``done`` ends the episode after them."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


class Environment(Protocol):
    """Answers one turn of the policy."""

    def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
        """Answer ``messages``, the conversation after the prompt; its last entry is the policy's message."""
        ...
