"""Does the early warning name what is wrong with a run, and is it silent where nothing is?

    .venv/bin/python -m benchmarks.early_warning [--planted | --healthy] [--seeds N ...] [--work DIR] [--json FILE]
    .venv/bin/python -m benchmarks.early_warning --planted --quick     # one model, little data, a shorter SFT before

Planted: tiny MoE models (sigmoid router with a bias, softmax router) that SFT has made go on with healthy SFT; after
`HEALTHY_STEPS` steps one thing is broken, in the weights or in the data. Which alarm names it first, after how many
steps, in which layer, and when the validation loss would have shown it.

Healthy: 20 runs with nothing broken, of many settings; every alarm is a false one.

Seeds of both come from the commit that last changed what can sound (`THRESHOLDS`), so that no run and no row of data can
have been seen when the thresholds were set. A working tree with changes is refused, unless seeds are given: then the
file says so.

Both go through the learner of the runs, in this process, and hear the alarms of a run (`posttrain.alarms.Alarms`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import benchmarks.local_learner as local  # before anything that imports DeepSpeed
from benchmarks.num_zeros import DOMAINS, Data, split
from examples.tiny.make_data import SFT, build
from examples.tiny.model import build_model
from posttrain.alarms import Alarms
from posttrain.config import DataConfig, Dtype, LearnerConfig, Schedule
from posttrain.data.sources import load_conversations
from posttrain.data.tokenizer import load_tokenizer
from posttrain.early_warning import VALIDATION_MARGIN, Trouble
from posttrain.manifest import code_revision
from posttrain.records import TrainingSample

FOLDER = Path("benchmarks") / "results"
RESULTS = Path(__file__).parent / "results" / "early_warning.json"
THRESHOLDS = (
    "posttrain/early_warning.py",
    "posttrain/alarms.py",
    "posttrain/learner/monitors",
    "posttrain/learner/moe/balance.py",
)
FAMILIES = ("mimo_v2_flash", "qwen3_moe")
HEALTHY_STEPS = 30  # before trouble is planted; 20 make the bands
BAR_STEPS = 20  # in which trouble is to be named
VALIDATE_EVERY = 2  # of planted trouble, so that it is known when the validation loss shows it
NUM_PLANTED, NUM_HEALTHY = 3, 20  # seeds
HEALTHY_RUN_STEPS, HEALTHY_VALIDATE_EVERY = 150, 5
MOE_LAYER = 1  # index of the MoE layer in which routers are broken; the middle one of three
BROKEN_LAYER = MOE_LAYER + 1  # its global number: the first layer is dense
NUM_DUPLICATED = 32  # rows that come again and again
FADING_STEPS = 10  # in which an expert loses its tokens
AT_AGE = 3  # steps after the planting at which single batches are bad


@dataclass(kw_only=True, frozen=True)
class Size:
    """How much of everything. ``num_sft`` is so large that no healthy run sees a row of a small domain again."""

    num_sft: int
    pretrain_steps: int
    watched_steps: int  # after trouble was planted


FULL = Size(num_sft=48_000, pretrain_steps=150, watched_steps=BAR_STEPS)
QUICK = Size(num_sft=8_000, pretrain_steps=80, watched_steps=BAR_STEPS)

Batch = list[TrainingSample]
BASE = LearnerConfig(
    lr=1e-3,
    warmup_steps=10,
    expert_bias_rate=None,
    aux_loss_coef=None,
    max_tokens_per_micro_batch=2000,
)

# Trouble --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class Plant:
    """One kind of trouble. ``alarms`` are the names that say it rightly, ``layer`` the one that is broken. ``weights`` breaks
    the model, before ``num_times`` steps in a row; ``data`` gives the batches from then on: (steps since then, healthy batch,
    rows of the run) -> batch."""

    name: str
    alarms: tuple[str, ...]
    layer: int | None = None
    weights: Callable[[local.LocalLearner, Batch], None] | None = None
    num_times: int = 1
    data: Callable[[int, Batch, Batch], Batch] | None = None


@torch.no_grad()
def push(learner: local.LocalLearner, batch: Batch, experts: list[int], bias: float, logits: float) -> None:
    """The router of one layer sends more tokens to ``experts``, or fewer (negative): by so much more bias where it has one,
    else by so much along a direction on which nearly all held-out tokens are 1 or more. Others may still find their way."""
    assert learner.worker.replay is not None
    router = learner.worker.replay.routers[MOE_LAYER]
    own = router.correction_bias()
    if own is not None:
        own[experts] += bias
        return
    seen: list[torch.Tensor] = []
    handle = router.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    learner.validate(batch)
    handle.remove()
    (weight,) = router.parameters()
    weight[experts] += logits * _common_direction(torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]))


def _common_direction(inputs: torch.Tensor) -> torch.Tensor:
    """[H] on which nearly all of ``inputs`` [N, H] are 1 or more: least squares that no longer pull back what is above 1."""
    direction = inputs.new_zeros(inputs.shape[1], 1)
    for _ in range(100):
        direction = torch.linalg.lstsq(inputs, (inputs @ direction).clamp(min=1.0)).solution
    return direction[:, 0]


def two_experts(learner: local.LocalLearner, batch: Batch) -> None:
    """All tokens to two experts."""
    push(learner, batch, [0, 1], 10.0, 30.0)


def shunned_experts(learner: local.LocalLearner, batch: Batch) -> None:
    """Hardly any to two."""
    push(learner, batch, [0, 1], -10.0, -30.0)


def fading_expert(learner: local.LocalLearner, batch: Batch) -> None:
    """Fewer to one, each time, until it has hardly any."""
    push(learner, batch, [0], -0.1, -0.4)


def underflow(learner: local.LocalLearner, batch: Batch) -> None:
    """What the second layer's attention reads and writes is scaled so far down that the gradient of its weights, which has
    both factors, leaves the range of the type."""
    attention: Any = learner.worker.policy.model.model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1e-25,))
    attention.o_proj.register_forward_hook(lambda _, inputs, output: output * 1e-25)


def duplicated(age: int, batch: Batch, rows: Batch) -> Batch:
    """The same few rows, over and over."""
    return rows[:NUM_DUPLICATED]


def one_nan(learner: local.LocalLearner, batch: Batch) -> None:
    """One row of one gradient is NaN, once."""
    projection: Any = learner.worker.policy.model.model.layers[1].self_attn.o_proj

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient.index_fill(0, torch.tensor([0]), torch.nan)

    handle = projection.weight.register_hook(poison)


def noise(age: int, batch: Batch, rows: Batch) -> Batch:
    """The answers of one batch are random tokens."""
    return batch if age != AT_AGE else [_scrambled(sample) for sample in batch]


def _scrambled(sample: TrainingSample) -> TrainingSample:
    drawn = np.random.default_rng(len(sample.token_ids)).integers(5, 90, len(sample.token_ids))
    return replace(sample, token_ids=np.where(sample.loss_mask, drawn, sample.token_ids).astype(np.int32))


PLANTS = (
    Plant(
        name="router biased to two experts",
        alarms=("imbalance", "dead_experts"),
        layer=BROKEN_LAYER,
        weights=two_experts,
    ),
    Plant(
        name="two experts without tokens",
        alarms=("dead_experts",),
        layer=BROKEN_LAYER,
        weights=shunned_experts,
    ),
    Plant(
        name="an expert that fades",
        alarms=("dead_experts",),
        layer=BROKEN_LAYER,
        weights=fading_expert,
        num_times=FADING_STEPS,
    ),
    Plant(name="duplicated data", alarms=("overfitting",), data=duplicated),
    Plant(name="layer scaled to underflow", alarms=("gradient_underflow",), layer=1, weights=underflow),
    Plant(name="NaN in one gradient", alarms=("nan",), weights=one_nan),
    Plant(name="one batch of noise", alarms=("loss_spike",), data=noise),
)

# Runs -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Heard:
    """What a run said: alarms in order with their steps, and the validation loss [(step, value)]."""

    alarms: list[tuple[int, Trouble]]
    validation: list[tuple[int, float]]


def make_data(folder: Path, num_sft: int, seed: int) -> Data:
    """Demonstrations of the four tiny domains from ``seed``; no prompt that is held out is in the others."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = build(seed, num_sft=num_sft, num_prompts=1, num_valid=1, num_heldout=1)[SFT]
    (folder / SFT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for family in FAMILIES:
        build_model(folder / family, seed, family=family)
    tokenizer = load_tokenizer(str(folder / FAMILIES[0]))
    return split(load_conversations(DataConfig(path=str(folder / SFT)), tokenizer, 160))


def batches(
    rows: dict[str, Batch], size: int, weights: list[float], seed: int, in_bursts: bool = False
) -> Iterator[Batch]:
    """Batches of ``size`` rows, domains by ``weights``; every row once before any comes again. ``in_bursts``: half of a batch
    is of one domain, drawn anew for each."""
    rng = random.Random(seed)
    feeds = {domain: _feed(own, rng) for domain, own in rows.items()}
    while True:
        drawn = rng.choices(DOMAINS, weights, k=size)
        if in_bursts:
            drawn[: size // 2] = rng.choices(DOMAINS, weights) * (size // 2)
        yield [next(feeds[domain]) for domain in drawn]


def _feed(rows: Batch, rng: random.Random) -> Iterator[TrainingSample]:
    while True:
        yield from rng.sample(rows, len(rows))


class Bench:
    """Data, models and one learner in a work folder."""

    def __init__(self, work: Path, size: Size, num_threads: int) -> None:
        self.work, self.size = work, size
        self.learner = local.LocalLearner(num_threads)
        self._data: dict[int, Data] = {}  # of the last seed

    def data(self, seed: int) -> Data:
        """Data of ``seed``, and its random models."""
        if seed not in self._data:
            self._data = {seed: make_data(self.work / f"seed{seed}", self.size.num_sft, seed)}
        return self._data[seed]

    def tuned(self, family: str, data: Data, seed: int) -> Path:
        """The model that SFT on balanced data makes of a random one."""
        folder = self.work / f"seed{seed}"
        model = (
            folder / f"{family}-tuned-{self.size.pretrain_steps}-{code_revision(str(FOLDER)) or 'unknown'}"
        )
        if model.exists():
            return model
        settings = replace(BASE, lr=3e-3, schedule=Schedule.cosine, min_lr_ratio=0.1, warmup_steps=20)
        self.learner.reset(settings, folder / family, self.size.pretrain_steps, seed)
        feed = batches(data.pretrain, 64, [1.0] * len(DOMAINS), seed)
        for step in range(1, self.size.pretrain_steps + 1):
            self.learner.train_step(next(feed), step)
        self.learner.worker.save_model(model)
        return model

    def run(
        self, name: str, feed: Iterator[Batch], held_out: Batch, num_steps: int, validate_every: int
    ) -> Heard:
        """Steps of the learner as it stands, with the alarms of a run. All metrics stay in ``name``.jsonl of the work folder."""
        alarms, heard = Alarms(), Heard(alarms=[], validation=[])
        log = (self.work / f"{name}.jsonl").open("w")
        for step, batch in zip(range(1, num_steps + 1), feed, strict=False):
            metrics = self.learner.train_step(batch, step)
            if step == 1 or step % validate_every == 0:
                losses = self.learner.validate(held_out)
                metrics |= {f"validation/loss/{domain}": loss for domain, loss in losses.items()}
                heard.validation.append((step, losses["all"]))
            log.write(json.dumps({"step": step} | metrics) + "\n")
            heard.alarms += [(step, trouble) for trouble in alarms.check(metrics)]
        log.close()
        return heard

    def broken(self, plant: Plant, data: Data, seed: int) -> Iterator[Batch]:
        """Healthy batches; after HEALTHY_STEPS of them the trouble begins."""
        few = [sample for own in data.tune.values() for sample in own[: NUM_DUPLICATED // len(DOMAINS)]]
        for step, batch in enumerate(batches(data.tune, 64, [1.0] * len(DOMAINS), seed), start=1):
            age = step - HEALTHY_STEPS
            if plant.weights is not None and 1 <= age <= plant.num_times:
                plant.weights(self.learner, data.held_out)
            yield plant.data(age, batch, few) if plant.data is not None and age >= 1 else batch

    def planted(self, plant: Plant, family: str, seed: int) -> dict[str, Any]:
        """One line of the table of planted trouble."""
        data = self.data(seed)
        model, num_steps = self.tuned(family, data, seed), HEALTHY_STEPS + self.size.watched_steps
        self.learner.reset(BASE, model, num_steps, seed)
        name = f"{plant.name}-{family}-{seed}".replace(" ", "_")
        heard = self.run(name, self.broken(plant, data, seed), data.held_out, num_steps, VALIDATE_EVERY)
        return judge(plant, heard) | {"trouble": plant.name, "family": family, "seed": seed}

    def healthy(self, number: int, seed: int) -> dict[str, Any]:
        """One run of settings drawn from ``seed``, nothing broken."""
        rng = random.Random(seed)
        family, is_tuned = FAMILIES[number % 2], number % 4 < 2
        dtype = Dtype.bfloat16 if number % 5 == 4 else Dtype.float32
        settings = replace(
            BASE,
            lr=rng.choice([3e-4, 1e-3, 3e-3] if is_tuned else [1e-3, 3e-3]),
            schedule=rng.choice(list(Schedule)),
            warmup_steps=rng.choice([5, 10, 20]),
            dtype=dtype,
            zero_stage=2 if dtype is Dtype.bfloat16 else 0,
            expert_bias_rate=rng.choice([1e-4, 1e-3]) if family == FAMILIES[0] else None,
        )
        size, weights = rng.choice([32, 64, 96]), [rng.uniform(0.5, 2.0) for _ in DOMAINS]
        in_bursts = number % 3 == 2
        folder, data = self.work / f"seed{seed}", self.data(seed)
        model = self.tuned(family, data, seed) if is_tuned else folder / family
        self.learner.reset(settings, model, HEALTHY_RUN_STEPS, seed)
        feed = batches(data.tune, size, weights, seed, in_bursts)
        heard = self.run(f"healthy-{seed}", feed, data.held_out, HEALTHY_RUN_STEPS, HEALTHY_VALIDATE_EVERY)
        return {
            "seed": seed,
            "family": family,
            "start": "tuned" if is_tuned else "random",
            "dtype": dtype.value,
            "lr": settings.lr,
            "schedule": settings.schedule.value,
            "batch_size": size,
            "in_bursts": in_bursts,
            "alarms": [_alarm(step, trouble) for step, trouble in heard.alarms],
            "losses": [heard.validation[0][1], heard.validation[-1][1]],
        }


def judge(plant: Plant, heard: Heard) -> dict[str, Any]:
    """When trouble was named, by what, and when the validation loss shows it; steps are counted from the planting."""
    early = [(step, t) for step, t in heard.alarms if step <= HEALTHY_STEPS]
    right = [(step, t) for step, t in heard.alarms if step > HEALTHY_STEPS and t.name in plant.alarms]
    first = right[0] if right else None
    return {
        "named_after": first[0] - HEALTHY_STEPS if first else None,
        "alarm": _alarm(*first) if first else None,
        "right_layer": None if plant.layer is None else first is not None and first[1].layer == plant.layer,
        "validation_after": validation_shows(heard.validation),
        "false_alarms": [_alarm(step, t) for step, t in early],
        "others": {
            name: after for name, after in _first_named(heard).items() if name not in plant.alarms[:1]
        },
    }


def _first_named(heard: Heard) -> dict[str, int]:
    """Name of an alarm -> steps from the planting to the first of it."""
    found: dict[str, int] = {}
    for step, trouble in heard.alarms:
        if step > HEALTHY_STEPS:
            found.setdefault(trouble.name, step - HEALTHY_STEPS)
    return found


def validation_shows(validation: list[tuple[int, float]]) -> int | None:
    """Steps from the planting to the first validation loss that lies above the lowest before it by VALIDATION_MARGIN and by
    more than any loss of the healthy steps did; None where there is none."""
    lowest, usual = float("inf"), VALIDATION_MARGIN
    for step, loss in validation:
        rise = loss / lowest - 1
        if step <= HEALTHY_STEPS:
            usual = max(usual, rise)
        elif rise > usual or not np.isfinite(loss):
            return step - HEALTHY_STEPS
        lowest = min(lowest, loss)
    return None


def _alarm(step: int, trouble: Trouble) -> dict[str, Any]:
    return {
        "step": step,
        "name": trouble.name,
        "metric": trouble.metric,
        "layer": trouble.layer,
        "value": trouble.value if math.isfinite(trouble.value) else None,
    }


def thresholds_commit() -> str:
    """The commit that last changed the thresholds."""
    command = ["git", "log", "-1", "--format=%H", "--", *THRESHOLDS]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def unseen_seeds(commit: str, number: int) -> list[int]:
    """Seeds that nobody could know before ``commit``."""
    first = int(commit[:7], 16)
    return [first + i for i in range(number)]


# Report ---------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """Both tables."""
    if planted := result.get("planted"):
        _show_planted(planted["lines"])
        print(_origin(planted))
    if healthy := result.get("healthy"):
        noisy = [run for run in healthy["lines"] if run["alarms"]]
        print(f"\n{len(noisy)} of {len(healthy['lines'])} healthy runs with an alarm")
        for run in noisy:
            print(json.dumps(run))
        print(_origin(healthy))


def _show_planted(lines: list[dict[str, Any]]) -> None:
    header = [
        "trouble",
        "model",
        "named after steps",
        "by",
        "right layer",
        "validation loss shows it after",
        "others",
    ]
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for name, family in dict.fromkeys((line["trouble"], line["family"]) for line in lines):
        own = [line for line in lines if (line["trouble"], line["family"]) == (name, family)]
        print("| " + " | ".join([name, family, *_cells(own)]) + " |")
    in_time = [line for line in lines if line["named_after"] is not None and line["named_after"] <= BAR_STEPS]
    placed = [line["right_layer"] for line in lines if line["right_layer"] is not None]
    print(
        f"{len(in_time)} of {len(lines)} named within {BAR_STEPS} steps; of {len(placed)} with a broken layer"
        f" {sum(placed)} name it"
    )


def _cells(lines: list[dict[str, Any]]) -> list[str]:
    def steps(key: str) -> str:
        return ", ".join("-" if line[key] is None else str(line[key]) for line in lines)

    metrics = sorted({line["alarm"]["metric"] for line in lines if line["alarm"]})
    others = sorted({name for line in lines for name in line["others"]})
    placed = [line["right_layer"] for line in lines if line["right_layer"] is not None]
    return [
        steps("named_after"),
        ", ".join(metrics),
        f"{sum(placed)}/{len(placed)}" if placed else "",
        steps("validation_after"),
        ", ".join(others) or "-",
    ]


def _origin(part: dict[str, Any]) -> str:
    seeds = "given seeds" if part["are_seeds_given"] else "seeds from that commit"
    return f"thresholds of {part['thresholds'][:7]}, {seeds}, {part['date'][:10]}, {part['wall_s']} s"


# Command --------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--planted", action="store_true", help="only planted trouble")
    parser.add_argument("--healthy", action="store_true", help="only healthy runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: from the commit of the thresholds")
    parser.add_argument(
        "--work", type=Path, help="folder of data and models (default: runs/benchmark-early-warning)"
    )
    parser.add_argument(
        "--json", type=Path, help="the numbers (default: benchmarks/results/early_warning.json)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--quick", action="store_true", help="one model, little data, a shorter SFT before")
    args = parser.parse_args()
    args.work = args.work or Path("runs") / ("benchmark-early-warning" + "-quick" * args.quick)
    args.json = args.json or (args.work / "early_warning.json" if args.quick else RESULTS)
    return args


def main() -> None:
    args = arguments()
    if not args.seeds and (code_revision(str(FOLDER)) or "-dirty").endswith("-dirty"):
        sys.exit(
            "files differ from the commit that seeds would come from: commit or stash them, or give --seeds"
        )
    commit, both = thresholds_commit(), args.planted == args.healthy
    seeds = args.seeds or unseen_seeds(commit, NUM_PLANTED + NUM_HEALTHY)
    bench = Bench(args.work, QUICK if args.quick else FULL, args.threads)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {}
    if args.planted or both:
        families = FAMILIES[:1] if args.quick else FAMILIES
        chosen = args.seeds or seeds[:NUM_PLANTED]
        cells = [(plant, family, seed) for seed in chosen for family in families for plant in PLANTS]
        parts["planted"] = lambda: [_said(bench.planted(*cell)) for cell in cells]
    if args.healthy or both:
        runs = enumerate(args.seeds or seeds[NUM_PLANTED:])
        parts["healthy"] = lambda: [_said(bench.healthy(number, seed)) for number, seed in runs]
    for name, measure in parts.items():
        begin = time.perf_counter()
        part = {
            "lines": measure(),
            "thresholds": commit,
            "are_seeds_given": bool(args.seeds),
            "commit": code_revision(str(FOLDER)),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": round(time.perf_counter() - begin),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(result | {name: part}, indent=1) + "\n")
    show(json.loads(args.json.read_text()))


def _said(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
