"""What files tell of the teachers before anything starts: the gates of a checkpoint.

Owns shards, vocabulary, special tokens, chat template, tokenizer, revision, whether the teacher is another model than
the student and of its origin, broken tensors. An adapter is judged by its base here, and by itself in
`teachers.adapter`. Reads files only (no torch). `teachers.check` puts the gates of all back ends together; those that
need scores are in `posttrain.preflight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig, UserError
from teachers.adapter import adapter_row, check_adapter
from teachers.checkpoint import TensorEntry, locate, read_config, read_tensors
from teachers.fingerprint import fingerprint
from teachers.gates import GateRow, Subject
from teachers.settings import differences
from teachers.tokenization import same_ids
from teachers.tokenizer_files import SPECIAL_TOKENS, TokenizerFiles, read_tokenizer, same_template
from teachers.weights import FOREIGN_COSINE, LAYER, SAME_COSINE, WeightReport, absent, compare_weights

COMMIT = re.compile(r"[0-9a-f]{40}")

_reports: dict[tuple[str, str], WeightReport] = {}  # by fingerprints of teacher and student


@dataclass(kw_only=True, slots=True)
class Student:
    """What every teacher is compared with."""

    folder: Path
    config: dict[str, Any]
    tokens: TokenizerFiles
    vocab_size: int
    tensors: dict[str, TensorEntry]
    fingerprint: str

    @classmethod
    def read(cls, model: ModelConfig) -> Student:
        """Raises `UserError` naming model.path."""
        folder = locate(model.path, "model.path", model.revision)
        config = read_config(folder, "model.path")
        return cls(
            folder=folder,
            config=config,
            tokens=read_tokenizer(folder, "model.path"),
            vocab_size=vocab_size_of(config, folder, "model.path"),
            tensors=read_tensors(folder, "model.path"),
            fingerprint=fingerprint(str(folder), "model.path"),
        )


def file_gates(subject: Subject, student: Student, weights: bool = True) -> list[GateRow]:
    """Every gate that needs files alone, for one teacher; a single row where its files cannot be read.

    ``weights``: compare tensors with the student's; off where the student of the run does not exist yet.
    """
    return _Gates(subject, student, weights).rows()


class _Gates:
    """The gates of one teacher, as far as its files can be read."""

    def __init__(self, subject: Subject, student: Student, weights: bool) -> None:
        self.subject, self.teacher = subject, subject.teacher
        self.key = f"{self.teacher.key}.path"
        self.student, self.weights = student, weights

    def rows(self) -> list[GateRow]:
        adapter = self.teacher.adapter
        try:  # files of someone else: what cannot be read is a row of the table
            folder = locate(self.teacher.path, self.key, self.teacher.revision)
            config = read_config(folder, self.key)
            tensors = read_tensors(folder, self.key)
            tokens = read_tokenizer(folder, self.key)
            vocab_size = vocab_size_of(config, folder, self.key)
            if adapter is not None:
                check_adapter(adapter, str(folder), self.teacher.key)
        except UserError as error:
            return [self.subject.refused("files", "unreadable", error)]
        rows = [self._ok("files", f"{len(tensors)} tensors")]
        rows += [self._vocabulary(tokens, vocab_size), self._special(tokens)]
        rows += [self._template(tokens), self._tokenizer(folder), *self._revision(folder)]
        rows.append(self._config(folder, config, tensors))
        if adapter is not None:
            rows.append(adapter_row(self.subject, str(folder)))
        if self.weights:
            own = fingerprint(str(folder), self.key)
            if (own, self.student.fingerprint) not in _reports:
                num_tokens = 1 + max(self.student.tokens.vocabulary.values(), default=self.student.vocab_size)
                report = compare_weights(tensors, self.student.tensors, self.student.vocab_size, num_tokens)
                _reports[own, self.student.fingerprint] = report
            report = _reports[own, self.student.fingerprint]
            rows += [self._identity(own, report), self._tensors(report, config)]
            rows += [self._broken(report), self._origin(report)]
        return rows

    def _vocabulary(self, tokens: TokenizerFiles, vocab_size: int) -> GateRow:
        if tokens.vocabulary != self.student.tokens.vocabulary:
            difference = _first_difference(tokens.vocabulary, self.student.tokens.vocabulary)
            return self._red(
                "vocabulary",
                "differs",
                f"another vocabulary than the student's ({difference})",
                "only a teacher with the student's tokenizer can score its tokens",
            )
        if vocab_size < self.student.vocab_size:
            return self._red(
                "vocabulary",
                f"{vocab_size} rows",
                f"its vocab_size is {vocab_size}, the student's {self.student.vocab_size}: it could not score every"
                " id that the student samples",
                "give a teacher with at least as many rows",
            )
        return self._ok("vocabulary", f"{len(tokens.vocabulary)} tokens")

    def _special(self, tokens: TokenizerFiles) -> GateRow:
        theirs, ours = tokens, self.student.tokens
        for role in SPECIAL_TOKENS:
            if theirs.special[role] != ours.special[role]:
                return self._red(
                    "special_tokens",
                    f"{role} differs",
                    f"its {role} is {theirs.special[role]!r}, the student's {ours.special[role]!r}",
                    "give both the same tokenizer_config.json",
                )
        if theirs.special_ids != ours.special_ids:
            ids = sorted(theirs.special_ids ^ ours.special_ids)
            return self._red(
                "special_tokens",
                f"{len(ids)} differ",
                f"token ids {ids[:5]} are special in only one of teacher and student",
                "give both the same tokenizer.json",
            )
        return self._ok("special_tokens", f"{len(theirs.special_ids)} marks")

    def _template(self, tokens: TokenizerFiles) -> GateRow:
        if same_template(tokens.chat_template, self.student.tokens.chat_template):
            return self._ok("chat_template", "equal")
        return self._red(
            "chat_template",
            "differs",
            "another chat template than the student's: the teacher would score a format that it never saw",
            "use a teacher of the same template, or copy the student's chat_template.jinja if it was trained with that",
        )

    def _tokenizer(self, folder: Path) -> GateRow:
        value, difference = same_ids(self.student.folder, folder)
        if difference is None:
            return self._ok("tokenizer", value)
        return self._red(
            "tokenizer",
            "other ids",
            f"its tokenizer cuts text otherwise: {difference}",
            "the student's ids are misspelt words to it; use a teacher that was trained with the student's tokenizer.json",
        )

    def _revision(self, folder: Path) -> list[GateRow]:
        asked, there = self.teacher.revision, _revision_on_disk(folder)
        if asked is None:
            return []
        if there is None or not COMMIT.fullmatch(asked):
            known = "nothing on disk tells which" if there is None else f"the folder holds commit {there[:8]}"
            if Path(self.teacher.path).expanduser().is_dir():  # a name cannot be compared with a commit
                return [
                    self._warn(
                        "revision",
                        "not known",
                        f"revision {asked!r} was asked for and {known}",
                        "give the commit of 40 digits, or the hub id instead of a folder",
                    )
                ]
            return [self._ok("revision", (there or asked)[:8])]
        if there != asked:
            return [
                self._red(
                    "revision",
                    there[:8],
                    f"revision {asked} was asked for and the folder holds {there}",
                    "fetch the revision again with `hf download --revision`",
                )
            ]
        return [self._ok("revision", there[:8])]

    def _config(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> GateRow:
        """Tensors of one name and shape (rows of the vocabulary left out) are those of one architecture."""
        if not _same_architecture(tensors, self.student.tensors):
            return self.subject.unmeasured("config", "another shape")
        wrong, unclear = differences(folder, self.student.folder)
        is_tied, tied = (bool(c.get("tie_word_embeddings")) for c in (config, self.student.config))
        if is_tied and not tied and "lm_head.weight" in tensors:
            unclear.append("tie_word_embeddings=True beside a head of its own (student False)")
        way_out = "see that its config.json is the one that it was trained with"
        if wrong:
            return self._red(
                "config",
                f"{len(wrong)} differ",
                f"its config.json makes another model of the same tensors: {', '.join(wrong[:3])}",
                way_out,
            )
        if unclear:
            return self._warn(
                "config",
                f"{len(unclear)} differ",
                f"its config.json differs from the student's: {', '.join(unclear[:3])}",
                way_out,
            )
        return self._ok("config", "as the student's")

    def _identity(self, own: str, report: WeightReport) -> GateRow:
        is_student = own == self.student.fingerprint or report.is_student
        key = f"{self.teacher.key}.self"
        if self.teacher.adapter is not None:  # whether it does anything is its own gate
            where = "the student" if is_student else own[:8]
            return self._ok("self_teacher", f"an adapter on {where}")
        if self.teacher.is_student and not is_student:
            return self._warn(
                "self_teacher",
                own[:8],
                f"{key}=true, and it is another model than the student",
                "remove that key",
            )
        if self.teacher.is_student or not is_student:
            return self._ok("self_teacher", "on purpose" if is_student else own[:8])
        how = "byte for byte" if own == self.student.fingerprint else "saved in another type"
        return self._red(
            "self_teacher",
            "is the student",
            f"its tensors are the student's, {how}: a teacher that agrees everywhere teaches nothing",
            f"give the trained teacher, or say that it is meant: {key}=true",
        )

    def _tensors(self, report: WeightReport, config: dict[str, Any]) -> GateRow:
        # A tied head is the embedding. Of a student with a head of its own it is missing all the same.
        is_tied = config.get("tie_word_embeddings") and self.student.config.get("tie_word_embeddings")
        missing = [name for name in report.missing if not (is_tied and name == "lm_head.weight")]
        if missing:
            return self._red(
                "tensors",
                f"{len(missing)} missing",
                f"{len(missing)} of the student's tensors are missing (first: {missing[0]})",
                "save it again with save_pretrained: Transformers would fill them with random numbers",
            )
        if report.cosine is None:
            return self._ok("tensors", "another shape")
        if report.extra:
            return self._warn(
                "tensors",
                f"{len(report.extra)} extra",
                f"{len(report.extra)} tensors that the student has not (first: {report.extra[0]})",
                "scoring leaves out what Transformers does not load; see that they are none of the model's",
            )
        return self._ok("tensors", "as the student's")

    def _broken(self, report: WeightReport) -> GateRow:
        if report.broken is not None:
            return self._red("weights", "broken", report.broken, "save or copy the teacher again")
        if report.untouched is not None and not self.teacher.is_student and self.teacher.adapter is None:
            return self._warn(
                "weights",
                "in part the student's",
                f"{report.untouched} the student's own, bit by bit, while others are not",
                "right where they were frozen; otherwise a shard is of the wrong checkpoint",
            )
        if report.unlike is not None:
            return self._warn(
                "weights",
                "a vector is another",
                f"{report.unlike} is not the student's, while the matrices are",
                "right where a balancing rule or a long training moved it; otherwise it is of the wrong checkpoint",
            )
        if report.not_read:
            return self._warn(
                "weights",
                f"{len(report.not_read)} not read",
                f"{len(report.not_read)} tensors are of a quantized type, which is not read here",
                "look at scoring and initial_kl",
            )
        return self._ok("weights", "finite")

    def _origin(self, report: WeightReport) -> GateRow:
        cosine = report.cosine
        if cosine is None:
            return self._warn(
                "foreign",
                "not comparable",
                "whether it is of the student's origin cannot be told from its weights",
                "look at initial_kl: about 0.04 nat is usual for one origin, 0.19 for a foreign teacher",
            )
        value = f"cosine {cosine:.3f}"
        if cosine < FOREIGN_COSINE:
            return self._red(
                "foreign",
                value,
                f"of another origin than the student: the median cosine of their matrices is {cosine:.3f}"
                " (same origin: near 1)",
                "use a teacher trained from the student's own start checkpoint",
                cosine,
            )
        if cosine < SAME_COSINE:
            return self._warn(
                "foreign",
                value,
                f"far from the student: the median cosine of their matrices is {cosine:.3f}",
                "one origin, but trained far away; expect a large initial_kl",
                cosine,
            )
        return self._ok("foreign", value, cosine)

    def _ok(self, gate: str, value: str, number: float | None = None) -> GateRow:
        return self.subject.ok(gate, value, number)

    def _warn(
        self, gate: str, value: str, problem: str, way_out: str, number: float | None = None
    ) -> GateRow:
        return self.subject.warn(gate, value, problem, way_out, number, self.subject.base)

    def _red(self, gate: str, value: str, problem: str, way_out: str, number: float | None = None) -> GateRow:
        return self.subject.red(gate, value, problem, way_out, number, self.subject.base)


def _same_architecture(teacher: dict[str, TensorEntry], student: dict[str, TensorEntry]) -> bool:
    """Whether the teacher has what the student has in as many layers, and perhaps more (scales, heads of other tasks)."""
    missing, extra, _ = absent(set(teacher), set(student))
    layers = {found[1] for name in student if (found := LAYER.match(name))}
    deeper = [name for name in extra if (found := LAYER.match(name)) and found[1] not in layers]
    common = teacher.keys() & student.keys()
    same = all(teacher[name].shape[-1:] == student[name].shape[-1:] for name in common)
    return same and bool(common) and not deeper and not [name for name in missing if name != "lm_head.weight"]


def _revision_on_disk(folder: Path) -> str | None:
    """Commit that the folder came from, as the hub's tools record it: a cache snapshot, or `hf download --local-dir`."""
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return folder.name
    for name in ("config.json", "model.safetensors"):
        record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if record.is_file():
            return record.read_text().splitlines()[0].strip()
    return None


def _first_difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    if len(teacher) != len(student):
        return f"{len(teacher)} tokens against {len(student)}"
    token = min(
        (token for token in student if teacher.get(token) != student[token]), key=lambda t: student[t]
    )
    return f"{token!r} has id {teacher.get(token)} against {student[token]}"


def vocab_size_of(config: dict[str, Any], folder: Path, key: str) -> int:
    """Rows of the embedding. Raises `UserError` where config.json does not tell."""
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if found is None:
        raise UserError(f"{key}={str(folder)!r}: config.json has no vocab_size; copy it again")
    return int(found)
