"""The rows of the preflight: one verdict of one gate on the teacher of one domain, and what stops a run.

Owns the order and the meaning of the gates, and the one line of a refusal. A red row stops the run unless
`teacher_workers.accept` names its gate; `files` and the rows of `NEVER_RED` have nothing to accept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from posttrain.config import UserError

# In the order of the table. Those that can stop a run and be accepted are `posttrain.config.ACCEPTABLE`.
GATES = {
    "files": "config.json, complete shards",
    "vocabulary": "the student's tokens under the same ids",
    "special_tokens": "the same begin, end and special marks",
    "chat_template": "the student's chat template",
    "tokenizer": "the same text gives the same ids",
    "revision": "the revision that was asked for",
    "self_teacher": "another model than the student",
    "shared": "another model than the other domains' teachers",
    "tensors": "the student's tensors, none missing",
    "weights": "no broken, zeroed, scaled or permuted tensor",
    "foreign": "of the student's origin, by distance of the weights",
    "scoring": "scores equal a direct forward of the checkpoint",
    "noise": "two scorings of the same text agree",
    "initial_kl": "distance on the student's own samples",
    "domain_swap": "the teacher has moved most where it is mapped",
    "lengths": "the student's samples end by themselves",
    "cost": "speed of scoring",
}
NEVER_RED = ("shared", "domain_swap", "lengths", "cost")


class Verdict(StrEnum):
    """What a gate says."""

    ok = "ok"
    warn = "warn"
    red = "red"
    accepted = "accepted"  # red, and named in teacher_workers.accept


@dataclass(kw_only=True, slots=True)
class GateRow:
    """One cell of the table. ``problem`` and ``way_out`` are empty where the verdict is ok."""

    domain: str
    path: str
    gate: str
    verdict: Verdict
    value: str  # a few words for the table
    number: float | None = None
    problem: str = ""
    way_out: str = ""

    def line(self) -> str:
        """Key, value, problem, way out, and the name that accepts it."""
        key = f"teachers.{self.domain}.path={self.path!r}"
        end = "" if self.gate == "files" else f" (accepted by name: teacher_workers.accept=[{self.gate}])"
        return f"{key}: {self.problem}; {self.way_out}{end if self.verdict is Verdict.red else ''}"


def judge(rows: Iterable[GateRow], accept: Iterable[str]) -> list[GateRow]:
    """The rows in the order of domains and gates, red ones that ``accept`` names turned into accepted ones."""
    order = list(GATES)
    found = sorted(rows, key=lambda row: (row.domain, order.index(row.gate)))
    for row in found:
        assert row.verdict is not Verdict.red or row.gate not in NEVER_RED, row
        if row.verdict is Verdict.red and row.gate in accept and row.gate != "files":
            row.verdict = Verdict.accepted
    return found


def stop_on_red(rows: Iterable[GateRow]) -> None:
    """Raises `UserError` for the first red row."""
    for row in rows:
        if row.verdict is Verdict.red:
            raise UserError(row.line())
