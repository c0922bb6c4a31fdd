"""Does num-zeros warn early? The claim of the MiMo-V2-Flash report (section 4.2) on the tiny MoE.

    .venv/bin/python -m benchmarks.num_zeros [--arms NAME ...] [--seeds 0 1 2 3 4] [--work DIR]
    .venv/bin/python -m benchmarks.num_zeros --table     # tables and pictures from the lines alone
    .venv/bin/python -m benchmarks.num_zeros --quick     # the main picture from a few arms and one seed, in minutes

num-zeros is the number of parameters whose gradient is exactly 0. The report: it rises when the balance of the experts
decays, falls when the model overfits, and depends on the rate of the expert bias and on AdamW's epsilon.

Each cell (arm, seed) fine-tunes one model per seed, which SFT on balanced data made before, through the learner of the
runs in this process. One factor at a time leaves the base setting (BASE_RATE, stock epsilon, float32). Epsilons lie at
quantiles of sqrt(v), AdamW's second moment, in a short probe run. A finished cell is one line of
benchmarks/results/num_zeros.jsonl, and is skipped the next time; a working tree with changes is refused, so that the
commit of a line made it. docs/num_zeros.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import benchmarks.local_learner as local  # before anything that imports DeepSpeed
from benchmarks.num_zeros_table import SERIES, show
from examples.tiny.domains import WORLDS
from examples.tiny.make_data import SFT, build
from examples.tiny.model import build_model
from posttrain.config import DataConfig, Dtype, LearnerConfig, Schedule
from posttrain.data.sources import load_conversations
from posttrain.data.tokenizer import load_tokenizer
from posttrain.early_warning import EarlyWarning
from posttrain.manifest import code_revision
from posttrain.records import TrainingSample
from posttrain.tracking.console import format_s
from posttrain.tracking.jsonl import read_jsonl

FOLDER = Path("benchmarks") / "results"
RESULTS = Path(__file__).parent / "results" / "num_zeros.jsonl"
DOMAINS = list(WORLDS)

SHAPE = {"num_experts": 32, "top_k": 2, "moe_width": 64}  # 16 experts for one that is chosen
RATES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
BASE_RATE = 1e-3  # of the tiny setting; the report's 1e-4 is for runs of many thousand steps
STOCK_EPS = 1e-8
QUANTILES = (0.001, 0.1, 0.5, 0.9)
PROBE_STEPS = 40
SKEW = 0.95  # share of one domain where data are skewed
RAMP_STEPS = 60  # in which the skew of the narrow arms grows
NUM_REPEATED = 256  # rows of the arm that overfits
NUM_HELD_OUT = 32  # rows a domain
NUM_SFT = 16_000
TOKENS_PER_MICRO_BATCH = 2000
STEP_S = {"float32": 0.22, "bfloat16": 1.1}  # for the estimate alone; validations included


@dataclass(kw_only=True, frozen=True)
class Size:
    """How long everything is. Batches are small, so that 32 experts feel a lack of tokens."""

    pretrain_steps: int
    steps: int
    shift: int  # the step after which the data of the skewed arms begin to change
    validate_every: int = 5
    batch_size: int = 32
    pretrain_batch_size: int = 64


FULL = Size(pretrain_steps=300, steps=140, shift=40)
QUICK = Size(pretrain_steps=240, steps=110, shift=30)

# Arms -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class Arm:
    """One setting. ``quantile`` of sqrt(v) gives epsilon; None is the stock one.

    ``data``: "narrow", balanced and then more and more of one domain; "shift", almost all of one domain and then almost
    none; "balanced"; "repeat", balanced and then few rows over and over.
    """

    data: str
    rate: float = BASE_RATE
    quantile: float | None = None
    dtype: str = "float32"
    quick: bool = False

    @property
    def name(self) -> str:
        parts = [self.data]
        if self.rate != BASE_RATE:
            parts.append(f"rate={self.rate:g}")
        if self.quantile is not None:
            parts.append(f"eps=q{self.quantile:g}")
        if self.dtype != "float32":
            parts.append(self.dtype)
        return " ".join(parts)


ARMS = {
    arm.name: arm
    for arm in (
        *(Arm(data="narrow", rate=rate, quick=rate in (0.0, BASE_RATE)) for rate in RATES),
        *(Arm(data="narrow", quantile=q) for q in QUANTILES),
        Arm(data="narrow", dtype="bfloat16"),
        *(Arm(data="shift", rate=rate) for rate in (0.0, BASE_RATE)),
        Arm(data="balanced", quick=True),
        Arm(data="balanced", rate=0.0),
        Arm(data="repeat", quick=True),
        *(Arm(data="repeat", quantile=q) for q in QUANTILES),
        Arm(data="repeat", rate=0.0),
        Arm(data="repeat", dtype="bfloat16"),
    )
}

# Data -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Data:
    """Rows of one seed by domain; no prompt of ``held_out`` is in the others."""

    pretrain: dict[str, list[TrainingSample]]
    tune: dict[str, list[TrainingSample]]
    held_out: list[TrainingSample]


def make_data(folder: Path, seed: int) -> Data:
    """Demonstrations of the four tiny domains, and the random model whose tokenizer they need, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = build(seed, num_sft=NUM_SFT, num_prompts=1, num_valid=1, num_heldout=1)[SFT]
    (folder / SFT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_model(folder / "random", seed, **SHAPE)
    tokenizer = load_tokenizer(str(folder / "random"))
    samples = load_conversations(DataConfig(path=str(folder / SFT)), tokenizer, 160)
    return split(samples)


def split(samples: list[TrainingSample]) -> Data:
    """The first NUM_HELD_OUT rows of a domain are held out; of the others half are for SFT before the cells."""
    data = Data(pretrain={}, tune={}, held_out=[])
    for domain in DOMAINS:
        own = [s for s in samples if s.domain == domain]
        held_out, rest = own[:NUM_HELD_OUT], own[NUM_HELD_OUT:]
        asked = {prompt(s) for s in held_out}
        rest = [s for s in rest if prompt(s) not in asked]
        data.held_out += held_out
        data.pretrain[domain], data.tune[domain] = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return data


def prompt(sample: TrainingSample) -> bytes:
    """The tokens before the first that is learned."""
    return sample.token_ids[: int(sample.loss_mask.argmax())].tobytes()


def share_of_first(kind: str, step: int, shift: int) -> float:
    """Share of the first domain in the batch of ``step``."""
    even = 1 / len(DOMAINS)
    if kind == "shift":
        return SKEW if step <= shift else 1 - SKEW
    if kind == "narrow":
        return even + (SKEW - even) * min(max(step - shift, 0) / RAMP_STEPS, 1)
    return even


def batches(
    kind: str, rows: dict[str, list[TrainingSample]], size: Size, seed: int
) -> Iterator[list[TrainingSample]]:
    """One batch a step, the same for all arms with this ``kind`` of data and seed."""
    rng = random.Random(f"{seed}/{kind}")
    for step in count(1):
        if kind == "repeat" and step > size.shift:
            break
        share = share_of_first(kind, step, size.shift)
        chosen = [
            DOMAINS[0] if rng.random() < share else rng.choice(DOMAINS[1:]) for _ in range(size.batch_size)
        ]
        yield [rng.choice(rows[domain]) for domain in chosen]
    few = [s for d in DOMAINS for s in rng.sample(rows[d], NUM_REPEATED // len(DOMAINS))]
    while True:
        rng.shuffle(few)
        for first in range(0, len(few), size.batch_size):
            yield few[first : first + size.batch_size]


# Cells ----------------------------------------------------------------------------------------------------------


class Study:
    """Models and cells in one work folder, one learner for all of them."""

    def __init__(self, work: Path, size: Size, num_threads: int) -> None:
        self.work, self.size = work, size
        self.learner = local.LocalLearner(num_threads)
        self._data: dict[int, Data] = {}

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            self._data = {seed: make_data(self.work / f"seed{seed}", seed)}
        return self._data[seed]

    def settings(self, arm: Arm, eps: float) -> LearnerConfig:
        return LearnerConfig(
            lr=1e-3,
            warmup_steps=10,
            eps=eps,
            dtype=Dtype(arm.dtype),
            zero_stage=0
            if arm.dtype == "float32"
            else 2,  # float32 master weights live in the ZeRO optimizer
            expert_bias_rate=arm.rate,
            aux_loss_coef=1e-6,
            max_tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
        )

    def start(self, seed: int) -> Path:
        """The model that all cells of a seed start from: SFT on balanced data, with a balanced load."""
        model = self.work / f"seed{seed}" / f"start-{self.size.pretrain_steps}"
        if model.exists():
            return model
        steps, rows = self.size.pretrain_steps, self.data(seed).pretrain
        settings = LearnerConfig(
            lr=3e-3,
            schedule=Schedule.cosine,
            min_lr_ratio=0.1,
            warmup_steps=20,
            expert_bias_rate=BASE_RATE,
            aux_loss_coef=1e-6,
            max_tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
        )
        self.learner.reset(settings, self.work / f"seed{seed}" / "random", steps, seed)
        size = Size(pretrain_steps=0, steps=steps, shift=0, batch_size=self.size.pretrain_batch_size)
        for step, batch in zip(range(1, steps + 1), batches("balanced", rows, size, seed), strict=False):
            metrics = self.learner.train_step(batch, step)
        print(f"seed {seed}: SFT before the cells ends at loss {metrics['loss']:.3f}", flush=True)
        self.learner.worker.save_model(model)
        return model

    def probe(self, seed: int) -> dict[str, Any]:
        """Quantiles of sqrt(v) over the elements that ever had a gradient, after a few steps of the base setting."""
        start, rows = self.start(seed), self.data(seed).tune
        self.learner.reset(self.settings(Arm(data="balanced"), STOCK_EPS), start, PROBE_STEPS, seed)
        feed = batches("balanced", rows, self.size, seed)
        for step, batch in zip(range(1, PROBE_STEPS + 1), feed, strict=False):
            self.learner.train_step(batch, step)
        roots = self.learner.second_moments().numpy()
        alive = np.sort(roots[roots > 0])
        found = {f"{q:g}": float(alive[int(q * (len(alive) - 1))]) for q in QUANTILES}
        return {"probe": found, "zero_share": float((roots == 0).mean()), "steps": PROBE_STEPS, "seed": seed}

    def cell(self, arm: Arm, eps: float, seed: int) -> dict[str, Any]:
        """Series of the metrics over the steps, and the steps at which the alarms of a run would have sounded first."""
        start, data, size = self.start(seed), self.data(seed), self.size
        self.learner.reset(self.settings(arm, eps), start, size.steps, seed)
        warning, alarms = EarlyWarning(), dict[str, int]()
        series: dict[str, list[float]] = {name: [] for name in SERIES}
        validation: dict[str, list[float]] = {}
        begin = time.perf_counter()
        for step, batch in zip(
            range(1, size.steps + 1), batches(arm.data, data.tune, size, seed), strict=False
        ):
            metrics = self.learner.train_step(batch, step)
            if step == 1 or step % size.validate_every == 0:
                for domain, loss in self.learner.validate(data.held_out).items():
                    metrics[f"validation/loss/{domain}"] = loss
                    validation.setdefault(domain, []).append(round(loss, 4))
            for key, trouble in warning.check(metrics):
                if trouble is not None:
                    alarms.setdefault(key, step)
            for name in SERIES:
                series[name].append(float(f"{metrics[name]:.5g}"))
        return {
            "arm": arm.name,
            "seed": seed,
            "data": arm.data,
            "rate": arm.rate,
            "eps": eps,
            "dtype": arm.dtype,
            "num_elements": sum(self.learner.worker.num_zeros.sizes.values()),
            "shift": None if arm.data == "balanced" else size.shift,
            "validated": [s for s in range(1, size.steps + 1) if s == 1 or s % size.validate_every == 0],
            "validation": validation,
            "alarms": alarms,
            "series": series,
            "wall_s": round(time.perf_counter() - begin, 1),
        }


def run(args: argparse.Namespace, names: list[str], results: Path) -> None:
    """Measure the cells that are not in ``results`` yet, and append them."""
    lines = read_jsonl(results) if results.exists() else []
    done = {(line["arm"], line["seed"]) for line in lines if "arm" in line}
    cells = [(ARMS[name], seed) for seed in args.seeds for name in names if (name, seed) not in done]
    print(f"{len(args.seeds) * len(names)} cells, {len(cells)} to do", flush=True)
    if not cells:
        return
    if not args.quick and (code_revision(str(FOLDER)) or "-dirty").endswith("-dirty"):
        sys.exit(
            "files differ from the commit that the lines would name: commit or stash them, or use --quick"
        )
    size = QUICK if args.quick else FULL
    costs = [STEP_S[arm.dtype] * size.steps for arm, _ in cells]
    before = 2 * STEP_S["float32"] * size.pretrain_steps * len({seed for _, seed in cells})
    print(f"estimated {format_s(before + sum(costs))} on 2 quiet CPU cores", flush=True)
    study = Study(args.work, size, args.threads)

    def append(line: dict[str, Any], command: str) -> None:
        line |= {
            "commit": code_revision(str(FOLDER)),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python -m benchmarks.num_zeros {command}" + " --quick" * args.quick,
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as stream:
            stream.write(json.dumps(line, separators=(",", ":")) + "\n")

    probe = next((line for line in lines if "probe" in line), None)
    if probe is None:
        probe = study.probe(args.seeds[0])
        append(probe, f"--seeds {args.seeds[0]}")
    print("sqrt(v): " + ", ".join(f"quantile {q} {v:.2g}" for q, v in probe["probe"].items()), flush=True)
    begin, paid = time.perf_counter(), 0.0
    for number, (arm, seed) in enumerate(cells):
        eps = STOCK_EPS if arm.quantile is None else probe["probe"][f"{arm.quantile:g}"]
        line = study.cell(arm, eps, seed)
        append(line, f"--arms '{arm.name}' --seeds {seed}")
        paid += costs[number]
        spent = time.perf_counter() - begin
        print(
            f"{arm.name} seed {seed}: {line['wall_s']:.0f} s; spent {format_s(spent)}, about"
            f" {format_s(sum(costs[number + 1 :]) * spent / paid)} left",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these arms (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4, with --quick 0")
    parser.add_argument("--work", type=Path, help="folder of the models (default: runs/benchmark-num-zeros)")
    parser.add_argument(
        "--results", type=Path, help="the lines (default: benchmarks/results/num_zeros.jsonl)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--table", action="store_true", help="tables and pictures, measure nothing")
    parser.add_argument("--quick", action="store_true", help="few arms, one seed, shorter runs")
    args = parser.parse_args()
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2, 3, 4])
    args.work = args.work or Path("runs") / ("benchmark-num-zeros" + "-quick" * args.quick)
    results = args.results or (args.work / "num_zeros.jsonl" if args.quick else RESULTS)
    if not args.table:
        names = args.arms or [name for name, arm in ARMS.items() if arm.quick or not args.quick]
        run(args, names, results)
    if not results.exists():
        sys.exit(f"{results}: no results yet; start without --table")
    show(results)


if __name__ == "__main__":
    main()
