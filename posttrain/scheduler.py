"""Which prompt (or, in SFT, which conversation) comes next.

Owns the data cursor: every source is walked in its own seeded order, epoch after epoch, and the sources take turns
by their mixture weights. The state that goes into a checkpoint is small: one (epoch, position) per source, the
turn-taking credit, and the prompts that were drawn but not trained on yet, so that a resumed run loses none and
repeats none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from posttrain.config import UserError

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class Drawn(Generic[T]):
    """An item that was handed out, under the group id that its rollouts carry."""

    group_id: str
    item: T


class Scheduler(Generic[T]):
    """Draws items from weighted sources, deterministically for a seed.

    Args:
        by_source: the items of each source.
        weights: mixture weight of each source; a source that is not named has weight 1.
        seed: fixes the order within each source.
        identify: bytes that tell one item from another, so that a resumed run notices rows that were edited or moved.

    Raises:
        UserError: no items, or no source with a positive weight.
    """

    def __init__(
        self,
        by_source: Mapping[str, Sequence[T]],
        weights: dict[str, float] | None = None,
        seed: int = 0,
        identify: Callable[[T], bytes] = lambda item: repr(item).encode(),
    ) -> None:
        self._by_source = {source: items for source, items in by_source.items() if len(items)}
        weights = weights or {}
        self._weights = {s: weights.get(s, 1.0) for s in sorted(self._by_source) if weights.get(s, 1.0) > 0}
        if not self._weights:
            raise UserError(
                "data.sources: nothing to draw from; give a source with rows and a weight above 0"
            )
        self._seed = seed
        self._digests = {s: _digest(self._by_source[s], identify) for s in self._weights}
        self._position = dict.fromkeys(self._weights, 0)
        self._credit = dict.fromkeys(self._weights, 0.0)
        self._num_drawn = 0
        self._outstanding: dict[str, tuple[str, int]] = {}  # group_id -> (source, absolute position)
        self._replay: list[tuple[str, tuple[str, int]]] = []
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    @property
    def epoch(self) -> dict[str, int]:
        """Completed passes over each source."""
        return {s: self._position[s] // len(self._by_source[s]) for s in self._weights}

    def draw(self, num_prompts: int) -> list[Drawn[T]]:
        """Next ``num_prompts`` prompts: first those that a crash left unfinished, then new ones."""
        return [self._draw_one() for _ in range(num_prompts)]

    def trained(self, group_ids: Iterable[str]) -> None:
        """These groups reached the learner (or were given up by name): they need no repeat after a crash."""
        for group_id in group_ids:
            self._outstanding.pop(group_id, None)

    def state(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint."""
        return {
            "seed": self._seed,
            "sizes": {s: len(self._by_source[s]) for s in self._weights},
            "digests": self._digests,
            "position": dict(self._position),
            "credit": dict(self._credit),
            "num_drawn": self._num_drawn,
            "outstanding": [[g, list(where)] for g, where in self._outstanding.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises `UserError` when the data or the seed are not those of the checkpoint."""
        sizes = {s: len(self._by_source[s]) for s in self._weights}
        if state["sizes"] != sizes or state["seed"] != self._seed:
            raise UserError(
                f"data.sources={sizes}: the checkpoint was made with {state['sizes']} and seed {state['seed']}; "
                "resume with the same data and seed, or start over with fresh=true"
            )
        for source, digest in self._digests.items():
            if state.get("digests", self._digests)[source] != digest:
                raise UserError(
                    f"data.sources.{source}: its rows, their order or the chat template changed since the checkpoint; "
                    "resume with the same data, or start over with fresh=true"
                )
        self._position = dict(state["position"])
        self._credit = dict(state["credit"])
        self._num_drawn = state["num_drawn"]
        self._replay = [(g, (w[0], w[1])) for g, w in state["outstanding"]]
        self._outstanding = dict(self._replay)

    def _draw_one(self) -> Drawn[T]:
        if self._replay:
            group_id, where = self._replay.pop(0)
            return Drawn(group_id=group_id, item=self._at(*where))
        source = self._next_source()
        where = (source, self._position[source])
        self._position[source] += 1
        group_id = f"g{self._num_drawn:08d}"
        self._num_drawn += 1
        self._outstanding[group_id] = where
        return Drawn(group_id=group_id, item=self._at(*where))

    def _next_source(self) -> str:
        """Smooth weighted round robin: in any window the shares follow the weights to within one prompt."""
        total = sum(self._weights.values())
        for source, weight in self._weights.items():
            self._credit[source] += weight / total
        best = max(self._credit, key=lambda s: self._credit[s])
        self._credit[best] -= 1.0
        return best

    def _at(self, source: str, position: int) -> T:
        items = self._by_source[source]
        epoch, offset = divmod(position, len(items))
        key = (source, epoch)
        if key not in self._orders:
            name = int.from_bytes(source.encode()[:8].ljust(8, b"\0"), "little")
            rng = np.random.default_rng([self._seed, epoch, name])
            self._orders[key] = rng.permutation(len(items))
        return items[int(self._orders[key][offset])]


def _digest(items: Sequence[T], identify: Callable[[T], bytes]) -> str:
    total = hashlib.sha256()
    for item in items:
        total.update(hashlib.sha256(identify(item)).digest())
    return total.hexdigest()
