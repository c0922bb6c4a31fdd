"""metrics.jsonl (one object per step, every step exactly once; step 0 is an evaluation before the first), expert_load.jsonl
(one per window of steps) and events.jsonl (what happened, append-only).

Owns the files' repair after a kill: a half-written last line is dropped, and metrics of steps after the checkpoint
are cut away in one atomic replacement. Refuses a file that is damaged anywhere else, and a step that goes back.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import UserError


class MetricsFile:
    """metrics.jsonl of a run; every line reaches the operating system before `write` returns."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open for appending after ``resume_step`` (0: nothing of a former attempt is kept)."""
        self.path = path
        self.last_step = resume_step or -1
        if path.exists():
            _cut_back(path, resume_step)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line: step, time (seconds since 1970), metrics. Values that are not finite become null."""
        assert step > self.last_step, f"step {step} after step {self.last_step}: a step is written once"
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._stream.flush()
        self.last_step = step

    def close(self) -> None:
        self._stream.close()


class LoadFile:
    """expert_load.jsonl of a run: one line per window of steps; the file is there from the first line on."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        if path.exists():
            _cut_back(path, resume_step)

    def write(self, step: int, load: dict[str, Any]) -> None:
        """Append one line: the last step of the window, and what `LearnerGroup.expert_load` says of it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **load}) + "\n")


class EventsFile:
    """events.jsonl of a run; survives resumption whole, since a restart is itself an event."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            _drop_half_line(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, kind: str, fields: dict[str, Any]) -> None:
        """Append one line: time, kind, fields (what JSON does not know, NaN too, is written as text)."""
        self._stream.write(json.dumps(_to_json({"time": time.time(), "kind": kind, **fields})) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of the file; a half-written last line is left out, any other bad line is a `UserError`."""
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:  # the writer may have been killed in the middle of a line
            if line.strip():
                rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # no newline after it: half-written
                break
            raise UserError(f"{path}:{number}: not JSON; mend or delete that line") from None
    return rows


def _cut_back(path: Path, resume_step: int) -> None:
    kept = [row for row in read_jsonl(path) if row["step"] <= resume_step] if resume_step else []
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def _drop_half_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)
