"""Which teacher serves a domain, and what a worker needs to load it.

Owns the mapping from the config (`teachers.<domain>`, with `teachers.default` for domains without one) to `Teacher`,
and the refusal of combinations that no back end has. Reads no file and asks no server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from posttrain.config import TeacherBackend, TeacherConfig, UserError

DEFAULT = "default"
SIGNALS = {  # what each back end gives
    TeacherBackend.transformers: ("sampled", "top_k", "top_k_renorm", "full"),
    TeacherBackend.vllm: ("sampled", "top_k", "top_k_renorm"),
    TeacherBackend.server: ("sampled", "top_k", "top_k_renorm"),
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Teacher:
    """One frozen model: a checkpoint, a checkpoint with a LoRA adapter, or a model behind a server."""

    key: str  # section of the config that names it: teachers.math
    path: str  # checkpoint directory, or the server's URL
    backend: TeacherBackend = TeacherBackend.transformers
    adapter: str | None = None  # PEFT directory on top of path
    model: str | None = None  # the server's name for it
    revision: str | None = None  # of path
    is_student: bool = False  # on purpose

    @property
    def name(self) -> str:
        """What events, samples and errors call it."""
        return f"{self.path}#{self.model}" if self.model else self.adapter or self.path


def resolve(
    teachers: dict[str, TeacherConfig], domains: Iterable[str], student_path: str, only: str | None = None
) -> dict[str, Teacher]:
    """The teacher of every domain of ``domains``; with ``only`` the others count for nothing.

    Raises `UserError` for a domain without teacher, a teacher without domain, and keys that do not go together.
    """
    domains = sorted(d for d in set(domains) if only in (None, d))
    if only is not None:
        owner = only if only in teachers else DEFAULT
        teachers = {name: teacher for name, teacher in teachers.items() if name == owner}
    for name, teacher in teachers.items():
        if name not in domains and (name != DEFAULT or all(domain in teachers for domain in domains)):
            what = (
                f"every domain ({', '.join(domains)}) has a teacher of its own"
                if name == DEFAULT
                else f"no prompt belongs to domain {name!r} (there are {', '.join(domains)})"
            )
            raise UserError(
                f"teachers.{name}.path={teacher.path!r}: {what}; remove this teacher or mend the rows' domain"
            )
    return {
        domain: build(owner, teachers[owner], student_path)
        for domain, owner in owners(teachers, domains).items()
    }


def owners(teachers: Mapping[str, TeacherConfig], domains: Iterable[str]) -> dict[str, str]:
    """Section of the teacher of every domain: its own, or the default one. Raises `UserError` where there is neither."""
    found = {domain: domain if domain in teachers else DEFAULT for domain in domains}
    for domain, owner in found.items():
        if owner not in teachers:
            raise _no_teacher(domain)
    return found


def build(owner: str, cfg: TeacherConfig, student_path: str | None) -> Teacher:
    """The teacher of the section ``teachers.<owner>``. An adapter without path sits on ``student_path``."""
    key = f"teachers.{owner}"
    if cfg.path is None and cfg.self and cfg.adapter is None and student_path is not None:
        raise UserError(
            f"{key}.path=None: the student as its own teacher needs its path too; give {key}.path={student_path}"
        )
    if cfg.path is None and (cfg.adapter is None or student_path is None):
        raise _no_teacher(owner)
    path = cfg.path if cfg.path is not None else str(student_path)
    if cfg.backend is TeacherBackend.server:
        _check_server(key, cfg)
        path = path.rstrip("/").removesuffix("/v1")
    elif cfg.model is not None:
        raise UserError(
            f"{key}.model={cfg.model!r}: only a server has named models; set {key}.backend=server"
        )
    elif path.startswith(("http://", "https://")):
        raise UserError(f"{key}.path={path!r}: a URL; set {key}.backend=server and {key}.model=NAME")
    if cfg.adapter is not None and cfg.backend is not TeacherBackend.transformers:
        other = f"serve it there and give its name as {key}.model" if cfg.model else "remove one of the two"
        raise UserError(
            f"{key}.adapter={cfg.adapter!r}: adapters are put on by backend=transformers alone, not by"
            f" {cfg.backend.value}; {other}"
        )
    if cfg.adapter is not None and cfg.path is None and cfg.revision is not None:
        raise UserError(
            f"{key}.revision={cfg.revision!r}: the adapter sits on the start model; set model.revision instead"
        )
    return Teacher(
        key=key,
        path=path,
        backend=cfg.backend,
        adapter=cfg.adapter,
        model=cfg.model,
        revision=cfg.revision,
        is_student=cfg.self,
    )


def _check_server(key: str, cfg: TeacherConfig) -> None:
    try:  # typed by the user
        url = urlsplit(str(cfg.path))
        bad = url.scheme not in ("http", "https") or not url.hostname or url.query or url.port == 0
    except ValueError:
        bad = True
    if bad:
        raise UserError(f"{key}.path={cfg.path!r}: not the URL of a server; give http://HOST:PORT")
    if url.username or url.password:
        raise UserError(
            f"{key}.path: a URL with a password in it; name a variable in teacher_workers.api_key_env instead"
        )
    if cfg.revision is not None:
        raise UserError(
            f"{key}.revision={cfg.revision!r}: a server does not tell which revision it holds; remove it"
        )
    if not cfg.model:
        raise UserError(
            f"{key}.model=None: which model of {cfg.path}? Give {key}.model=NAME, as `vllm serve` names it"
        )


def _no_teacher(domain: str) -> UserError:
    return UserError(
        f"teachers.{domain}.path=None: prompts of domain {domain!r} have no teacher; give teachers.{domain}.path=DIR,"
        " or teachers.default.path=DIR for every domain without a teacher of its own; domain=NAME trains on one domain alone"
    )
