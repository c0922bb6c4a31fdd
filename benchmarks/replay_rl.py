"""RL with routing replay against RL without it, on the tiny MoE: reward, mismatch KL and F(1.1) over the steps.

    .venv/bin/python benchmarks/replay_rl.py [--json FILE] [--picture FILE] [--seeds 5] [--steps 40] [--lr 5e-4]

One SFT model, then for every learning rate and seed two ordinary `rl` runs that differ in `learner.routing_replay`
alone. The train/inference correction is off, so that nothing but replay guards the update; `--correction icepop` puts
the default back. The reward is that of the training prompts, sampled before the update of its step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny.make_data import make
from examples.tiny.model import build_model
from posttrain.compose import compose
from posttrain.config import Correction, PipelineRun, Replay
from posttrain.engines import Engines
from posttrain.runs import pipeline, rl, sft
from posttrain.tracking.jsonl import read_jsonl

ARMS = {"replay": Replay.auto, "no replay": Replay.off}
CURVES = {"reward": "reward/all", "k3": "mismatch/k3", "f1.1": "mismatch/f1.1"}
LAST = 5  # steps that the table averages over


def configuration(work: Path, domain: str, num_steps: int, sft_steps: int) -> PipelineRun:
    overrides = [
        "experiment=tiny",
        "name=replay_rl",
        f"runs_dir={work}",
        f"sft.algorithm.steps={sft_steps}",
        f"rl.algorithm.steps={num_steps}",
        f"teachers.{domain}.steps={num_steps}",
        "rl.learner.schedule=constant",
        "tracking.wandb=disabled",
        "tracking.console=false",
        "tracking.rollout_samples=0",
        "tracking.rollout_every_steps=1000",
        "checkpoint.every_steps=1000",
    ]
    _, cfg = compose("pipeline", overrides)
    return cfg


def measure(work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs; one row each with its curves."""
    cfg = configuration(work, args.domain, args.steps, args.sft_steps)
    inputs = work / "replay_rl" / "inputs"
    make(inputs, seed=0, num_sft=32_000, num_prompts=2_000, num_valid=10, num_heldout=10)
    build_model(inputs / "model", 0)
    rows = []
    with Engines(cfg.ray) as engines:
        pipeline.warm_up(engines, cfg, sorted(cfg.teachers))
        base = args.model or sft.run(pipeline.sft_config(cfg), engines)
        for lr in args.lr:
            for seed in range(args.seeds):
                arms = list(
                    ARMS.items()
                )  # which comes first changes, because the engines' random state goes on
                for arm, routing_replay in arms if seed % 2 == 0 else arms[::-1]:
                    name = f"replay_rl/{arm.replace(' ', '_')}-lr{lr:g}-seed{seed}"
                    run = pipeline.rl_config(cfg, args.domain, base)
                    run = replace(
                        run,
                        name=name,
                        seed=seed,
                        learner=replace(run.learner, routing_replay=routing_replay, lr=lr),
                        algorithm=replace(run.algorithm, correction=Correction[args.correction]),
                    )
                    rl.run(run, engines)
                    steps = read_jsonl(work / name / "metrics.jsonl")
                    curves = {curve: [step[key] for step in steps] for curve, key in CURVES.items()}
                    rows.append({"arm": arm, "lr": lr, "seed": seed} | curves)
                    print(f"{name}: reward {np.mean(curves['reward'][-LAST:]):.3f}", flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds: reward of the last steps, mismatch over all steps."""
    table = []
    for lr, arm in sorted({(row["lr"], row["arm"]) for row in rows}):
        runs = [row for row in rows if (row["lr"], row["arm"]) == (lr, arm)]
        last = [np.mean(run["reward"][-LAST:]) for run in runs]
        numbers = {"reward": last} | {k: [np.mean(run[k]) for run in runs] for k in ("k3", "f1.1")}
        spread = {
            name: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0]
            for name, v in numbers.items()
        }
        table.append({"lr": lr, "arm": arm, "num_seeds": len(runs)} | spread)
    return table


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Curves of all runs (thin) and their means (thick): a row of panels per learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({row["lr"] for row in rows})
    figure, panels = pyplot.subplots(len(rates), 3, figsize=(12, 3.2 * len(rates)), squeeze=False)
    for line, lr in zip(panels, rates, strict=True):
        for panel, curve in zip(line, CURVES, strict=True):
            for arm, colour in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
                values = np.array([row[curve] for row in rows if (row["lr"], row["arm"]) == (lr, arm)])
                steps = np.arange(1, values.shape[1] + 1)
                panel.plot(steps, values.T, color=colour, alpha=0.25, linewidth=0.8)
                panel.plot(steps, values.mean(axis=0), color=colour, label=arm)
            panel.set(title=f"{curve}, lr {lr:g}", xlabel="step")
            if curve != "reward":
                panel.set_yscale("log" if curve == "k3" else "linear")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write curves and table to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="RL steps of each run")
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--domain", default="code")
    parser.add_argument("--correction", choices=[c.name for c in Correction], default="off")
    parser.add_argument("--model", help="start from this checkpoint instead of an SFT run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(work), args)
    table = summarise(rows)
    print(f"{'lr':>8} {'arm':>10} {'reward':>15} {'k3':>19} {'F(1.1)':>17}   ({args.seeds} seeds, mean ± sd)")
    for row in table:
        reward, k3, far = row["reward"], row["k3"], row["f1.1"]
        print(
            f"{row['lr']:8g} {row['arm']:>10} {reward[0]:7.3f} ± {reward[1]:.3f} {k3[0]:9.2e} ± {k3[1]:.1e} "
            f"{far[0]:8.5f} ± {far[1]:.5f}"
        )
    if args.picture:
        draw(args.picture, rows)
    if args.json:
        args.json.write_text(json.dumps({"table": table, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
