"""Loops at the end of an answer, by token ids alone."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.repetition import MAX_PERIOD, MIN_TOKENS, has_repeated_tail

END = 999


def tail(*token_ids: int) -> bool:
    return has_repeated_tail(np.array([*range(100, 120), *token_ids], np.int32))


@pytest.mark.parametrize("period", [1, 2, 5, 17, MAX_PERIOD])
def test_a_block_that_stands_three_times_at_the_end(period: int) -> None:
    times = max(3, -(-MIN_TOKENS // period))
    block = list(range(period))
    assert tail(*block * times)
    assert tail(*block * times, END), "an end mark after the loop does not hide it"
    assert not tail(*block * times, 50, 51), "two other tokens do"
    assert not tail(*block * 2, *block[:-1], 60)


def test_what_is_no_loop() -> None:
    assert not tail(0, 0, 0, 0), "a few equal digits"
    assert not tail(*[0] * (MIN_TOKENS - 2))
    assert not tail(*range(200, 300))
    rng = np.random.default_rng(0)
    assert sum(has_repeated_tail(rng.integers(0, 10, 200)) for _ in range(300)) == 0


def test_short_and_empty_answers() -> None:
    for length in range(MIN_TOKENS):
        assert not has_repeated_tail(np.zeros(length, np.int32))
    assert has_repeated_tail(np.zeros(MIN_TOKENS, np.int32))
