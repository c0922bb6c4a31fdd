"""Parameter average of checkpoints: the baseline that every distilled student has to beat.

Streams tensor by tensor over safetensors files: memory holds one output shard, whatever the number of checkpoints.
Sums in float32 (float64 tensors in float64) and stores each tensor in its former type. Refuses checkpoints whose
tensors differ in name, shape or type.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config import UserError
from teachers.checkpoint import INDEX_NAME, TensorEntry, locate, read_config, read_tensors

if TYPE_CHECKING:
    import torch

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def average(paths: list[str], out: str) -> None:
    """Write the mean of the checkpoints ``paths`` to the new folder ``out``, with config and tokenizer of the first.

    Types may differ: the mean is taken in float32 and has the type of the first. The folder appears whole or not at all. Raises `UserError` when names or shapes differ, when an integer
    tensor differs, or when ``out`` is there already.
    """
    from safetensors.torch import save_file

    if len(paths) < 1:
        raise UserError("paths=[]: give at least one checkpoint directory")
    target = Path(out)
    if target.exists():
        raise UserError(f"out={out!r}: is there already; remove it or choose another folder")
    folders = [locate(path, "paths") for path in paths]
    checkpoints = [read_tensors(folder, "paths") for folder in folders]
    _check_equal_layout(paths, checkpoints)
    read_config(folders[0], "paths")

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an average that was killed
    partial.mkdir(parents=True)
    for pattern in COPIED:
        for file in folders[0].glob(pattern):
            if file.name != INDEX_NAME:
                shutil.copy2(file, partial / file.name)
    shards = _shards(checkpoints[0])
    for name, tensor_names in shards.items():
        means = {
            tensor: _mean(tensor, [checkpoint[tensor] for checkpoint in checkpoints])
            for tensor in tensor_names
        }
        save_file(means, partial / name, metadata={"format": "pt"})
    if (folders[0] / INDEX_NAME).exists():
        _write_index(partial, checkpoints[0], shards)
    partial.rename(target)


def _check_equal_layout(paths: list[str], checkpoints: list[dict[str, TensorEntry]]) -> None:
    first = checkpoints[0]
    for path, other in zip(paths[1:], checkpoints[1:], strict=True):
        alone = sorted(set(first) ^ set(other))
        if alone:
            raise UserError(
                f"paths={path!r}: {alone[0]!r} and {len(alone) - 1} other tensors are in only one of it and"
                f" {paths[0]!r}; average checkpoints of one architecture"
            )
        for name, entry in first.items():
            if entry.shape != other[name].shape:
                raise UserError(
                    f"paths={path!r}: {name!r} is {list(other[name].shape)} there and"
                    f" {list(entry.shape)} in {paths[0]!r}; average checkpoints of one architecture"
                )


def _shards(tensors: dict[str, TensorEntry]) -> dict[str, list[str]]:
    """File name -> its tensors, as in the first checkpoint."""
    shards: dict[str, list[str]] = {}
    for name, entry in tensors.items():
        shards.setdefault(entry.file.name, []).append(name)
    return shards


def _mean(name: str, entries: list[TensorEntry]) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    total: torch.Tensor | None = None
    dtype = torch.float32
    for entry in entries:
        with safe_open(entry.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        if total is None:
            dtype = tensor.dtype
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            total = tensor.to(wide, copy=True) if tensor.is_floating_point() else tensor
        elif tensor.is_floating_point():
            total += tensor
        elif not torch.equal(total, tensor):
            raise UserError(
                f"paths={str(entry.file.parent)!r}: integer tensor {name!r} differs; it has no average"
            )
    assert total is not None
    return (total / len(entries)).to(dtype) if total.is_floating_point() else total


def _write_index(folder: Path, tensors: dict[str, TensorEntry], shards: dict[str, list[str]]) -> None:
    index = {
        "metadata": {"total_size": sum(entry.end - entry.start for entry in tensors.values())},
        "weight_map": {tensor: file for file, names in shards.items() for tensor in names},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
