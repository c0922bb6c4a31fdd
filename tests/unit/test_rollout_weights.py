"""Bundles: read from files, checked against what the engine's model has. No engine here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from posttrain.config import UserError
from posttrain.records import WeightBundle
from rollout.checkpoint import checkpoint_shapes, read_checkpoint
from rollout.process import cores_of_worker
from rollout.weights import WeightMismatch, bundle_tensors, check_bundle

TENSORS = {
    "model.layers.0.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "model.layers.0.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "lm_head.weight": torch.ones(4, 2, dtype=torch.float16),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def write_shards(folder: Path) -> None:
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")
        weight_map[name] = f"model-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoint_is_read_bit_for_bit(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        write_shards(tmp_path)
    else:
        save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    bundle = read_checkpoint(tmp_path, policy_version=3)
    assert bundle.policy_version == 3
    read = dict(bundle_tensors(bundle))
    assert read.keys() == TENSORS.keys() and checkpoint_shapes(tmp_path) == SHAPES
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"model-1.*cut short"):
        read_checkpoint(tmp_path, 0)
    shard.write_bytes(b"\x00\x01")
    with pytest.raises(UserError, match=r"model-1.*not a whole"):
        read_checkpoint(tmp_path, 0)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard model-1\.safetensors of 3 is missing"):
        read_checkpoint(tmp_path, 0)
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        (tmp_path / "empty").mkdir()
        read_checkpoint(tmp_path / "empty", 0)


def bundle_of(tensors: dict[str, torch.Tensor]) -> WeightBundle:
    return WeightBundle(
        policy_version=1,
        tensors={
            name: tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
            for name, tensor in tensors.items()
        },
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )


def check(bundle: WeightBundle, tied: bool = False, num_layers: int = 1) -> None:
    check_bundle(bundle, SHAPES, num_layers=num_layers, tied_embeddings=tied)


def test_bundles_that_do_not_fit_are_refused_by_name() -> None:
    check(bundle_of(TENSORS))
    without = {name: tensor for name, tensor in TENSORS.items() if "bias" not in name}
    with pytest.raises(WeightMismatch, match=r"misses 1 tensors: \['model.layers.0.bias'\]"):
        check(bundle_of(without))
    with pytest.raises(WeightMismatch, match=r"has unknown 1 tensors: \['stray'\]"):
        check(bundle_of(TENSORS | {"stray": torch.zeros(1)}))
    with pytest.raises(WeightMismatch, match=r"bias has shape \(3,\), the engine's \(2,\)"):
        check(bundle_of(TENSORS | {"model.layers.0.bias": torch.zeros(3)}))
    short = bundle_of(TENSORS)
    short.tensors["lm_head.weight"] = np.zeros(3, dtype=np.uint8)
    with pytest.raises(WeightMismatch, match=r"lm_head.weight has 3 bytes"):
        check(short)


def test_what_the_engine_does_not_use_may_be_absent() -> None:
    without_head = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    check(bundle_of(without_head), tied=True)
    with pytest.raises(WeightMismatch):
        check(bundle_of(without_head), tied=False)
    beyond = {name: tensor for name, tensor in TENSORS.items() if ".layers." not in name}
    check(bundle_of(beyond), num_layers=0)  # layer 0 is a prediction head there


def test_workers_get_neighbouring_cores_in_turn() -> None:
    assert [cores_of_worker(i, 1, [0, 1]) for i in range(3)] == [[0], [1], [0]]
    assert [cores_of_worker(i, 2, [2, 3, 4, 5]) for i in range(2)] == [[2, 3], [4, 5]]
    assert cores_of_worker(1, 8, [0, 1]) == [0, 1]
