"""Micro-batches of ``trl-sorted``, a side of `sft_throughput`. Standard library alone, because TRL's environment imports it."""

from __future__ import annotations

import itertools


def sorted_micro_batches(
    steps: list[list[dict[str, list[int]]]], micro_batches: int
) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
    """The documents of all steps, shortest first within a step, and the numbers of those of every micro-batch: each step
    is cut into ``micro_batches`` runs of as equal a number of documents as can be."""
    documents: list[dict[str, list[int]]] = []
    numbers: list[list[int]] = []
    for step in steps:
        edges = [len(documents) + len(step) * i // micro_batches for i in range(micro_batches + 1)]
        numbers += [list(range(first, end)) for first, end in itertools.pairwise(edges)]
        documents += sorted(step, key=lambda document: len(document["input_ids"]))
    return documents, numbers
