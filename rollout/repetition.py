"""Does an answer end in a loop? Pure numpy on token ids; runs in the rollout worker, on every answer."""

from __future__ import annotations

import numpy as np

MAX_PERIOD = 64  # tokens of the block that repeats
NUM_BLOCKS = 3  # times that it must stand at the end
MIN_TOKENS = 16  # that they must fill together: a few equal digits are no loop


def has_repeated_tail(token_ids: np.ndarray) -> bool:
    """Whether ``token_ids`` [T] end in a block of at most MAX_PERIOD tokens NUM_BLOCKS times over, an end mark after it
    or not."""
    return _ends_in_loop(token_ids) or _ends_in_loop(token_ids[:-1])


def _ends_in_loop(token_ids: np.ndarray) -> bool:
    longest = min(MAX_PERIOD, len(token_ids) // NUM_BLOCKS)
    if longest == 0:
        return False
    backwards = token_ids[::-1]
    for period in np.flatnonzero(backwards[1 : longest + 1] == backwards[0]) + 1:  # few are left to look at
        tail = token_ids[-max(NUM_BLOCKS * period, MIN_TOKENS) :]
        if len(tail) >= MIN_TOKENS and np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
