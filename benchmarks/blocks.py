"""Blocks of work in turn: processes in environments of their own, of which one works while the others wait.

Standard library alone, because all environments import it. Commands and answers are lines of JSON on a child's
standard input and output; whatever else the child prints goes to its log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


class Channel:
    """The child's end. Make it before anything prints."""

    def __init__(self) -> None:
        self._answers: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The next command; the process sleeps until it comes."""
        line = sys.stdin.readline()
        if not line:
            sys.exit("the benchmark is gone")
        return json.loads(line)

    def send(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


class Child:
    """The benchmark's end: a running child, with everything it prints in ``log``."""

    def __init__(
        self, name: str, command: list[str], settings: dict[str, Any], log: Path, num_threads: int
    ) -> None:
        self.name, self.log = name, log
        environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [*command, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=environment,
            )

    def send(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next answer; ends the benchmark with the last lines of the child's log when the child has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            sys.exit(f"{self.name} ended with status {self.process.wait()}; {self.log} ends with\n{tail}")
        return json.loads(line)

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self.send(command)
        return self.receive()

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(kw_only=True, slots=True)
class Block:
    """What a block of steps cost: seconds by the child's own clock, and CPU time of all its threads, which other work on
    the machine lengthens less."""

    seconds: float
    cpu_seconds: float


def alternate(rounds: list[list[Child]], steps: int) -> tuple[dict[str, list[Block]], dict[str, float]]:
    """A block of ``steps`` steps of every child in every round, in the order of the round. Returns the blocks by name of
    the child, and the CPU time that each used while it waited, as a share of the seconds that the others worked."""
    names = [child.name for child in rounds[0]]
    blocks: dict[str, list[Block]] = {name: [] for name in names}
    waited, idle = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for order in rounds:
        for working in order:
            before = {child.name: child.cpu_seconds() for child in order}
            seconds = float(working.ask({"steps": steps})["seconds"])
            used = {child.name: child.cpu_seconds() - before[child.name] for child in order}
            blocks[working.name].append(Block(seconds=seconds, cpu_seconds=used.pop(working.name)))
            for name, cpu_seconds in used.items():
                idle[name] += cpu_seconds
                waited[name] += seconds
    return blocks, {name: idle[name] / waited[name] for name in names}
