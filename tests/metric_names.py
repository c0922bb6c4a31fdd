"""The names that docs/metrics.md documents, as patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def documented() -> list[re.Pattern[str]]:
    """One pattern per name in the first column of the page's tables; `<...>` stands for one part without a slash."""
    names: list[str] = []
    for line in PAGE.read_text().split("## Alarms")[0].splitlines():
        if line.startswith("| `"):
            names += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return [re.compile(re.sub(r"<\w+>", "[^/]+", name.replace(".", r"\."))) for name in names]


def undocumented(names: Iterable[str]) -> set[str]:
    patterns = documented()
    return {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)}
