"""Signs that a training run goes wrong, against a band that the run learns from its own first steps.

Pure: metrics of a step in, troubles out. A number's band is the median of its first `WARM_UP` steps, wider by `SIGMAS`
robust standard deviations (1.4826 * MAD, which one odd step does not move) or by a fixed margin, whichever is more. It
has left the band when its last `RECENT` steps all have, so that neither one odd batch nor noise sounds. The loss has a
band that moves with it, because it falls by itself. None of the constants is from a source.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

WARM_UP = 20  # steps that make a band: beyond the usual 10 of learning-rate warm-up, few enough to be early
RECENT = 5  # steps in a row outside: an expert that misses three batches is not dead
SIGMAS = 6.0  # five steps in a row never scatter so far, so most of this is left for slow drift
MAD_TO_SIGMA = 1.4826  # for normal noise
SPIKE_SIGMAS = 8.0  # one step alone is compared, and mixed batches have heavy tails
SPIKE_MARGIN = 0.5  # of |median|: a batch of a harder domain is no spike
SPIKE_REACH = (
    1.5  # times the way from the median to the second highest: domains that come in bursts make two levels
)
VALIDATIONS = 5  # fewer say nothing about their own noise
VALIDATION_WINDOW = 12  # the last ones, whose noise counts
VALIDATION_SIGMAS = 4.0
VALIDATION_MARGIN = 0.02  # of the loss: what validation rises, and training falls, at least
DOMAIN_SIGMAS = 6.0  # a domain's loss wanders while others are learned, and several are watched
DOMAIN_MARGIN = 0.1
LAYER = re.compile(r"(.+)/layer_(\d+)")
ZERO_CLASSES = "attention|norm|router|head|shared_expert|other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Metrics whose whole name matches ``pattern`` should not leave their learned band on ``side``, which is wider than
    their median by ``sigmas``, by ``relative`` times the median, by ``roots`` times its square root (the noise of a count), or
    by ``absolute``, whichever is most. ``<where>/layer_<n>`` are metrics that show in which layer."""

    name: str
    pattern: str
    side: str  # "above" | "below"
    relative: float = 0.0
    absolute: float = 0.0
    sigmas: float = SIGMAS
    roots: float = 0.0
    where: str = ""
    hint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """A number outside of its band [low, high]. ``layer`` is the one that has moved most, None where nothing tells."""

    name: str
    metric: str
    value: float
    low: float = float("-inf")
    high: float = float("inf")
    hint: str
    layer: int | None = None

    @property
    def message(self) -> str:
        is_told = self.layer is None or LAYER.fullmatch(self.metric)
        metric = self.metric if is_told else f"{self.metric} (most in layer {self.layer})"
        if not math.isfinite(self.value):
            return f"{metric} is {self.value}: {self.hint}"
        side, limit = ("below", self.low) if self.value < self.low else ("above", self.high)
        return f"{metric} is {self.value:.3g}, {side} {limit:.3g}: {self.hint}"


BALANCE = "in SFT raise learner.aux_loss_coef or learner.expert_bias_rate, in RL and MOPD learner.freeze_router=true keeps"
WATCHES = (
    Watch(
        name="imbalance",
        pattern=r"balance/max_vio(/.*)?",
        side="above",
        relative=0.5,
        absolute=0.5,  # half a mean load more on the fullest expert
        where="balance/max_vio",
        hint=f"the load of the experts gets less even; {BALANCE} the routing, or lower learner.lr",
    ),
    Watch(
        name="imbalance",
        pattern="num_zeros/routed_expert",
        side="above",
        relative=0.5,
        absolute=0.05,  # of all elements
        where="num_zeros/dead_experts",
        hint=f"(share of all elements) experts lose their gradient; {BALANCE} the routing, or lower learner.lr",
    ),
    Watch(
        name="dead_experts",
        pattern=r"experts/silent/layer_\d+",  # their sum would say the same once more
        side="above",
        relative=0.5,
        absolute=0.5,  # one expert more
        hint=f"experts get (nearly) no tokens any more; {BALANCE} the routing",
    ),
    Watch(
        name="dead_experts",
        # Over all layers: with a hundred experts in each, some layer always has a few more than before.
        pattern=r"experts/starving(/replayed)?",
        side="above",
        relative=0.5,
        absolute=4.5,  # five more: single ones come and go at the limit of what counts as starving
        roots=3.0,
        where="experts/starving",
        hint=f"experts get hardly any tokens; {BALANCE} the routing; a small batch looks the same",
    ),
    Watch(
        name="overfitting",
        # Without the experts: balance that improves lowers their zeros as well.
        pattern=f"num_zeros/(embedding|{ZERO_CLASSES})",
        side="below",
        relative=0.25,
        absolute=0.02,  # of all elements
        hint="(share of all elements; MiMo: overfitting) stop at an earlier checkpoint, lower learner.lr, or bring more data",
    ),
    Watch(
        name="gradient_underflow",
        pattern=f"num_zeros/({ZERO_CLASSES})",
        side="above",
        relative=0.5,
        absolute=0.01,  # of all elements
        where="num_zeros/not_experts",
        hint="(share of all elements) gradients outside of the experts vanish; try learner.dtype=float32, and see whether"
        " rewards or teacher gaps are all equal",
    ),
    Watch(
        name="gradient_underflow",
        pattern="num_zeros/share",
        side="above",
        absolute=0.5,
        where="num_zeros",
        hint="most gradients are exactly 0; try learner.dtype=float32, and see whether rewards or teacher gaps are all equal",
    ),
    Watch(
        name="gradient_underflow",
        pattern="grad_norm",
        side="below",
        relative=0.999,
        sigmas=0.0,
        hint="a thousandth of what it was: nothing is learned; try learner.dtype=float32, and see whether rewards or teacher"
        " gaps are all equal",
    ),
)
SPIKE_HINT = "look at this batch's rows, lower learner.lr or learner.grad_clip; tracking.alarms.loss_spike=skip leaves it out"
VALIDATION_HINT = (
    "the loss on held-out rows rises while that of training falls: go back to the checkpoint before, lower learner.lr or"
    " algorithm.steps, or bring more data"
)
NAN_HINT = "no optimizer step was made, weights are as before; lower learner.lr, look for bad records, try learner.dtype=float32"


@dataclass(kw_only=True, slots=True)
class _Series:
    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


class EarlyWarning:
    """Remembers what the first steps, the last losses and the validations of a run were."""

    def __init__(self, watches: Sequence[Watch] = WATCHES) -> None:
        self._watches = watches
        self._places = {watch.where for watch in watches if watch.where}
        self._watched: dict[str, list[Watch]] = {}  # metric -> its watches
        self._series: dict[str, _Series] = {}
        self._losses: deque[float] = deque(maxlen=WARM_UP)
        self._validations: dict[str, list[tuple[float, float]]] = {}  # name -> (its loss, training loss then)

    @property
    def max_loss(self) -> float:
        """Upper end of the band of the next step's loss; infinity while there is none."""
        if len(self._losses) < WARM_UP:
            return math.inf
        middle = median(self._losses)
        reach = SPIKE_REACH * (sorted(self._losses)[-2] - middle)  # the highest may be a spike itself
        return middle + max(SPIKE_SIGMAS * _sigma(self._losses), SPIKE_MARGIN * abs(middle), reach)

    def check(self, metrics: Mapping[str, float | None]) -> Iterator[tuple[str, Trouble | None]]:
        """(key of the band, what is wrong or None) of every band that the ``metrics`` of a step can be compared with.
        None stands for NaN or infinity, as on disk."""
        bad = [name for name in ("loss", "grad_norm") if name in metrics and not _is_finite(metrics[name])]
        yield "nan", Trouble(name="nan", metric=bad[0], value=math.nan, hint=NAN_HINT) if bad else None
        known = {name: value for name, value in metrics.items() if value is not None and _is_finite(value)}
        if "loss" in known:
            yield from self._spike(known["loss"])
        if known.get("skipped"):
            return  # the gradient of a batch that was left out says nothing
        yield from self._learned(_shares(known))
        yield from self._overfitting(known)

    def _spike(self, loss: float) -> Iterator[tuple[str, Trouble | None]]:
        limit = self.max_loss
        trouble = Trouble(name="loss_spike", metric="loss", value=loss, high=limit, hint=SPIKE_HINT)
        yield "loss_spike", trouble if loss > limit else None
        self._losses.append(loss)

    def _learned(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, Trouble | None]]:
        for metric, value in metrics.items():
            if self._watches_of(metric) or self._is_place(metric):
                series = self._series.setdefault(metric, _Series())
                (series.first if len(series.first) < WARM_UP else series.recent).append(value)
        for metric in metrics:
            for watch in self._watches_of(metric):
                series = self._series[metric]
                if len(series.recent) < RECENT:
                    continue
                trouble = _outside(watch, metric, series)
                if trouble is not None:
                    trouble = replace(trouble, layer=self._layer(watch.where, metric))
                yield f"{watch.name}/{watch.side}/{metric}", trouble

    def _watches_of(self, metric: str) -> list[Watch]:
        if metric not in self._watched:
            self._watched[metric] = [w for w in self._watches if re.fullmatch(w.pattern, metric)]
        return self._watched[metric]

    def _is_place(self, metric: str) -> bool:
        found = LAYER.fullmatch(metric)
        return found is not None and found.group(1) in self._places

    def _layer(self, where: str, metric: str) -> int | None:
        """The layer of ``metric``, or that in which ``where`` is furthest above the noise of its first steps."""
        if own := LAYER.fullmatch(metric):
            return int(own.group(2))
        above = {}
        for name, series in self._series.items():
            found = LAYER.fullmatch(name)
            if found and found.group(1) == where and series.recent:
                limit = median(series.first) + SIGMAS * _sigma(series.first)
                above[int(found.group(2))] = median(series.recent) - limit
        layer = max(above, key=above.__getitem__, default=None)
        return layer if layer is not None and above[layer] > 0 else None

    def _overfitting(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, Trouble | None]]:
        for name in (name for name in metrics if name.startswith("validation/loss/")):
            if len(self._losses) < WARM_UP:
                continue
            history = self._validations.setdefault(name, [])
            history.append((metrics[name], median(self._losses)))
            if len(history) < VALIDATIONS:
                continue
            losses = [loss for loss, _ in history]
            smooth = [median(losses[i - 2 : i + 1]) for i in range(2, len(losses))]
            best = min(range(len(smooth)), key=smooth.__getitem__)
            # Second differences see the noise alone, not the trend; they have six times its variance.
            slopes = [b - a for a, b in pairwise(losses[-VALIDATION_WINDOW:])]
            sigma = _sigma([b - a for a, b in pairwise(slopes)]) / math.sqrt(6)
            sigmas, margin = VALIDATION_SIGMAS, VALIDATION_MARGIN
            if name != "validation/loss/all":
                sigmas, margin = DOMAIN_SIGMAS, DOMAIN_MARGIN
            limit = smooth[best] + sigmas * sigma + margin * abs(smooth[best])
            before = history[best + 2][1]
            falls = history[-1][1] < before - VALIDATION_MARGIN * abs(before)
            trouble = Trouble(
                name="overfitting", metric=name, value=smooth[-1], high=limit, hint=VALIDATION_HINT
            )
            yield name, trouble if smooth[-1] > limit and falls else None


def _outside(watch: Watch, metric: str, series: _Series) -> Trouble | None:
    middle = median(series.first)
    now = max(series.recent) if watch.side == "below" else min(series.recent)
    noise = max(watch.sigmas * _sigma(series.first), watch.roots * math.sqrt(abs(middle)))
    width = max(noise, watch.relative * abs(middle), watch.absolute)
    low = middle - width if watch.side == "below" else -math.inf
    high = middle + width if watch.side == "above" else math.inf
    if low <= now <= high:
        return None
    hint = f"{RECENT} steps in a row; the first {WARM_UP} had {middle:.3g}; {watch.hint}"
    return Trouble(name=watch.name, metric=metric, value=now, low=low, high=high, hint=hint)


def _shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """The zeros of each module class as a share of all elements: a margin needs a scale."""
    total, share = metrics.get("num_zeros/total", 0.0), metrics.get("num_zeros/share", 0.0)
    scale = share / total if total > 0 else 0.0
    classes = rf"num_zeros/(embedding|routed_expert|{ZERO_CLASSES})"
    return {name: v * scale if re.fullmatch(classes, name) else v for name, v in metrics.items()}


def _sigma(values: deque[float] | list[float]) -> float:
    """Robust standard deviation."""
    middle = median(values)
    return MAD_TO_SIGMA * median(abs(value - middle) for value in values)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
