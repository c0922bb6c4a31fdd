"""Preflight of resolved teachers, whatever holds them: files of checkpoints and adapters, answers of servers.

Owns which gates a back end has before anything starts, and a teacher's fingerprint. `check_teachers` is what a run, a
dry run and a swap (`posttrain.live_teachers`) ask; `teacher_gates` gives the same rows without refusing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from posttrain.config import ModelConfig, TeacherBackend, TeacherWorkerConfig
from teachers.adapter import adapter_fingerprint, target_parameters
from teachers.checkpoint import locate, read_config
from teachers.fingerprint import fingerprint
from teachers.gates import UNLOADABLE, GateRow, Subject, Verdict, judge, stop_on_red
from teachers.preflight import Student, file_gates
from teachers.scores import check_signal
from teachers.server import PROBE_TOP, server_gates
from teachers.settings import digest
from teachers.teacher import SIGNALS, Teacher


def check_teachers(
    teachers: dict[str, Teacher],
    student: ModelConfig,
    workers: TeacherWorkerConfig,
    max_tokens: int,
    signal: str = "sampled",
    top_k: int = PROBE_TOP,
    weights: bool = True,
    in_use: Mapping[str, str] | None = None,
) -> list[GateRow]:
    """`teacher_gates` in the order of domains and gates. Raises `UserError` for the first red row that
    `teacher_workers.accept` does not name."""
    found = teacher_gates(teachers, student, workers, max_tokens, signal, top_k, weights, in_use)
    rows = judge(found, workers.accept)
    stop_on_red(rows)
    return rows


def teacher_gates(
    teachers: dict[str, Teacher],
    student: ModelConfig,
    workers: TeacherWorkerConfig,
    max_tokens: int,
    signal: str = "sampled",
    top_k: int = PROBE_TOP,
    weights: bool = True,
    in_use: Mapping[str, str] | None = None,
) -> list[GateRow]:
    """Every gate that needs no scores of rollouts, for the teacher of every domain.

    Args:
        max_tokens: the longest rollout.
        signal, top_k: what will be asked of every teacher.
        weights: compare tensors with the student's; off where the student of the run does not exist yet.
        in_use: domain -> fingerprint of a run's present teachers, when some are to be changed.

    Raises:
        UserError: a signal that a back end cannot give, a student that cannot be read.
    """
    for teacher in teachers.values():
        check_signal(teacher.key, teacher.backend.value, signal, SIGNALS[teacher.backend])
    ours = Student.read(student)
    rows: list[GateRow] = []
    for domain, teacher in teachers.items():
        subject = Subject(domain=domain, teacher=teacher)
        if subject.is_server:
            k = PROBE_TOP if signal == "sampled" else top_k
            rows += server_gates(subject, workers, ours.folder, ours.vocab_size, max_tokens, k)
        else:
            rows += file_gates(subject, ours, weights)
        if teacher.backend is TeacherBackend.vllm and _is_readable(rows, domain):
            rows.append(_context(subject, max_tokens))
    readable = {d: t for d, t in teachers.items() if _is_readable(rows, d)}
    return _targets(readable, rows) + (_shared(readable, in_use or {}) if weights else [])


def teacher_fingerprint(teacher: Teacher) -> str:
    """What a teacher computes with: BASE.SETTINGS or BASE.SETTINGS+ADAPTER (hex), SETTINGS being what its config.json has
    that tensors do not tell. Nobody sees the weights behind a server: there it is a hash of URL and name."""
    if teacher.backend is TeacherBackend.server:
        return hashlib.sha256(teacher.name.encode()).hexdigest()
    key = f"{teacher.key}.path"
    settings = digest(read_config(locate(teacher.path, key, teacher.revision), key))
    base = f"{fingerprint(teacher.path, key, teacher.revision)}.{settings}"
    if teacher.adapter is None:
        return base
    return f"{base}+{adapter_fingerprint(teacher.adapter, f'{teacher.key}.adapter')}"


def key_of(teacher: Teacher) -> str:
    """By which pool and workers know a teacher: the same for the same weights behind the same back end."""
    return f"{teacher.backend.value}:{teacher_fingerprint(teacher)}"


def _is_readable(rows: list[GateRow], domain: str) -> bool:
    return not any(
        row.domain == domain and row.gate in UNLOADABLE and row.verdict is Verdict.red for row in rows
    )


def _context(subject: Subject, max_tokens: int) -> GateRow:
    teacher = subject.teacher
    key = f"{teacher.key}.path"
    config = read_config(locate(teacher.path, key, teacher.revision), key)
    context = config.get("text_config", config).get("max_position_embeddings")
    if context is None:
        return subject.unmeasured("context", "config.json does not tell")
    if context > max_tokens:
        return subject.ok("context", f"{context} tokens")
    return subject.red(
        "context",
        f"{context} tokens",
        f"the context of {subject.base} is {context}, and vLLM samples one token after a text",
        f"give at most {context - 1}, or set {teacher.key}.backend=transformers",
        setting=f"rollout.max_model_len={max_tokens}",
    )


def _targets(teachers: dict[str, Teacher], rows: list[GateRow]) -> list[GateRow]:
    """``rows``, where adapters of one base that have target parameters at all must have the same."""
    held: dict[str, frozenset[str]] = {}  # fingerprint of a base -> what its adapters change
    for domain, teacher in teachers.items():
        wanted = target_parameters(teacher.adapter, teacher.key) if teacher.adapter else None
        base = teacher_fingerprint(teacher).partition("+")[0]
        if not wanted or held.setdefault(base, wanted) == wanted:
            continue
        rows = [row for row in rows if row.domain != domain]
        problem = (
            f"its target_parameters are {sorted(wanted)}, those of another adapter on this base"
            f" {sorted(held[base])}"
        )
        way_out = "PEFT holds only equal ones: merge one of them into a checkpoint"
        rows.append(Subject(domain=domain, teacher=teacher).red("files", "other targets", problem, way_out))
    return rows


def _shared(teachers: dict[str, Teacher], in_use: Mapping[str, str]) -> list[GateRow]:
    """Equal teachers of two domains are legitimate (a generalist), and often a slip: reported. ``teachers.default`` says
    that it is meant."""
    rows = []
    own = {**in_use, **{domain: teacher_fingerprint(teacher) for domain, teacher in teachers.items()}}
    for domain, teacher in teachers.items():
        subject = Subject(domain=domain, teacher=teacher)
        others = [d for d in own if d != domain and own[d] == own[domain]]
        names = ", ".join(others)
        if not others:
            rows.append(subject.ok("shared", "its own model"))
        elif all(d in teachers and teachers[d].key == teacher.key for d in others):
            rows.append(subject.ok("shared", f"also {names}"))
        else:
            way_out = "right for one teacher of several domains; otherwise mend the path"
            rows.append(subject.warn("shared", f"also {names}", f"the very teacher of {names} too", way_out))
    return rows
