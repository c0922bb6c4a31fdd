"""The rows of the preflight: one verdict of one gate on the teacher of one domain, and what stops a run.

Owns the order and the meaning of the gates, and the one line of a refusal. A red row stops the run unless
`teacher_workers.accept` names its gate; without `files`, `server` and `context` there is nothing to score with, so that
they cannot be accepted. A gate that a back end gives no answer to is a row as well: not measured is not ok.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from posttrain.config import ACCEPTABLE, TeacherBackend, UserError
from teachers.teacher import Teacher

# In the order of the table. Those that can stop a run and be accepted are `posttrain.config.ACCEPTABLE`.
GATES = {
    "files": "config.json, complete shards, an adapter that fits",
    "server": "the server holds the model and gives logprobs",
    "context": "room for the longest rollout",
    "vocabulary": "the student's tokens under the same ids",
    "special_tokens": "the same begin, end and special marks",
    "chat_template": "the student's chat template",
    "tokenizer": "the same text gives the same ids",
    "config": "the student's settings of the forward",
    "revision": "the revision that was asked for",
    "self_teacher": "another model than the student",
    "shared": "another model than the other domains' teachers",
    "tensors": "the student's tensors, none missing",
    "weights": "no broken, zeroed, scaled or permuted tensor",
    "foreign": "of the student's origin, by distance of the weights",
    "adapter": "finite, and not without effect",
    "scoring": "scores equal a direct forward of the checkpoint",
    "noise": "two scorings of the same text agree",
    "initial_kl": "distance on the student's own samples",
    "domain_swap": "the teacher has moved most where it is mapped",
    "lengths": "the student's samples end by themselves",
    "cost": "speed of scoring",
}
NEVER_RED = ("shared", "domain_swap", "lengths", "cost")
UNLOADABLE = ("files", "server", "context")  # red ones cannot be accepted


class Verdict(StrEnum):
    """What a gate says."""

    ok = "ok"
    warn = "warn"
    red = "red"
    accepted = "accepted"  # red, and named in teacher_workers.accept
    unmeasured = "not measured"  # this back end gives no answer


@dataclass(kw_only=True, slots=True)
class GateRow:
    """One cell of the table. ``problem`` and ``way_out`` are empty where the verdict is ok or unmeasured."""

    domain: str
    path: str  # `Teacher.name`
    backend: str
    setting: str  # key and value to change: teachers.math.path='DIR'
    gate: str
    verdict: Verdict
    value: str  # a few words for the table
    number: float | None = None
    problem: str = ""
    way_out: str = ""

    def line(self) -> str:
        """Key, value, problem, way out, and the name that accepts it."""
        can = self.verdict is Verdict.red and self.gate in ACCEPTABLE
        end = f" (accepted by name: teacher_workers.accept=[{self.gate}])" if can else ""
        return f"{self.setting}: {self.problem}; {self.way_out}{end}"


@dataclass(kw_only=True, slots=True, frozen=True)
class Subject:
    """The teacher of one domain, of which rows speak."""

    domain: str
    teacher: Teacher

    @property
    def setting(self) -> str:
        """The part of the config that names it."""
        teacher = self.teacher
        if teacher.adapter is not None:
            return f"{teacher.key}.adapter={teacher.adapter!r}"
        return self.base

    @property
    def base(self) -> str:
        """The part of the config that names its checkpoint or server."""
        return f"{self.teacher.key}.path={self.teacher.path!r}"

    @property
    def is_server(self) -> bool:
        return self.teacher.backend is TeacherBackend.server

    def ok(self, gate: str, value: str, number: float | None = None) -> GateRow:
        return self._row(gate, Verdict.ok, value, number, "", "", None)

    def warn(
        self,
        gate: str,
        value: str,
        problem: str,
        way_out: str,
        number: float | None = None,
        setting: str | None = None,
    ) -> GateRow:
        return self._row(gate, Verdict.warn, value, number, problem, way_out, setting)

    def red(
        self,
        gate: str,
        value: str,
        problem: str,
        way_out: str,
        number: float | None = None,
        setting: str | None = None,
    ) -> GateRow:
        return self._row(gate, Verdict.red, value, number, problem, way_out, setting)

    def unmeasured(self, gate: str, why: str) -> GateRow:
        return self._row(gate, Verdict.unmeasured, why, None, "", "", None)

    def refused(self, gate: str, value: str, error: UserError) -> GateRow:
        """A red row of what ``error`` says: KEY=VALUE: problem; way out."""
        setting, _, rest = str(error).partition(": ")
        problem, _, way_out = rest.partition("; ")
        if setting.startswith(f"{self.teacher.key}.path="):
            setting = self.base  # as the user wrote it
        return self.red(gate, value, problem, way_out or "give another one", setting=setting)

    def _row(
        self,
        gate: str,
        verdict: Verdict,
        value: str,
        number: float | None,
        problem: str,
        way_out: str,
        setting: str | None,
    ) -> GateRow:
        return GateRow(
            domain=self.domain,
            path=self.teacher.name,
            backend=self.teacher.backend.value,
            setting=setting or self.setting,
            gate=gate,
            verdict=verdict,
            value=value,
            number=number,
            problem=problem,
            way_out=way_out,
        )


def judge(rows: Iterable[GateRow], accept: Iterable[str]) -> list[GateRow]:
    """The rows in the order of domains and gates, red ones that ``accept`` names turned into accepted ones."""
    order = list(GATES)
    found = sorted(rows, key=lambda row: (row.domain, order.index(row.gate)))
    for row in found:
        assert row.verdict is not Verdict.red or row.gate not in NEVER_RED, row
        if row.verdict is Verdict.red and row.gate in accept and row.gate in ACCEPTABLE:
            row.verdict = Verdict.accepted
    return found


def stop_on_red(rows: Iterable[GateRow]) -> None:
    """Raises `UserError` for the first red row, which names the others too."""
    red = [row for row in rows if row.verdict is Verdict.red]
    if not red:
        return
    others = ", ".join(f"{row.gate} of teachers.{row.domain}" for row in red[1:4])
    more = f"; red as well: {others}{' ...' if len(red) > 4 else ''}" if others else ""
    raise UserError(red[0].line() + more)
