"""The table on screen at the end of a pipeline, from the content of summary.json."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from posttrain.tracking.console import format_s


def summary_table(summary: dict[str, Any]) -> Group:
    """Accuracy per domain, teachers against domains, replay and time: what `print_summary` shows."""
    parts: list[Any] = [_accuracy(summary), _teachers(summary)]
    if summary["replay"]:
        parts.append(_replay(summary["replay"]))
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
    accuracy, shares = summary["accuracy"], summary["normalised"]
    merged = "average_merge" in accuracy
    table = Table(
        title="Accuracy on held-out prompts, temperature 1 (%)",
        title_justify="left",
        caption="share = (model - SFT) / (teacher - SFT), with its 95 % interval",
        caption_justify="left",
    )
    table.add_column("domain")
    for name in ["prompts", "SFT", "teacher", "student", *(["average"] if merged else []), "student's share"]:
        table.add_column(name, justify="right")
    if merged:
        table.add_column("average's share", justify="right")
    for domain in summary["domains"]:
        cells = [
            accuracy[name][domain]
            for name in ("sft", "teachers", "mopd", *(["average_merge"] if merged else []))
        ]
        row = [domain, str(summary["num_eval"][domain]), *(_percent(cell) for cell in cells)]
        row.append(_share(shares["mopd"], domain))
        if merged:
            row.append(_share(shares["average_merge"], domain))
        table.add_row(*row)
    table.add_section()
    names = ("sft", "teachers", "mopd", *(["average_merge"] if merged else []))
    means = [_percent(sum(accuracy[name].values()) / len(summary["domains"])) for name in names]
    last = [_share(shares["mopd"], "mean"), *([_share(shares["average_merge"], "mean")] if merged else [])]
    table.add_row("mean", "", *means, *last, style="bold")
    return table


def _teachers(summary: dict[str, Any]) -> Table:
    table = Table(title="Every teacher on every domain (%)", title_justify="left")
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


def _replay(replay: dict[str, float]) -> Text:
    return Text(
        f"routing replay: coverage {replay['coverage']:.4g}, mismatch k3 {replay['k3']:.2e}"
        f" ({replay['k3_without']:.2e} without), routes that differ {replay['route_mismatch']:.2%}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _share(shares: dict[str, Any], name: str) -> str:
    if shares[name] is None:
        return "-"
    low, high = (("∞" if end is None else f"{end:.2f}") for end in shares["ci"][name])
    return f"{shares[name]:.2f} [{'-' if low == '∞' else ''}{low}, {high}]"
