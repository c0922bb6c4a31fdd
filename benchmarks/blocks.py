"""Blocks of work in turn: two processes, each in an environment of its own, of which one waits while the other works.

Standard library alone, because both environments import it. Commands and answers are lines of JSON on a child's
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


def alternate(
    first: Child, second: Child, num_pairs: int, steps: int
) -> tuple[list[tuple[Block, Block]], dict[str, float]]:
    """``num_pairs`` pairs of blocks of ``steps`` steps, first, second, first, second and so on; and the CPU time that each
    used while it waited, as a share of the other's seconds."""
    pairs = []
    waited, idle = (
        dict.fromkeys((first.name, second.name), 0.0),
        dict.fromkeys((first.name, second.name), 0.0),
    )
    for _ in range(num_pairs):
        blocks = []
        for working, waiting in ((first, second), (second, first)):
            before, rested = working.cpu_seconds(), waiting.cpu_seconds()
            seconds = float(working.ask({"steps": steps})["seconds"])
            blocks.append(Block(seconds=seconds, cpu_seconds=working.cpu_seconds() - before))
            idle[waiting.name] += waiting.cpu_seconds() - rested
            waited[waiting.name] += seconds
        pairs.append((blocks[0], blocks[1]))
    return pairs, {name: idle[name] / waited[name] for name in idle}
