"""The quality table of `benchmarks/mopd.py` and its picture, from the lines of the results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny.domains import WORLDS
from posttrain.report.bootstrap import normalised
from posttrain.tracking.jsonl import read_jsonl

DOMAINS = list(WORLDS)
LABELS = {
    "sft": "SFT",
    "teachers": "own teacher",
    "average": "parameter average",
    "task_arithmetic": "task arithmetic",
    "mopd": "MOPD",
    "mopd_token_mean": "MOPD, token_mean",
    "mopd_balanced": "MOPD, token_mean_balanced",
    "mopd_top_k": "MOPD, top_k signal",
    "mopd_full": "MOPD, full signal",
    "mix_rl": "Mix-RL, student's tokens",
    "mix_rl_all": "Mix-RL, teachers' tokens too",
    "cascade": "cascade RL",
    "off_policy": "off-policy distillation",
    "off_policy_filtered": "off-policy, right answers",
    "oracle": "one teacher, one student",
    "round2": "MOPD, second round",
}


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per row over its seeds: mean accuracies, share of gain with its interval, tokens.

    The interval is a paired bootstrap over held-out prompts, with every (seed, domain) resampled by itself; ``spread``
    is the standard deviation of the share over seeds.
    """
    cells = {(line["row"], line["seed"]): line for line in lines}
    table = []
    for name in LABELS:
        seeds = [s for row, s in cells if row == name and ("sft", s) in cells and ("teachers", s) in cells]
        if not seeds:
            continue
        own = [cells[name, s] for s in seeds]
        arrays = [
            {f"{s}/{d}": np.array(cells[row, s]["per_prompt"][d]) for s in seeds for d in DOMAINS}
            for row in ("sft", "teachers", name)
        ]
        shares = [line["normalised"]["mean"] for line in own]
        entry: dict[str, Any] = {"row": name, "seeds": seeds}
        entry["accuracy"] = {d: float(np.mean([line["accuracy"][d] for line in own])) for d in DOMAINS}
        entry["greedy"] = float(np.mean([np.mean(list(line["accuracy_greedy"].values())) for line in own]))
        entry["share"] = normalised(arrays[0], arrays[1], arrays[2], seed=0)[1]
        known = [share for share in shares if share is not None]
        entry["spread"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        for key in ("tokens", "tokens_teachers", "wall_s"):
            entry[key] = float(np.mean([line[key] for line in own]))
        table.append(entry)
    return table


def print_table(table: list[dict[str, Any]]) -> None:
    print(
        "Accuracy on held-out prompts at temperature 1, %; share of gain = (row - SFT) / (teacher - SFT) [95 %]"
    )
    header = "".join(f"{d:>9}" for d in [*DOMAINS, "mean", "greedy"])
    print(f"{'':<30}{header}   share of gain          sd  Mtokens (+ teachers')   wall s  seeds")
    for entry in table:
        values = list(entry["accuracy"].values())
        numbers = "".join(f"{100 * v:9.1f}" for v in [*values, np.mean(values), entry["greedy"]])
        share, spread = entry["share"], entry["spread"]
        value = "    -" if share.value is None else f"{share.value:5.2f}"
        print(
            f"{LABELS[entry['row']]:<30}{numbers}   {value} [{share.low:.2f}, {share.high:.2f}]"
            f"{'     -' if spread is None else f'  {spread:.2f}'}  {entry['tokens'] / 1e6:6.2f}"
            f" (+ {entry['tokens_teachers'] / 1e6:.2f}){entry['wall_s']:14.0f}  {len(entry['seeds'])}"
        )


def draw(path: Path, table: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Share of gain of every row: the mean with its interval, and each seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [e for e in table if e["share"].value is not None and e["row"] not in ("sft", "teachers")]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.36 * len(shown)), layout="constrained")
    for y, entry in enumerate(reversed(shown)):
        share = entry["share"]
        dots = [
            e["normalised"]["mean"] for e in lines if e["row"] == entry["row"] and e["seed"] in entry["seeds"]
        ]
        axes.plot([share.low, share.high], [y, y], color="#5b7bb4", linewidth=3, alpha=0.5)
        axes.plot(dots, [y] * len(dots), "o", color="#5b7bb4", markersize=3)
        axes.plot(share.value, y, "D", color="#e2702b", markersize=7)
        axes.annotate(
            f"{share.value:.2f}",
            (share.value, y),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(shown)), [LABELS[e["row"]] for e in reversed(shown)])
    axes.axvline(0, color="#c3c8d1", linewidth=1)
    axes.axvline(1, color="#c3c8d1", linewidth=1)
    axes.set_xlabel("share of the teachers' gain over SFT (0: SFT, 1: own teachers)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def show(results: Path) -> None:
    """Table and picture from the lines alone; of a cell that is there twice the later one counts."""
    lines = list({(line["row"], line["seed"]): line for line in read_jsonl(results)}.values())
    table = summarise(lines)
    print_table(table)
    draw(results.with_suffix(".png"), table, lines)
    print(f"picture: {results.with_suffix('.png')}")
