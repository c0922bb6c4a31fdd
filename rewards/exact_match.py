"""Stock verifier: the completion equals the row's answer, character by character after optional trimming.

Owns string comparison only; it refuses rows without an answer (an error, not a reward of 0).
"""

from __future__ import annotations

from posttrain.records import Rollout


class ExactMatch:
    """1.0 if the text after the last ``after`` in the last assistant message equals the answer, else 0.0.

    ``after``: marker such as ``"####"`` or ``"Answer:"`` that precedes the final answer; None takes the whole
    message, and a message without the marker is wrong. ``strip`` trims white space on both sides of both texts;
    ``ignore_case`` compares case-folded. An answer that is a list accepts each of its members.
    """

    required_fields = ("answer",)

    def __init__(self, after: str | None = None, strip: bool = True, ignore_case: bool = False) -> None:
        if after == "":
            raise ValueError("after='': give a non-empty marker, or null for the whole message")
        self.after = after
        self.strip = strip
        self.ignore_case = ignore_case

    def score(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """`rewards.base.Reward.score`; raises ValueError if the prompt has no answer."""
        answer = rollout.prompt.answer
        if answer is None:
            raise ValueError(f"prompt {rollout.prompt.prompt_id} has no answer to compare with")
        accepted = {self._normal(str(item)) for item in (answer if isinstance(answer, list) else [answer])}
        text, found = rollout.completion, True
        if self.after is not None:
            _, mark, text = text.rpartition(self.after)
            found = bool(mark)
        correct = float(found and self._normal(text) in accepted)
        return correct, {"correct": correct}

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
