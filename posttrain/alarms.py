"""Numbers that have left their band, in words with a way out. Pure: metrics of a step in, alarms out.

Each alarm sounds once when its number leaves the band, and again only after it has been back inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """``metric`` should stay at or below ``limit``. ``hint`` says what to look at."""

    name: str
    metric: str
    limit: float
    hint: str


REPLAY_BANDS = (
    Band(
        name="route_mismatch",
        metric="replay/route_mismatch",
        limit=0.2,
        hint="engine and learner see different inputs to their routers; run `posttrain doctor replay` on this model",
    ),
    Band(
        name="mismatch_k3",
        metric="mismatch/k3",
        limit=0.02,
        hint="learner and engine disagree on sampled tokens; compare dtypes, and run `posttrain doctor replay`",
    ),
    Band(
        name="mismatch_f2",
        metric="mismatch/f2",
        limit=0.005,
        hint="ratios beyond 2 are no rounding; look at probe/max_abs and replay/route_mismatch",
    ),
    Band(
        name="routes_rejected",
        metric="replay/rejected",
        limit=0,
        hint="rollouts with routes of other weights or layers stayed out of the loss; events.jsonl names them",
    ),
)


ROLLOUT_BANDS = (
    Band(
        name="rollouts_fail",
        metric="failed/all",
        limit=0.05,
        hint="what fails is left out, and is seldom a fair sample; events.jsonl names the reasons",
    ),
)


class Alarms:
    """Remembers which bands are left, so that an alarm does not repeat itself every step."""

    def __init__(self, bands: tuple[Band, ...] = REPLAY_BANDS + ROLLOUT_BANDS) -> None:
        self._bands = bands
        self._sounding: set[str] = set()

    def check(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        """(name, message) of the bands that ``metrics`` have left since the last call."""
        new = []
        for band in self._bands:
            value = metrics.get(band.metric)
            if value is None or value <= band.limit:  # false for NaN, which sounds
                self._sounding.discard(band.name)
            elif band.name not in self._sounding:
                self._sounding.add(band.name)
                new.append((band.name, f"{band.metric} is {value:.3g}, above {band.limit:g}: {band.hint}"))
        return new
