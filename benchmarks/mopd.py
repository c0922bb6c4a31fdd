"""MOPD against its baselines on the tiny MoE: the quality table.

    .venv/bin/python benchmarks/mopd.py [--core | --rows sft teachers mopd ...] [--seeds 0 1 2] [--jobs 2] [--work DIR]
    .venv/bin/python benchmarks/mopd.py --table      # table and picture from the results alone
    .venv/bin/python benchmarks/mopd.py --quick      # every code path with a few steps; numbers mean nothing

Every finished cell (row, seed) is one line of benchmarks/results/mopd.jsonl; cells that are there are skipped, and what
rows share (SFT, teachers, the student) lies in the work folder and is resumed, so the command may be stopped at any time.
Several processes, a core each, share the cells out among themselves (`benchmarks/cells.py`).

The setting is `conf/experiment/tiny.yaml` with long answers in math, so that the longest domain's answers are 15 times
the shortest's, and 1,000 held-out prompts a domain. Rows that distil or sample get as many answers as the student of
MOPD, RL rows as many steps as its sampled tokens pay for; the line says what was really sampled. Learning rates are
chosen on the validation split with seed 0 and kept for the others, merge coefficients with every seed; what was chosen
from what lies beside the results (`*_chosen.json`) and is taken from there where the work folder is new. Held-out prompts
choose none of them; how long teachers train and how large the budget is was set after looking at some (docs/results.md). A
working tree with changes is refused; a line names the commit that its process was started with. Shares are
(row - SFT) / (teachers - SFT), per domain, then averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import Cell, locked, run_jobs, take
from benchmarks.mopd_models import SIZES, Models, Seed
from benchmarks.mopd_table import DOMAINS, show
from posttrain.config import PipelineRun
from posttrain.disk import write_atomic
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
ORACLE_RATES = (2e-4, 5e-4)  # a quarter of the answers a step
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
    after: str | None = "teachers"  # what of the same seed it starts from, or has the budget of


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
        Row(name="sft", make=lambda s, _: s.sft(), core=True, rounds=1.3, after=None),
        Row(
            name="teachers",
            make=lambda s, lr: s.teachers(lr=lr),
            grid=TEACHER_RATES,
            core=True,
            rounds=3.0,
            after="sft",
        ),
        Row(name="average", make=lambda s, _: s.merged(None), core=True, rounds=0),
        _arithmetic(),
        _mopd(core=True),
        _mopd("mopd.algorithm.aggregation=token_mean", name="mopd_token_mean"),
        _mopd("mopd.algorithm.aggregation=token_mean_balanced", name="mopd_balanced"),
        _mopd("mopd.algorithm.signal=top_k", TOP_K, name="mopd_top_k"),
        _mopd("mopd.algorithm.signal=top_k_renorm", TOP_K, name="mopd_top_k_renorm"),
        _mopd("mopd.algorithm.signal=full", name="mopd_full"),
        _mopd("mopd.algorithm.teacher_clip=1000", name="mopd_no_clip"),
        _mopd(*ORM, name="mopd_orm"),
        Row(
            name="mix_rl",
            make=lambda s, lr: s.mixed(lr, "mix_rl", _budget(s)),
            grid=RL_RATES,
            core=True,
            after="mopd",
        ),
        Row(
            name="mix_rl_half_batch",  # as many answers a step as MOPD's student
            make=lambda s, lr: s.mixed(lr, "mix_rl_half_batch", _budget(s), batch=0.5),
            grid=RL_RATES,
            after="mopd",
        ),
        Row(
            name="mix_rl_all",
            make=lambda s, lr: s.mixed(lr, "mix_rl_all", _budget(s, teachers=True)),
            grid=RL_RATES,
            rounds=2.3,
            after="mopd",
        ),
        Row(
            name="cascade",
            make=lambda s, lr: s.cascade(lr, _budget(s, teachers=True)),
            grid=(1e-4, *RL_RATES),  # what later domains overwrite asks for a small rate
            rounds=2.3,
            after="mopd",
        ),
        Row(name="off_policy", make=lambda s, lr: s.off_policy(lr), grid=SFT_RATES, core=True),
        Row(name="off_policy_seq_mean", make=lambda s, lr: s.off_policy(lr, seq_mean=True), grid=SFT_RATES),
        Row(
            name="off_policy_filtered", make=lambda s, lr: s.off_policy(lr, filtered=True), like="off_policy"
        ),
        Row(name="foreign_teachers", make=lambda s, _: s.foreign_teachers(), rounds=4.3),
        Row(
            name="mopd_foreign",
            make=lambda s, lr: s.student_of_foreigners(lr),
            like="mopd",
            after="foreign_teachers",
        ),
        Row(name="oracle", make=lambda s, lr: s.oracle(lr), grid=ORACLE_RATES),
        Row(name="round2", make=lambda s, lr: s.second_round(lr), like="mopd", rounds=2.3, after="mopd"),
    )
}


def needs(cell: Cell) -> set[Cell]:
    """The cells whose runs this one starts from, or whose choice it takes over."""
    row, seed = ROWS[cell[0]], cell[1]
    found = {(row.after, seed)} if row.after else set()
    tuned = row.like or (row.name if row.grid != (None,) and not row.every_seed else None)
    if tuned:
        found.add((tuned, TUNING_SEED))
    return found - {cell}


def choose(row: Row, s: Seed) -> Any:
    """The value of the grid with the best mean accuracy on the validation split, remembered in the work folder."""
    if row.like:
        return choose(ROWS[row.like], s)
    grid = row.grid[:2] if s.quick else row.grid
    if len(grid) == 1:
        return grid[0]
    file = s.folder.parent / "chosen.json"
    chosen = read_choices(file)
    key = f"{row.name}/seed{s.seed}" if row.every_seed else row.name
    if key not in chosen:
        with s.aside():
            accuracy = [_mean_accuracy(s, row, value) for value in grid]
        best = grid[int(np.argmax(accuracy))]
        validation = dict(zip(map(str, grid), accuracy, strict=True))
        chosen = add_choices(file, {key: {"value": best, "seed": s.seed, "validation": validation}})
        print(f"{row.name}: chose {best} on the validation split: {validation}", flush=True)
    return chosen[key]["value"]


def read_choices(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def add_choices(file: Path, new: dict[str, Any]) -> dict[str, Any]:
    """All choices of ``file`` after ``new`` came to them; what is there already stays."""
    with locked(file.with_suffix(".lock")):  # another process may have written since
        chosen = new | read_choices(file)
        write_atomic(file, json.dumps(chosen, indent=1) + "\n")
    return chosen


def take_over_choices(work: Path, results: Path) -> None:
    """Choices that lines were made with hold in a new work folder too; a work folder that chose otherwise is refused."""
    made = read_choices(_choices_of(results)) if results.exists() else {}
    chosen = add_choices(work / "chosen.json", made)
    for key, entry in made.items():
        if chosen[key]["value"] != entry["value"]:
            sys.exit(
                f"{work / 'chosen.json'}: {key} is {chosen[key]['value']}, and the lines of {results} were made with"
                f" {entry['value']}; give another --work or --results"
            )


def _choices_of(results: Path) -> Path:
    return results.with_name(results.stem + "_chosen.json")


def _mean_accuracy(s: Seed, row: Row, value: Any) -> float:
    scores = s.evaluate(as_models(row.make(s, value)), "valid").sampled
    return float(np.mean([a.mean() for a in scores.values()]))


def as_models(made: Models | str) -> Models:
    return dict.fromkeys(DOMAINS, made) if isinstance(made, str) else made


# Cells ----------------------------------------------------------------------------------------------------------


def measure(row: Row, s: Seed, command: str, commit: str | None) -> dict[str, Any]:
    """The line of one cell."""
    value = choose(row, s)
    s.used = set()
    scores = s.evaluate(as_models(row.make(s, value)), "heldout")
    used = sorted(s.used)
    found: dict[str, float | None] = dict.fromkeys([*DOMAINS, "mean"], 0.0)
    if row.name != "sft":  # whose share is 0, and which comes before the teachers
        with s.aside():
            base = s.evaluate(as_models(s.sft()), "heldout").sampled
            teachers = s.evaluate(s.teachers(), "heldout").sampled
        shares, mean = normalised(base, teachers, scores.sampled, s.seed, num_draws=1)
        found = {d: i.value for d, i in shares.items()} | {"mean": mean.value}
    own = [name for name in used if name != "sft" and not name.startswith("teachers/")]
    if row.name in ("sft", "teachers"):
        own = [name for name in used if row.name == "sft" or name != "sft"]
    seconds = s.wall_seconds()
    return {
        "row": row.name,
        "seed": s.seed,
        "commit": commit,
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
        "normalised": found,
        **(s.course(own[0]) if len(own) == 1 else {}),
        "per_prompt": {d: [round(float(v), 4) for v in a.mean(axis=1)] for d, a in scores.sampled.items()},
    }


def estimate_s(row: Row, cfg: PipelineRun, num_values: int) -> float:
    """Seconds of a cell on one core: 16 ms an answer of training, 344 evaluated answers a second, which said 3:23 h of
    a core for what took two 1:33 h (docs/results.md)."""
    evaluated = len(DOMAINS) * (
        SIZES["num_heldout"] * 5 + (num_values > 1) * num_values * SIZES["num_valid"] * 4
    )
    answers = cfg.mopd.algorithm.steps * cfg.mopd.algorithm.prompts_per_step
    return row.rounds * answers * 0.016 * num_values + evaluated / 344


def finished(results: Path) -> set[Cell]:
    return {(line["row"], line["seed"]) for line in (read_jsonl(results) if results.exists() else [])}


def run(args: argparse.Namespace, rows: list[Row], results: Path) -> None:
    """Measure the cells that are not in ``results`` yet, and append them."""
    done = finished(results)
    cells = [(row.name, seed) for seed in args.seeds for row in rows if (row.name, seed) not in done]
    print(f"{len(args.seeds) * len(rows)} cells, {len(cells)} to do", flush=True)
    if not cells:
        return
    args.commit = code_revision(str(FOLDER))  # of the code that is imported; a later one is not
    if not args.quick and (args.commit or "-dirty").endswith("-dirty"):
        sys.exit(
            "files differ from the commit that the lines would name: commit or stash them, or use --quick"
        )
    cfg = Seed(args.work, args.seeds[0], args.quick).cfg
    costs = {}
    for name, seed in cells:
        row = ROWS[name]
        tuned = row.every_seed or (seed == TUNING_SEED and not row.like)
        costs[name, seed] = estimate_s(row, cfg, len(row.grid) if tuned else 1)
    if not args.job:
        print(
            f"estimated {format_s(sum(costs.values()) / args.jobs)}, {args.jobs} processes with a core each"
            + " (not with --quick)" * args.quick,
            flush=True,
        )
    take_over_choices(args.work, results)
    begin = time.perf_counter()
    seeds = {seed: Seed(args.work, seed, args.quick) for seed in {TUNING_SEED, *args.seeds}}
    if args.jobs > 1:
        for s in seeds.values():
            s.make_inputs()
        run_jobs(args.jobs, [*sys.argv, "--jobs", "1", "--job"])
        print(f"{len(cells)} cells in {format_s(time.perf_counter() - begin)} by {args.jobs} processes")
        return
    for seed in dict.fromkeys([TUNING_SEED, args.seeds[0]]):
        seeds[seed].make_inputs()
    with Engines(cfg.ray) as engines:
        pipeline.warm_up(engines, cfg, DOMAINS)
        for s in seeds.values():
            s.engines = engines
        for cell in take(cells, needs, lambda: finished(results), args.work / "claims"):
            line = measure_cell(cell, seeds, args)
            with locked(args.work / "results.lock"):
                append(line, args.work / "chosen.json", results)
            left = [costs[other] for other in set(cells) - finished(results)]
            spent = time.perf_counter() - begin
            paid = max(sum(costs.values()) - sum(left), 1.0)
            print(
                f"{cell[0]} seed {cell[1]}: mean accuracy {100 * np.mean(list(line['accuracy'].values())):.1f} %;"
                f" spent {format_s(spent)}, about {format_s(sum(left) * spent / paid)} left",
                flush=True,
            )


def measure_cell(cell: Cell, seeds: dict[int, Seed], args: argparse.Namespace) -> dict[str, Any]:
    """The line of a cell, after what it takes over from the seed that chooses."""
    row, first, s = ROWS[cell[0]], seeds[TUNING_SEED], seeds[cell[1]]
    s.make_inputs()
    if row.name != "sft":
        choose(ROWS["teachers"], first)
    if row.after == "mopd":
        choose(ROWS["mopd"], first)  # its student sets the budget
    if not row.every_seed and (row.grid != (None,) or row.like):
        choose(row, first)
    command = f"benchmarks/mopd.py --rows {row.name} --seeds {s.seed}" + " --quick" * args.quick
    return measure(row, s, command + f" --results {args.results}" * bool(args.results), args.commit)


def append(line: dict[str, Any], chosen: Path, results: Path) -> None:
    """Add a line to the results, with what was chosen so far beside them. Call it under a lock."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if found := read_choices(chosen):
        write_atomic(_choices_of(results), json.dumps(found, indent=1) + "\n")
    # Read and written whole: half a line of a killed process goes.
    lines = [*(read_jsonl(results) if results.exists() else []), line]
    write_atomic(results, "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--core", action="store_true", help="the rows " + ", ".join(r.name for r in ROWS.values() if r.core)
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="these rows (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core, at most one a seed)")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)  # one of these processes
    parser.add_argument("--work", type=Path, help="folder of all runs (default: runs/benchmark-mopd)")
    parser.add_argument("--results", type=Path, help="the lines (default: benchmarks/results/mopd.jsonl)")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print the table and draw the picture, measure nothing; with --seeds, those alone and no picture",
    )
    parser.add_argument(
        "--against",
        default="mopd",
        choices=list(ROWS),
        help="the row that others are subtracted from (default: mopd)",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: does it run?")
    args = parser.parse_args()
    args.work = args.work or Path("runs") / ("benchmark-mopd-quick" if args.quick else "benchmark-mopd")
    shown, args.seeds = args.seeds, args.seeds or [0, 1, 2]
    args.jobs = args.jobs or min(len(os.sched_getaffinity(0)), len(args.seeds))
    results = args.results or (args.work / "mopd.jsonl" if args.quick else RESULTS)
    if not args.table:
        names = args.rows or [name for name, row in ROWS.items() if row.core or not args.core]
        run(args, [ROWS[name] for name in names], results)
    if args.job:
        return
    if not results.exists():
        sys.exit(f"{results}: no results yet; start without --table")
    show(results, shown if args.table else None, args.against)


if __name__ == "__main__":
    main()
