"""MOPD against its baselines on the tiny MoE: the quality table.

    .venv/bin/python benchmarks/mopd.py [--core | --rows sft teachers mopd ...] [--seeds 0 1 2] [--work DIR]
    .venv/bin/python benchmarks/mopd.py --table      # table and picture from the results alone
    .venv/bin/python benchmarks/mopd.py --quick      # every code path with a few steps; numbers mean nothing

Every finished cell (row, seed) is one line of benchmarks/results/mopd.jsonl; cells that are there are skipped, and what
rows share (SFT, teachers, the student) lies in the work folder and is resumed, so the command may be stopped at any time.

The setting is `conf/experiment/tiny.yaml` with long answers in math, so that the longest domain's answers are 15 times
the shortest's, and 1,000 held-out prompts a domain. Rows that distil or sample get as many answers as the student of
MOPD, RL rows as many steps as its sampled tokens pay for; the line says what was really sampled. Learning rates are
chosen on the validation split with seed 0 and kept for the others, merge coefficients with every seed; the held-out
prompts decide nothing, and what was chosen from what lies beside the results (`*_chosen.json`). A working tree with
changes is refused, so that the commit of a line made it. Shares are (row - SFT) / (teachers - SFT), per domain, then averaged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mopd_models import SIZES, Models, Seed
from benchmarks.mopd_table import DOMAINS, show
from posttrain.config import PipelineRun
from posttrain.engines import Engines
from posttrain.manifest import code_revision
from posttrain.report.bootstrap import normalised
from posttrain.runs import pipeline
from posttrain.tracking.console import format_s
from posttrain.tracking.jsonl import read_jsonl

FOLDER = Path("benchmarks") / "results"
RESULTS = Path(__file__).parent / "results" / "mopd.jsonl"
# Around the best of wider grids at half the student's budget (docs/log.md).
RATES = (3e-4, 5e-4)
TEACHER_RATES = (2e-4, 4e-4)
RL_RATES = (2e-4, 4e-4)
SFT_RATES = (3e-4, 1e-3, 2e-3)
TUNING_SEED = 0
TOP_K = "mopd.algorithm.top_k=8"  # the default of 64 would be most of the tiny vocabulary of 90
# As many answers a step as the student without the outcome term, in groups of 8 as in RL.
ORM = (
    "mopd.algorithm.alpha=1",
    "mopd.algorithm.loss=ppo_clip",
    "mopd.algorithm.group_size=8",
    "mopd.algorithm.prompts_per_step=8",
)

# Rows -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class Row:
    """One line of the table. ``make`` gets the value that was chosen from ``grid``."""

    name: str
    make: Callable[[Seed, Any], Models | str]
    grid: tuple[Any, ...] = (None,)
    like: str | None = None  # takes the value that was chosen for this row
    every_seed: bool = False  # chosen with every seed
    core: bool = False
    rounds: float = 1.0  # of work, in the student's steps, for the estimate of time


def _mopd(*overrides: str, name: str = "mopd", core: bool = False) -> Row:
    return Row(name=name, make=lambda s, lr: s.student(lr, *overrides), grid=RATES, core=core)


def _budget(s: Seed, teachers: bool = False) -> float:
    return s.budget(choose(ROWS["mopd"], s), teachers)


def _arithmetic() -> Row:
    grid = (0.3, 0.4, 0.5, 0.7, 1.0)
    return Row(
        name="task_arithmetic", make=lambda s, c: s.merged(c), grid=grid, every_seed=True, core=True, rounds=0
    )


ROWS = {
    row.name: row
    for row in (
        Row(name="sft", make=lambda s, _: s.sft(), core=True, rounds=1.3),
        Row(name="teachers", make=lambda s, lr: s.teachers(lr=lr), grid=TEACHER_RATES, core=True, rounds=3.0),
        Row(name="average", make=lambda s, _: s.merged(None), core=True, rounds=0),
        _arithmetic(),
        _mopd(core=True),
        _mopd("mopd.algorithm.aggregation=token_mean", name="mopd_token_mean"),
        _mopd("mopd.algorithm.aggregation=token_mean_balanced", name="mopd_balanced"),
        _mopd("mopd.algorithm.signal=top_k", TOP_K, name="mopd_top_k"),
        _mopd("mopd.algorithm.signal=top_k_renorm", TOP_K, name="mopd_top_k_renorm"),
        _mopd("mopd.algorithm.signal=full", name="mopd_full"),
        _mopd(*ORM, name="mopd_orm"),
        Row(name="mix_rl", make=lambda s, lr: s.mixed(lr, "mix_rl", _budget(s)), grid=RL_RATES, core=True),
        Row(
            name="mix_rl_all",
            make=lambda s, lr: s.mixed(lr, "mix_rl_all", _budget(s, teachers=True)),
            grid=RL_RATES,
            rounds=2.3,
        ),
        Row(
            name="cascade",
            make=lambda s, lr: s.cascade(lr, _budget(s, teachers=True)),
            grid=(1e-4, *RL_RATES),  # what later domains overwrite asks for a small rate
            rounds=2.3,
        ),
        Row(name="off_policy", make=lambda s, lr: s.off_policy(lr), grid=SFT_RATES, core=True),
        Row(
            name="off_policy_filtered", make=lambda s, lr: s.off_policy(lr, filtered=True), like="off_policy"
        ),
        Row(name="foreign_teachers", make=lambda s, _: s.foreign_teachers(), rounds=4.3),
        Row(name="mopd_foreign", make=lambda s, lr: s.student_of_foreigners(lr), like="mopd"),
        Row(name="oracle", make=lambda s, lr: s.oracle(lr), like="mopd"),
        Row(name="round2", make=lambda s, lr: s.second_round(lr), like="mopd", rounds=2.3),
    )
}


def choose(row: Row, s: Seed) -> Any:
    """The value of the grid with the best mean accuracy on the validation split, remembered in the work folder."""
    if row.like:
        return choose(ROWS[row.like], s)
    grid = row.grid[:2] if s.quick else row.grid
    if len(grid) == 1:
        return grid[0]
    file = s.folder.parent / "chosen.json"
    chosen = json.loads(file.read_text()) if file.exists() else {}
    key = f"{row.name}/seed{s.seed}" if row.every_seed else row.name
    if key not in chosen:
        with s.aside():
            accuracy = [_mean_accuracy(s, row, value) for value in grid]
        best = grid[int(np.argmax(accuracy))]
        # Another process may have written since.
        chosen = json.loads(file.read_text()) if file.exists() else {}
        chosen[key] = {
            "value": best,
            "seed": s.seed,
            "validation": dict(zip(map(str, grid), accuracy, strict=True)),
        }
        file.write_text(json.dumps(chosen, indent=1) + "\n")
        print(f"{row.name}: chose {best} on the validation split: {chosen[key]['validation']}", flush=True)
    return chosen[key]["value"]


def _mean_accuracy(s: Seed, row: Row, value: Any) -> float:
    scores = s.evaluate(as_models(row.make(s, value)), "valid").sampled
    return float(np.mean([a.mean() for a in scores.values()]))


def as_models(made: Models | str) -> Models:
    return dict.fromkeys(DOMAINS, made) if isinstance(made, str) else made


# Cells ----------------------------------------------------------------------------------------------------------


def measure(row: Row, s: Seed, command: str) -> dict[str, Any]:
    """The line of one cell."""
    value = choose(row, s)
    s.used = set()
    scores = s.evaluate(as_models(row.make(s, value)), "heldout")
    used = sorted(s.used)
    with s.aside():
        base = s.evaluate(as_models(s.sft()), "heldout").sampled
        teachers = s.evaluate(s.teachers(), "heldout").sampled
    shares, mean = normalised(base, teachers, scores.sampled, s.seed, num_draws=1)
    own = [name for name in used if name != "sft" and not name.startswith("teachers/")]
    if row.name in ("sft", "teachers"):
        own = [name for name in used if row.name == "sft" or name != "sft"]
    seconds = json.loads((s.folder / "wall.json").read_text())
    return {
        "row": row.name,
        "seed": s.seed,
        "commit": code_revision(str(FOLDER)),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "chosen": value,
        "tokens": round(sum(map(s.tokens, own))),
        "tokens_teachers": round(
            sum(s.tokens(n) for n in used if n.startswith("teachers/") and n not in own)
        ),
        "wall_s": round(sum(seconds[name] for name in own), 1),
        "num_samples": s.cfg.eval.num_samples,
        "accuracy": {d: round(float(a.mean()), 4) for d, a in scores.sampled.items()},
        "accuracy_greedy": {d: round(float(a.mean()), 4) for d, a in (scores.greedy or {}).items()},
        "normalised": {d: i.value for d, i in shares.items()} | {"mean": mean.value},
        **(s.course(own[0]) if len(own) == 1 else {}),
        "per_prompt": {d: [round(float(v), 4) for v in a.mean(axis=1)] for d, a in scores.sampled.items()},
    }


def estimate_s(row: Row, cfg: PipelineRun, num_values: int) -> float:
    """Seconds of a cell: 16 ms an answer of training, 344 evaluated answers a second (docs/results.md, tiny pipeline)."""
    evaluated = len(DOMAINS) * (
        SIZES["num_heldout"] * 5 + (num_values > 1) * num_values * SIZES["num_valid"] * 4
    )
    answers = cfg.mopd.algorithm.steps * cfg.mopd.algorithm.prompts_per_step
    return row.rounds * answers * 0.016 * num_values + evaluated / 344


def run(args: argparse.Namespace, rows: list[Row], results: Path) -> None:
    """Measure the cells that are not in ``results`` yet, and append them."""
    done = {(line["row"], line["seed"]) for line in (read_jsonl(results) if results.exists() else [])}
    cells = [(row, seed) for seed in args.seeds for row in rows if (row.name, seed) not in done]
    print(f"{len(args.seeds) * len(rows)} cells, {len(cells)} to do", flush=True)
    if not cells:
        return
    if not args.quick and (code_revision(str(FOLDER)) or "-dirty").endswith("-dirty"):
        sys.exit(
            "files differ from the commit that the lines would name: commit or stash them, or use --quick"
        )
    cfg = Seed(args.work, args.seeds[0], args.quick).cfg
    costs = {}
    for row, seed in cells:
        tuned = row.every_seed or (seed == TUNING_SEED and not row.like)
        costs[row.name, seed] = estimate_s(row, cfg, len(row.grid) if tuned else 1)
    print(
        f"estimated {format_s(sum(costs.values()))} on 2 CPU cores" + " (not with --quick)" * args.quick,
        flush=True,
    )
    begin, paid = time.perf_counter(), 0.0
    seeds = {seed: Seed(args.work, seed, args.quick) for seed in {TUNING_SEED, *args.seeds}}
    first = seeds[TUNING_SEED]
    first.make_inputs()
    seeds[args.seeds[0]].make_inputs()
    with Engines(cfg.ray) as engines:
        pipeline.warm_up(engines, cfg, DOMAINS)
        first.engines = engines
        for row, seed in cells:
            s = seeds[seed]
            s.engines = engines
            s.make_inputs()
            if row.name != "sft":
                choose(ROWS["teachers"], first)
            if not row.every_seed and row.name != "teachers" and (row.grid != (None,) or row.like):
                choose(ROWS["mopd"], first)  # its student sets the budget
                choose(row, first)
            command = f"benchmarks/mopd.py --rows {row.name} --seeds {seed}"
            command += (" --quick" if args.quick else "") + (
                f" --results {args.results}" * bool(args.results)
            )
            line = measure(row, s, command)
            results.parent.mkdir(parents=True, exist_ok=True)
            if (chosen := args.work / "chosen.json").exists():
                shutil.copy(chosen, results.with_name(results.stem + "_chosen.json"))
            with results.open("a") as stream:
                stream.write(json.dumps(line, separators=(",", ":")) + "\n")
            paid += costs.pop((row.name, seed))
            spent = time.perf_counter() - begin
            left = sum(costs.values()) * spent / max(paid, 1.0)
            print(
                f"{row.name} seed {seed}: mean accuracy {100 * np.mean(list(line['accuracy'].values())):.1f} %;"
                f" spent {format_s(spent)}, about {format_s(left)} left",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--core", action="store_true", help="the rows " + ", ".join(r.name for r in ROWS.values() if r.core)
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="these rows (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder of all runs (default: runs/benchmark-mopd)")
    parser.add_argument("--results", type=Path, help="the lines (default: benchmarks/results/mopd.jsonl)")
    parser.add_argument(
        "--table", action="store_true", help="print the table and draw the picture, measure nothing"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: does it run?")
    args = parser.parse_args()
    args.work = args.work or Path("runs") / ("benchmark-mopd-quick" if args.quick else "benchmark-mopd")
    results = args.results or (args.work / "mopd.jsonl" if args.quick else RESULTS)
    if not args.table:
        names = args.rows or [name for name, row in ROWS.items() if row.core or not args.core]
        run(args, [ROWS[name] for name in names], results)
    if not results.exists():
        sys.exit(f"{results}: no results yet; start without --table")
    show(results)


if __name__ == "__main__":
    main()
