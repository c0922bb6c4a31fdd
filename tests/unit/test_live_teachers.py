"""Teachers that change between steps: by file, by call, on trial until their gap check, and after a crash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from posttrain.compose import compose
from posttrain.config import TeacherBackend, TeacherConfig, UserError
from posttrain.live_teachers import LiveTeachers, Record
from posttrain.run_folder import RunFolder
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from teachers.teacher import Teacher, resolve
from tests.tiny_models import tiny_dense


class FakePool:
    """Remembers what it was told to hold; refuses folders whose name is in ``broken``."""

    def __init__(self) -> None:
        self.held: dict[str, Teacher] = {}
        self.asked: tuple[str, int] | None = None  # signal and top_k
        self.broken: set[str] = set()

    def set_teachers(self, teachers: dict[str, Teacher], signal: str, top_k: int) -> None:
        self.held, self.asked = {}, (signal, top_k)
        for teacher in teachers.values():
            if Path(teacher.path).name in self.broken:
                raise UserError(f"{teacher.path} does not load")
        self.held = dict(teachers)


class World:
    """A run of two domains in ``root``, as one process sees it; `restart` is the next process."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        base = [f"model.path={root}/student", f"runs_dir={root}/runs", "name=swap", "tracking.wandb=disabled"]
        sections = [f"teachers.{d}.path={root}/{p}" for d, p in (("math", "a"), ("code", "student"))]
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
        self.pool.set_teachers(record.teachers, "sampled", 1)
        tracker = Tracker(folder.path, self.cfg.tracking, "swap", {}, 10)
        self.live = LiveTeachers(self.pool, record, self.cfg, folder, tracker)  # type: ignore[arg-type]

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
def world(tmp_path: Path) -> World:
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny_dense(tmp_path / name, seed=seed, num_layers=1, hidden=64)
    return World(tmp_path)


def accept_all(world: World) -> None:
    for domain in sorted(world.live.unchecked):
        world.live.accept(domain)


def test_a_file_swaps_a_teacher_once(world: World) -> None:
    assert world.live.unchecked == {"math", "code"}
    accept_all(world)
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
    assert len(event["fingerprint"]) == 64
    world.live.accept("math")
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
        ("math: {path: /x, steps: 3}", "give a path, or a mapping of path, backend, adapter, model"),
        ("math: {path: 3}", "teachers.math.path=3: a text is needed"),
        ("math: {path: /x, backend: vlm}", "teachers.math.backend='vlm': choose transformers, vllm, server"),
        ("math: {path: /x, model: big}", "teachers.math.model='big': only a server has named models"),
    ],
)
def test_a_bad_file_is_an_event_and_nothing_changes(world: World, text: str, expected: str) -> None:
    accept_all(world)
    world.write(text)
    world.live.read_file(3)
    world.live.read_file(4)
    [event] = world.events("teacher_swap_refused")
    assert expected in event["message"] and event["step"] == 3 and event["version"] == 1
    assert world.held == {"math": "a", "code": "student"} and world.live.unchecked == set()


def test_a_teacher_that_does_not_load_leaves_the_former_ones(world: World) -> None:
    accept_all(world)
    world.pool.broken = {"b"}
    with pytest.raises(UserError, match=r"could not be loaded: .*/b does not load"):
        world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    assert world.held == {"math": "a", "code": "student"} and world.live.version == 1


def test_a_new_teacher_is_asked_for_the_signal_of_the_run(tmp_path: Path) -> None:
    for seed, name in enumerate(("student", "a", "b")):
        tiny_dense(tmp_path / name, seed=seed, num_layers=1, hidden=64)
    world = World(tmp_path, "algorithm.signal=top_k", "algorithm.top_k=7")
    accept_all(world)
    world.live.set_teachers({"math": TeacherConfig(path=f"{tmp_path}/b")}, 2)
    assert world.pool.asked == ("top_k", 7)
    world.pool.asked = None
    assert world.live.take_back("math", 2, UserError("far"))
    assert world.pool.asked == ("top_k", 7)
    full = World(tmp_path, "algorithm.signal=full", "name=full")
    served = TeacherConfig(path=f"{tmp_path}/b", backend=TeacherBackend.vllm)
    with pytest.raises(
        UserError, match=r"^algorithm\.signal='full': teachers\.math\.backend=vllm gives sampled"
    ):
        full.live.set_teachers({"math": served}, 2)
    assert full.held == {"math": "a", "code": "student"}


def test_weights_that_change_in_place_are_refused(world: World) -> None:
    accept_all(world)
    file = world.root / "a/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="changed in place"):
        world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/a")}, 3)


def test_a_teacher_that_fails_its_gap_check_is_taken_back(world: World) -> None:
    accept_all(world)
    assert not world.live.take_back("math", 2, UserError("far")), "the first teachers are not on trial"
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/b")}, 3)
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/c")}, 4)
    assert world.live.take_back("math", 4, UserError("too far"))
    assert world.held == {"math": "a", "code": "student"}, "neither b nor c ever passed"
    [event] = world.events("teacher_swap_refused")
    assert (
        event["path"] == f"{world.root}/c"
        and "goes back to" in event["message"]
        and "too far" in event["message"]
    )
    assert world.live.version == event["version"] == 4
    assert world.live.unchecked == {"math"}, "the former one is measured on the same samples"


def test_a_resumed_run_uses_the_swapped_teacher(world: World) -> None:
    accept_all(world)
    world.write(f"math: {world.root}/b\n")
    world.live.read_file(2)
    world.restart()
    assert world.held["math"] == "a", "what was on trial when the run died starts its trial again"
    world.live.read_file(2)
    assert world.held["math"] == "b"
    accept_all(world)
    world.live.set_teachers({"math": TeacherConfig(path=f"{world.root}/c")}, 5)
    accept_all(world)
    version = world.live.version
    world.restart()
    world.live.read_file(5)
    assert world.held == {"math": "c", "code": "student"}, "the call came after the file"
    assert world.live.version == version and world.live.unchecked == {"math", "code"}


def test_a_path_alone_keeps_the_back_end(world: World) -> None:
    accept_all(world)
    world.write(f"math: {{path: {world.root}/b, backend: vllm}}\n")
    world.live.read_file(2)
    accept_all(world)
    world.write(f"math: {world.root}/c\n")
    world.live.read_file(3)
    assert [e["backend"] for e in world.events("teacher_swap")] == ["vllm", "vllm"]
    assert world.pool.held["math"].backend == "vllm"
