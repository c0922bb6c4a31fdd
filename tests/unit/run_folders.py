"""Configurations of runs in a folder of a test, and what lies there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain import run_folder
from posttrain.compose import compose


@contextmanager
def run_configs(runs_dir: Path) -> Iterator[Callable[..., Any]]:
    """``make("sft", "algorithm.steps=9")``: the config of the run `run`. At the end every folder is let go of."""

    def make(command: str = "sft", *overrides: str) -> Any:
        own = ["model.path=/m", "data.path=/d.jsonl", f"runs_dir={runs_dir}", "name=run", *overrides]
        return compose(command, own)[1]

    let_go()  # of what other tests of this process left open
    yield make
    let_go()


def let_go() -> None:
    for path in list(run_folder._locks):
        run_folder._locks.pop(path).close()


def write_weights(text: str) -> Callable[[Path], None]:
    """What `RunFolder.save` is given to write."""

    def write(folder: Path) -> None:
        (folder / "rank_0").mkdir()
        (folder / "rank_0" / "weights.bin").write_text(text)

    return write


def contents(path: Path) -> dict[str, bytes]:
    """Every file below but the lock."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}
