"""Preflight of resolved teachers, whatever holds them: files of checkpoints and adapters, answers of servers.

Used before a run (`posttrain.validate`) and before a swap (`posttrain.live_teachers`). Raises `UserError`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from posttrain.config import ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from teachers.adapter import adapter_fingerprint, check_adapter
from teachers.checkpoint import locate, read_config
from teachers.fingerprint import fingerprint
from teachers.preflight import check_files
from teachers.scores import check_signal
from teachers.server import PROBE_TOP, check_server
from teachers.teacher import SIGNALS, Teacher


def check_teachers(
    teachers: dict[str, Teacher],
    student: ModelConfig,
    workers: TeacherWorkerConfig,
    max_tokens: int,
    signal: str = "sampled",
    top_k: int = PROBE_TOP,
) -> list[dict[str, Any]]:
    """One row per domain for events.jsonl: domain, path, fingerprint, result ("ok" or "self-teacher"), shared_with.

    ``max_tokens``: the longest rollout; ``signal`` and ``top_k``: what will be asked of every teacher.
    """
    for teacher in teachers.values():
        check_signal(teacher.key, teacher.backend.value, signal, SIGNALS[teacher.backend])
    folders = {d: t.path for d, t in teachers.items() if t.backend is not TeacherBackend.server}
    rows = []
    if folders:
        keys = {d: f"{teachers[d].key}.path" for d in folders}
        rows = check_files(student.path, folders, folders, student.revision, keys)
    found = {row["domain"]: row for row in rows}
    targets: dict[str, frozenset[str]] = {}  # fingerprint of a base -> parameters that its adapters change
    for domain, teacher in teachers.items():
        row = found.setdefault(domain, {"domain": domain, "result": "ok"})
        if teacher.adapter is not None:
            wanted = check_adapter(teacher.adapter, teacher.path, teacher.key)
            if wanted and targets.setdefault(row["fingerprint"], wanted) != wanted:
                raise UserError(
                    f"{teacher.key}.adapter={teacher.adapter!r}: its target_parameters are {sorted(wanted)}, those of"
                    f" another adapter on this base {sorted(targets[row['fingerprint']])}; PEFT holds only equal ones"
                )
            row["result"], row["base"] = "ok", teacher.path
        if teacher.backend is TeacherBackend.vllm:
            _check_context(teacher, max_tokens)
        if teacher.backend is TeacherBackend.server:
            folder = locate(student.path, "model.path", student.revision)
            vocab_size = _vocab_size(read_config(folder, "model.path"))
            k = PROBE_TOP if signal == "sampled" else top_k
            check_server(teacher, workers, folder, vocab_size, max_tokens, k)
        row |= {"path": teacher.name, "fingerprint": teacher_fingerprint(teacher)}
        row["backend"] = teacher.backend.value
    for row in found.values():
        same = [other["domain"] for other in found.values() if other["fingerprint"] == row["fingerprint"]]
        row["shared_with"] = sorted(set(same) - {row["domain"]})
    return [found[domain] for domain in sorted(found)]


def teacher_fingerprint(teacher: Teacher) -> str:
    """What a teacher computes with: BASE or BASE+ADAPTER (hex). Nobody sees the weights behind a server: there it is
    a hash of URL and name."""
    if teacher.backend is TeacherBackend.server:
        return hashlib.sha256(teacher.name.encode()).hexdigest()
    base = fingerprint(teacher.path, f"{teacher.key}.path")
    if teacher.adapter is None:
        return base
    return f"{base}+{adapter_fingerprint(teacher.adapter, f'{teacher.key}.adapter')}"


def _check_context(teacher: Teacher, max_tokens: int) -> None:
    key = f"{teacher.key}.path"
    config = read_config(locate(teacher.path, key), key)
    context = config.get("text_config", config).get("max_position_embeddings")
    if context is not None and context <= max_tokens:
        raise UserError(
            f"rollout.max_model_len={max_tokens}: the context of {key}={teacher.path!r} is {context}, and vLLM samples"
            f" one token after a text; give at most {context - 1}, or set {teacher.key}.backend=transformers"
        )


def _vocab_size(config: dict[str, Any]) -> int:
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
