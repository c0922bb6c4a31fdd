"""`make demo`: write the tiny model and data, run all three stages, print the table.

Environment: SEED (default 0), QUICK=1 (a few minutes, numbers not meant to convince), OUT (folder for runs).
A demo that was interrupted goes on where it was.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from examples.tiny.make_data import make
from examples.tiny.model import build_model
from posttrain.cli import main

QUICK = [
    "sft.algorithm.steps=160",
    "rl.algorithm.steps=8",
    "mopd.algorithm.steps=8",
    "teachers.code.steps=8",
    "eval.num_prompts=100",
    "eval.cross_num_prompts=25",
    "eval.num_samples=2",
]


def demo(seed: int, quick: bool, out: Path) -> int:
    """Inputs, then `posttrain pipeline experiment=tiny`; returns the exit code."""
    begin = time.perf_counter()
    name = f"tiny{'-quick' if quick else ''}-seed{seed}"
    inputs = out / name / "inputs"
    if not (inputs / "READY").exists():
        print(f"writing the tiny model and data into {inputs}", flush=True)
        make(inputs, seed=seed)
        build_model(inputs / "model", seed)
        (inputs / "READY").touch()
    overrides = [
        "experiment=tiny",
        f"name={name}",
        f"runs_dir={out}",
        f"seed={seed}",
        *(QUICK if quick else []),
    ]
    code = main(["pipeline", *overrides])
    if quick and code == 0:
        print(
            "QUICK=1: the same flow with a fraction of the steps and prompts; these numbers are not meant to convince."
        )
    print(f"whole demo: {time.perf_counter() - begin:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(
        demo(
            seed=int(os.environ.get("SEED") or 0),
            quick=os.environ.get("QUICK") in ("1", "true", "yes"),
            out=Path(os.environ.get("OUT") or "runs"),
        )
    )
