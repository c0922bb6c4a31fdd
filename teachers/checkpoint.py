"""What a checkpoint folder holds, read from its files alone: tensors and where their bytes lie, config, tokenizer.

Owns the file-level checks that every reader of foreign checkpoints needs before an engine starts: config.json is
there, every shard of the index is there, no shard is truncated, weights are safetensors. Refuses pickled weights.
Imports neither torch nor transformers, so it costs nothing at start-up.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors format

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(kw_only=True, slots=True, frozen=True)
class TensorEntry:
    """One tensor of a checkpoint; its bytes are ``file[start:end]``."""

    name: str
    file: Path
    dtype: str  # the safetensors name: F32, BF16, ...
    shape: tuple[int, ...]
    start: int
    end: int


def locate(path: str, key: str, revision: str | None = None) -> Path:
    """Folder of the checkpoint ``path``: a directory, or a hub id whose ``revision`` the local hub cache already holds.

    Raises `UserError` naming ``key`` when there is neither. Never downloads.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if len(Path(path).parts) == 2 and not folder.is_absolute():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:  # the cache is another program's folder: absent is an ordinary answer
            return Path(snapshot_download(path, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            pass
    cache = "the local hub cache" if revision is None else f"the local hub cache at revision {revision!r}"
    raise UserError(
        f"{key}={path!r}: no such directory, and not in {cache}; give a checkpoint directory"
        " or fetch it first with `hf download`"
    )


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """config.json of the checkpoint. Raises `UserError` when it is not there or not JSON."""
    return read_json(folder / "config.json", folder, key)


def read_tensors(folder: Path, key: str) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name, from the headers of its safetensors files.

    Raises `UserError` naming ``key`` for a missing, truncated or damaged shard, for a tensor that the index
    promises and no shard holds, and for folders without safetensors.
    """
    tensors: dict[str, TensorEntry] = {}
    for file in _weight_files(folder, key):
        for entry in read_header(file, folder, key):
            tensors[entry.name] = entry
    index_file = folder / INDEX_NAME
    if index_file.exists():
        promised = _weight_map(folder, key)
        absent = sorted(set(promised) - set(tensors))
        if absent:
            raise UserError(
                f"{key}={str(folder)!r}: {INDEX_NAME} promises {len(absent)} tensors that no shard holds"
                f" (first: {absent[0]}); copy the whole checkpoint again"
            )
        tensors = {name: tensors[name] for name in promised}
    return tensors


def _weight_files(folder: Path, key: str) -> list[Path]:
    if (folder / INDEX_NAME).exists():
        names = sorted(set(_weight_map(folder, key).values()))
        if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in names:
            raise UserError(
                f"{key}={str(folder)!r}: it holds {SINGLE_NAME} and {INDEX_NAME}: Transformers loads the first, vLLM what"
                " the second names; remove the stale one"
            )
        for name in names:
            if not (folder / name).is_file():
                raise UserError(
                    f"{key}={str(folder)!r}: the shard {name} named in {INDEX_NAME} is missing; copy it there"
                )
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    pickled = sorted(folder.glob("*.bin"))
    hint = "pickled weights are not read; save it with save_pretrained" if pickled else "is it a checkpoint?"
    raise UserError(f"{key}={str(folder)!r}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; {hint}")


def _weight_map(folder: Path, key: str) -> dict[str, str]:
    found = read_json(folder / INDEX_NAME, folder, key).get("weight_map")
    if not isinstance(found, dict):
        raise UserError(f"{key}={str(folder)!r}: {INDEX_NAME} has no weight_map; copy it again")
    return found


def read_header(file: Path, folder: Path, key: str) -> list[TensorEntry]:
    """Tensors of one safetensors file. Raises `UserError` for a damaged one."""
    way_out = "the file is truncated or damaged; copy it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{key}={str(folder)!r}: {file.name} has no readable header; {way_out}")
        raw = stream.read(length)
    try:  # a damaged file of someone else
        header = json.loads(raw)
    except ValueError:
        raise UserError(f"{key}={str(folder)!r}: {file.name} has no readable header; {way_out}") from None
    header.pop("__metadata__", None)
    entries = []
    for name, info in header.items():
        begin, end = info["data_offsets"]
        shape = tuple(info["shape"])
        expected = (
            math.prod(shape) * DTYPE_BITS[info["dtype"]] // 8 if info["dtype"] in DTYPE_BITS else end - begin
        )
        if end - begin != expected or 8 + length + end > size:
            raise UserError(
                f"{key}={str(folder)!r}: {file.name} has {size} bytes and tensor {name} ends at"
                f" {8 + length + end}; {way_out}"
            )
        entries.append(
            TensorEntry(
                name=name,
                file=file,
                dtype=info["dtype"],
                shape=shape,
                start=8 + length + begin,
                end=8 + length + end,
            )
        )
    return entries


def read_json(file: Path, folder: Path, key: str) -> dict[str, Any]:
    """Content of a JSON file of ``folder``. Raises `UserError` when it is not there or no JSON object."""
    if not file.is_file():
        inner = folder / "model"
        hint = f"; did you mean {str(inner)!r}?" if (inner / file.name).is_file() else ""
        raise UserError(
            f"{key}={str(folder)!r}: {file.name} is missing; give a Hugging Face checkpoint directory{hint}"
        )
    try:  # a file of someone else
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{key}={str(folder)!r}: {file.name} is not JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}={str(folder)!r}: {file.name} holds no JSON object; copy it again")
    return content
