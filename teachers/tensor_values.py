"""Values of the tensors of a checkpoint, from their bytes: whole, by slices, rows or experts; rounding to narrower types.

Imports no torch. Quantized types are not read: their scales have other names in every format.
"""

from __future__ import annotations

import math
from typing import BinaryIO

import numpy as np

from teachers.checkpoint import DTYPE_BITS, TensorEntry

SLICES, SLICE_ELEMENTS = 16, 2**12
EXPERT_SLICES = 4
READABLE = ("F64", "F32", "F16", "BF16")


def read_whole(entry: TensorEntry) -> np.ndarray:
    """All values, flat, in their own type (bfloat16 as float32). For `READABLE` types."""
    with entry.file.open("rb") as stream:
        return _decode(_at(stream, entry.start, entry.end - entry.start), entry.dtype)


def read_slices(entry: TensorEntry) -> np.ndarray:
    """Values [n] float64: the whole tensor, or its spread slices."""
    count = math.prod(entry.shape)
    width = DTYPE_BITS[entry.dtype] // 8
    if count <= SLICES * SLICE_ELEMENTS:
        starts, length = [0], count
    else:
        starts = np.linspace(0, count - SLICE_ELEMENTS, SLICES).astype(int).tolist()
        length = SLICE_ELEMENTS
    with entry.file.open("rb") as stream:
        parts = []
        for start in starts:
            stream.seek(entry.start + start * width)
            parts.append(_decode(stream.read(length * width), entry.dtype))
    return np.concatenate(parts).astype(np.float64)


def read_rows(entry: TensorEntry, rows: np.ndarray) -> np.ndarray:
    """Rows [len(rows), H] float32 of a matrix."""
    width = entry.shape[1] * DTYPE_BITS[entry.dtype] // 8
    with entry.file.open("rb") as stream:
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # neighbours
            stream.seek(entry.start + int(rows[0]) * width)
            raw = stream.read(len(rows) * width)
        else:
            raw = b"".join(_at(stream, entry.start + int(row) * width, width) for row in rows)
    return _decode(raw, entry.dtype).astype(np.float32).reshape(len(rows), entry.shape[1])


def read_experts(entry: TensorEntry, count: int) -> np.ndarray:
    """``count`` values of every expert [E, count] float64 of a stacked tensor (all, where it has fewer), in `EXPERT_SLICES`
    slices spread over it."""
    width = DTYPE_BITS[entry.dtype] // 8
    each = math.prod(entry.shape[1:])
    length = min(each, count) if each <= count else count // EXPERT_SLICES
    starts = [0] if each <= count else np.linspace(0, each - length, EXPERT_SLICES).astype(int).tolist()
    with entry.file.open("rb") as stream:
        raw = b"".join(
            _at(stream, entry.start + (e * each + start) * width, length * width)
            for e in range(entry.shape[0])
            for start in starts
        )
    return _decode(raw, entry.dtype).astype(np.float64).reshape(entry.shape[0], length * len(starts))


def _at(stream: BinaryIO, start: int, length: int) -> bytes:
    stream.seek(start)
    return stream.read(length)


def _decode(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` [n] float64 rounded to the nearest value of ``dtype``, as float64."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return kept.astype(np.uint32).view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return values.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]).astype(
            np.float64
        )


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
