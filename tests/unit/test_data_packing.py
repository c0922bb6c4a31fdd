"""Packing: nothing lost, nothing too long, and close to full."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.packing import pack


def test_first_fit_decreasing():
    assert pack([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_document_once_and_no_row_too_long(lengths, row_tokens):
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= row_tokens for row in rows)
    # first fit: no two rows could have been one
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > row_tokens


@pytest.mark.parametrize("length", [0, 11])
def test_impossible_document(length):
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens"):
        pack([4, length], 10)
