"""Where the seconds of one MOPD step of the tiny setting go.

    .venv/bin/python benchmarks/step.py [--json FILE] [--steps 12] [--work DIR]

Trains the tiny model by SFT for a moment (answers of a random model have no realistic length), makes four teachers
out of it by a few more steps on their own domain, and runs the ordinary `mopd` run. The first steps warm up and are
left out; the rest gives median seconds and tokens per second of each part: prompt and answer where a model runs over
both (teacher, train), else sampled tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from examples.tiny.make_data import make
from examples.tiny.model import build_model
from posttrain.compose import compose
from posttrain.engines import Engines
from posttrain.runs import mopd, pipeline, sft

WARM_UP_STEPS = 3
PARTS = {  # part -> whose tokens it is measured by
    "generate": "tokens/all",
    "reward": "tokens/all",
    "teacher": "num_tokens",
    "train": "num_tokens",
    "update_weights": "tokens/all",
    "rest": "tokens/all",
    "step": "tokens/all",
}


def measure(work: Path, num_steps: int, sft_steps: int) -> dict[str, Any]:
    """Run the stages in ``work`` and read the student's metrics.jsonl."""
    inputs = work / "step" / "inputs"
    make(inputs, seed=0, num_sft=20_000, num_prompts=3_000, num_valid=10, num_heldout=10)
    build_model(inputs / "model", 0)
    overrides = [
        "experiment=tiny",
        "name=step",
        f"runs_dir={work}",
        f"sft.algorithm.steps={sft_steps}",
        f"mopd.algorithm.steps={WARM_UP_STEPS + num_steps}",
        "tracking.wandb=disabled",
        "tracking.rollout_every_steps=1000",  # samples and replay measurements are not part of a step
        *(f"teachers.{d}.train=sft" for d in ("math", "code", "tool", "instruct")),
        *(f"teachers.{d}.steps=20" for d in ("math", "code", "tool", "instruct")),
    ]
    _, cfg = compose("pipeline", overrides)
    with Engines(cfg.ray) as engines:
        pipeline.warm_up(engines, cfg, sorted(cfg.teachers))
        base = sft.run(pipeline.sft_config(cfg), engines)
        teachers = {d: pipeline.teacher_model(cfg, d, base, engines) for d in sorted(cfg.teachers)}
        mopd.run(pipeline.mopd_config(cfg, base, teachers), engines)
    lines = (work / "step" / "mopd" / "metrics.jsonl").read_text().splitlines()
    return summarise([json.loads(line) for line in lines][WARM_UP_STEPS:])


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds, share and tokens/s of each part over the steps."""
    total = statistics.median(s["time_s/step"] for s in steps)
    parts = {}
    for part, tokens in PARTS.items():
        seconds = statistics.median(s.get(f"time_s/{part}", 0.0) for s in steps)
        rate = statistics.median(s[tokens] for s in steps) / seconds if seconds else None
        parts[part] = {"seconds": seconds, "share": seconds / total, "tokens_per_s": rate}
    return {"num_steps": len(steps), "machine": platform.processor() or platform.machine(), "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--steps", type=int, default=12, help="measured MOPD steps")
    parser.add_argument("--sft-steps", type=int, default=300, help="SFT steps before")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args.work or Path(temporary), args.steps, args.sft_steps)
    print(
        f"{'part':>15} {'seconds':>9} {'share':>7} {'tokens/s':>10}   (median of {result['num_steps']} steps)"
    )
    for part, row in result["parts"].items():
        rate = f"{row['tokens_per_s']:10,.0f}" if row["tokens_per_s"] else f"{'':>10}"
        print(f"{part:>15} {row['seconds']:9.3f} {100 * row['share']:6.1f}% {rate}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
