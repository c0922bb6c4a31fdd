"""A model directory is written whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from posttrain.config import UserError
from posttrain.learner import export

TENSORS = {f"layers.{i}.weight": torch.full((64, 64), float(i)) for i in range(4)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    config = {"torch_dtype": "bfloat16", "hybrid_layer_pattern": [0, 1], "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (folder / name).write_text("weights of the source")
    return folder


def test_config_keeps_its_keys_and_old_weights_stay_behind(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert export._write(folder, source, TENSORS, torch.float32) is None
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config == {"torch_dtype": "float32", "hybrid_layer_pattern": [0, 1], "architectures": ["X"]}
    assert load_file(folder / "model.safetensors").keys() == TENSORS.keys()


def test_shards_with_an_index(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    folder = tmp_path / "model"
    assert export._write(folder, source, TENSORS, torch.float32) is None
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == TENSORS.keys() and len(set(index.values())) == 2
    for name, file in index.items():
        assert torch.equal(load_file(folder / file)[name], TENSORS[name])


def test_a_full_disk_leaves_the_former_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    assert export._write(folder, source, TENSORS, torch.float32) is None

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    error = export._write(folder, source, {"other": torch.zeros(1)}, torch.float32)
    assert isinstance(error, UserError) and str(error).startswith(f"{folder}: the disk is full")
    assert load_file(folder / "model.safetensors").keys() == TENSORS.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]


def test_bundle_is_raw_bytes() -> None:
    bundle = export.bundle({"a": torch.tensor([[1.0, -2.0]]).bfloat16()}, 3)
    assert (
        bundle.dtypes == {"a": "bfloat16"} and bundle.shapes == {"a": (1, 2)} and bundle.policy_version == 3
    )
    back = torch.from_numpy(bundle.tensors["a"].copy()).view(torch.bfloat16)
    assert back.tolist() == [1.0, -2.0]
