"""Weights under Hugging Face checkpoint names: for rollout engines, and as a directory that loads anywhere.

Every rank takes part (ZeRO-3 gathers), rank 0 alone holds the result. Float32 stays float32 for buffers and routers,
which engines keep in that type; tied weights appear once, as in the source checkpoint. Adapters (LoRA) are merged into
copies, and the names are those of the plain model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.config import UserError
from posttrain.learner import lora
from posttrain.learner.metrics import agree
from posttrain.learner.model import read_config
from posttrain.learner.moe.replay import RouterReplay
from posttrain.records import WeightBundle

GATHER_ELEMENTS = 200_000_000  # parameters gathered at once under ZeRO-3
SHARD_BYTES = 5_000_000_000
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
)


def checkpoint_tensors(
    model: nn.Module, replay: RouterReplay | None, dtype: torch.dtype
) -> dict[str, Tensor] | None:
    """Tensors on the CPU by checkpoint name, matrices in ``dtype``; None on other ranks than 0. A collective.

    Unconverted tensors may share memory with the live weights: use them before the next step.
    """
    from transformers.core_model_loading import revert_weight_conversion

    exact = {id(p) for router in (replay.routers if replay else []) for p in router.parameters()}
    names = {id(p): lora.plain_name(name) for name, p in model.named_parameters()}
    adapters = {id(adapter.weight): adapter for adapter in lora.adapters(model)}
    factors = {id(factor) for adapter in adapters.values() for factor in adapter.factors}
    state: dict[str, Tensor] = {}
    for group in _groups([p for p in model.parameters() if id(p) not in factors]):
        own = [factor for p in group if id(p) in adapters for factor in adapters[id(p)].factors]
        with _gathered([*group, *own]):
            if dist.get_rank() == 0:
                for parameter in group:
                    target = parameter.dtype if id(parameter) in exact else dtype
                    adapter = adapters.get(id(parameter))
                    value = parameter if adapter is None else adapter.merged()
                    state[names[id(parameter)]] = _to_cpu(value, target)
    if dist.get_rank() != 0:
        return None
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            state[lora.plain_name(name)] = _to_cpu(buffer, buffer.dtype)
    converted = revert_weight_conversion(model, state)  # type: ignore[arg-type]
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _groups(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        group.append(parameter)
        size += int(getattr(parameter, "ds_numel", parameter.numel()))
        if size >= GATHER_ELEMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _gathered(group: list[nn.Parameter]):  # type: ignore[no-untyped-def]  # a context manager of DeepSpeed
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters(group, enabled=any(hasattr(p, "ds_id") for p in group))


def _to_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy where ZeRO-3 will take the memory back, else the tensor itself if nothing must change."""
    moved = tensor.detach().to("cpu", dtype)
    return moved.clone() if hasattr(tensor, "ds_id") and moved.data_ptr() == tensor.data_ptr() else moved


def bundle(tensors: dict[str, Tensor], policy_version: int) -> WeightBundle:
    """Raw bytes of every tensor, for Ray's shared memory."""
    return WeightBundle(
        policy_version=policy_version,
        tensors={name: _bytes(tensor) for name, tensor in tensors.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor] | None:
    """The adapter alone, on the CPU, by PEFT's names; None on other ranks than 0 and without an adapter. A collective."""
    names = lora.file_names(model)
    with _gathered(list(names.values())):
        if dist.get_rank() != 0 or not names:
            return None
        return {name: factor.detach().cpu().clone() for name, factor in names.items()}


def save_model(
    folder: Path,
    source: Path,
    model: nn.Module,
    replay: RouterReplay | None,
    dtype: torch.dtype,
    with_adapter: bool = True,
) -> None:
    """A Hugging Face directory: weights, the config.json of ``source`` with all its keys, tokenizer, chat template; of a
    model with adapters the merged weights, and in ``adapter/`` the adapter itself unless not ``with_adapter``.

    Written beside ``folder`` and renamed at the end, so that ``folder`` is whole or as it was. `UserError` when the
    disk is full. A collective.
    """
    tensors = checkpoint_tensors(model, replay, dtype)
    factors = adapter_tensors(model) if with_adapter else None
    adapter = None if factors is None else (lora.settings(model), factors)
    error: Exception | None = None
    if tensors is not None:
        error = _write(folder, source, tensors, dtype, adapter)
    agree(error)


def _write(
    folder: Path,
    source: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    adapter: tuple[dict[str, Any], dict[str, Tensor]] | None = None,
) -> Exception | None:
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:  # the disk is the other side
        aside.mkdir(parents=True)
        _copy_source(source, aside, dtype)
        _write_weights(aside, tensors)
        if adapter is not None:
            lora.write(aside / lora.FOLDER, *adapter)
        _replace(aside, folder)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        return UserError(f"{folder}: the disk is full; free some space and start again") if full else error
    return None


def _copy_source(source: Path, aside: Path, dtype: torch.dtype) -> None:
    """Everything of the source but its weights; config.json says the type of the new ones."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and file.name != "config.json":
            shutil.copyfile(file, aside / file.name)
    config = read_config(source)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_weights(aside: Path, tensors: dict[str, Tensor]) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)  # type: ignore[arg-type]
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, aside / name, metadata={"format": "pt"})
        _sync(aside / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _replace(aside: Path, folder: Path) -> None:
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    aside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
