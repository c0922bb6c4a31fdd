"""Fingerprint of a checkpoint's (or adapter's) weights: the same for equal tensors, however they are cut into shards.

Owns the hash and its cache (per process, by the names of the tensors and by path, modification time and size of every
shard). Says nothing of
config or tokenizer, which `teachers.preflight` compares.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teachers.checkpoint import TensorEntry, locate, read_tensors

CHUNK_BYTES = 8 * 2**20
NUM_THREADS = 4  # hashlib releases the interpreter lock

_cache: dict[tuple[tuple[tuple[str, int, int], ...], tuple[str, ...]], str] = {}


def fingerprint(path: str, key: str = "path", revision: str | None = None) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of every tensor, in the order of the names.

    ``key`` is the config key that a `UserError` about missing or damaged files names, ``revision`` that of a hub id.
    """
    return hash_tensors(read_tensors(locate(path, key, revision), key))


def num_bytes(path: str, key: str = "path") -> int:
    """Bytes of all tensors of the checkpoint, for placing it."""
    return sum(entry.end - entry.start for entry in read_tensors(locate(path, key), key).values())


def hash_tensors(tensors: dict[str, TensorEntry]) -> str:
    """`fingerprint` of tensors whose headers are read already."""
    stamp = _stamp({entry.file for entry in tensors.values()}), tuple(sorted(tensors))
    if stamp not in _cache:
        _cache[stamp] = _hash([tensors[name] for name in sorted(tensors)])
    return _cache[stamp]


def _stamp(files: set[Path]) -> tuple[tuple[str, int, int], ...]:
    stats = [(str(file.resolve()), file.stat()) for file in sorted(files)]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _hash(entries: list[TensorEntry]) -> str:
    total = hashlib.sha256()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for entry, digest in zip(entries, threads.map(_hash_tensor, entries), strict=True):
            total.update(f"{entry.name} {entry.dtype} {list(entry.shape)} {digest}\n".encode())
    return total.hexdigest()


def _hash_tensor(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        left = entry.end - entry.start
        while left:
            chunk = stream.read(min(CHUNK_BYTES, left))
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
