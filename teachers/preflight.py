"""What must be true of the teachers before anything starts, read from their files.

Owns the gates that need no engine: shards, vocabulary, special tokens, chat template, tokenizer, revision, whether the
teacher is another model than the student and of its origin, broken tensors. `check_files` refuses a wrong teacher with
one line naming ``teachers.<domain>.path``; `file_gates` gives all rows without refusing. Reads files only (no torch).
The gates that need scores are in `posttrain.preflight`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import TeacherConfig, UserError
from teachers.checkpoint import TensorEntry, locate, read_config, read_tensors
from teachers.fingerprint import fingerprint
from teachers.gates import GateRow, Verdict, judge, stop_on_red
from teachers.tokenization import same_ids
from teachers.weights import FOREIGN_COSINE, SAME_COSINE, WeightReport, compare_weights

# The pad token is left out: nobody samples it, and fine-tuned checkpoints often change it.
SPECIAL_TOKENS = ("bos_token", "eos_token")
COMMIT = re.compile(r"[0-9a-f]{40}")

_reports: dict[tuple[str, str], WeightReport] = {}  # by fingerprints of teacher and student


@dataclass(kw_only=True, slots=True)
class TokenizerFiles:
    """What decides whether two checkpoints read the same token ids in the same way."""

    vocabulary: dict[str, int]
    special: dict[str, str | None]  # role -> token
    special_ids: frozenset[int]
    chat_template: str | None


@dataclass(kw_only=True, slots=True)
class _Student:
    """What every teacher is compared with."""

    folder: Path
    tokens: TokenizerFiles
    vocab_size: int
    tensors: dict[str, TensorEntry]
    fingerprint: str


def check_files(
    student_path: str,
    teachers: Mapping[str, TeacherConfig],
    domains: Iterable[str],
    student_revision: str | None = None,
    accept: Iterable[str] = (),
    weights: bool = True,
) -> list[GateRow]:
    """`file_gates`, and `UserError` for the first red row: all that files tell, before anything starts."""
    rows = judge(file_gates(student_path, teachers, domains, student_revision, weights), accept)
    stop_on_red(rows)
    return rows


def file_gates(
    student_path: str,
    teachers: Mapping[str, TeacherConfig],
    domains: Iterable[str],
    student_revision: str | None = None,
    weights: bool = True,
) -> list[GateRow]:
    """Every gate that needs files alone, for the teacher of every domain; ``domains`` are those of the prompts.

    Args:
        weights: compare tensors with the student's; off where the student of the run does not exist yet.

    Raises:
        UserError: a domain without teacher, a teacher without domain, a student that cannot be read.
    """
    domains = sorted(set(domains))
    _check_mapping({domain: teacher.path for domain, teacher in teachers.items()}, domains)
    student = _read_student(student_path, student_revision)
    rows: list[GateRow] = []
    fingerprints: dict[str, str] = {}
    for domain in domains:
        rows += _Gates(domain, teachers[domain], student, weights).rows(fingerprints)
    return rows + _shared(fingerprints, {domain: str(teachers[domain].path) for domain in domains})


class _Gates:
    """The gates of one teacher, as far as its files can be read."""

    def __init__(self, domain: str, teacher: TeacherConfig, student: _Student, weights: bool) -> None:
        self.domain, self.path, self.teacher = domain, str(teacher.path), teacher
        self.key = f"teachers.{domain}.path"
        self.student, self.weights = student, weights

    def rows(self, fingerprints: dict[str, str]) -> list[GateRow]:
        """All rows; adds the checkpoint's fingerprint to ``fingerprints``."""
        try:  # files of someone else: what cannot be read is a row of the table
            folder = locate(self.path, self.key, self.teacher.revision)
            config = read_config(folder, self.key)
            tensors = read_tensors(folder, self.key)
            tokens = read_tokenizer(folder, self.key)
        except UserError as error:
            text = re.sub(rf"^{re.escape(self.key)}=.*?: ", "", str(error))
            problem, _, way_out = text.partition("; ")
            return [self._red("files", "unreadable", problem, way_out or "give another checkpoint")]
        rows = [self._ok("files", f"{len(tensors)} tensors")]
        rows += [self._vocabulary(tokens, _vocab_size(config)), self._special(tokens)]
        rows += [self._template(tokens), self._tokenizer(folder), *self._revision(folder)]
        if self.weights:
            fingerprints[self.domain] = fingerprint(str(folder), self.key)
            pair = (fingerprints[self.domain], self.student.fingerprint)
            if pair not in _reports:
                _reports[pair] = compare_weights(tensors, self.student.tensors, self.student.vocab_size)
            report = _reports[pair]
            if config.get("tie_word_embeddings"):
                report.missing = [name for name in report.missing if name != "lm_head.weight"]
            rows += [self._identity(fingerprints[self.domain], report), self._tensors(report)]
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
        if tokens.chat_template == self.student.tokens.chat_template:
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
            if Path(self.path).expanduser().is_dir():  # a name cannot be compared with a commit
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

    def _identity(self, own: str, report: WeightReport) -> GateRow:
        is_student = own == self.student.fingerprint or report.is_student
        if self.teacher.self and not is_student:
            return self._warn(
                "self_teacher",
                own[:8],
                f"teachers.{self.domain}.self=true, and it is another model than the student",
                "remove that key",
            )
        if self.teacher.self or not is_student:
            return self._ok("self_teacher", "on purpose" if is_student else own[:8])
        how = "byte for byte" if own == self.student.fingerprint else "saved in another type"
        return self._red(
            "self_teacher",
            "is the student",
            f"its tensors are the student's, {how}: a teacher that agrees everywhere teaches nothing",
            f"give the trained teacher, or say that it is meant: teachers.{self.domain}.self=true",
        )

    def _tensors(self, report: WeightReport) -> GateRow:
        if report.missing:
            return self._red(
                "tensors",
                f"{len(report.missing)} missing",
                f"{len(report.missing)} of the student's tensors are missing (first: {report.missing[0]})",
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
        return GateRow(
            domain=self.domain, path=self.path, gate=gate, verdict=Verdict.ok, value=value, number=number
        )

    def _warn(
        self, gate: str, value: str, problem: str, way_out: str, number: float | None = None
    ) -> GateRow:
        return self._row(gate, Verdict.warn, value, problem, way_out, number)

    def _red(self, gate: str, value: str, problem: str, way_out: str, number: float | None = None) -> GateRow:
        return self._row(gate, Verdict.red, value, problem, way_out, number)

    def _row(
        self, gate: str, verdict: Verdict, value: str, problem: str, way_out: str, number: float | None
    ) -> GateRow:
        return GateRow(
            domain=self.domain,
            path=self.path,
            gate=gate,
            verdict=verdict,
            value=value,
            number=number,
            problem=problem,
            way_out=way_out,
        )


def _read_student(path: str, revision: str | None) -> _Student:
    folder = locate(path, "model.path", revision)
    return _Student(
        folder=folder,
        tokens=read_tokenizer(folder, "model.path"),
        vocab_size=_vocab_size(read_config(folder, "model.path")),
        tensors=read_tensors(folder, "model.path"),
        fingerprint=fingerprint(str(folder), "model.path"),
    )


def _shared(fingerprints: dict[str, str], paths: dict[str, str]) -> list[GateRow]:
    """Byte-identical teachers of two domains are legitimate (a generalist), and often a slip: reported."""
    rows = []
    for domain, own in fingerprints.items():
        others = [other for other, theirs in fingerprints.items() if other != domain and theirs == own]
        row = GateRow(
            domain=domain, path=paths[domain], gate="shared", verdict=Verdict.ok, value="its own model"
        )
        if others:
            names = ", ".join(others)
            row.verdict, row.value = Verdict.warn, f"also {names}"
            row.problem = f"byte for byte the teacher of {names} too"
            row.way_out = "right for one teacher of several domains; otherwise mend the path"
        rows.append(row)
    return rows


def _revision_on_disk(folder: Path) -> str | None:
    """Commit that the folder came from, as the hub's tools record it: a cache snapshot, or `hf download --local-dir`."""
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return folder.name
    for name in ("config.json", "model.safetensors"):
        record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if record.is_file():
            return record.read_text().splitlines()[0].strip()
    return None


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


def _check_mapping(teachers: dict[str, str | None], domains: list[str]) -> None:
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
