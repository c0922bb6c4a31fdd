"""summary.json of a pipeline: accuracies, how much of each teacher the student took over, times, replay.

Owns the shape of that file. Consumes rewards per prompt; refuses models evaluated on different prompts.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.report.bootstrap import Interval, normalised, standard_error
from posttrain.stages import in_round

SFT, MOPD, AVERAGE = "sft", "mopd", "average_merge"
TEACHER_PREFIX = "teacher/"


@dataclass(kw_only=True, slots=True)
class EvalScores:
    """Rewards in [0, 1] of one model on one domain's held-out prompts, in the order of the prompts."""

    sampled: np.ndarray  # [num_prompts, num_samples], temperature 1
    greedy: np.ndarray | None = None  # [num_prompts]


EvalTable = dict[str, dict[str, EvalScores]]
"""Model name -> domain -> scores. Names: "sft", "mopd", "average_merge" and `teacher_name(domain)`, those of later rounds
as `posttrain.stages.in_round` says; the cells of a teacher outside its own domain may hold fewer prompts than the others.
"average_merge" may be absent."""


def teacher_name(domain: str) -> str:
    """Name under which the teacher of ``domain`` stands in an `EvalTable`."""
    return TEACHER_PREFIX + domain


def domain_of_teacher(name: str) -> str | None:
    """The domain whose teacher, of whatever round, is called ``name``; None for other models."""
    _, prefix, domain = name.rpartition(TEACHER_PREFIX)
    return domain if prefix else None


def build_summary(
    table: EvalTable, wall_s: dict[str, float], replay: dict[str, float] | None, seed: int
) -> dict[str, Any]:
    """The content of summary.json, plain JSON types only.

    ``wall_s``: stage -> seconds ("total" is added where it is absent). ``replay``: coverage, k3, k3_without,
    route_mismatch; None for a dense model. Accuracies are means in [0, 1]; an end of "ci" that is not finite, and a
    normalised value of a domain whose teacher is not better than SFT, are null. Where the table has a second round,
    "rounds" holds teachers, student and the student's normalised values (1: the *first* round's teacher) of each.
    """
    domains = list(table[SFT])
    own = {domain: table[teacher_name(domain)][domain] for domain in domains}
    students = [name for name in (MOPD, AVERAGE) if name in table]
    summary: dict[str, Any] = {
        "domains": domains,
        "num_eval": {domain: len(table[SFT][domain].sampled) for domain in domains},
        "accuracy": _accuracy(table, greedy=False),
    }
    if table[SFT][domains[0]].greedy is not None:
        summary["accuracy_greedy"] = _accuracy(table, greedy=True)
    summary["normalised"] = {
        name: _normalised(_sampled(table[SFT]), _sampled(own), _sampled(table[name]), seed)
        for name in students
    }
    if in_round(2, MOPD) in table:
        summary["rounds"] = _rounds(table, own, seed)
    total = wall_s.get("total", sum(wall_s.values()))
    summary["wall_s"] = {stage: round(float(s), 1) for stage, s in {**wall_s, "total": total}.items()}
    summary["replay"] = None if replay is None else {name: float(value) for name, value in replay.items()}
    summary["seed"] = seed
    return summary


def standard_errors(table: EvalTable) -> dict[str, dict[str, float]]:
    """Model ("sft", "mopd", "average_merge", "teachers" for own teachers) -> domain -> standard error, for bars."""
    errors = {
        name: {domain: standard_error(cell.sampled) for domain, cell in table[name].items()}
        for name in (SFT, MOPD, AVERAGE)
        if name in table
    }
    errors["teachers"] = {
        domain: standard_error(table[teacher_name(domain)][domain].sampled) for domain in table[SFT]
    }
    return errors


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    os.replace(aside, path)


def _rounds(table: EvalTable, own: dict[str, EvalScores], seed: int) -> list[dict[str, Any]]:
    """One entry per round: accuracy of its teachers and its student, and how far the student is on the way to the first
    round's teachers."""
    rounds: list[dict[str, Any]] = []
    while (student := in_round(len(rounds) + 1, MOPD)) in table:
        number = len(rounds) + 1
        teachers = {d: table[in_round(number, teacher_name(d))][d] for d in own}
        rounds.append(
            {
                "teachers": {d: round(float(cell.sampled.mean()), 6) for d, cell in teachers.items()},
                "mopd": {d: round(float(table[student][d].sampled.mean()), 6) for d in own},
                "normalised": _normalised(
                    _sampled(table[SFT]), _sampled(own), _sampled(table[student]), seed
                ),
            }
        )
    return rounds


def _accuracy(table: EvalTable, *, greedy: bool) -> dict[str, Any]:
    def mean(cell: EvalScores) -> float:
        rewards = cell.greedy if greedy else cell.sampled
        assert rewards is not None, "greedy scores are there for all models or for none"
        return round(float(rewards.mean()), 6)

    domains = list(table[SFT])
    teachers = {domain: table[teacher_name(domain)] for domain in domains}
    accuracy: dict[str, Any] = {SFT: {domain: mean(table[SFT][domain]) for domain in domains}}
    accuracy["teachers"] = {domain: mean(teachers[domain][domain]) for domain in domains}
    accuracy["teachers_all"] = {
        teacher: {
            domain: mean(cells[domain])
            for domain in domains
            if domain in cells and not (greedy and cells[domain].greedy is None)
        }
        for teacher, cells in teachers.items()
    }
    for name in (MOPD, AVERAGE):
        if name in table:
            accuracy[name] = {domain: mean(table[name][domain]) for domain in domains}
    return accuracy


def _sampled(cells: dict[str, EvalScores]) -> dict[str, np.ndarray]:
    return {domain: cell.sampled for domain, cell in cells.items()}


def _normalised(
    sft: dict[str, np.ndarray], teacher: dict[str, np.ndarray], model: dict[str, np.ndarray], seed: int
) -> dict[str, Any]:
    values, mean = normalised(sft, teacher, model, seed)
    everything = {**values, "mean": mean}
    result: dict[str, Any] = {
        name: None if interval.value is None else round(interval.value, 4)
        for name, interval in everything.items()
    }
    result["ci"] = {name: _ends(interval) for name, interval in everything.items()}
    return result


def _ends(interval: Interval) -> list[float | None]:
    return [round(end, 4) if np.isfinite(end) else None for end in (interval.low, interval.high)]
