"""Writes the tables of docs/routing-replay.md from the tests' families: `python scripts/write_replay_families.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "routing-replay.md"
BEGIN, END = "<!-- written by `python scripts/write_replay_families.py` -->\n", "<!-- end -->\n"


def page(old: str) -> str:
    """The whole page, with new tables between the marks of the ``old`` one."""
    head, _, rest = old.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert rest and tail, f"{PAGE} has lost its marks"
    return head + BEGIN + tables() + END + tail


def tables() -> str:
    """One row per class that is replayed, and one per class that is refused."""
    from tests.unit.moe_families import FAMILIES, REFUSED, Family

    by_class: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        by_class.setdefault(family.model_class, []).append(family)
    rows = [
        "| family | Transformers class | weights of the chosen experts | packs | besides |",
        "|---|---|---|---|---|",
    ]
    for name, families in sorted(by_class.items(), key=lambda item: item[1][0].model_type):
        rules = "; ".join(dict.fromkeys(family.rule.text for family in families))
        packs = "yes" if families[0].packs else "no"
        besides = "; ".join(dict.fromkeys(note for family in families for note in family.notes()))
        rows.append(f"| {families[0].model_type} | `{name}` | {rules} | {packs} | {besides} |")
    rows += ["", f"{len(by_class)} classes in {len(FAMILIES)} configurations. Refused by name:", ""]
    rows += ["| Transformers class | why |", "|---|---|"]
    rows += [f"| `{refused.model_class}` | {refused.reason} |" for refused in REFUSED.values()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(PAGE.read_text()))
