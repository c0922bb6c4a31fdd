"""Numbers that have left their band, in words with a way out. Pure: metrics of a step in, alarms out.

A `Band` is fixed. A `Drift` is a band that a run makes for itself from its first steps, for numbers whose healthy value
nobody knows beforehand. Every domain's share of the gradient is watched as well. Each alarm sounds once when its number
leaves the band, and again only after it has been back inside; the signs of `posttrain.early_warning`, which many numbers
can show, at most every `QUIET_STEPS` steps by name. After a restart the steps on disk are shown to `Alarms.check` again,
so that bands and silences are those of one run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from posttrain.early_warning import EarlyWarning, Trouble

FIRST_STEPS = 10  # that make a Drift's own band
RECENT_STEPS = 3  # whose mean is compared with it: one odd batch is no drift
STARVING_SHARE = 0.25  # of what a domain should have
STARVING_STEPS = 5  # in a row
# Mean |A| of a domain with a teacher below which little is left to move, so that it starves of nothing: nat, and as a
# share of its first steps.
TAUGHT_GAP, TAUGHT_SHARE = 0.02, 0.1
QUIET_STEPS = 20  # between two early warnings of one name


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
    Band(
        name="no_mixed_groups",
        metric="reward/mixed_groups",
        low=1e-9,
        hint="every group has equal rewards: nothing is learned; vary the prompts' difficulty or lower learner.lr",
    ),
)


class Alarms:
    """Remembers which bands are left, and what the first steps were like."""

    def __init__(
        self,
        bands: tuple[Band, ...] = REPLAY_BANDS + ROLLOUT_BANDS,
        drifts: tuple[Drift, ...] = HEALTH_DRIFTS,
    ) -> None:
        self.early = EarlyWarning()
        self._bands = bands
        self._drifts = drifts
        self._own: dict[str, _Own] = {}
        self._hungry: dict[str, int] = {}  # domain -> steps in a row below its share
        self._teachers: float | None = None  # their version
        self._first_gaps: dict[str, list[float]] = {}  # domain -> mean |A| of the first steps with them
        self._sounding: set[str] = set()
        self._num_checks = 0
        self._last_warning: dict[str, int] = {}  # name -> check at which it last sounded

    def check(self, metrics: Mapping[str, float | None]) -> list[Trouble]:
        """The bands that the ``metrics`` of a step have left since the last call. A metric that is None, as a NaN is on
        disk, counts as absent, but for loss and gradient norm."""
        self._num_checks += 1
        known = {name: value for name, value in metrics.items() if value is not None}
        new = []
        for key, trouble in [*self._fixed(known), *self._drifting(known), *self._starving(known)]:
            if self._is_new(key, trouble) and trouble is not None:
                new.append(trouble)
        # The layer that is furthest out speaks for a name, before numbers that are over all layers.
        for key, trouble in sorted(self.early.check(metrics), key=lambda pair: _rank(pair[1])):
            last = self._last_warning.get(trouble.name) if trouble is not None else None
            if last is not None and self._num_checks - last < QUIET_STEPS:
                continue
            if self._is_new(f"early/{key}", trouble) and trouble is not None:
                self._last_warning[trouble.name] = self._num_checks
                new.append(trouble)
        return new

    def _is_new(self, key: str, trouble: Trouble | None) -> bool:
        if trouble is None:
            self._sounding.discard(key)
            return False
        if key in self._sounding:
            return False
        self._sounding.add(key)
        return True

    def _fixed(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, Trouble | None]]:
        for band in self._bands:
            value = metrics.get(band.metric)
            if value is None:
                yield band.name, None
                continue
            yield band.name, _outside(band.name, band.metric, value, band.low, band.high, band.hint)

    def _drifting(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, Trouble | None]]:
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
                yield metric, _outside(drift.name, metric, sum(own.recent) / RECENT_STEPS, low, high, hint)

    def _starving(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, Trouble | None]]:
        if not any(name.startswith("share/gradient/") for name in metrics):
            return  # no domain got any: that is another trouble
        if self._teachers != (version := metrics.get("teacher/version", self._teachers)):
            self._teachers, self._first_gaps = version, {}
        for name, share in metrics.items():
            domain = name.removeprefix("share/prompts/")
            if domain == name:
                continue
            due = metrics.get(f"share/target/{domain}", share)
            got = metrics.get(f"share/gradient/{domain}", 0.0)
            is_taught = self._is_taught(domain, metrics)
            is_hungry = got < STARVING_SHARE * due and not is_taught
            hungry = self._hungry.get(domain, 0) + 1 if is_hungry else 0
            self._hungry[domain] = hungry
            starving = Trouble(
                name="starving_domain",
                metric=f"share/gradient/{domain}",
                value=got,
                low=STARVING_SHARE * due,
                hint=f"it should be near {due:.3g}, {hungry} steps in a row: the domain"
                " starves; algorithm.aggregation=token_mean_balanced gives it its share of the tokens, gap_following=true"
                " follows its gap; no harm if it solves its prompts",
            )
            yield f"starving/{domain}", starving if hungry >= STARVING_STEPS else None

    def _is_taught(self, domain: str, metrics: Mapping[str, float]) -> bool:
        """Whether the domain has a teacher and agrees with it. |A| also holds the outcome: what that still moves is not
        at rest."""
        gap = metrics.get(f"{domain}/advantage_abs")
        if gap is None or f"{domain}/teacher_abs" not in metrics:
            return False
        first = self._first_gaps.setdefault(domain, [])
        if len(first) < FIRST_STEPS:
            first.append(gap)
            return gap < TAUGHT_GAP
        return gap < max(TAUGHT_GAP, TAUGHT_SHARE * sum(first) / FIRST_STEPS)


def _rank(trouble: Trouble | None) -> tuple[bool, float]:
    if trouble is None or trouble.layer is None:
        return True, 0.0
    limit = trouble.high if trouble.value > trouble.high else trouble.low
    return False, -abs(trouble.value - limit) / max(abs(limit), 1.0)


def _limits(drift: Drift, first: list[float]) -> tuple[float, float]:
    low = float("-inf") if drift.low_factor is None else min(first) * drift.low_factor - drift.margin
    high = float("inf") if drift.high_factor is None else max(first) * drift.high_factor + drift.margin
    return low, high


def _outside(name: str, metric: str, value: float, low: float, high: float, hint: str) -> Trouble | None:
    """What is wrong, None if nothing. NaN is above every band."""
    if low <= value <= high:
        return None
    return Trouble(name=name, metric=metric, value=value, low=low, high=high, hint=hint)
