"""What every back end owes to its scores: shape, rows that are wanted, and the refusal of scores that are not numbers,
of token ids that the teacher does not have, and of signals that its engine cannot give."""

from __future__ import annotations

import numpy as np

from posttrain.config import UserError
from teachers.backend import TokenScores


class TeacherScoreError(RuntimeError):
    """A teacher's score is not a number; the run stops."""


def empty_scores(num_tokens: int, k: int) -> TokenScores:
    """Rows of zeros: what a text of one token has."""
    return TokenScores(
        logprobs=np.zeros(num_tokens, np.float32),
        topk_ids=np.zeros((num_tokens, k), np.int32) if k else None,
        topk_logprobs=np.zeros((num_tokens, k), np.float32) if k else None,
    )


def keep_rows(scores: TokenScores, mask: np.ndarray) -> None:
    """Zero the top-k rows outside ``mask`` [T]."""
    if scores.topk_ids is not None and scores.topk_logprobs is not None:
        scores.topk_ids[~mask] = 0
        scores.topk_logprobs[~mask] = 0


def check_finite(logprobs: np.ndarray, teacher: str, sequence: str) -> None:
    """Raise `TeacherScoreError` for the first entry of ``logprobs`` [T] that is not finite."""
    if np.isfinite(logprobs).all():
        return
    position = int(np.flatnonzero(~np.isfinite(logprobs))[0])
    raise TeacherScoreError(
        f"teacher {teacher!r} gave {logprobs[position]} for token {position} of {sequence} ({len(logprobs)} tokens):"
        " its weights or its type are broken; the run stops"
    )


def check_ids(token_ids: np.ndarray, teacher: str, vocab_size: int) -> None:
    """Raise `TeacherScoreError` for an id outside the teacher's vocabulary."""
    if len(token_ids) and int(token_ids.max()) >= vocab_size:
        raise TeacherScoreError(
            f"teacher {teacher!r} knows {vocab_size} token ids and was asked for {int(token_ids.max())}"
        )


def check_signal(key: str, backend: str, signal: str, supported: tuple[str, ...]) -> None:
    """Raise `UserError` for a signal that the back end of the teacher ``key`` does not give."""
    if signal not in supported:
        raise UserError(
            f"algorithm.signal={signal!r}: {key}.backend={backend} gives {', '.join(supported)}; choose one of them, or"
            f" another {key}.backend"
        )
