"""summary.png: accuracy of SFT, teachers and student per domain, and the student's way over the MOPD steps.

Owns one picture, drawn from the content of summary.json and the rows of metrics.jsonl. Matplotlib is imported when
it draws, with a backend that needs no display.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"sft": "#c3c8d1", "teachers": "#5b7bb4", "mopd": "#e2702b", "average_merge": "#2b2f36"}
LABELS = {
    "sft": "SFT",
    "teachers": "own teacher",
    "mopd": "MOPD student",
    "average_merge": "average of teachers",
}
DOMAIN_COLOURS = ("#2a9d8f", "#7a5195", "#d1495b", "#b8860b", "#3d6cb9", "#6b8e23", "#8c564b", "#555b66")
INK, GRID = "#2b2f36", "#e6e8ec"
BAR_WIDTH = 0.26
SMOOTH_STEPS = 5


def draw_summary(
    path: Path | str,
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    errors: dict[str, dict[str, float]] | None = None,
) -> None:
    """Write the picture to ``path``.

    ``metrics``: rows of the MOPD stage's metrics.jsonl; the curves are "reward/<domain>" and "teacher/mean_abs",
    those of them that are there. ``errors``: standard errors as `posttrain.report.summary.standard_errors` gives
    them; bars show 95 % intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    num_domains = len(summary["domains"])
    figure = Figure(figsize=(max(11.0, 7.0 + 1.25 * num_domains), 5.0), dpi=150, layout="constrained")
    with matplotlib.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        grid = figure.add_gridspec(2, 2, width_ratios=(1.35, 1), height_ratios=(1.6, 1))
        _draw_accuracy(figure.add_subplot(grid[:, 0]), summary, errors or {})
        top = figure.add_subplot(grid[0, 1])
        _draw_rewards(top, summary["domains"], metrics)
        _draw_gap(figure.add_subplot(grid[1, 1], sharex=top), metrics)
        top.tick_params(labelbottom=False)
        figure.savefig(path)


def _draw_accuracy(axes: Axes, summary: dict[str, Any], errors: dict[str, dict[str, float]]) -> None:
    domains, accuracy = summary["domains"], summary["accuracy"]
    positions = np.arange(len(domains))
    for offset, name in enumerate(("sft", "teachers", "mopd")):
        values = np.array([100 * accuracy[name][domain] for domain in domains])
        bars = None
        if name in errors:
            bars = np.array([196 * errors[name][domain] for domain in domains])
            bars = np.stack([np.minimum(bars, values), np.minimum(bars, 100 - values)])
        x = positions + (offset - 1) * BAR_WIDTH
        style = {"elinewidth": 1.0, "ecolor": INK, "capsize": 2}
        axes.bar(
            x, values, BAR_WIDTH * 0.94, yerr=bars, color=COLOURS[name], label=LABELS[name], error_kw=style
        )
        for at, value in zip(x, values, strict=True):
            inside = value > 12
            axes.text(
                at, 2 if inside else value + 2, f"{value:.0f}", ha="center", va="bottom", fontsize=8.5,
                color="white" if inside and name != "sft" else INK,
            )  # fmt: skip
    if "average_merge" in accuracy:
        values = np.array([100 * accuracy["average_merge"][domain] for domain in domains])
        axes.scatter(
            positions + BAR_WIDTH, values, marker="D", s=34, color=COLOURS["average_merge"], edgecolor="white",
            linewidth=0.9, zorder=5, label=LABELS["average_merge"],
        )  # fmt: skip
    axes.set_xticks(positions, [_domain_label(domain, summary) for domain in domains])
    axes.set_ylim(0, 104)
    axes.set_ylabel("accuracy on held-out prompts, %")
    _tidy(axes, "y", _title(summary))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False, handlelength=1.2, fontsize=9
    )


def _title(summary: dict[str, Any]) -> str:
    mean = summary["normalised"]["mopd"]["mean"]
    return "Accuracy per domain" + (
        "" if mean is None else f": the student has {100 * mean:.0f} % of the teachers' gain"
    )


def _domain_label(domain: str, summary: dict[str, Any]) -> str:
    share = summary["normalised"]["mopd"][domain]
    return domain if share is None else f"{domain}\n{100 * share:.0f} % of the gain"


def _draw_rewards(axes: Axes, domains: list[str], metrics: list[dict[str, Any]]) -> None:
    for index, domain in enumerate(domains):
        colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
        _curve(axes, metrics, f"reward/{domain}", colour, domain)
    _tidy(axes, "both", "The student over MOPD steps")
    axes.set_ylabel("reward")
    if axes.lines:
        axes.legend(loc="lower right", ncols=2, frameon=False, fontsize=9, handlelength=1.4)
    else:
        axes.text(0.5, 0.5, "no rewards were logged", transform=axes.transAxes, ha="center", color="#80868f")


def _draw_gap(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    _curve(axes, metrics, "teacher/mean_abs", COLOURS["mopd"], "gap")
    _tidy(axes, "both", "")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("mean |log-ratio|\nto the teacher")


def _curve(axes: Axes, metrics: list[dict[str, Any]], name: str, colour: str, label: str) -> None:
    """Raw values faint, a centred running mean on top."""
    rows = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    if not rows:
        return
    steps, values = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.9, label=label)


def smooth(values: np.ndarray, width: int = SMOOTH_STEPS) -> np.ndarray:
    """Centred running mean, shorter at the ends; same length."""
    half = width // 2
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def _tidy(axes: Axes, grid_axis: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis=grid_axis, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aeb4bd")
    axes.tick_params(length=0)
