"""The lines of a report of `posttrain doctor`, whatever its topic: what was looked at, what was found, and the way out
of what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(kw_only=True, slots=True)
class Finding:
    """One line of the report. ``way_out`` set: something is wrong."""

    name: str
    value: str
    way_out: str | None = None


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row a finding: ok or wrong, name, value."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = "[red]wrong[/red]" if finding.way_out else "[green]ok[/green]"
        table.add_row(mark, escape(finding.name), escape(finding.value))
    return table


def print_ways_out(console: Console, findings: Sequence[Finding]) -> None:
    """One line for everything that is wrong."""
    for finding in findings:
        if finding.way_out:
            text = f"{finding.name}: {finding.way_out}"
            console.print(text, style="red", soft_wrap=True, highlight=False, markup=False)
