"""An SFT run that is killed with `kill -9` and started again by the same command ends like one that never was, bit by bit.

Compared after the last step: everything in DeepSpeed's state files (weights, float32 master weights, Adam's moments,
buffers with the expert bias), the generators, what the driver keeps, and the exported model.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from posttrain.tracking.jsonl import read_jsonl
from tests.tiny_models import tiny_mimo

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

REPO = Path(__file__).resolve().parents[2]
STEPS, EVERY, KILLED = 20, 10, 13
CELLS = {0: 1, 2: 2, 3: 2}  # ZeRO stage -> ranks
COMMAND = [
    "sft", "data.path=chat.jsonl", "model.path=model", f"algorithm.steps={STEPS}", "algorithm.batch_size=32",
    f"checkpoint.every_steps={EVERY}", "learner.dtype=float32", "learner.lr=3e-3", "learner.warmup_steps=4",
    "learner.max_tokens_per_micro_batch=400", "algorithm.max_tokens=64", "learner.cores_per_rank=1", "tracking.wandb=disabled",
    "ray.object_store_gb=0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has an expert bias, and conversations."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_mimo(folder / "model", num_layers=2)
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 9))) for _ in range(200)]
    rows = [[{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}] for w in words]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain.cli", *command],
        cwd=folder,
        stdout=(folder / "posttrain.log").open("ab"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )


def finish(folder: Path, command: list[str]) -> None:
    assert start(folder, command).wait() == 0, (folder / "posttrain.log").read_text()[-6000:]


def num_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(read_jsonl(file)) if file.exists() else 0


def kill(folder: Path, run: Path, command: list[str]) -> None:
    """`kill -9` of the driver after step KILLED; returns when every process that it had started is gone too."""
    driver = start(folder, command)
    while num_steps(run) < KILLED:
        assert driver.poll() is None, (folder / "posttrain.log").read_text()[-6000:]
        time.sleep(0.01)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    assert driver.wait() == -9
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{EVERY}", "killed too late"
    assert KILLED <= num_steps(run) < STEPS


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, number and text in nested dicts and lists, with where it is."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}/{index}")
    elif isinstance(node, torch.Tensor | bool | int | float | str):
        yield path, node


def contents(folder: Path) -> dict[str, Any]:
    """All that the files of a checkpoint or model hold."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".pt":
            found |= leaves(torch.load(file, weights_only=False), name)
        elif file.suffix == ".safetensors":
            found |= leaves(load_file(file), name)
        elif file.name == "state.json":
            found |= leaves(json.loads(file.read_text()), name)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two `contents` are not equal bit by bit."""
    assert one.keys() == other.keys()

    def is_equal(a: Any, b: Any) -> bool:
        if not isinstance(a, torch.Tensor):
            return bool(a == b)
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        )

    return [name for name in one if not is_equal(one[name], other[name])]


@pytest.mark.parametrize("zero_stage", CELLS)
def test_a_killed_run_ends_like_one_in_one_go(zero_stage: int, user: Path) -> None:
    settings = [f"learner.zero_stage={zero_stage}", f"learner.num_ranks={CELLS[zero_stage]}"]
    if zero_stage == 3:
        settings.append("learner.deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    whole, killed = (user / "runs" / f"{name}-{zero_stage}" for name in ("whole", "killed"))
    finish(user, [*COMMAND, *settings, f"name={whole.name}"])
    command = [*COMMAND, *settings, f"name={killed.name}"]
    kill(user, killed, command)
    finish(user, command)
    assert f"{killed}: resuming after step {EVERY}" in (user / "posttrain.log").read_text()

    first, last, resumed = (
        contents(run / "checkpoints" / f"step_{step}")
        for run, step in ((whole, EVERY), (whole, STEPS), (killed, STEPS))
    )
    tensors = [name for name, value in last.items() if isinstance(value, torch.Tensor) and value.numel() > 1]
    assert any("exp_avg_sq" in name for name in tensors) and any(
        "correction_bias" in name for name in tensors
    )
    assert len(differences(first, last)) > len(tensors) / 2, "training moves weights, moments and bias"
    assert differences(last, resumed) == []
    assert differences(contents(whole / "model"), contents(killed / "model")) == []
    rows = [read_jsonl(run / "metrics.jsonl") for run in (whole, killed)]
    kept = [
        [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per_s"))} for row in of_run]
        for of_run in rows
    ]
    assert kept[0] == kept[1]
