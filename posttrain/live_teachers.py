"""The teachers of a run, which may change between two steps: by call, or by the file `teachers.yaml` in its folder.

Owns which teacher is in use (`teachers.json`, from which a resumed run goes on), its version, and the way back: a new
teacher passes the same gates as the first ones, from files and then on the student's next samples, with which it becomes
final; one that fails is an event, and the former teacher stays. Every change is an event with step, version and fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
import yaml
from ray.exceptions import RayError

from posttrain.config import MOPDRun, TeacherBackend, TeacherConfig, UserError
from posttrain.preflight import Preflight
from posttrain.records import Rollout
from posttrain.run_folder import RunFolder
from posttrain.tracking import Tracker
from teachers.check import check_teachers, teacher_fingerprint
from teachers.gates import GateRow
from teachers.pool import TeacherPool
from teachers.teacher import Teacher, build

FILE, RECORD = "teachers.yaml", "teachers.json"
SWAPPABLE = ("path", "backend", "adapter", "model", "revision", "self")


@dataclass(kw_only=True, slots=True)
class Record:
    """What `teachers.json` holds: the teachers that passed their checks."""

    teachers: dict[str, Teacher]  # by domain
    version: int = 1  # counts every change of what is in use, those that were taken back too
    file: str | None = None  # sha256 of the `teachers.yaml` that was carried out

    @classmethod
    def read(cls, folder: RunFolder, configured: dict[str, Teacher]) -> Record:
        """The record of a former process of this run, or the teachers of the config.

        Raises:
            UserError: a recorded teacher is not what it was.
        """
        content = folder.read_json(RECORD)
        if content is None:
            return cls(teachers=dict(configured))
        teachers = {
            domain: Teacher(**entry | {"backend": TeacherBackend(entry["backend"])})
            for domain, entry in content["teachers"].items()
        }
        for domain, fingerprint in content.get("fingerprints", {}).items():
            teacher = teachers[domain]
            if teacher_fingerprint(teacher) != fingerprint:
                raise UserError(
                    f"{teacher.key}.path={teacher.name!r}: it changed since this run took it as the teacher of {domain}"
                    f" ({folder.path / RECORD}); put it back, or remove that file to go on with the teachers of the config"
                )
        return cls(teachers=configured | teachers, version=content["version"], file=content["file"])


class LiveTeachers:
    """`TeacherPool` with a memory. ``record.teachers`` are loaded in ``pool`` already, and ``preflight`` has the rows of
    their files."""

    def __init__(
        self,
        pool: TeacherPool,
        record: Record,
        cfg: MOPDRun,
        folder: RunFolder,
        tracker: Tracker,
        preflight: Preflight,
    ) -> None:
        self._pool = pool
        self._preflight = preflight
        self._cfg = cfg
        self._folder = folder
        self._tracker = tracker
        self._in_use = dict(record.teachers)
        # domain -> the last teacher that passed and the rows of its files, while a new one is on trial
        self._former: dict[str, Teacher] = {}
        self._former_rows: dict[str, list[GateRow]] = {}
        self._former_fingerprints: dict[str, str] = {}
        self._fingerprints = {d: teacher_fingerprint(t) for d, t in record.teachers.items()}
        self._stamp: tuple[int, int] | None = None
        # sha256 of the file whose teachers were loaded last, and of the one whose trial is over
        self._digest = self._done = record.file
        self.version = record.version
        self.unchecked = set(record.teachers)  # domains whose teacher waits for samples

    def score_all(self, group_refs: dict[str, list[Any]]) -> dict[str, ray.ObjectRef]:
        """See `TeacherPool.score_all`. A teacher that is still to be checked scores alone: its error is its own."""
        alone = {d: self._pool.score(d, refs) for d, refs in group_refs.items() if d in self.unchecked}
        return alone | self._pool.score_all({d: refs for d, refs in group_refs.items() if d not in alone})

    def pop_restarts(self) -> list[tuple[str, str]]:
        """See `TeacherPool.pop_restarts`."""
        return self._pool.pop_restarts()

    def check_alive(self) -> None:
        """See `TeacherPool.check_alive`."""
        self._pool.check_alive()

    @property
    def heads(self) -> dict[int, ray.ObjectRef]:
        """See `TeacherPool.heads`."""
        return self._pool.heads

    def read_file(self, step: int) -> None:
        """Carry out `teachers.yaml` if it is new. A bad file is an event."""
        file = self._folder.path / FILE
        try:  # the user's file: it may come and go
            stat = file.stat()
            text = file.read_bytes() if (stat.st_mtime_ns, stat.st_size) != self._stamp else None
        except OSError:
            return
        if text is None:
            return
        self._stamp = (stat.st_mtime_ns, stat.st_size)
        digest = hashlib.sha256(text).hexdigest()
        if digest == self._done:
            return
        try:  # a mistake here must not stop a run
            self.set_teachers(self._parse(text), step)
            self._digest = digest
        except UserError as error:
            self._tracker.event(
                "teacher_swap_refused", step=step, version=self.version, message=f"{FILE}: {error}"
            )

    def set_teachers(self, teachers: dict[str, TeacherConfig], step: int) -> set[str]:
        """Make these the teachers of their domains from ``step`` on; call it between two steps. Returns the domains
        whose teacher changed.

        Raises `UserError` for a teacher that preflight refuses or that cannot be loaded; the former ones stay.
        """
        for domain in teachers:
            if domain not in self._in_use:
                raise UserError(
                    f"teachers.{domain}: this run has no domain {domain!r}; it has {', '.join(self._in_use)}"
                )
        new = {d: build(d, cfg, self._cfg.model.path) for d, cfg in teachers.items()}
        workers, longest = self._cfg.teacher_workers, self._cfg.rollout.max_model_len
        signal, top_k = self._cfg.algorithm.signal.value, self._cfg.algorithm.top_k
        rows = check_teachers(
            new, self._cfg.model, workers, longest, signal, top_k, in_use=self._fingerprints
        )
        fingerprints = {d: teacher_fingerprint(teacher) for d, teacher in new.items()}
        changed = {d for d in new if self._is_other(d, new[d], fingerprints[d])}
        if not changed:
            return changed
        _check_in_place(self._in_use, self._fingerprints)  # the way back, too
        former = dict(self._in_use)
        self._load(former | {d: new[d] for d in changed}, former)
        self.version += 1
        self.unchecked |= changed
        for domain in sorted(changed):
            self._former.setdefault(domain, former[domain])
            self._former_rows.setdefault(domain, self._preflight.rows_of(domain))
            self._former_fingerprints.setdefault(domain, self._fingerprints[domain])
            self._preflight.replace(domain, new[domain], [row for row in rows if row.domain == domain])
            self._fingerprints[domain] = fingerprints[domain]
            self._tracker.event(
                "teacher_swap",
                step=step,
                version=self.version,
                domain=domain,
                path=new[domain].name,
                backend=new[domain].backend.value,
                fingerprint=fingerprints[domain],
                former=former[domain].name,
                message=f"from step {step} on {domain} is taught by {new[domain].name}",
            )
        return changed

    def check(
        self, samples: Mapping[str, list[Rollout]], step: int, scores: Mapping[str, ray.ObjectRef]
    ) -> set[str]:
        """The gates on the student's own samples (domain -> rollouts), for the teachers that wait for them. Returns the
        domains that went back to their former teacher, whose texts must be scored again.

        ``scores`` are references to what the step's texts were given, by domain.

        Raises:
            UserError: a red line of a teacher that is not on trial.
        """
        waiting = {d: found for d, found in samples.items() if found and d in self.unchecked}
        settled = {d: found for d, found in waiting.items() if d not in self._former}
        is_start = step == 1
        self._preflight.check(self._pool, settled, is_start)
        for domain in settled:
            self._accept(domain)
        back = set()
        for domain in sorted(set(waiting) - set(settled)):
            try:  # what came during the run must not end it
                ray.get(scores[domain])
                self._preflight.check(self._pool, {domain: waiting[domain]}, is_start)
            except (UserError, RayError) as error:
                self._take_back(domain, step, error)
                self._preflight.check(self._pool, {domain: waiting[domain]}, is_start)
                back.add(domain)
            self._accept(domain)
        return back

    def _accept(self, domain: str) -> None:
        """The teacher of ``domain`` passed: from now on a resumed run uses it."""
        self.unchecked.discard(domain)
        self._former_rows.pop(domain, None)
        self._former_fingerprints.pop(domain, None)
        if self._former.pop(domain, None) is not None:
            self._save()

    def _take_back(self, domain: str, step: int, error: BaseException) -> None:
        """Return to the former teacher of ``domain``, which is measured on the same samples."""
        refused, former = self._in_use[domain], self._former.pop(domain)
        fingerprint = self._fingerprints[domain]
        former_fingerprint = self._former_fingerprints.pop(domain)
        kept = self._in_use | {domain: former}
        _check_in_place(kept, self._fingerprints | {domain: former_fingerprint})
        self._set(kept)
        self._preflight.replace(domain, former, self._former_rows.pop(domain))
        self._in_use[domain] = former
        self._fingerprints[domain] = former_fingerprint
        self.version += 1
        self._tracker.event(
            "teacher_swap_refused",
            step=step,
            version=self.version,
            domain=domain,
            path=refused.name,
            fingerprint=fingerprint,
            message=f"{domain} goes back to {former.name}: {reason(error)}",
        )
        self._save()

    def _is_other(self, domain: str, teacher: Teacher, fingerprint: str) -> bool:
        current = self._in_use[domain]
        if teacher.backend is not current.backend:
            return True
        same_folders = (teacher.path, teacher.adapter) == (current.path, current.adapter)
        if same_folders and teacher.model is None and fingerprint != self._fingerprints[domain]:
            raise UserError(
                f"{teacher.key}.path={teacher.name!r}: it changed in place, so that there would be no way"
                " back; give the new teacher a folder of its own"
            )
        return fingerprint != self._fingerprints[domain]

    def _load(self, wanted: dict[str, Teacher], former: dict[str, Teacher]) -> None:
        try:  # a worker or its engine may die of it
            self._set(wanted)
        except (UserError, RayError) as error:
            self._set(former)
            raise UserError(f"the teachers could not be loaded: {reason(error)}") from error
        self._in_use = wanted

    def _set(self, teachers: dict[str, Teacher]) -> None:
        algorithm = self._cfg.algorithm
        self._pool.set_teachers(teachers, algorithm.signal.value, algorithm.top_k)

    def _parse(self, text: bytes) -> dict[str, TeacherConfig]:
        """`domain: path` (the back end stays), or a mapping of `SWAPPABLE` keys as in the config."""
        try:  # written by the user, perhaps at this moment
            content = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"not valid YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise UserError("a mapping is needed, `domain: path`")
        return {str(domain): self._section(str(domain), entry) for domain, entry in content.items()}

    def _section(self, domain: str, entry: Any) -> TeacherConfig:
        if isinstance(entry, str):
            current = self._in_use.get(domain)
            kept: dict[str, Any] = (
                {} if current is None else {"backend": current.backend, "model": current.model}
            )
            return TeacherConfig(path=entry, **kept)
        if not isinstance(entry, dict) or not set(entry) <= set(SWAPPABLE):
            raise UserError(
                f"teachers.{domain}={entry!r}: give a path, or a mapping of {', '.join(SWAPPABLE)}"
            )
        backend = entry.get("backend", TeacherBackend.transformers.value)
        if backend not in [b.value for b in TeacherBackend]:
            raise UserError(f"teachers.{domain}.backend={backend!r}: choose {', '.join(TeacherBackend)}")
        for name, value in entry.items():
            kind, words = (bool, "true or false") if name == "self" else (str, "a text")
            if value is not None and not isinstance(value, kind):
                raise UserError(f"teachers.{domain}.{name}={value!r}: {words} is needed")
        return TeacherConfig(**entry | {"backend": TeacherBackend(backend)})

    def _save(self) -> None:
        """Write what passed its checks. While something is on trial the file counts as not carried out."""
        if not self._former:
            self._done = self._digest
        passed = self._in_use | self._former
        content = {
            "version": self.version,
            "file": self._done,
            "teachers": {domain: asdict(teacher) for domain, teacher in passed.items()},
            "fingerprints": self._fingerprints | self._former_fingerprints,  # as they were loaded
        }
        self._folder.write_json(RECORD, content)


def _check_in_place(teachers: Mapping[str, Teacher], fingerprints: Mapping[str, str]) -> None:
    """Raises `UserError` when the files of one of them are no longer those that this run took: whatever loads one teacher
    looks at the files of all."""
    for domain, teacher in teachers.items():
        if teacher_fingerprint(teacher) != fingerprints[domain]:
            raise UserError(
                f"teachers.{domain}.path={teacher.name!r}: it changed in place since this run took it; put it back, and give"
                " a new teacher a folder of its own"
            )


def reason(error: BaseException) -> str:
    """One line: of an error from a worker what was raised there, not Ray's account of it."""
    return " ".join(str(getattr(error, "cause", None) or error).split())[:500]
