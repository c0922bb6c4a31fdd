"""The table on screen at the end of a pipeline, from the content of summary.json."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from posttrain.tracking.console import format_s


def summary_table(summary: dict[str, Any]) -> Group:
    """Accuracy per domain, teachers against domains, replay and time: what `print_summary` shows."""
    parts: list[Any] = [_accuracy(summary), _teachers(summary)]
    if "rounds" in summary:
        parts.append(_rounds(summary))
    if summary["replay"]:
        parts.append(_replay(summary["replay"]))
    if "lineage" in summary:
        parts.append(_lineage(summary["lineage"]))
    stages = ", ".join(f"{stage} {format_s(s)}" for stage, s in summary["wall_s"].items() if stage != "total")
    parts.append(
        Text(f"time {format_s(summary['wall_s']['total'])} ({stages}), seed {summary['seed']}", style="dim")
    )
    return Group(*parts)


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the table; plain text where there is no terminal."""
    console = console or Console()
    console.print(summary_table(summary), highlight=False)


def _accuracy(summary: dict[str, Any]) -> Table:
    """Fits 80 columns with the average merge in it."""
    accuracy, shares = summary["accuracy"], summary["normalised"]
    names = ["sft", "teachers", "mopd", *(["average_merge"] if "average_merge" in accuracy else [])]
    table = Table(
        title="Accuracy on held-out prompts at temperature 1, %",
        caption="share of gain = (model - SFT) / (teacher - SFT), with its 95 % interval",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("domain")
    for header in ["n", "SFT", "teacher", "student"]:
        table.add_column(header, justify="right", style="bold" if header == "student" else "")
    table.add_column("share of gain", justify="right", style="bold", no_wrap=True)
    if "average_merge" in accuracy:
        table.add_column("average", justify="right")
        table.add_column("share", justify="right")
    rows = [(domain, [accuracy[name][domain] for name in names]) for domain in summary["domains"]]
    means = [sum(accuracy[name].values()) / len(rows) for name in names]
    for domain, (sft, teacher, student, *average) in [*rows, ("mean", means)]:
        cells = [_percent(sft), _percent(teacher), _percent(student), _share(shares["mopd"], domain)]
        if average:
            cells += [_percent(average[0]), _number(shares["average_merge"][domain])]
        if domain == "mean":
            table.add_section()
        table.add_row(domain, str(summary["num_eval"].get(domain, "")), *cells)
    return table


def _teachers(summary: dict[str, Any]) -> Table:
    table = Table(title="Every teacher on every domain, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("teacher of")
    for domain in summary["domains"]:
        table.add_column(domain, justify="right")
    for teacher, cells in summary["accuracy"]["teachers_all"].items():
        row = [
            Text(_percent(cells.get(domain)), style="bold" if domain == teacher else "")
            for domain in summary["domains"]
        ]
        table.add_row(teacher, *row)
    return table


def _rounds(summary: dict[str, Any]) -> Table:
    table = Table(
        title="Rounds, %",
        caption="share: of the first round's teachers' gain",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("domain")
    for number in range(1, len(summary["rounds"]) + 1):
        for header in (f"teacher {number}", f"student {number}", "share"):
            table.add_column(header, justify="right")
    for domain in [*summary["domains"], "mean"]:
        cells = []
        for entry in summary["rounds"]:
            for name in ("teachers", "mopd"):
                values = entry[name]
                cells.append(_percent(values.get(domain, sum(values.values()) / len(values))))
            cells.append(_number(entry["normalised"][domain]))
        table.add_row(domain, *cells)
    return table


def _lineage(entries: list[dict[str, Any]]) -> Text:
    """One line per trained model, oldest first: `mopd: mopd of sft; teachers/code, teachers/math`."""
    lines = ["what the student was made from:"]
    for entry in entries:
        parents = entry["trained_from"]
        if entry["stage"] is None:
            continue
        others = sorted({name for key, name in parents.items() if key != "model.path"})
        origin = "; ".join(filter(None, [parents.get("model.path", ""), ", ".join(others)]))
        lines.append(f"  {entry['model']}: {entry['stage']} of {origin}")
    return Text("\n".join(lines), style="dim")


def _replay(replay: dict[str, float]) -> Text:
    return Text(
        f"routing replay: coverage {replay['coverage']:.4g}, mismatch k3 {replay['k3']:.2e}"
        f" ({replay['k3_without']:.2e} without), routes that differ {replay['route_mismatch']:.2%}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(shares: dict[str, Any], name: str) -> str:
    if shares[name] is None:
        return "-"
    low, high = shares["ci"][name]
    return f"{shares[name]:.2f} [{'-∞' if low is None else f'{low:.2f}'}, {'∞' if high is None else f'{high:.2f}'}]"
