"""Safetensors files of a checkpoint as raw bytes: which tensors it holds, and all of them as a `WeightBundle`.

No torch: headers are parsed here and tensors are views of the mapped files, so a checkpoint of any size costs no
memory until it is used. Pickled checkpoints are refused.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import UserError
from posttrain.records import WeightBundle

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
INDEX = "model.safetensors.index.json"


def local_checkpoint(path: str, revision: str | None = None) -> Path:
    """Directory of a checkpoint; a hub id is downloaded (or found in the cache) first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def shard_paths(folder: Path) -> list[Path]:
    """Safetensors files of ``folder``. Raises `UserError` when there is none or one of the index is missing."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise UserError(
                f"checkpoint={str(folder)!r}: shard {missing[0]} of {len(names)} is missing; copy it again"
            )
        return [folder / name for name in names]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(
            f"checkpoint={str(folder)!r}: no *.safetensors file in it; give a Hugging Face directory"
        )
    return shards


def _read_header(shard: Path) -> tuple[dict[str, Any], int]:
    """Header of one file and the offset of its data. Raises `UserError` when the file is cut short."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"checkpoint={str(shard)!r}: not a whole safetensors file; copy it again")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end > size:
        raise UserError(f"checkpoint={str(shard)!r}: the file is cut short; copy it again")
    return header, 8 + length


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the headers alone."""
    headers = [_read_header(shard)[0] for shard in shard_paths(folder)]
    return {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}


def read_checkpoint(path: str | Path, policy_version: int) -> WeightBundle:
    """All tensors of a Hugging Face checkpoint directory. Raises `UserError` when a shard is missing or cut short."""
    bundle = WeightBundle(policy_version=policy_version, tensors={}, dtypes={}, shapes={})
    for shard in shard_paths(local_checkpoint(str(path))):
        header, data_start = _read_header(shard)
        with shard.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = np.frombuffer(mapped, dtype=np.uint8)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            bundle.tensors[name] = content[data_start + start : data_start + end]
            bundle.dtypes[name] = DTYPES[entry["dtype"]]
            bundle.shapes[name] = tuple(entry["shape"])
    return bundle
