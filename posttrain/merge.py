"""Merging of checkpoints without training: the baselines that every distilled student has to beat.

`average` is the mean; `task_arithmetic` adds weighted differences to a common base (Ilharco et al., arXiv:2212.04089).
Streams tensor by tensor over safetensors files: memory holds one output shard, whatever the number of checkpoints.
Sums in float32 (float64 tensors in float64) and stores each tensor in its former type. An expert bias is merged as the
router that it belongs to. Refuses checkpoints whose tensors differ in name or shape or whose config.json computes otherwise,
quantized ones (a mean of codes is no mean of weights), and integer tensors that differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config import UserError
from teachers.checkpoint import INDEX_NAME, TensorEntry, locate, read_config, read_tensors
from teachers.settings import differences

if TYPE_CHECKING:
    import torch

MERGED = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def average(paths: list[str], out: str) -> None:
    """Write the mean of the checkpoints ``paths`` to the new folder ``out``, with config and tokenizer of the first.

    Types may differ: the mean is taken in float32 and has the type of the first. The folder appears whole or not at
    all. Raises `UserError` when names or shapes differ, when an integer tensor differs, or when ``out`` is there already.
    """
    if len(paths) < 1:
        raise UserError("models=[]: give at least one checkpoint directory")
    _merge({f"models.{i}": path for i, path in enumerate(paths)}, [1.0] * len(paths), len(paths), out)


def task_arithmetic(base: str, paths: list[str], coefficients: Sequence[float], out: str) -> None:
    """Write base + sum of coefficient_i * (model_i - base) to the new folder ``out``, with layout, config, tokenizer and
    types of ``base``. Errors as in `average`.

    Computed as (1 - sum of coefficients) * base + sum of coefficient_i * model_i, so that one model with coefficient 1
    comes out as it is, and the base with 0.
    """
    if len(paths) < 1:
        raise UserError("models=[]: give at least one checkpoint directory")
    sources = {"base": base} | {f"models.{i}": path for i, path in enumerate(paths)}
    _merge(sources, [1.0 - sum(coefficients), *coefficients], 1, out)


def check_layout(sources: dict[str, str]) -> list[dict[str, TensorEntry]]:
    """Tensors of every checkpoint (config key -> path). Raises `UserError` naming the key when files are missing or
    damaged, when one is quantized, or when names, shapes or what decides in config.json are not those of the first."""
    checkpoints = [read_tensors(locate(path, key), key) for key, path in sources.items()]
    (first_key, first_path), first = next(iter(sources.items())), checkpoints[0]
    for (key, path), tensors in zip(sources.items(), checkpoints, strict=True):
        packed = next((name for name, entry in tensors.items() if entry.dtype not in MERGED), None)
        if packed is not None or read_config(locate(path, key), key).get("quantization_config"):
            which = "config.json has a quantization_config"
            if packed is not None:
                which = f"{packed!r} is of type {tensors[packed].dtype}"
            raise UserError(f"{key}={path!r}: {which}; quantized weights cannot be merged, give whole ones")
        deciding, _ = differences(locate(path, key), locate(first_path, first_key))
        if deciding:
            raise UserError(
                f"{key}={path!r}: its config.json has {deciding[0].replace('(student ', f'({first_path!r} has ')}; merge"
                " checkpoints that compute in one way"
            )
    for (key, path), other in zip(sources.items(), checkpoints, strict=True):
        alone = sorted(set(first) ^ set(other))
        if alone:
            raise UserError(
                f"{key}={path!r}: {alone[0]!r} and {len(alone) - 1} other tensors are in only one of it and"
                f" {first_path!r}; merge checkpoints of one architecture"
            )
        for name, entry in first.items():
            if entry.shape != other[name].shape:
                raise UserError(
                    f"{key}={path!r}: {name!r} is {list(other[name].shape)} there and"
                    f" {list(entry.shape)} in {first_path!r}; merge checkpoints of one architecture"
                )
    return checkpoints


def _merge(sources: dict[str, str], weights: list[float], divisor: int, out: str) -> None:
    """Weighted sum over divisor, tensor by tensor."""
    from safetensors.torch import save_file

    target = Path(out)
    if target.exists():
        raise UserError(f"out={out!r}: is there already; remove it or choose another folder")
    checkpoints = check_layout(sources)
    first_key, first_path = next(iter(sources.items()))
    folder = locate(first_path, first_key)
    read_config(folder, first_key)

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a merge that was killed
    partial.mkdir(parents=True)
    for pattern in COPIED:
        for file in folder.glob(pattern):
            if file.name != INDEX_NAME:
                shutil.copy2(file, partial / file.name)
    shards = _shards(checkpoints[0])
    for shard, names in shards.items():
        merged = {
            name: _weighted_sum(name, [c[name] for c in checkpoints], weights, divisor) for name in names
        }
        save_file(merged, partial / shard, metadata={"format": "pt"})
    if (folder / INDEX_NAME).exists():
        _write_index(partial, checkpoints[0], shards)
    partial.rename(target)


def _shards(tensors: dict[str, TensorEntry]) -> dict[str, list[str]]:
    """File name -> its tensors, as in the first checkpoint."""
    shards: dict[str, list[str]] = {}
    for name, entry in tensors.items():
        shards.setdefault(entry.file.name, []).append(name)
    return shards


def _weighted_sum(name: str, entries: list[TensorEntry], weights: list[float], divisor: int) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    total: torch.Tensor | None = None
    first = torch.zeros(0)
    dtype = torch.float32
    for entry, weight in zip(entries, weights, strict=True):
        with safe_open(entry.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        if total is None:
            first, dtype = tensor, tensor.dtype
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            total = tensor.to(wide) * weight if tensor.is_floating_point() else tensor
        elif tensor.is_floating_point() and total.is_floating_point():
            total.add_(tensor.to(total.dtype), alpha=weight)
        elif not torch.equal(total, tensor):
            raise UserError(
                f"models={str(entry.file.parent)!r}: integer tensor {name!r} differs; such tensors cannot be merged"
            )
    assert total is not None
    if not total.is_floating_point():
        return total
    result = (total / divisor).to(dtype)
    if (~result.isfinite() & (result.isnan() | ~first.isinf())).any():  # a mask of -inf may stay one
        where = ", ".join(sorted({str(entry.file.parent) for entry in entries}))
        raise UserError(
            f"models: the merge of {name!r} holds NaN or infinite values, of {where}; look for the damaged one"
            " (`posttrain doctor teachers` names it) and leave it out"
        )
    return result


def _write_index(folder: Path, tensors: dict[str, TensorEntry], shards: dict[str, list[str]]) -> None:
    index = {
        "metadata": {"total_size": sum(entry.end - entry.start for entry in tensors.values())},
        "weight_map": {tensor: file for file, names in shards.items() for tensor in names},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
