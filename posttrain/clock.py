"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall seconds per part of a step; an inner part is taken out of the outer one."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._spent: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        self._stack.append(part)
        try:
            yield
        finally:
            self._stack.pop()
            spent = time.perf_counter() - begin
            self._spent[part] += spent
            if self._stack:
                self._spent[self._stack[-1]] -= spent

    def metrics(self, num_tokens: float) -> dict[str, float]:
        """time_s/<part>, the rest, the whole step, and sampled tokens per second of the whole step."""
        total = time.perf_counter() - self._start
        parts = {f"time_s/{k}": v for k, v in self._spent.items()}
        rest = {"time_s/rest": total - sum(self._spent.values()), "time_s/step": total}
        return parts | rest | {"tokens_per_s": num_tokens / total}
