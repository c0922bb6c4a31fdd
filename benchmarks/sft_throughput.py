"""SFT throughput of the learner against TRL's SFTTrainer with packing: same model, data, machine and loss.

    .venv/bin/python -m benchmarks.sft_throughput [--json FILE] [--models NAME ...] [--pairs 12] [--steps 4] [--quick]

Three sides, each a process in its own environment (TRL: .venv-trl, which `scripts/setup_trl.sh` makes):

- ``ours``, the learner of the runs;
- ``trl-packed``, SFTTrainer with ``packing=True``: the bar;
- ``trl-sorted``, SFTTrainer with ``packing=False`` on the documents of a step in order of length, in large micro-batches: a
  user of TRL who feeds it so gets rid of most padding without the attention of packed rows. No bar, but on a CPU the
  nearer rival.

TRL packs the documents, and the other two get the very same documents in every optimizer step, so the training losses must
agree step by step, and the held-out losses at the end. All train in float32 with the mean over all loss tokens of the
global batch, AdamW, a constant rate and clipping. Row lengths and micro-batches are the fastest of those tried in the sweeps of
docs/log.md; nothing is known about others. Tokens are real ones.

The sides take blocks of optimizer steps in turn, ours first in odd rounds and last in even ones. Our block and one of TRL's
of the same round make a pair, which gives one ratio of tokens per second, and the interval is a bootstrap over pairs. The
ratio by CPU time beside it says what is left where other work disturbs the clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.blocks import Block, Child, alternate
from examples.tiny.make_data import SFT, build
from examples.tiny.model import build_model
from posttrain.config import DataConfig
from posttrain.data.sources import load_conversations
from posttrain.data.tokenizer import load_tokenizer
from posttrain.manifest import code_revision

FOLDER = Path("benchmarks") / "results"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / FOLDER / "sft_throughput.json"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"

TOKENS_PER_STEP = 4096  # at most: TRL's rows are seldom full
# max_length of trl-packed, whose micro-batch is one such row.
ROW_TOKENS = {"mimo_v2_flash": 256, "qwen3_moe": 512}
SORTED_MICRO_BATCHES = 8  # of a step of trl-sorted: some 20 documents each
ARMS = (PACKED, SORTED) = ("trl-packed", "trl-sorted")
OURS = {"pack_tokens": 0, "max_tokens_per_micro_batch": 1024}
LR, BETAS, EPS, GRAD_CLIP = 1e-3, [0.9, 0.95], 1e-8, 1.0

NUM_HELD_OUT = 128
WARM_UP_STEPS = 6
LOSS_WINDOW = 5  # steps of the moving average
LOSS_BAR = 0.01  # nat: smoothed training loss and held-out loss may differ by so much
IGNORED = -100
NUM_DRAWS = 4000


def write_data(folder: Path, family: str, num_steps: int) -> None:
    """The random model and, as token ids with labels, the demonstrations of the tiny domains."""
    build_model(folder / "model", 0, family=family)
    # Documents have 25 tokens on average.
    rows = build(
        0, num_sft=num_steps * TOKENS_PER_STEP // 20 + NUM_HELD_OUT, num_prompts=1, num_valid=1, num_heldout=1
    )[SFT]
    (folder / SFT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = load_conversations(
        DataConfig(path=str(folder / SFT)), load_tokenizer(str(folder / "model")), min(ROW_TOKENS.values())
    )
    documents = [
        {
            "input_ids": s.token_ids.tolist(),
            "labels": np.where(s.loss_mask, s.token_ids, IGNORED).tolist(),
        }
        for s in samples
    ]
    data = {"held_out": documents[:NUM_HELD_OUT], "train": documents[NUM_HELD_OUT:]}
    (folder / "data.json").write_text(json.dumps(data))


def settings(folder: Path, row_tokens: int, total_steps: int, num_threads: int) -> dict[str, Any]:
    """What all children get; the keys that one of them ignores are the others' own."""
    adamw = {"lr": LR, "betas": BETAS, "eps": EPS, "grad_clip": GRAD_CLIP}
    return {
        "work": str(folder),
        "model": str(folder / "model"),
        "data": str(folder / "data.json"),
        "steps": str(folder / "steps.jsonl"),
        "total_steps": total_steps,
        "num_threads": num_threads,
        "seed": 0,
        "row_tokens": row_tokens,
        "micro_batches": {PACKED: TOKENS_PER_STEP // row_tokens, SORTED: SORTED_MICRO_BATCHES},
        "learner": adamw | OURS | {"warmup_steps": 0},
        **adamw,
    }


def measure(folder: Path, family: str, num_pairs: int, steps: int, num_threads: int) -> dict[str, Any]:
    """One model: all children, a warm-up, the rounds, and how the losses agree."""
    total_steps = WARM_UP_STEPS + num_pairs * steps
    write_data(folder, family, total_steps)
    given = settings(folder, ROW_TOKENS[family], total_steps, num_threads)
    children: list[Child] = []

    def start(name: str, python: str, module: str) -> dict[str, Any]:
        command = [python, "-m", f"benchmarks.{module}"]
        children.append(Child(name, command, given | {"arm": name}, folder / f"{name}.log", num_threads))
        return children[-1].receive()

    try:
        # trl-packed first: it writes the steps that the others read.
        about = {arm: start(arm, str(TRL_PYTHON), "sft_throughput_trl") for arm in ARMS}
        about["ours"] = start("ours", sys.executable, "sft_throughput_ours")
        for child in children:
            child.ask({"steps": WARM_UP_STEPS})
        blocks, idle = alternate(orders(children[-1], children[:-1], num_pairs), steps)
        ends = {child.name: child.ask({"finish": True}) for child in children}
    finally:
        for child in children:
            child.close()
    tokens, loss_tokens = count_tokens(folder / "steps.jsonl", steps)
    return {
        "model": family,
        "num_tokens": sum(tokens),
        "num_loss_tokens": sum(loss_tokens),
        "sides": {name: side(own, tokens, loss_tokens) for name, own in blocks.items()},
        "arms": {arm: ratios(blocks["ours"], blocks[arm]) | agreement(about, ends, arm) for arm in ARMS},
        "attention": {name: told["attention"] for name, told in about.items()},
        "versions": about[PACKED]["versions"] | about["ours"]["versions"],
        "idle_cpu_share": idle,
        "curves": {name: [round(loss, 5) for loss in end["losses"]] for name, end in ends.items()},
    }


def orders(ours: Child, others: list[Child], num_rounds: int) -> list[list[Child]]:
    """Who works in what order in every round: ours first in odd rounds and last in even ones, while the others change places
    so that over four rounds everybody stands in the middle on average."""
    found = []
    for index in range(num_rounds):
        rest = others if index % 4 in (0, 3) else others[::-1]
        found.append([ours, *rest] if index % 2 == 0 else [*rest, ours])
    return found


def agreement(about: dict[str, Any], ends: dict[str, Any], arm: str) -> dict[str, Any]:
    """How the losses of our side and of ``arm`` agree, and the held-out losses [ours, arm]."""
    return {
        "losses": compare_losses(ends["ours"]["losses"], ends[arm]["losses"]),
        "held_out": {
            "before": [about["ours"]["held_out"], about[arm]["held_out"]],
            "after": [ends["ours"]["held_out"], ends[arm]["held_out"]],
        },
    }


def count_tokens(file: Path, steps: int) -> tuple[list[int], list[int]]:
    """Tokens and loss tokens of every measured block; there is no padding among them."""
    tokens, loss_tokens = [], []
    for line in file.read_text().splitlines()[WARM_UP_STEPS:]:
        documents = json.loads(line)
        tokens.append(sum(len(d["input_ids"]) for d in documents))
        loss_tokens.append(sum(label != IGNORED for d in documents for label in d["labels"]))
    firsts = range(0, len(tokens), steps)
    return [sum(tokens[i : i + steps]) for i in firsts], [sum(loss_tokens[i : i + steps]) for i in firsts]


def ratios(ours: list[Block], arm: list[Block]) -> dict[str, dict[str, float]]:
    """The ratios of tokens per second ours / ``arm`` by ``wall`` and ``cpu`` seconds; the blocks hold the same tokens."""
    pairs = list(zip(ours, arm, strict=True))
    return {
        "wall": interval([b.seconds / a.seconds for a, b in pairs]),
        "cpu": interval([b.cpu_seconds / a.cpu_seconds for a, b in pairs]),
    }


def side(blocks: list[Block], tokens: list[int], loss_tokens: list[int]) -> dict[str, Any]:
    """Tokens per second of one side (medians over blocks) and what every block cost."""
    seconds = [block.seconds for block in blocks]
    return {
        "tokens_per_s": float(np.median(np.array(tokens) / seconds)),
        "loss_tokens_per_s": float(np.median(np.array(loss_tokens) / seconds)),
        "seconds": seconds,
        "cpu_seconds": [block.cpu_seconds for block in blocks],
    }


def interval(ratios: list[float]) -> dict[str, float]:
    """The median over pairs with its 95 % bootstrap interval."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (NUM_DRAWS, len(ratios))), axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def compare_losses(ours: list[float], trl: list[float]) -> dict[str, float]:
    """Largest differences of the training losses, step by step and of their moving averages, and where they end."""
    assert len(ours) == len(trl), "the two sides took different numbers of steps"
    window = np.ones(LOSS_WINDOW) / LOSS_WINDOW
    smooth = [np.convolve(curve, window, "valid") for curve in (ours, trl)]
    return {
        "max_difference": float(np.abs(np.array(ours) - np.array(trl)).max()),
        "max_smoothed_difference": float(np.abs(smooth[0] - smooth[1]).max()),
        "first": float(smooth[0][0]),
        "last": float(smooth[0][-1]),
    }


def is_equal(arm: dict[str, Any]) -> bool:
    """Whether the two sides trained the same: loss curve and held-out losses within LOSS_BAR."""
    gaps = [abs(a - b) for a, b in arm["held_out"].values()]
    return max(arm["losses"]["max_smoothed_difference"], *gaps) <= LOSS_BAR


def verdict(name: str, arm: dict[str, Any]) -> str:
    """What the row of an arm says: packing is the bar, the other arm is there to be seen beside it."""
    if not is_equal(arm):
        return "not met: losses differ" if name == PACKED else "losses differ"
    if name != PACKED:
        return "no bar"
    return "met" if arm["wall"]["low"] >= 1 else "not met"


def summary(result: dict[str, Any]) -> str:
    """What the table has no room for."""
    idle = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result["idle_cpu_share"].items())
    lines = [f"{result['model']}: {result['num_tokens']:,} tokens a side; CPU of the sides that wait: {idle}"]
    for name, arm in result["arms"].items():
        losses, before = arm["losses"], arm["held_out"]["before"]
        lines.append(
            f"  {name}: loss {losses['first']:.3f} to {losses['last']:.3f}, largest difference of a step"
            f" {losses['max_difference']:.1e}; held-out loss of the random model ours {before[0]:.6f}, TRL {before[1]:.6f}"
        )
    return "\n".join(lines)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | TRL's arm | tokens/s ours | TRL | loss tokens/s ours | TRL | ratio | by CPU time | training loss differs by | held-out loss ours | TRL | bar |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ours = r["sides"]["ours"]
        for name, arm in r["arms"].items():
            trl, after, wall, cpu = r["sides"][name], arm["held_out"]["after"], arm["wall"], arm["cpu"]
            lines.append(
                f"| {r['model']} | {name} | {ours['tokens_per_s']:,.0f} | {trl['tokens_per_s']:,.0f}"
                f" | {ours['loss_tokens_per_s']:,.0f} | {trl['loss_tokens_per_s']:,.0f}"
                f" | {wall['ratio']:.2f} [{wall['low']:.2f}, {wall['high']:.2f}]"
                f" | {cpu['ratio']:.2f} [{cpu['low']:.2f}, {cpu['high']:.2f}]"
                f" | {arm['losses']['max_smoothed_difference']:.1e} | {after[0]:.4f} | {after[1]:.4f} | {verdict(name, arm)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--models", nargs="+", choices=list(ROW_TOKENS), default=list(ROW_TOKENS))
    parser.add_argument("--pairs", type=int, default=12, help="pairs of blocks of each of TRL's arms")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a block")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each side")
    parser.add_argument(
        "--quick", action="store_true", help="one model, four pairs; written nowhere by default"
    )
    args = parser.parse_args()
    if args.quick:
        args.models, args.pairs = args.models[:1], 4
    subprocess.run([ROOT / "scripts" / "setup_trl.sh"], check=True)
    results = []
    for family in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            results.append(measure(Path(temporary), family, args.pairs, args.steps, args.threads))
        print(summary(results[-1]), flush=True)
    print(table(results))
    models = " ".join(args.models)
    written = {
        "results": results,
        "settings": {
            "row_tokens_of_trl": ROW_TOKENS,
            "sorted_micro_batches": SORTED_MICRO_BATCHES,
            "ours": OURS,
            "tokens_per_step": TOKENS_PER_STEP,
        },
        "num_threads": args.threads,
        "commit": code_revision(str(FOLDER)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.sft_throughput --models {models} --pairs {args.pairs} --steps {args.steps}"
        f" --threads {args.threads}",
        "machine": platform.processor() or platform.machine(),
    }
    file = args.json or (None if args.quick else RESULTS)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
