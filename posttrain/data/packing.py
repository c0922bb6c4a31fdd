"""Packing of documents into rows of bounded length. Pure arithmetic; what a row means is the learner's matter."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: indices of the documents in each row, no row longer than ``row_tokens``.

    Every index occurs exactly once; ties keep the given order, so the result is deterministic.

    Raises:
        ValueError: a document longer than a row, or of no tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= row_tokens:
            raise ValueError(f"document {index} has {length} tokens, a row holds 1 to {row_tokens}")
        for row, left in enumerate(room):
            if length <= left:
                rows[row].append(index)
                room[row] -= length
                break
        else:
            rows.append([index])
            room.append(row_tokens - length)
    return rows
