"""What counting num-zeros and the load of the experts costs a training step.

    .venv/bin/python -m benchmarks.learner_overhead [--json FILE] [--steps 60] [--tokens 16384]

One tiny MoE takes SFT steps of at least ``--tokens`` tokens in short rows through the learner of the runs, in this
process. Timers around the functions that only watch give their share of the seconds of the same step, so what else the
machine does hits both alike: the median over steps, with its 95 % bootstrap interval. Counting tokens per expert runs
inside the forward pass, where the bias update needs it as well; its timer is reported by itself and is not in the sum.
Bar: 1 % of a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import benchmarks.local_learner as local  # before anything that imports DeepSpeed
from examples.tiny.make_data import SFT, build
from examples.tiny.model import build_model
from posttrain.config import DataConfig, LearnerConfig
from posttrain.data.sources import load_conversations
from posttrain.data.tokenizer import load_tokenizer
from posttrain.learner.moe import balance
from posttrain.manifest import code_revision
from posttrain.records import TrainingSample

FOLDER = Path("benchmarks") / "results"
RESULTS = Path(__file__).parent / "results" / "learner_overhead.json"
BAR = 0.01
WARM_UP = 3
MAX_TOKENS = 48  # of a row
COUNTING = ("num_zeros",)
HEALTH = ("observe", "entropy", "health", "max_vio")  # what nothing but the metrics of experts needs


class Timers:
    """Seconds of functions since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        """Time ``owner.attribute`` from now on."""
        function: Callable[..., Any] = getattr(owner, attribute)
        self._seconds[name] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - begin

        setattr(owner, attribute, timed)

    def take(self) -> dict[str, float]:
        taken = dict(self._seconds)
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return taken


def short_rows(folder: Path, num_tokens: int) -> list[TrainingSample]:
    """Demonstrations of at most MAX_TOKENS tokens, with ``num_tokens`` or more together."""
    rows = build(0, num_sft=4000, num_prompts=1, num_valid=1, num_heldout=1)[SFT]
    (folder / SFT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_model(folder / "model", 0)
    tokenizer = load_tokenizer(str(folder / "model"))
    chosen: list[TrainingSample] = []
    for sample in load_conversations(DataConfig(path=str(folder / SFT)), tokenizer, 160):
        if sum(len(s.token_ids) for s in chosen) >= num_tokens:
            break
        if len(sample.token_ids) <= MAX_TOKENS:
            chosen.append(sample)
    return chosen


def measure(folder: Path, num_steps: int, num_tokens: int, num_threads: int) -> dict[str, Any]:
    """Seconds of every step and of what watches it."""
    batch = short_rows(folder, num_tokens)
    learner = local.LocalLearner(num_threads)
    settings = LearnerConfig(
        lr=1e-4, expert_bias_rate=1e-3, aux_loss_coef=1e-6, max_tokens_per_micro_batch=4000
    )
    learner.reset(settings, folder / "model", num_steps, 0)
    timers = Timers()
    timers.watch("num_zeros", learner.worker.num_zeros, "count")
    timers.watch("max_vio", balance, "max_violation")
    assert learner.worker.replay is not None and learner.worker.health is not None
    timers.watch("observe", learner.worker.health, "observe")
    timers.watch("health", learner.worker.health, "metrics")
    timers.watch("entropy", learner.worker.replay, "_add_entropy")
    timers.watch("select", learner.worker.replay, "_select")  # counts tokens per expert, in the forward pass
    seconds, parts = [], []
    for step in range(1, WARM_UP + num_steps + 1):
        timers.take()
        begin = time.perf_counter()
        metrics = learner.train_step(batch, step)
        if step > WARM_UP:
            seconds.append(time.perf_counter() - begin)
            parts.append(timers.take())
    return summarise(seconds, parts) | {
        "num_tokens": int(metrics["num_tokens"]),
        "num_rows": len(batch),
        "num_parameters": learner.worker.info().num_parameters,
        "num_threads": num_threads,
    }


def summarise(seconds: list[float], parts: list[dict[str, float]]) -> dict[str, Any]:
    """Median share of the step for every part, for counting zeros and for expert health, with intervals over steps."""
    rng = np.random.default_rng(0)

    def share(names: tuple[str, ...]) -> dict[str, Any]:
        own = np.array([sum(p[n] for n in names) / s for s, p in zip(seconds, parts, strict=True)])
        draws = np.median(rng.choice(own, (2000, len(own))), axis=1)
        low, high = np.quantile(draws, (0.025, 0.975))
        milliseconds = 1e3 * float(np.median([sum(p[n] for n in names) for p in parts]))
        return {"share": float(np.median(own)), "low": float(low), "high": float(high), "ms": milliseconds}

    return {
        "num_steps": len(seconds),
        "step_s": float(np.median(seconds)),
        "parts": {name: share((name,)) for name in parts[0]},
        "counting": share(COUNTING),
        "expert_health": share(HEALTH),
        "bar": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the numbers to this file")
    parser.add_argument("--steps", type=int, default=60, help="measured steps")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a step, at least")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Path(temporary), args.steps, args.tokens, args.threads)
    result |= {
        "commit": code_revision(str(FOLDER)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.learner_overhead --steps {args.steps} --tokens {args.tokens} --threads {args.threads}",
        "machine": platform.processor() or platform.machine(),
    }
    print(
        f"{result['num_steps']} steps of {result['num_tokens']} tokens in {result['num_rows']} rows:"
        f" {result['step_s']:.3f} s a step"
    )
    totals = {name: result[name] for name in ("counting", "expert_health")}
    for name, part in (result["parts"] | totals).items():
        print(
            f"{name:>13} {part['ms']:9.3f} ms {100 * part['share']:7.3f} % [{100 * part['low']:.3f}, {100 * part['high']:.3f}]"
        )
    for name, part in totals.items():
        print(f"{name}: bar {100 * BAR:g} % {'met' if part['high'] <= BAR else 'not met'}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
