"""Cells of a benchmark, shared out among processes: whoever is free takes the next cell that may be made.

No process leads. What is left is read from the results file, and a cell is held by a lock of the kernel, so that a
killed process gives its cell back at once, and processes that were started by hand join in.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

Cell = tuple[str, int]  # row, seed
POLL_S = 2.0


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Wait for the lock ``file``, and hold it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _held(file: Path) -> Iterator[bool]:
    """Whether this process got the lock ``file``, without waiting."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def take(
    cells: list[Cell],
    needs: Callable[[Cell], Collection[Cell]],
    done: Callable[[], Collection[Cell]],
    claims: Path,
) -> Iterator[Cell]:
    """
    Yield cells, one at a time, until all are done, here or elsewhere. Whoever gets a cell makes it and notes it where
    ``done`` looks, before it asks for the next.

    Args:
        cells: What is to be made, most urgent first.
        needs: The cells that must be done before this one, as far as they are among ``cells``.
        done: The cells that are done by now.
        claims: Folder of the locks, the same for every process.
    """
    while left := [cell for cell in cells if cell not in done()]:
        for cell in left:
            if any(needed in left for needed in needs(cell)):
                continue
            with _held(claims / f"{cell[0]}-{cell[1]}") as mine:
                if mine and cell not in done():
                    yield cell
                    break
        else:
            time.sleep(POLL_S)


def run_jobs(num_jobs: int, command: list[str]) -> None:
    """
    Run ``command`` in ``num_jobs`` processes at once, each with its share of this process's cores: two learners of two
    threads on two cores wait for each other at every barrier (docs/log.md, 2026-11-29).

    Raises:
        SystemExit: Not every process ended well; each was waited for.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[job::num_jobs] or cores for job in range(num_jobs)]
    processes = [
        subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, share)), sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": str(len(share))},
        )
        for share in shares
    ]
    if failed := [p.pid for p in processes if p.wait() != 0]:
        sys.exit(f"{len(failed)} of {num_jobs} processes failed; start the same command again to go on")
