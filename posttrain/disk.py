"""Files that are either whole or not there, and the question whether the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

SPARE_BYTES = 16 * 2**20  # less than this free counts as full


def write_atomic(file: Path, text: str) -> None:
    """Write aside, flush to the disk, rename."""
    aside = file.with_name(f".{file.name}.tmp")
    with aside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, whoever wrote them."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Flush one file, or the entries of one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether ``error`` came from a full disk: by its number, by a worker's traceback, or by what is left."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(link):
            return True
        link = getattr(link, "cause", None) or link.__cause__
    # torch reports a short write as a RuntimeError without a number
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < SPARE_BYTES
