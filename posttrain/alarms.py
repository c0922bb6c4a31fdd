"""Numbers that have left their band, in words with a way out. Pure: metrics of a step in, alarms out.

A `Band` is fixed. A `Drift` is a band that a run makes for itself from its first steps, for numbers whose healthy value
nobody knows beforehand. Every domain's share of the gradient is watched as well. Each alarm sounds once when its number
leaves the band, and again only after it has been back inside. After a restart the steps on disk are shown to
`Alarms.check` again, so that bands and silences are those of one run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

FIRST_STEPS = 10  # that make a Drift's own band
RECENT_STEPS = 3  # whose mean is compared with it: one odd batch is no drift
STARVING_SHARE = 0.25  # of what a domain should have
STARVING_STEPS = 5  # in a row


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """``metric`` should stay between ``low`` and ``high``, both ends included. ``hint`` says what to look at."""

    name: str
    metric: str
    hint: str
    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """``<before><domain><after>`` should stay where its first steps were: between their smallest value times
    ``low_factor`` and their largest times ``high_factor`` plus ``margin``. None: that side is open."""

    name: str
    before: str = ""
    after: str = ""
    hint: str
    low_factor: float | None = None
    high_factor: float | None = None
    margin: float = 0.0


REPLAY_BANDS = (
    Band(
        name="route_mismatch",
        metric="replay/route_mismatch",
        high=0.2,
        hint="engine and learner see different inputs to their routers; run `posttrain doctor replay` on this model",
    ),
    Band(
        name="mismatch_k3",
        metric="mismatch/k3",
        high=0.02,
        hint="learner and engine disagree on sampled tokens; compare dtypes, and run `posttrain doctor replay`",
    ),
    Band(
        name="mismatch_f2",
        metric="mismatch/f2",
        high=0.005,
        hint="ratios beyond 2 are no rounding; look at probe/max_abs and replay/route_mismatch",
    ),
    Band(
        name="routes_rejected",
        metric="replay/rejected",
        high=0,
        hint="rollouts with routes of other weights or layers stayed out of the loss; events.jsonl names them",
    ),
)

HEALTH_DRIFTS = (
    Drift(
        name="truncation",
        before="truncated/",
        high_factor=1.0,
        margin=0.1,
        hint="answers no longer end; lower learner.lr, cap the length, or try algorithm.overlong=shape",
    ),
    Drift(
        name="repetition",
        before="repeated/",
        high_factor=1.0,
        margin=0.05,
        hint="answers end in loops; read rollouts/, lower learner.lr, and look at what teacher or reward say of them",
    ),
    Drift(
        name="entropy",
        after="/entropy",
        low_factor=0.25,
        hint="the policy no longer tries anything else; raise algorithm.clip_high, or lower learner.lr",
    ),
    Drift(
        name="length",
        before="length/",
        low_factor=0.5,
        high_factor=2.0,
        hint="answers have another length than at the start; see which lengths reward or teacher favour in rollouts/",
    ),
)


@dataclass(kw_only=True, slots=True)
class _Own:
    """A Drift's band of one domain: the values that make it, and those that are compared with it."""

    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))


ROLLOUT_BANDS = (
    Band(
        name="rollouts_fail",
        metric="failed/all",
        high=0.05,
        hint="what fails is left out, and is seldom a fair sample; events.jsonl names the reasons",
    ),
)


class Alarms:
    """Remembers which bands are left, and what the first steps were like."""

    def __init__(
        self,
        bands: tuple[Band, ...] = REPLAY_BANDS + ROLLOUT_BANDS,
        drifts: tuple[Drift, ...] = HEALTH_DRIFTS,
    ) -> None:
        self._bands = bands
        self._drifts = drifts
        self._own: dict[str, _Own] = {}
        self._hungry: dict[str, int] = {}  # domain -> steps in a row below its share
        self._sounding: set[str] = set()

    def check(self, metrics: Mapping[str, float | None]) -> list[tuple[str, str]]:
        """(name, message) of the bands that the ``metrics`` of a step have left since the last call. A metric that is
        None, as a NaN is on disk, counts as absent."""
        known = {name: value for name, value in metrics.items() if value is not None}
        new = []
        for key, name, problem in [*self._fixed(known), *self._drifting(known), *self._starving(known)]:
            if problem is None:
                self._sounding.discard(key)
            elif key not in self._sounding:
                self._sounding.add(key)
                new.append((name, problem))
        return new

    def _fixed(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str | None]]:
        for band in self._bands:
            value = metrics.get(band.metric)
            problem = None if value is None else _outside(band.metric, value, band.low, band.high, band.hint)
            yield band.name, band.name, problem

    def _drifting(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str | None]]:
        for drift in self._drifts:
            for metric, value in metrics.items():
                domain = metric.removeprefix(drift.before).removesuffix(drift.after)
                if metric != f"{drift.before}{domain}{drift.after}" or domain in ("", "all"):
                    continue
                if math.isnan(value):  # the tracker names it
                    continue
                own = self._own.setdefault(metric, _Own())
                if len(own.first) < FIRST_STEPS:
                    own.first.append(value)
                    continue
                own.recent.append(value)
                if len(own.recent) < RECENT_STEPS:
                    continue
                low, high = _limits(drift, own.first)
                hint = f"the first {FIRST_STEPS} steps had {min(own.first):.3g} to {max(own.first):.3g}; {drift.hint}"
                yield metric, drift.name, _outside(metric, sum(own.recent) / RECENT_STEPS, low, high, hint)

    def _starving(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str | None]]:
        if not any(name.startswith("share/gradient/") for name in metrics):
            return  # no domain got any: that is another trouble
        for name, share in metrics.items():
            domain = name.removeprefix("share/prompts/")
            if domain == name:
                continue
            due = metrics.get(f"share/target/{domain}", share)
            got = metrics.get(f"share/gradient/{domain}", 0.0)
            hungry = self._hungry.get(domain, 0) + 1 if got < STARVING_SHARE * due else 0
            self._hungry[domain] = hungry
            problem = (
                f"share/gradient/{domain} is {got:.3g} and should be near {due:.3g}, {hungry} steps in a row: the domain"
                " starves; algorithm.aggregation=token_mean_balanced gives it its share of the tokens, gap_following=true"
                " follows its gap; no harm if it has reached its teacher or solves its prompts"
            )
            yield f"starving/{domain}", "starving_domain", problem if hungry >= STARVING_STEPS else None


def _limits(drift: Drift, first: list[float]) -> tuple[float, float]:
    low = float("-inf") if drift.low_factor is None else min(first) * drift.low_factor - drift.margin
    high = float("inf") if drift.high_factor is None else max(first) * drift.high_factor + drift.margin
    return low, high


def _outside(metric: str, value: float, low: float, high: float, hint: str) -> str | None:
    """What is wrong, None if nothing. NaN is above every band."""
    if low <= value <= high:
        return None
    side, limit = ("below", low) if value < low else ("above", high)
    return f"{metric} is {value:.3g}, {side} {limit:g}: {hint}"
