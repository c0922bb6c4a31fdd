"""What a scoring back end is: one frozen model that scores token sequences, wherever it runs.

The signals are those of `algorithm.signal`; which columns of `TokenScores` each of them fills is said there. A back
end that cannot give a signal raises `UserError` naming ``algorithm.signal`` before anything starts, never later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, slots=True)
class TokenScores:
    """One sequence of T tokens as a frozen model sees it. Entry t speaks of the token at t and was formed from the
    tokens before it; entry 0 is 0. Rows of tokens outside the caller's mask are 0 in all but ``logprobs``.

    ``hidden`` times the transpose of `Backend.head` gives the logits of token t; its type is that of `as_array`.
    """

    logprobs: np.ndarray  # [T] float32, log p(token t | tokens before t), temperature 1, full vocabulary
    topk_ids: np.ndarray | None = None  # [T, k] int32, likeliest first; top_k and top_k_renorm
    topk_logprobs: np.ndarray | None = None  # [T, k] float32, of the same softmax as ``logprobs``
    hidden: np.ndarray | None = None  # [T, H], in the teacher's type; full


class Backend(Protocol):
    """A frozen model that scores. ``path`` is its checkpoint, ``vocab_size`` the number of rows of its LM head."""

    path: str
    vocab_size: int

    def score(
        self,
        token_ids: list[np.ndarray],
        max_tokens_per_batch: int,
        names: list[str] | None = None,
        signal: str = "sampled",
        top_k: int = 64,
        masks: list[np.ndarray] | None = None,
    ) -> list[TokenScores]:
        """Scores of every sequence, in order.

        ``token_ids`` are [T] each. ``names`` say in errors which sequence it was. ``signal`` decides what is filled
        beside ``logprobs``, with ``top_k`` columns. ``masks`` [T] bool name the tokens whose rows are wanted (all
        when None); ``logprobs`` are always whole. Raises `teachers.scorer.TeacherScoreError` for a score that is not
        finite, `UserError` for a signal that this back end cannot give.
        """
        ...

    def head(self) -> torch.Tensor | None:
        """The LM head [V, H] that turns ``hidden`` into logits; None where the back end has none to give, and with it
        no ``full`` signal."""
        ...


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own bytes on the CPU. numpy has no bfloat16: its bits travel as uint16 (see `posttrain.records`)."""
    import torch

    tensor = tensor.detach().cpu()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
