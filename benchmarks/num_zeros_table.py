"""Tables and pictures of `benchmarks/num_zeros.py`, from the lines of the results alone.

A signal warns where its last five steps have all left the band that it learned from its first twenty: the bands of
`posttrain.early_warning`, six robust sigmas wide, here on both sides and without the fixed margins of the alarms. It
is compared with two events of the same run after its data change (or after the steps that make the bands, where they do
not): the step of the lowest validation loss, where the loss rises by 2 % or more afterwards; and the step from which most
batches leave some expert without tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from posttrain.early_warning import RECENT, VALIDATION_MARGIN, WARM_UP, EarlyWarning, Watch
from posttrain.tracking.jsonl import read_jsonl

SERIES = (
    "loss",
    "num_zeros/total",
    "num_zeros/share",
    "num_zeros/routed_expert",
    "num_zeros/embedding",
    "num_zeros/dead_experts",
    "num_empty_experts",
    "balance/max_vio",
)
GAP = "validation gap"
SIGNALS = {  # shown as -> metric
    "num-zeros": "num_zeros/share",
    "of experts": "num_zeros/routed_expert",
    "of the rest": "rest",
    "MaxVio": "balance/max_vio",
    "empty experts": "num_empty_experts",
    GAP: "gap",
}
WATCHES = tuple(
    Watch(name=signal, pattern=metric, side=side, hint="")
    for signal, metric in SIGNALS.items()
    for side in ("above", "below")
)
EVENTS = {
    "validation": "the lowest validation loss",
    "empty": f"an expert without tokens in most of {RECENT} steps",
}
PANELS = {
    "num-zeros, share": "num_zeros/share",
    "MaxVio": "balance/max_vio",
    "empty experts": "num_empty_experts",
}

Line = dict[str, Any]
Warned = tuple[int, str]  # step, side of the band

# One line -------------------------------------------------------------------------------------------------------


def steps_of(line: Line) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of a run. ``rest`` are zeros outside of experts and embedding; ``gap`` is the last validation
    loss minus the training loss."""
    series, at = line["series"], dict(zip(line["validated"], line["validation"]["all"], strict=True))
    held_out = None
    for index in range(len(series["loss"])):
        metrics = {name: values[index] for name, values in series.items()}
        parts = metrics["num_zeros/routed_expert"] + metrics["num_zeros/embedding"]
        # Five digits of each are kept, so a rest below that is rounding.
        rest = metrics["num_zeros/total"] - parts
        metrics["rest"] = rest if rest > 2e-4 * metrics["num_zeros/total"] else 0.0
        held_out = at.get(index + 1, held_out)
        if held_out is not None:
            metrics["gap"] = held_out - metrics["loss"]
        yield index + 1, metrics


def first_warnings(line: Line) -> dict[str, Warned | None]:
    """The first step at which each signal has left its band, and the side."""
    warning = EarlyWarning(WATCHES)
    found: dict[str, Warned | None] = dict.fromkeys(SIGNALS)
    for step, metrics in steps_of(line):
        for _, trouble in warning.check(metrics):
            if trouble is not None and trouble.name in found and found[trouble.name] is None:
                found[trouble.name] = (step, "above" if trouble.value > trouble.high else "below")
    return found


def events(line: Line) -> dict[str, int | None]:
    """The steps that signals are compared with, None for what does not happen."""
    begin = line["shift"] or WARM_UP
    empty = line["series"]["num_empty_experts"]
    lost = [
        step for step in range(begin + RECENT, len(empty) + 1) if median(empty[step - RECENT : step]) >= 1
    ]
    held_out = zip(line["validated"], line["validation"]["all"], strict=True)
    steps, losses = zip(*[(step, loss) for step, loss in held_out if step >= begin], strict=True)
    return {"validation": rise(list(steps), list(losses)), "empty": lost[0] if lost else None}


def rise(steps: list[int], losses: list[float]) -> int | None:
    """The step of the lowest loss (medians of three) where the last one is 2 % higher, None where it is not."""
    smooth = [median(losses[i - 1 : i + 2]) for i in range(1, len(losses) - 1)]
    best = int(np.argmin(smooth))
    return steps[best + 1] if smooth[-1] > smooth[best] * (1 + VALIDATION_MARGIN) else None


def correlation(line: Line, first: str, second: str) -> float | None:
    """Rank correlation of two metrics over the steps; None where one does not move."""
    rows = [metrics for _, metrics in steps_of(line) if first in metrics and second in metrics]
    ranks = [_ranks(np.array([row[name] for row in rows])) for name in (first, second)]
    if min(r.std() for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


# Arms over seeds ------------------------------------------------------------------------------------------------


def by_arm(lines: list[Line]) -> dict[str, list[Line]]:
    """Lines of every arm in the order of their first ones; of a cell that is there twice the later one counts."""
    cells = {(line["arm"], line["seed"]): line for line in lines if "arm" in line}
    arms: dict[str, list[Line]] = {}
    for (arm, _), line in cells.items():
        arms.setdefault(arm, []).append(line)
    return arms


def leads(lines: list[Line], signal: str, event: str) -> list[int]:
    """Steps from a signal's warning to the event, of the seeds that have both; negative: the signal comes after it."""
    found = []
    for line in lines:
        warned, happened = first_warnings(line)[signal], events(line)[event]
        if warned is not None and happened is not None:
            found.append(happened - warned[0])
    return found


def summary(lines: list[Line]) -> dict[str, Any]:
    """What an arm's runs show: levels at both ends, correlations, warnings, events, leads."""
    ends = {}
    for name in ("num_zeros/share", "balance/max_vio", "num_empty_experts"):
        values = [line["series"][name] for line in lines]
        ends[name] = (
            [float(np.mean(v[:WARM_UP])) for v in values],
            [float(np.mean(v[-WARM_UP:])) for v in values],
        )
    return {
        "num_seeds": len(lines),
        "ends": ends,
        "correlation": {
            other: [c for line in lines if (c := correlation(line, "num_zeros/share", metric)) is not None]
            for other, metric in (("MaxVio", "balance/max_vio"), (GAP, "gap"))
        },
        "warnings": {s: [w for line in lines if (w := first_warnings(line)[s]) is not None] for s in SIGNALS},
        "events": {e: [at for line in lines if (at := events(line)[e]) is not None] for e in EVENTS},
        "leads": {(s, e): leads(lines, s, e) for s in SIGNALS for e in EVENTS},
    }


def _mean(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _warned(found: list[Warned], num_seeds: int) -> str:
    """`above 44 (5/5)`: side, median step, seeds that warn; both sides where seeds disagree."""
    if not found:
        return "-"
    sides = "/".join(sorted({side for _, side in found}))
    return f"{sides} {median(step for step, _ in found):g} ({len(found)}/{num_seeds})"


def _lead(found: list[int], num_seeds: int) -> str:
    if not found:
        return "-"
    return f"{median(found):+g} [{min(found)}, {max(found)}] ({len(found)}/{num_seeds})"


def _print(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_tables(arms: dict[str, list[Line]]) -> None:
    found = {name: summary(lines) for name, lines in arms.items()}
    _print(
        f"First and last {WARM_UP} steps, mean +- standard deviation over seeds; rank correlation with num-zeros over steps",
        ["arm", "seeds", "num-zeros, share", "MaxVio", "empty experts", "with MaxVio", f"with {GAP}"],
        [
            [name, str(s["num_seeds"])]
            + [" -> ".join(_mean(side) for side in s["ends"][metric]) for metric in s["ends"]]
            + [_mean(s["correlation"][other], 2) for other in ("MaxVio", GAP)]
            for name, s in found.items()
        ],
    )
    _print(
        "First step at which a signal has left its band: side, median step, seeds that warn",
        ["arm", "data change after", *SIGNALS],
        [
            [name, str(arms[name][0]["shift"] or "-")]
            + [_warned(s["warnings"][signal], s["num_seeds"]) for signal in SIGNALS]
            for name, s in found.items()
        ],
    )
    for event, what in EVENTS.items():
        _print(
            f"Steps by which a signal warns before {what}: median [least, most], seeds that have both; negative: after it",
            ["arm", "event at step", *SIGNALS],
            [
                [name, _at(s["events"][event], s["num_seeds"])]
                + [_lead(s["leads"][signal, event], s["num_seeds"]) for signal in SIGNALS]
                for name, s in found.items()
            ],
        )
    _print(
        "First alarm of a run with its own margins (posttrain.early_warning): median step, seeds",
        ["arm", "alarms"],
        [[name, _alarms(lines)] for name, lines in arms.items()],
    )


def _at(found: list[int], num_seeds: int) -> str:
    return f"{median(found):g} ({len(found)}/{num_seeds})" if found else "-"


def _alarms(lines: list[Line]) -> str:
    keys = sorted({key for line in lines for key in line["alarms"]})
    each = {key: [line["alarms"][key] for line in lines if key in line["alarms"]] for key in keys}
    return ", ".join(f"{key} {_at(steps, len(lines))}" for key, steps in each.items()) or "-"


def draw(path: Path, arms: dict[str, list[Line]]) -> None:
    """A column for every kind of data, a row for every signal; mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(lines[0]["data"] for lines in arms.values()))
    rows = [*PANELS, "training loss", "validation loss"]
    size = (1 + 4.2 * len(kinds), 2.1 * len(rows))
    figure, grid = pyplot.subplots(len(rows), len(kinds), figsize=size, squeeze=False, layout="constrained")
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for column, kind in enumerate(kinds):
        own = {name: lines for name, lines in arms.items() if lines[0]["data"] == kind}
        for row, title in enumerate(rows):
            axes = grid[row][column]
            for color, (name, lines) in zip(colors, own.items(), strict=False):
                curves = [_curve(line, title) for line in lines]
                length = min(len(values) for _, values in curves)
                x, values = curves[0][0][:length], np.array([v[:length] for _, v in curves])
                axes.plot(x, values.mean(0), color=color, linewidth=1.2, label=name)
                axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
            if (shift := next(iter(own.values()))[0]["shift"]) is not None:
                axes.axvline(shift, color="#888888", linewidth=0.8, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(title, fontsize=9)
            if row == 0:
                axes.set_title(kind, fontsize=10)
                axes.legend(fontsize=6, frameon=False)
        grid[-1][column].set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(line: Line, title: str) -> tuple[list[int], list[float]]:
    """(steps, values); metrics of a step as medians of RECENT steps, so that a curve is readable."""
    if title == "validation loss":
        return line["validated"], line["validation"]["all"]
    values = line["series"]["loss" if title == "training loss" else PANELS[title]]
    starts = range(len(values) - RECENT + 1)
    return [i + RECENT for i in starts], [median(values[i : i + RECENT]) for i in starts]


def show(results: Path) -> None:
    """Tables and picture; of a cell that is there twice the later one counts."""
    lines = read_jsonl(results)
    arms = by_arm(lines)
    print_tables(arms)
    for probe in (line for line in lines if "probe" in line):
        print("\nsqrt(v): " + ", ".join(f"quantile {q} {v:.3g}" for q, v in probe["probe"].items()))
    print("commits: " + ", ".join(sorted({line.get("commit") or "unknown" for line in lines})))
    if arms:
        draw(results.with_suffix(".png"), arms)
        print(f"picture: {results.with_suffix('.png')}")
