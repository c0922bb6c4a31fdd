"""What must be true of the teachers before anything starts, and of their first scores.

Owns the refusal of a wrong teacher: another vocabulary, other special tokens, another chat template, a missing or
truncated shard, a domain without teacher, a teacher without domain, a teacher far from the student's samples. Each
is a `UserError` naming ``teachers.<domain>.path``. A teacher equal to the student is reported, not refused.
`check_files` reads files only (no torch); `check_gap` takes logprobs that the caller has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import UserError
from teachers.checkpoint import locate, read_config, read_tensors
from teachers.fingerprint import fingerprint

# The pad token is left out: nobody samples it, and fine-tuned checkpoints often change it.
SPECIAL_TOKENS = ("bos_token", "eos_token")


@dataclass(kw_only=True, slots=True)
class TokenizerFiles:
    """What decides whether two checkpoints read the same token ids in the same way."""

    vocabulary: dict[str, int]
    special: dict[str, str | None]  # role -> token
    special_ids: frozenset[int]
    chat_template: str | None


def check_files(
    student_path: str,
    teachers: Mapping[str, str | None],
    domains: Iterable[str],
    student_revision: str | None = None,
    keys: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Compare every teacher's files with the student's; return one row per domain for events.jsonl.

    ``teachers`` maps domain -> path (None where the config has no path); ``domains`` are those of the prompts. Rows
    hold domain, path, fingerprint, result ("ok" or "self-teacher") and the domains that share the checkpoint.
    ``keys`` are the config keys of the paths where they are not ``teachers.<domain>.path``. Raises `UserError`.
    """
    domains = sorted(set(domains))
    _check_mapping(teachers, domains)
    student = locate(student_path, "model.path", student_revision)
    student_tokens = read_tokenizer(student, "model.path")
    student_vocab_size = _vocab_size(read_config(student, "model.path"))
    rows: list[dict[str, Any]] = []
    for domain in domains:
        key, path = (keys or {}).get(domain, f"teachers.{domain}.path"), teachers[domain]
        assert path is not None
        folder = locate(path, key)
        config = read_config(folder, key)
        read_tensors(folder, key)
        _compare(key, path, read_tokenizer(folder, key), student_tokens)
        _compare_vocab_size(key, path, _vocab_size(config), student_vocab_size)
        rows.append({"domain": domain, "path": path, "fingerprint": fingerprint(path, key)})
    student_fingerprint = fingerprint(student_path, "model.path", student_revision)
    for row in rows:
        row["result"] = "self-teacher" if row["fingerprint"] == student_fingerprint else "ok"
        row["shared_with"] = [
            other["domain"]
            for other in rows
            if other is not row and other["fingerprint"] == row["fingerprint"]
        ]
    return rows


def check_gap(
    domain: str,
    path: str,
    teacher_logprobs: list[np.ndarray],
    student_logprobs: list[np.ndarray],
    loss_masks: list[np.ndarray],
    limit: float,
) -> dict[str, Any]:
    """Mean |teacher - student| logprob over the student's own sampled tokens; all arrays are [T].

    Raises `UserError` above ``limit`` (`teacher_workers.max_initial_kl`): such a teacher almost always reads another
    template or vocabulary than the files say. Returns a row for events.jsonl.
    """
    gaps = np.concatenate(
        [
            np.abs(teacher - student)[mask]
            for teacher, student, mask in zip(teacher_logprobs, student_logprobs, loss_masks, strict=True)
        ]
    )
    assert gaps.size, f"no sampled token of domain {domain!r} to compare on"
    mean = float(gaps.mean())
    if not mean <= limit:
        raise UserError(
            f"teachers.{domain}.path={path!r}: mean |log-ratio| to the student on its own samples is {mean:.3f}, above"
            f" teacher_workers.max_initial_kl={limit}; choose a teacher of this student's family or raise the limit"
        )
    return {
        "domain": domain,
        "path": path,
        "mean_abs": mean,
        "p99_abs": float(np.quantile(gaps, 0.99)),
        "num_tokens": int(gaps.size),
    }


def read_tokenizer(folder: Path, key: str) -> TokenizerFiles:
    """Vocabulary, special tokens and chat template of a checkpoint folder."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _read_slow_tokenizer(folder, key)
    content = json.loads(file.read_text())
    model_vocab = content["model"].get("vocab", {})
    if isinstance(model_vocab, list):  # Unigram: [token, score] in the order of the ids
        model_vocab = {row[0]: i for i, row in enumerate(model_vocab)}
    added = content.get("added_tokens", [])
    return TokenizerFiles(
        vocabulary=dict(model_vocab) | {token["content"]: token["id"] for token in added},
        special=_read_special(folder),
        special_ids=frozenset(token["id"] for token in added if token.get("special")),
        chat_template=_read_chat_template(folder),
    )


def _check_mapping(teachers: Mapping[str, str | None], domains: list[str]) -> None:
    for domain in domains:
        if teachers.get(domain) is None:
            raise UserError(
                f"teachers.{domain}.path=None: prompts of domain {domain!r} have no teacher; give"
                f" teachers.{domain}.path=DIR"
            )
    for domain, path in teachers.items():
        if domain not in domains:
            raise UserError(
                f"teachers.{domain}.path={path!r}: no prompt belongs to domain {domain!r} (there are"
                f" {', '.join(domains)}); remove this teacher or mend the rows' domain"
            )


def _compare(key: str, path: str, teacher: TokenizerFiles, student: TokenizerFiles) -> None:
    if teacher.vocabulary != student.vocabulary:
        raise UserError(
            f"{key}={path!r}: another vocabulary than the student's"
            f" ({_first_difference(teacher.vocabulary, student.vocabulary)}); only a teacher with the student's"
            " tokenizer can score its tokens"
        )
    for role in SPECIAL_TOKENS:
        if teacher.special[role] != student.special[role]:
            raise UserError(
                f"{key}={path!r}: its {role} is {teacher.special[role]!r}, the student's {student.special[role]!r};"
                " give both the same tokenizer_config.json"
            )
    if teacher.special_ids != student.special_ids:
        ids = sorted(teacher.special_ids ^ student.special_ids)
        raise UserError(
            f"{key}={path!r}: token ids {ids[:5]} are special in only one of teacher and student;"
            " give both the same tokenizer.json"
        )
    if teacher.chat_template != student.chat_template:
        raise UserError(
            f"{key}={path!r}: another chat template than the student's; the teacher would score a format that it"
            " never saw. Use a teacher of the same template, or copy the student's chat_template.jinja if it was"
            " trained with that"
        )


def _compare_vocab_size(key: str, path: str, teacher: int, student: int) -> None:
    if teacher < student:
        raise UserError(
            f"{key}={path!r}: its vocab_size is {teacher}, the student's {student}: it could not score every id that"
            " the student samples; give a teacher with at least as many rows"
        )


def _first_difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    if len(teacher) != len(student):
        return f"{len(teacher)} tokens against {len(student)}"
    token = min(
        (token for token in student if teacher.get(token) != student[token]), key=lambda t: student[t]
    )
    return f"{token!r} has id {teacher.get(token)} against {student[token]}"


def _vocab_size(config: dict[str, Any]) -> int:
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def _read_special(folder: Path) -> dict[str, str | None]:
    special: dict[str, str | None] = dict.fromkeys(SPECIAL_TOKENS)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for role in SPECIAL_TOKENS:
            token = content.get(role)
            if token is not None:
                special[role] = token["content"] if isinstance(token, dict) else token
    return special


def _read_chat_template(folder: Path) -> str | None:
    """The file wins over tokenizer_config.json, as in Transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text().strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text()).get("chat_template")
            if isinstance(template, list):  # several named templates
                template = next((t["template"] for t in template if t["name"] == "default"), None)
            if template is not None:
                return str(template).strip()
    return None


def _read_slow_tokenizer(folder: Path, key: str) -> TokenizerFiles:
    """Tokenizers without tokenizer.json are read by Transformers, which imports more than file reading does."""
    from transformers import AutoTokenizer

    try:  # the folder is someone else's, and Transformers raises half a dozen types for what is missing
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}={str(folder)!r}: no tokenizer.json there and no tokenizer that loads ({reason}); copy the"
            " tokenizer files of the student"
        ) from None
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerFiles(
        vocabulary=dict(tokenizer.get_vocab()),
        special={role: getattr(tokenizer, role) for role in SPECIAL_TOKENS},
        special_ids=frozenset(tokenizer.all_special_ids),
        chat_template=template.strip() if template else None,
    )
