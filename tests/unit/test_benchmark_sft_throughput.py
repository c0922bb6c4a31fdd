"""The benchmark against TRL without TRL: pairs, intervals, tokens, losses and verdicts by hand; blocks that really alternate."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import sft_throughput
from benchmarks.blocks import Block, Child, alternate
from benchmarks.sft_throughput import (
    LOSS_BAR,
    PACKED,
    SORTED,
    WARM_UP_STEPS,
    compare_losses,
    count_tokens,
    is_equal,
    orders,
    ratios,
    side,
)
from benchmarks.sft_throughput_sorted import sorted_micro_batches

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
CHILD = """
import json, sys, time
from benchmarks.blocks import Channel
channel = Channel()
name = json.loads(sys.argv[1])["name"]
print("noise on standard output")
channel.send({"ready": name})
while "steps" in (command := channel.receive()):
    begin = time.perf_counter()
    with open(json.loads(sys.argv[1])["file"], "a") as stream:
        stream.write(name)
    time.sleep(0.01 * command["steps"])
    channel.send({"seconds": time.perf_counter() - begin})
sys.exit("told to end")
"""


def blocks(*seconds: float) -> list[Block]:
    return [Block(seconds=s, cpu_seconds=s / 2) for s in seconds]


def test_a_pair_gives_one_ratio_and_the_interval_is_over_pairs() -> None:
    # The machine is ten times slower in the last pair, for both sides alike.
    ours, trl = blocks(1.0, 1.0, 10.0), blocks(1.5, 1.5, 15.0)
    found = ratios(ours, trl)
    assert found["wall"] == {"ratio": 1.5, "low": 1.5, "high": 1.5} == found["cpu"]
    tokens, loss_tokens = [300, 300, 300], [90, 90, 90]
    assert side(ours, tokens, loss_tokens)["tokens_per_s"] == 300
    assert side(trl, tokens, loss_tokens)["tokens_per_s"] == 200
    assert side(ours, tokens, loss_tokens)["loss_tokens_per_s"] == 90


def test_the_interval_holds_the_ratios_that_pairs_have() -> None:
    wall = ratios(blocks(*[1.0] * 9), blocks(0.9, 1.1, 0.95, 1.05, 1.0, 1.2, 0.8, 1.0, 1.0))["wall"]
    assert wall["ratio"] == 1.0
    assert 0.8 <= wall["low"] < 1.0 < wall["high"] <= 1.2


def test_tokens_are_those_of_the_measured_blocks(tmp_path: Any) -> None:
    file = tmp_path / "steps.jsonl"
    long = {"input_ids": [1] * 50, "labels": [1] * 50}
    steps = [[long]] * WARM_UP_STEPS + [
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}],
        [{"input_ids": [5, 6], "labels": [-100, 6]}],
        [{"input_ids": [7] * 9, "labels": [-100] * 8 + [7]}],
        [{"input_ids": [8], "labels": [-100]}],
    ]
    file.write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert count_tokens(file, 2) == ([6, 10], [3, 1])


def test_sorted_micro_batches_hold_their_own_step_shortest_first() -> None:
    steps = [
        [{"input_ids": [step] * n, "labels": [step] * n} for n in lengths]
        for step, lengths in enumerate([(5, 1, 4, 2, 3), (9, 7, 8)])
    ]
    documents, numbers = sorted_micro_batches(steps, 2)
    found = [[documents[i]["input_ids"] for i in own] for own in numbers]
    assert [[len(ids) for ids in own] for own in found] == [[1, 2], [3, 4, 5], [7], [8, 9]]
    assert [{token for ids in own for token in ids} for own in found] == [{0}, {0}, {1}, {1}]
    assert all(document["labels"] == document["input_ids"] for document in documents)


def test_losses_are_compared_step_by_step_and_smoothed() -> None:
    ours = np.linspace(3.0, 2.0, 11)
    trl = ours.copy()
    trl[5] += 0.05
    found = compare_losses(ours.tolist(), trl.tolist())
    assert found["max_difference"] == pytest.approx(0.05)
    assert found["max_smoothed_difference"] == pytest.approx(0.01)
    assert found["first"] == pytest.approx(2.8) and found["last"] == pytest.approx(2.2)
    with pytest.raises(AssertionError):
        compare_losses([1.0] * 9, [1.0] * 8)


@pytest.mark.parametrize(("gap", "equal"), [(0.5 * LOSS_BAR, True), (2 * LOSS_BAR, False)])
def test_equal_means_training_and_held_out(gap: float, equal: bool) -> None:
    def result(smoothed: float, before: float, after: float) -> dict[str, Any]:
        losses = {"max_smoothed_difference": smoothed}
        return {"losses": losses, "held_out": {"before": [4.0, 4.0 + before], "after": [2.0 + after, 2.0]}}

    assert is_equal(result(0, 0, 0))
    for place in range(3):
        assert is_equal(result(*(gap * (place == i) for i in range(3)))) is equal


def test_blocks_alternate_and_the_waiting_child_rests(tmp_path: Any) -> None:
    def child(name: str) -> Child:
        settings = {"name": name, "file": str(tmp_path / "order")}
        made = Child(name, [sys.executable, "-c", CHILD], settings, tmp_path / f"{name}.log", 1)
        assert made.receive() == {"ready": name}
        return made

    ours, trl = child("a"), child("b")
    found, idle = alternate([[ours, trl], [trl, ours], [ours, trl]], 4)
    assert (tmp_path / "order").read_text() == "abbaab"
    assert {name: len(own) for name, own in found.items()} == {"a": 3, "b": 3}
    assert all(block.seconds >= 0.04 for own in found.values() for block in own)
    assert set(idle) == {"a", "b"} and max(idle.values()) < 0.5
    assert "noise on standard output" in (tmp_path / "a.log").read_text()
    with pytest.raises(SystemExit, match="told to end"):
        ours.ask({"finish": True})
    trl.close()
    assert trl.process.returncode != 0


def test_ours_is_first_in_odd_rounds_and_last_in_even_ones() -> None:
    rounds: Any = orders("o", ["p", "s"], 8)  # type: ignore[arg-type, list-item]
    assert ["".join(order) for order in rounds] == ["ops", "spo", "osp", "pso"] * 2
    for name in "ops":
        assert sum(order.index(name) for order in rounds) == 8, "in the middle on average"


def arm(low: float, after: float = 2.0) -> dict[str, Any]:
    return {
        "wall": {"ratio": low + 0.1, "low": low, "high": low + 0.2},
        "cpu": {"ratio": 1.2, "low": 1.1, "high": 1.3},
        "losses": {"max_smoothed_difference": 1e-4},
        "held_out": {"before": [4.0, 4.0], "after": [2.0, after]},
    }


@pytest.mark.parametrize(
    ("packed", "padded", "verdicts"),
    [
        (arm(1.1), arm(0.8), ["met", "no bar"]),
        (arm(0.95), arm(1.1), ["not met", "no bar"]),
        (arm(1.1, after=2.1), arm(1.1, after=2.1), ["not met: losses differ", "losses differ"]),
    ],
)
def test_the_table_says_whether_the_bar_is_met_and_packing_alone_is_the_bar(
    packed: dict[str, Any], padded: dict[str, Any], verdicts: list[str]
) -> None:
    own = {"tokens_per_s": 9000.0, "loss_tokens_per_s": 2500.0}
    result = {
        "model": "tiny",
        "sides": {"ours": own, PACKED: own, SORTED: own},
        "arms": {PACKED: packed, SORTED: padded},
    }
    rows = sft_throughput.table([result]).splitlines()[2:]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == verdicts


def test_trl_has_the_versions_of_the_project_and_one_package_of_its_own() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==(\S+)", (REQUIREMENTS / name).read_text(), re.MULTILINE))

    own, ours = pins("trl.txt"), pins("cpu.txt")
    assert {"torch", "transformers", "accelerate", "datasets", "trl"} <= set(own)
    assert set(own.items()) - set(ours.items()) == {("trl", own["trl"])}
