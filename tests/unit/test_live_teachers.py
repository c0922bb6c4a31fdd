"""Teachers that change between steps: by file, by call, on trial until they passed on samples, and after a crash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError
from safetensors.torch import load_file, save_file

from posttrain.compose import compose
from posttrain.config import TeacherBackend, TeacherConfig, UserError
from posttrain.live_teachers import LiveTeachers, Record
from posttrain.run_folder import RunFolder
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from teachers.check import check_teachers
from teachers.fingerprint import fingerprint
from teachers.gates import GateRow
from teachers.teacher import Teacher, resolve
from tests.tiny_models import tiny_dense, tiny_teacher


class FakePool:
    """Remembers what it was told to hold; refuses folders whose name is in ``broken``."""

    def __init__(self) -> None:
        self.held: dict[str, Teacher] = {}
        self.asked: tuple[str, int] | None = None  # signal and top_k
        self.broken: set[str] = set()

    def score(self, domain: str, refs: list[str]) -> str:
        return f"{domain} alone"

    def score_all(self, refs: dict[str, list[str]]) -> dict[str, str]:
        return {domain: " ".join(refs) for domain in refs}

    def set_teachers(self, teachers: dict[str, Teacher], signal: str, top_k: int) -> None:
        self.held, self.asked = {}, (signal, top_k)
        for teacher in teachers.values():
            if Path(teacher.path).name in self.broken:
                raise UserError(f"{teacher.path} does not load")
        self.held = dict(teachers)


class FakePreflight:
    """Remembers whose rows it has; measures what it is given, and refuses folders whose name is in ``far``."""

    def __init__(self, teachers: dict[str, Teacher], rows: list[GateRow]) -> None:
        self.teachers, self.rows = dict(teachers), rows
        self.far: set[str] = set()
        self.measured: list[tuple[str, bool]] = []  # folder, is_start

    def rows_of(self, domain: str) -> list[GateRow]:
        return [row for row in self.rows if row.domain == domain]

    def replace(self, domain: str, teacher: Teacher, rows: list[GateRow]) -> None:
        self.teachers[domain] = teacher
        self.rows = [row for row in self.rows if row.domain != domain] + rows

    def check(self, pool: FakePool, samples: dict[str, Any], is_start: bool) -> None:
        for domain in samples:
            assert pool.held[domain] == self.teachers[domain]
            name = Path(self.teachers[domain].path).name
            self.measured.append((name, is_start))
            if name in self.far:
                raise UserError(f"{name} is too far")


class World:
    """A run of two domains in ``root``, as one process sees it; `restart` is the next process."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        base = [f"model.path={root}/student", f"runs_dir={root}/runs", "name=swap", "tracking.wandb=disabled"]
        sections = [f"teachers.{d}.path={root}/{p}" for d, p in (("math", "a"), ("code", "student"))]
        sections.append("teachers.code.self=true")
        self.cfg: Any = compose(
            "mopd",
            [
                *base,
                *sections,
                "data.path=x",
                "tracking.console=false",
                "rollout.max_model_len=64",
                *overrides,
            ],
        )[1]
        self.restart()

    def restart(self) -> None:
        folder = RunFolder.open(self.cfg)
        self.folder = folder.path
        self.pool = FakePool()
        record = Record.read(folder, resolve(self.cfg.teachers, ["math", "code"], self.cfg.model.path))
        rows = check_teachers(record.teachers, self.cfg.model, self.cfg.teacher_workers, 64)
        self.pool.set_teachers(record.teachers, "sampled", 1)
        tracker = Tracker(folder.path, self.cfg.tracking, "swap", {}, 10)
        self.preflight = FakePreflight(record.teachers, rows)
        self.live = LiveTeachers(self.pool, record, self.cfg, folder, tracker, self.preflight)  # type: ignore[arg-type]

    def check(self, step: int = 3, *domains: str, scores: Any = None) -> set[str]:
        """A step whose samples are of ``domains`` (all)."""
        samples: Any = {domain: ["rollout"] for domain in domains or ("math", "code")}
        return self.live.check(samples, step, scores or dict.fromkeys(samples))

    def write(self, text: str) -> None:
        file = self.folder / "teachers.yaml"
        stamp = file.stat().st_mtime_ns if file.exists() else 0
        file.write_text(text)
        os.utime(file, ns=(stamp + 10**9, stamp + 10**9))  # one file system's clock may be coarse

    @property
    def held(self) -> dict[str, str]:
        return {domain: Path(teacher.path).name for domain, teacher in self.pool.held.items()}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.folder / "events.jsonl") if e["kind"] == kind]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    student = tiny_dense(tmp_path / "student", num_layers=1, hidden=64)
    for seed, name in enumerate("abc"):
        tiny_teacher(student, tmp_path / name, seed=seed)
    monkeypatch.setattr("posttrain.live_teachers.ray.get", lambda ref: ref)
    return World(tmp_path)


def test_a_file_swaps_a_teacher_once(world: World) -> None:
    assert world.live.unchecked == {"math", "code"}
    world.check(1)
    assert world.live.unchecked == set() and world.preflight.measured == [("a", True), ("student", True)]
    world.live.read_file(1)
    assert world.held == {"math": "a", "code": "student"} and world.live.version == 1
    world.write(f"math: {world.root}/b\n")
    world.live.read_file(4)
    assert world.held == {"math": "b", "code": "student"}
    assert world.live.version == 2 and world.live.unchecked == {"math"}
    world.live.read_file(5)
    [event] = world.events("teacher_swap")
    assert (event["step"], event["version"], event["domain"]) == (4, 2, "math")
    assert event["path"] == f"{world.root}/b" and event["former"] == f"{world.root}/a"
    weights, _, settings = event["fingerprint"].partition(".")
    assert weights == fingerprint(f"{world.root}/b") and len(settings) == 12
    assert world.check(5) == set() and world.preflight.measured[-1] == ("b", False)
    assert {row.path for row in world.preflight.rows_of("math")} == {f"{world.root}/b"}
    assert {row.gate for row in world.preflight.rows_of("math")} >= {"files", "weights", "foreign", "shared"}
    world.write(f"math: {world.root}/b\n")
    world.live.read_file(6)
    assert world.live.version == 2, "the same teacher again is no change"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("math: [", "not valid YAML"),
        ("- a", "a mapping is needed"),
        ("law: /x", "teachers.law: this run has no domain 'law'; it has code, math"),
        ("math: /gone", "teachers.math.path='/gone': no such directory"),
        (
            "math: {path: /x, steps: 3}",
            "give a path, or a mapping of path, backend, adapter, model, revision, self",
        ),
        ("math: {path: /x, self: 1}", "teachers.math.self=1: true or false is needed"),
        ("math: {path: /x, revision: 3}", "teachers.math.revision=3: a text is needed"),
        ("math: {path: 3}", "teachers.math.path=3: a text is needed"),
        ("math: {path: /x, backend: vlm}", "teachers.math.backend='vlm': choose transformers, vllm, server"),
        ("math: {path: /x, model: big}", "teachers.math.model='big': only a server has named models"),
    ],
)
def test_a_bad_file_is_an_event_and_nothing_changes(world: World, text: str, expected: str) -> None:
    world.check()
    world.write(text)
    world.live.read_file(3)
    world.live.read_file(4)
    [event] = world.events("teacher_swap_refused")
    assert expected in event["message"] and event["step"] == 3 and event["version"] == 1
    assert world.held == {"math": "a", "code": "student"} and world.live.unchecked == set()


def test_a_teacher_that_does_not_load_leaves_the_former_ones(world: World) -> None:
    world.check()
    world.pool.broken = {"b"}
    with pytest.raises(UserError, match=r"could not be loaded: .*/b does not load"):
        world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    assert world.held == {"math": "a", "code": "student"} and world.live.version == 1


def test_a_new_teacher_is_asked_for_the_signal_of_the_run(world: World) -> None:
    world = World(world.root, "algorithm.signal=top_k", "algorithm.top_k=7", "name=top")
    world.check()
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 2)
    assert world.pool.asked == ("top_k", 7)
    world.pool.asked, world.preflight.far = None, {"b"}
    assert world.check(2) == {"math"}
    assert world.pool.asked == ("top_k", 7)
    full = World(world.root, "algorithm.signal=full", "name=full")
    served = TeacherConfig(path=f"{world.root}/b", backend=TeacherBackend.vllm)
    with pytest.raises(
        UserError, match=r"^algorithm\.signal='full': teachers\.math\.backend=vllm gives sampled"
    ):
        full.live.set_teachers({"math": served}, 2)
    assert full.held == {"math": "a", "code": "student"}


def test_weights_that_change_in_place_are_refused(world: World) -> None:
    world.check()
    change_in_place(world.root / "a")
    with pytest.raises(UserError, match="changed in place"):
        world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/a")}, 3)


def change_in_place(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})


def test_a_swap_takes_no_changed_files_of_another_domain_with_it(world: World) -> None:
    """Loading looks at the files of all teachers: those of code would be taken anew, without a gate or a word."""
    world.check()
    world.live.set_teachers({"code": TeacherConfig(path=f"{world.root}/c")}, 2)
    world.check()
    change_in_place(world.root / "c")
    world.write(f"math: {world.root}/b\n")
    world.live.read_file(3)
    [event] = world.events("teacher_swap_refused")
    assert (
        f"teachers.code.path='{world.root}/c': it changed in place since this run took it" in event["message"]
    )
    assert world.held == {"math": "a", "code": "c"} and world.live.version == 2


def test_no_swap_away_from_files_that_changed(world: World) -> None:
    """Where the new teacher does not load, the former one would, with its new weights."""
    world.check()
    change_in_place(world.root / "a")
    world.pool.broken = {"b"}
    with pytest.raises(UserError, match=r"/a': it changed in place since this run took it"):
        world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    assert world.held["math"] == "a" and world.live.version == 1


@pytest.mark.parametrize("changed", ["a", "student"])
def test_no_way_back_to_files_that_changed(world: World, changed: str) -> None:
    world.check()
    world.preflight.far = {"b"}
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    change_in_place(world.root / changed)
    with pytest.raises(UserError, match=rf"/{changed}': it changed in place since this run took it"):
        world.check()


def test_a_teacher_that_fails_on_samples_is_taken_back(world: World) -> None:
    world.check()
    files = world.preflight.rows_of("math")
    world.preflight.far = {"c"}
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/c")}, 4)
    assert world.check(4, "code") == set() and world.live.unchecked == {"math"}, "no sample of math yet"
    assert world.check(4) == {"math"}
    assert world.held == {"math": "a", "code": "student"}, "neither b nor c ever passed"
    assert world.preflight.rows_of("math") == files
    [event] = world.events("teacher_swap_refused")
    assert (
        event["path"] == f"{world.root}/c"
        and "goes back to" in event["message"]
        and "too far" in event["message"]
    )
    assert event["fingerprint"] == world.events("teacher_swap")[-1]["fingerprint"], (
        "of the one that was refused"
    )
    assert world.live.version == event["version"] == 4
    assert [name for name, _ in world.preflight.measured[-2:]] == ["c", "a"], "on the same samples"
    assert world.live.unchecked == set()


def test_the_first_teachers_are_not_on_trial(world: World) -> None:
    world.preflight.far = {"a"}
    with pytest.raises(UserError, match="a is too far"):
        world.check()
    assert world.events("teacher_swap_refused") == [] and world.live.unchecked == {"math", "code"}


def test_scores_that_failed_take_a_teacher_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wave was given counts too, not only what preflight asks."""

    def get(ref: Any) -> Any:
        if isinstance(ref, BaseException):
            raise ref
        return ref

    monkeypatch.setattr("posttrain.live_teachers.ray.get", get)
    world.check()
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    assert world.check(3, "math", scores={"math": RayError("nan for token 7")}) == {"math"}
    assert "nan for token 7" in world.events("teacher_swap_refused")[0]["message"]
    assert world.held["math"] == "a"


def test_a_teacher_on_trial_scores_alone(world: World) -> None:
    """In a common call its error would be that of the others."""
    asked: Any = {"math": ["a"], "code": ["b"]}
    assert world.live.score_all(asked) == {"math": "math alone", "code": "code alone"}
    world.check()
    assert world.live.score_all(asked) == dict.fromkeys(asked, "math code")
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    assert world.live.score_all(asked) == {"math": "math alone", "code": "code"}


def test_a_teacher_that_its_files_refuse_never_loads(world: World) -> None:
    """The same gates as at the start, with the same names to accept them."""
    world.check()
    foreign = tiny_dense(world.root / "foreign", seed=9, num_layers=1, hidden=64)
    for path, words in ((foreign, "accept=[foreign]"), (world.root / "student", "teachers.math.self=true")):
        world.write(f"math: {path}\n")
        world.live.read_file(3)
        assert words in world.events("teacher_swap_refused")[-1]["message"]
    assert world.held["math"] == "a" and world.live.version == 1
    world.write(f"math: {{path: {world.root}/student, self: true}}\n")
    world.live.read_file(4)
    assert world.held["math"] == "student"
    [row] = [row for row in world.preflight.rows_of("math") if row.gate == "shared"]
    assert row.value == "also code", "a domain that was not swapped"


def test_a_resumed_run_uses_the_swapped_teacher(world: World) -> None:
    world.check()
    world.write(f"math: {world.root}/b\n")
    world.live.read_file(2)
    world.restart()
    assert world.held["math"] == "a", "what was on trial when the run died starts its trial again"
    world.live.read_file(2)
    assert world.held["math"] == "b"
    world.check()
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/c")}, 5)
    world.check()
    version = world.live.version
    world.restart()
    world.live.read_file(5)
    assert world.held == {"math": "c", "code": "student"}, "the call came after the file"
    assert world.live.version == version and world.live.unchecked == {"math", "code"}


def test_a_refused_file_is_not_noted_as_carried_out(world: World) -> None:
    world.check()
    world.write("math: nowhere\n")
    world.live.read_file(2)
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    world.check(3)
    record = json.loads((world.folder / "teachers.json").read_text())
    assert record["file"] is None and record["teachers"]["math"]["path"] == f"{world.root}/b"


def test_a_path_alone_keeps_the_back_end(world: World) -> None:
    world.check()
    world.write(f"math: {{path: {world.root}/b, backend: vllm}}\n")
    world.live.read_file(2)
    world.check()
    world.write(f"math: {world.root}/c\n")
    world.live.read_file(3)
    assert [e["backend"] for e in world.events("teacher_swap")] == ["vllm", "vllm"]
    assert world.pool.held["math"].backend == "vllm"


def test_a_teacher_that_was_overwritten_is_not_resumed_with(world: World) -> None:
    """Its weights, or its config.json alone."""
    world.check()
    world.write("math: b\n".replace("b", f"{world.root}/b"))
    world.live.read_file(2)
    world.check()
    config = Path(f"{world.root}/b/config.json")
    former = config.read_text()
    config.write_text(json.dumps(json.loads(former) | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"^teachers\.math\.path='.*/b': it changed since this run took it"):
        world.restart()
    config.write_text(former)
    world.restart()
    weights = Path(f"{world.root}/b/model.safetensors")
    weights.write_bytes(Path(f"{world.root}/c/model.safetensors").read_bytes())
    with pytest.raises(UserError, match="put it back, or remove that file"):
        world.restart()
    (world.folder / "teachers.json").unlink()
    world.restart()
    assert world.held["math"] == "a"


def test_another_config_beside_equal_tensors_is_another_teacher(world: World) -> None:
    world.check()
    other = Path(shutil.copytree(f"{world.root}/a", f"{world.root}/a2"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert world.live.set_teachers({"math": TeacherConfig(path=str(other))}, 2) == set()
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"rms_norm_eps=0\.5"):
        world.live.set_teachers({"math": TeacherConfig(path=str(other))}, 3)
