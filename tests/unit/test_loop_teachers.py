"""Teachers that change while the loop runs, signal `full`: the learner always has the LM head that a score belongs to.

The loop, the live teachers and the pool are the real ones; workers, engine and learner are not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from posttrain.compose import compose
from posttrain.config import Dtype, ModelConfig, Overlong, PolicyAlgorithm, TeacherWorkerConfig
from posttrain.live_teachers import LiveTeachers, Record
from posttrain.loop import PolicyLoop
from posttrain.records import (
    GroupSummary,
    LossSettings,
    Prompt,
    RolloutStatus,
    SampleRef,
    SamplingSettings,
    TeacherScores,
)
from posttrain.runs.policy import preflight, teacher_files
from posttrain.scheduler import Scheduler
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from teachers.direct import Examination
from teachers.pool import TeacherPool, _Worker
from teachers.teacher import Teacher, resolve
from teachers.worker import ScoringTask
from tests.tiny_models import tiny_dense, tiny_teacher
from tests.unit.test_loop_eval import DOMAINS, FakeFolder, FakeLearner, FakeRollouts, prompts

# "far" has the hash that comes first: were heads numbered by their place among those in use, it would move all others.
DIGESTS = {"far": "0", "student": "1", "a": "2", "b": "3"}


class Method:
    """A method of an actor; what it gives is there at once, several results as a list of their number."""

    def __init__(self, function: Any) -> None:
        self.remote = function

    def options(self, num_returns: int) -> Method:
        def call(*args: Any) -> list[Any]:
            results: list[Any] = self.remote(*args)
            assert num_returns == len(results) > 1  # Ray splits no single result
            return results

        return Method(call)


class FakeWorker:
    """Scores with its teachers' names: 0 nat, or -9 by the teacher "far"; the head of a teacher is its name. It dies
    once, and another process takes its place."""

    def __init__(self) -> None:
        self.pid = 1
        self.fetched: list[str] = []
        self.process = Method(lambda: f"node:{self.pid}")
        self.set_teachers, self.head, self.score = map(Method, (self._set_teachers, self._head, self._score))
        self.score_all = Method(lambda tasks, *signal: [self._score(task, *signal) for task in tasks])
        right = Examination(mean_abs=0.0, max_abs=0.0, num_tokens=9, explanation=None)
        self.examine = Method(lambda *asked: right)

    def _set_teachers(self, teachers: dict[str, Teacher], signal: str) -> dict[str, Any]:
        assert signal == "full"
        return {
            "host": "node",
            "pid": self.pid,
            "heads": {key: DIGESTS[Path(teacher.path).name] for key, teacher in teachers.items()},
        }

    def _head(self, key: str, teacher: Teacher) -> str:
        self.fetched.append(Path(teacher.path).name)
        return self.fetched[-1]

    def _score(self, task: ScoringTask, signal: str, top_k: int) -> list[TeacherScores]:
        self.pid = 2
        name = Path(task.teacher.path).name
        value = -9.0 if name == "far" else 0.0
        lengths = [len(rollout.loss_mask) for group in task.group_refs for rollout in group.rollouts]
        return [
            TeacherScores(teacher=name, logprobs=np.full(n, value, np.float32), head_id=task.head_id)
            for n in lengths
        ]


class Rollouts(FakeRollouts):
    def finish(self, prompt: Prompt, settings: SamplingSettings, group_id: str) -> tuple[Any, GroupSummary]:
        (_, lengths), summary = super().finish(prompt, settings, group_id)
        rollouts = [
            SimpleNamespace(
                token_ids=np.arange(3 + n, dtype=np.int32),
                rollout_logprobs=np.zeros(3 + n, np.float32),
                loss_mask=np.arange(3 + n) >= 3,
                status=RolloutStatus.completed,
            )
            for n in lengths
        ]
        return SimpleNamespace(rollouts=rollouts), summary


class Learner(FakeLearner):
    """Looks up every sample's head, as the loss does, and writes the swaps of the next step."""

    def __init__(self, swaps: Path) -> None:
        super().__init__()
        self.swaps = swaps
        self.heads: dict[int, Any] = {}
        self.num_heads_set = 0
        self.taught: dict[int, dict[str, str]] = {}  # step -> domain -> whose head its scores meet

    def set_heads(self, heads: dict[int, Any]) -> None:
        self.heads, self.num_heads_set = dict(heads), self.num_heads_set + 1

    def train_step(
        self, samples: list[SampleRef], loss: LossSettings, step: int, updates: int
    ) -> dict[str, float]:
        self.taught[step] = {}
        for sample in samples:
            scores = sample.teacher_ref[sample.teacher_index]
            assert self.heads[scores.head_id] == scores.teacher, (
                "hidden states of one teacher, head of another"
            )
            self.taught[step][sample.domain] = scores.teacher
        if step in (2, 3):
            self.swaps.write_text(f"math: {self.swaps.parent}/{'b' if step == 2 else 'far'}\n")
            os.utime(self.swaps, ns=(step * 10**9, step * 10**9))  # one file system's clock may be coarse
        return super().train_step(samples, loss, step, updates)


def test_heads_follow_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda refs, **settings: (list(refs), []))
    student = tiny_dense(tmp_path / "student", num_layers=1, hidden=64)
    for seed, name in enumerate(("far", "a", "b")):
        tiny_teacher(student, tmp_path / name, seed)
    sections = [f"teachers.{d}.path={tmp_path}/{p}" for d, p in (("math", "a"), ("code", "student"))]
    sections.append("teachers.code.self=true")
    quiet = ["tracking.wandb=disabled", "tracking.console=false", "rollout.max_model_len=64"]
    cfg: Any = compose(
        "mopd",
        [*quiet, *sections, f"model.path={tmp_path}/student", "data.path=x", "algorithm.signal=full"],
    )[1]
    worker = FakeWorker()
    pool = TeacherPool(TeacherWorkerConfig(), ModelConfig())
    pool._shared = [_Worker(actor=worker)]
    taught = resolve(cfg.teachers, DOMAINS, cfg.model.path)
    pool.set_teachers(taught, "full", 64)
    folder: Any = FakeFolder(tmp_path)
    engine: Any = Rollouts()
    learner: Any = Learner(tmp_path / "teachers.yaml")
    with Tracker(tmp_path, cfg.tracking, "t", {}, 5) as tracker:
        checks = preflight(cfg, taught, teacher_files(cfg, taught), folder, tracker)
        PolicyLoop(
            algorithm=PolicyAlgorithm(
                beta=1.0, alpha=0.0, group_size=2, steps=5, prompts_per_step=4, overlong=Overlong.keep
            ),
            loss=LossSettings(kind="policy_gradient", beta=1.0, alpha=0.0, signal="full"),
            sampling=SamplingSettings(group_size=2, max_new_tokens=8),
            rollout_dtype=Dtype.float32,
            scheduler=Scheduler({d: [p for p in prompts("p", 20) if p.domain == d] for d in DOMAINS}, seed=1),
            rollouts=engine,
            learner=learner,
            rewards=None,
            teachers=LiveTeachers(pool, Record(teachers=taught), cfg, folder, tracker, checks),
            tracker=tracker,
            folder=folder,
            checkpoint_every=5,
            probe_texts=[np.arange(3)],
            probe_tolerance=0.1,
            decode=str,
            rollout_samples=0,
            rollout_every_steps=1,
        ).run(1)
    kept = {"code": "student"}
    assert learner.taught == {
        step: kept | {"math": math} for step, math in enumerate(["a", "a", "b", "b", "b"], start=1)
    }, "b from step 3 on; at step 4 far was taken back"
    assert set(learner.heads.values()) == {"student", "b"}
    rows = json.loads((tmp_path / "preflight.json").read_text())
    assert {(r["domain"], Path(r["path"]).name) for r in rows} == {("code", "student"), ("math", "b")}
    assert {r["verdict"] for r in rows if r["gate"] in ("scoring", "initial_kl", "weights")} == {"ok"}
    red = [e for e in read_jsonl(tmp_path / "events.jsonl") if e.get("verdict") == "red"]
    assert [(e["gate"], Path(e["path"]).name) for e in red] == [("initial_kl", "far")]
    events = [e["kind"] for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"].startswith("teacher_")]
    assert events == ["teacher_swap", "teacher_swap", "teacher_swap_refused"]
    [death] = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "worker_restarted"]
    assert death["worker"] == "teachers-0" and "process node:1 died; node:2 took" in death["reason"]
    assert worker.fetched.count("student") == 1, "a head that stays is not fetched again"


def test_every_member_of_a_group_may_show_what_a_teacher_says(monkeypatch):
    """Of every prompt first, then more of each; a failed first member hides no teacher."""
    monkeypatch.setattr("posttrain.loop.ray.get", lambda refs: refs)
    ok, failed, cut = RolloutStatus.completed, RolloutStatus.environment_error, RolloutStatus.truncated

    def group(name: str, domain: str, statuses: list[RolloutStatus], counts: list[int]) -> Any:
        rollouts = [f"{name}{i}" for i in range(len(statuses))]
        summary = SimpleNamespace(domain=domain, statuses=statuses, num_loss_tokens=counts)
        return SimpleNamespace(summary=summary, ref=SimpleNamespace(rollouts=rollouts), teacher_ref=name)

    done = [
        group("a", "math", [failed, ok, cut], [3, 3, 3]),
        group("b", "math", [ok, ok], [3, 0]),
        group("c", "math", [failed, failed], [3, 3]),
        group("d", "code", [failed, ok], [2, 2]),
        group("e", "tool", [ok], [2]),
        *(group(f"f{i}-", "many", [ok] * 8, [1] * 8) for i in range(20)),
    ]
    asked: dict[str, list[str]] = {}
    teachers = SimpleNamespace(
        unchecked={"math", "code", "many"}, check=lambda samples, *_: asked.update(samples) or []
    )
    PolicyLoop.check_teachers(SimpleNamespace(), SimpleNamespace(done=done, step=1), teachers)  # type: ignore[arg-type]
    many = asked.pop("many")
    assert asked == {"math": ["a1", "b0", "a2"], "code": ["d1"]}
    assert len(many) == 32 and many[:20] == [f"f{i}-0" for i in range(20)] and many[20] == "f0-1"
