"""The folder of a run: its files, its checkpoints, and who may write to it.

Owns the order in which things reach the disk, so that a crash at any moment leaves a whole checkpoint: data first,
then a manifest with hashes, then the rename, `latest` last. Refuses a folder that belongs to another run or to
another living driver. Knows nothing of what a checkpoint holds: the caller writes it, `state` is plain JSON.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from posttrain import disk, manifest
from posttrain.config import RUNS, MergeRun, PipelineRun, RunConfig, TeacherBackend, UserError
from posttrain.first_step import CONFIG_HEAD, has_only_begun, wrote_config
from posttrain.lineage import collect
from posttrain.stages import check_steps

# What makes a run the run it is: a change of these is another run, a change of anything else goes on.
IDENTITY = (
    *("model", "data", "sft_data", "domain", "teachers", "seed", "sample"),
    *("method", "models", "base", "coefficient", "coefficients"),  # of a merge
)
RUN_FILES = ("config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "model", "finished.json")

_locks: dict[Path, Any] = {}  # lock files of this process, by run folder


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    step: int
    folder: Path  # what `write` wrote
    state: dict[str, Any]


class RunFolder:
    """`runs/<name>`. Make one with `open`; `finish` (or the end of the process) lets go of it."""

    def __init__(self, path: Path, cfg: RunConfig) -> None:
        self.path = path
        self.model = path / "model"
        self._checkpoints = path / "checkpoints"
        self._keep = cfg.checkpoint.keep
        self._steps = _steps_of(cfg)

    @classmethod
    def open(cls, cfg: RunConfig) -> RunFolder:
        """Create the folder of a run, or go on in it. Prints one line when it resumes. What a start of other keys or
        weights left there that ended before its first step is moved aside.

        Raises:
            UserError: the folder belongs to another run, another process works in it, or it cannot be written.
        """
        path = (Path(cfg.runs_dir) / cfg.name).absolute()
        _check_name(cfg)
        try:  # the user's disk
            path.mkdir(parents=True, exist_ok=True)
            _lock(path, cfg.name)
        except OSError as error:
            raise UserError(
                f"runs_dir={cfg.runs_dir!r}: {path} cannot be written ({error.strerror})"
            ) from error
        folder = cls(path, cfg)
        _check_inputs(path, cfg)
        if cfg.fresh:
            _move_aside(path, cfg, "starting over")
        _make_way(path, cfg, _find_other_run(path, cfg))
        fingerprints = _fingerprints(cfg)
        _make_way(path, cfg, _find_other_weights(path, cfg, fingerprints))
        if isinstance(cfg, PipelineRun):
            check_steps(path, cfg)
        _check_steps_to_go(path, cfg)
        folder._begin(cfg, fingerprints)
        return folder

    @property
    def finished(self) -> bool:
        """Whether a former process finished this run; a run given more steps than it finished with goes on."""
        record = self.read_json("finished.json")
        return record is not None and (self._steps is None or (record["steps"] or 0) >= self._steps)

    def finish(self) -> None:
        """Mark the run as finished, and let go of the folder."""
        self.write_json("finished.json", {"steps": self._steps, "time": _now()})
        self.close()

    def close(self) -> None:
        """Let go of the folder: another driver may have it."""
        if lock := _locks.pop(self.path, None):
            lock.close()

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file ``name`` (which may name a subfolder) in one step."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(file, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any | None:
        """Content of a file written by `write_json`, or None if it is not there."""
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    # Checkpoints ----------------------------------------------------------------------------------------------

    def save(self, step: int, write: Callable[[Path], Any], state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``: ``write`` fills the folder it is given, ``state`` is kept as JSON.

        Until the last rename the former checkpoint is the latest. Raises `UserError` when the disk is full; the
        former checkpoint is then still whole.
        """
        self._checkpoints.mkdir(exist_ok=True)
        target, aside = self._checkpoints / f"step_{step}", self._checkpoints / f".tmp-step_{step}"
        shutil.rmtree(aside, ignore_errors=True)
        try:  # the user's disk
            aside.mkdir()
            write(aside)
            disk.write_atomic(aside / "state.json", json.dumps({"step": step, "state": state}))
            disk.write_atomic(aside / "manifest.json", json.dumps(hash_files(aside), indent=1))
            disk.sync_tree(aside)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            disk.sync_folder(self._checkpoints)
            disk.write_atomic(self._checkpoints / "latest", target.name + "\n")
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not disk.is_full(error, self._checkpoints):
                raise
            raise UserError(
                f"{self._checkpoints}: the disk is full, step {step} was not saved; the last checkpoint is whole."
                " Free space (or lower checkpoint.keep) and start the same command again to resume"
            ) from error
        self._prune(step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, None if there is none yet. A damaged one is named and passed over."""
        names = [p.name for p in self._checkpoints.glob("step_*")] if self._checkpoints.is_dir() else []
        pointer = self._checkpoints / "latest"
        newest = _step_of(pointer.read_text().strip()) if pointer.exists() else 0
        for step in sorted((_step_of(name) for name in names), reverse=True):
            if step > newest:
                continue  # renamed, but the process died before `latest` said so
            folder = self._checkpoints / f"step_{step}"
            if damage := find_damage(folder):
                print(f"{folder}: {damage}; going back to the checkpoint before it", flush=True)
                continue
            print(f"{self.path}: resuming after step {step}", flush=True)
            return Checkpoint(
                step=step, folder=folder, state=json.loads((folder / "state.json").read_text())["state"]
            )
        if names and newest:
            raise UserError(f"{self._checkpoints}: no checkpoint is whole; start over with fresh=true")
        return None

    def _prune(self, newest: int) -> None:
        steps = sorted((_step_of(p.name) for p in self._checkpoints.glob("step_*")), reverse=True)
        kept = [s for s in steps if s <= newest][: max(self._keep, 1)]
        for step in steps:
            if step not in kept:
                shutil.rmtree(self._checkpoints / f"step_{step}", ignore_errors=True)

    # The start ------------------------------------------------------------------------------------------------

    def _begin(self, cfg: RunConfig, fingerprints: dict[str, str]) -> None:
        """Write config.yaml and manifest.json. A run that is finished, and will not go on, keeps its own."""
        former = self.read_json("manifest.json")
        changed = ", ".join(_changes(self.path, cfg)) if former is not None else ""
        if self._steps is not None and self.finished:  # the record stays that of the run that made the model
            if changed:
                print(
                    f"{self.path}: finished before, a change of settings has no effect: {changed};"
                    " give another name=, or start over with fresh=true",
                    flush=True,
                )
            return
        if changed:
            print(f"{self.path}: settings changed since it was last started: {changed}", flush=True)
        lineage = collect({key: _value(cfg, key) for key in fingerprints}, fingerprints)
        now = manifest.build(command_of(cfg), cfg.seed, fingerprints, lineage)
        text = f"{CONFIG_HEAD}{command_of(cfg)} --config {self.path / 'config.yaml'}\n" + _yaml(cfg)
        disk.write_atomic(self.path / "config.yaml", text)
        self.write_json(
            "manifest.json", now | {"created": (former or now)["created"], "resumed": former is not None}
        )


def check_folder(cfg: RunConfig) -> str:
    """What `RunFolder.open` refuses about name and folder, without a change on the disk; and where the run would start.

    Returns:
        The folder, and whether the run would begin, go on or do nothing there: a line for the plan.

    Raises:
        UserError: not a plain name, or the folder belongs to another run.
    """
    path = (Path(cfg.runs_dir) / cfg.name).absolute()
    _check_name(cfg)
    _check_inputs(path, cfg)
    if cfg.fresh:
        _check_nobody_works_below(path.resolve(), cfg)
        former = ", what is there is moved aside" if any((path / name).exists() for name in RUN_FILES) else ""
        return f"{path}: would begin{former} (fresh=true)"
    if problem := _find_other_run(path, cfg):
        if not has_only_begun(path):
            raise UserError(f"{problem}; {_other_name(cfg)}")
        return f"{path}: would begin; {problem}, which ended before its first step and is moved aside"
    if isinstance(cfg, PipelineRun):
        check_steps(path, cfg)
    _check_steps_to_go(path, cfg)
    if not (path / "config.yaml").exists():
        return f"{path}: would begin"
    if RunFolder(path, cfg).finished:
        return f"{path}: finished before, nothing to do"
    if isinstance(cfg, PipelineRun):
        return f"{path}: would go on, stages that are finished are not run again"
    pointer = path / "checkpoints" / "latest"
    if not pointer.exists():
        return f"{path}: would go on; it has no checkpoint"
    return f"{path}: would resume after step {_step_of(pointer.read_text().strip())}"


def command_of(cfg: RunConfig) -> str:
    """The command that a configuration belongs to."""
    return next(name for name, schema in RUNS.items() if schema is type(cfg))


def plain(cfg: RunConfig) -> dict[str, Any]:
    """The configuration as plain values without secrets."""
    return manifest.redact(json.loads(json.dumps(asdict(cfg))))


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(4) as threads:
        return {str(p.relative_to(folder)): h for p, h in zip(files, threads.map(_hash, files), strict=True)}


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is whole."""
    listing = folder / "manifest.json"
    if not listing.exists():
        return "its manifest.json is missing"
    try:  # a file that may be damaged
        expected = json.loads(listing.read_text())
    except ValueError:
        return "its manifest.json is damaged"
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _hash(folder / name) != digest:
            return f"{name} is damaged"
    return None


def _check_name(cfg: RunConfig) -> None:
    parts = Path(cfg.name).parts
    if not parts or ".." in parts or Path(cfg.name).is_absolute():
        raise UserError(f"name={cfg.name!r}: give a plain name; runs_dir says where the folder goes")


def _lock(path: Path, name: str) -> None:
    """The kernel holds the lock for as long as this process lives, so that of a killed driver is free at once."""
    if path in _locks:
        return
    file = (path / "lock").open("a+")
    try:  # another process may hold it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"name={name!r}: process {owner} is working in {path}; wait for it, or choose another name="
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _locks[path] = file


def _make_way(path: Path, cfg: RunConfig, problem: str | None) -> None:
    """Refuse the folder for its ``problem``, if there is one, unless no step was made there: then it is moved aside."""
    if problem is None:
        return
    if not has_only_begun(path):
        raise UserError(f"{problem}; {_other_name(cfg)}")
    _move_aside(path, cfg, f"{problem}, which ended before its first step; starting over")


def _other_name(cfg: RunConfig) -> str:
    return f"choose another name= than {cfg.name!r}, or start over with fresh=true"


def _move_aside(path: Path, cfg: RunConfig, why: str) -> None:
    """Move what a former run wrote to `<name>.old-<time>`; folders that this run reads from stay. What says whose folder
    it is goes last, so that a move that was cut off is gone on with."""
    read = _with_parents(_inputs(cfg).values())
    kept = {"lock", *(entry.name for entry in path.iterdir() if {entry, entry.resolve()} & read)}
    path = path.resolve()  # a link to another disk stays there
    _check_nobody_works_below(path, cfg)
    entries = [entry for entry in path.iterdir() if entry.name not in kept]
    if not entries:
        return
    old = path.with_name(f"{path.name}.old-{datetime.now():%Y%m%d-%H%M%S}")
    while old.exists():  # a second start in one second
        old = old.with_name(old.name + "+")
    old.mkdir()
    for entry in sorted(entries, key=lambda entry: entry.name in RUN_FILES[:2]):
        os.replace(entry, old / entry.name)
    print(f"{path}: {why}; what was there is now in {old}", flush=True)


def _with_parents(paths: Iterable[str]) -> set[Path]:
    """Where they are as they are written and as links lead, and all folders above."""
    plain = [Path(path).expanduser().absolute() for path in paths]
    return {above for own in plain for form in (own, own.resolve()) for above in (form, *form.parents)}


def _check_nobody_works_below(path: Path, cfg: RunConfig) -> None:
    """A run in a folder below, of a name such as `a/b` or a stage of a pipeline, goes on only where it is."""
    own = {folder.resolve() for folder in _locks}
    for file in path.rglob("*/lock"):
        if file.parent.resolve() in own:
            continue
        if not file.is_file():
            continue
        with file.open("r") as stream:
            try:  # another process may hold it
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise UserError(
                    f"name={cfg.name!r}: process {stream.read().strip() or 'unknown'} is working in {file.parent}, and"
                    f" {path} would be moved aside; wait for it, or choose another name="
                ) from None


def _check_inputs(path: Path, cfg: RunConfig) -> None:
    """No run reads a model where it would write its own."""
    own = {path / "model", (path / "model").resolve()}
    for key, value in _inputs(cfg).items():
        if key.endswith(("path", "adapter")) and own & _with_parents([value]):
            raise UserError(
                f"{key}={value!r}: this run would write its own model there; choose another name="
            )


def _find_other_run(path: Path, cfg: RunConfig) -> str | None:
    """What says that ``path`` is the folder of another run: key, value, what it was."""
    config, record = path / "config.yaml", path / "manifest.json"
    if config.exists() and not wrote_config(config):
        return f"name={cfg.name!r}: {config} is not of a run, which would write its own there"
    if not (config.exists() and record.exists()):
        if found := [name for name in RUN_FILES[1:] if (path / name).exists()]:
            missing = record if config.exists() else config
            return f"name={cfg.name!r}: {path} holds {found[0]} but no {missing.name}"
        return None
    try:  # files that may be damaged
        former, command = dict(yaml.safe_load(config.read_text())), json.loads(record.read_text())["command"]
    except (ValueError, yaml.YAMLError, KeyError, TypeError):
        return f"name={cfg.name!r}: {config} or {record.name} is damaged"
    now = plain(cfg)
    if command != command_of(cfg):
        return f"name={cfg.name!r}: {path} is the folder of another run (`posttrain {command}`)"
    for key in IDENTITY:
        if key in now and _identity(now[key]) != _identity(former.get(key)):
            where, old, new = _first_difference(key, _identity(former.get(key)), _identity(now[key]))
            return f"{where}={new!r}: {path} is the folder of a run with {where}={old!r}"
    return None


def _find_other_weights(path: Path, cfg: RunConfig, fingerprints: dict[str, str]) -> str | None:
    """The first checkpoint that is not what it was when the run of ``path`` began."""
    record = path / "manifest.json"
    former = json.loads(record.read_text()).get("fingerprints", {}) if record.exists() else {}
    for key, value in former.items():
        if key in fingerprints and fingerprints[key] != value:
            return f"{key}={_value(cfg, key)!r}: its weights changed since this run began in {path}"
    return None


def _check_steps_to_go(path: Path, cfg: RunConfig) -> None:
    """Refuse an unfinished run fewer steps than its newest checkpoint has: its model would be that of more steps."""
    steps, pointer, record = _steps_of(cfg), path / "checkpoints" / "latest", path / "finished.json"
    if steps is None or not pointer.exists():
        return
    if record.exists() and (json.loads(record.read_text())["steps"] or 0) >= steps:
        return  # finished before, nothing is made
    newest = _step_of(pointer.read_text().strip())
    if newest <= steps:
        return
    kept = sorted(_step_of(p.name) for p in pointer.parent.glob("step_*"))
    before = max((step for step in kept if step <= steps), default=None)
    way_back = f"write step_{before} into {pointer} to go back to it" if before else "none before it was kept"
    raise UserError(
        f"algorithm.steps={steps}: the newest checkpoint in {path} is of step {newest}; give {newest} or more, or"
        f" {way_back}"
    )


def _steps_of(cfg: RunConfig) -> int | None:
    return getattr(getattr(cfg, "algorithm", None), "steps", None)


def _changes(path: Path, cfg: RunConfig) -> list[str]:
    """What differs from the config.yaml of the former start: `learner.lr 1e-06 -> 1e-05`."""
    former = _flat(yaml.safe_load((path / "config.yaml").read_text()))
    now = _flat(plain(cfg) | {"fresh": False})
    keys = [key for key in {**former, **now} if former.get(key) != now.get(key)]
    return [f"{key} {former.get(key)} -> {now.get(key)}" for key in keys]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _identity(section: Any) -> Any:
    """A section without what may change while the run stays the same (how many steps a teacher trains, whether it is
    known to be the student) and without what is not set."""
    if isinstance(section, dict):
        return {
            key: _identity(value)
            for key, value in section.items()
            if key not in ("steps", "self") and value is not None
        }
    return section


def _first_difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                return _first_difference(f"{key}.{name}", old.get(name), new.get(name))
    return key, old, new


def _inputs(cfg: RunConfig) -> dict[str, str]:
    """Every path that the run reads, by config key."""
    found = {"model.path": cfg.model.path} if cfg.model.path else {}
    if isinstance(cfg, MergeRun):
        found |= cfg.sources()
    for section in ("data", "sft_data"):
        data = getattr(cfg, section, None)
        if data is None:
            continue
        found |= {f"{section}.{k}": v for k in ("path", "eval_path") if (v := getattr(data, k)) is not None}
        for group in ("sources", "eval_sources"):
            found |= {f"{section}.{group}.{n}.path": s.path for n, s in getattr(data, group).items()}
    for domain, teacher in getattr(cfg, "teachers", {}).items():
        if teacher.path is not None and teacher.backend is not TeacherBackend.server:
            found[f"teachers.{domain}.path"] = teacher.path
        if teacher.adapter is not None:
            found[f"teachers.{domain}.adapter"] = teacher.adapter
    return found


def _value(cfg: RunConfig, key: str) -> str:
    return _inputs(cfg)[key]


def _fingerprints(cfg: RunConfig) -> dict[str, str]:
    from teachers.adapter import adapter_fingerprint
    from teachers.fingerprint import fingerprint

    revisions = {"model.path": cfg.model.revision}
    revisions |= {f"teachers.{d}.path": t.revision for d, t in getattr(cfg, "teachers", {}).items()}
    found = {}
    for key, path in _inputs(cfg).items():
        if key.startswith(("data.", "sft_data.")):
            continue
        if key.startswith("teachers.") and key.endswith(".adapter"):
            found[key] = adapter_fingerprint(path, key)
        else:
            found[key] = fingerprint(path, key, revisions.get(key))
    return found


def _yaml(cfg: RunConfig) -> str:
    ordered = {f.name: plain(cfg)[f.name] for f in fields(cfg)}
    return yaml.safe_dump(ordered | {"fresh": False}, sort_keys=False, width=100)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _step_of(name: str) -> int:
    return int(name.rpartition("_")[2])


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
