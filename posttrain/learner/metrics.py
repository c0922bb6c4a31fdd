"""Adds metrics up over micro-batches, updates and ranks. Means are kept as (sum, count), so cutting changes nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Totals:
    """Sums, (sum, count) means and maxima by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.means: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}

    def add_sum(self, name: str, value: Tensor | float) -> None:
        """Reported as the sum over everything."""
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def add_mean(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Reported as sum of totals / sum of counts; left out where the count is 0."""
        before = self.means.get(name, (0.0, 0.0))
        self.means[name] = (before[0] + float(total), before[1] + float(count))

    def add_maximum(self, name: str, value: Tensor | float) -> None:
        """Reported as the largest value."""
        self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def merge(self, other: Totals) -> None:
        """Adds another rank's totals."""
        for name, value in other.sums.items():
            self.add_sum(name, value)
        for name, (total, count) in other.means.items():
            self.add_mean(name, total, count)
        for name, value in other.maxima.items():
            self.add_maximum(name, value)

    def reduce(self) -> dict[str, float]:
        """Numbers of the whole batch, the same on every rank. A collective."""
        merged = Totals()
        for other in gather(self):
            merged.merge(other)
        means = {name: total / count for name, (total, count) in merged.means.items() if count > 0}
        return {**merged.sums, **means, **merged.maxima}


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, by rank. A collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(error: Exception | None) -> None:
    """Raises on every rank what the first rank ran into, so that no rank waits for one that gave up. A collective."""
    for raised in gather(error):
        if raised is not None:
            raise raised
