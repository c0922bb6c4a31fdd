"""Rounds of the pipeline: which stage starts from which model, in which folder. The stages themselves are replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from posttrain.compose import compose
from posttrain.runs import pipeline
from posttrain.stages import in_round, stages

TEACHERS = [
    "teachers.math.train=rl",
    "teachers.code.train=sft",
    "teachers.tool.train=none",
    "teachers.given.path=/g",
]
BASE = ["model.path=/m", "data.path=/d", "sft_data.path=/s", "name=run", *TEACHERS]


def config(*overrides: str):
    return compose("pipeline", [*BASE, *overrides])[1]


def test_one_round_has_the_plain_names():
    assert in_round(1, "mopd") == "mopd" and in_round(3, "teachers/math") == "round3/teachers/math"
    folders = [[stage.folder for stage in group] for group in stages(config())]
    assert folders == [["sft"], ["teachers/code", "teachers/math"], ["mopd"]]


def test_stages_of_two_rounds():
    groups = stages(config("rounds=2", "teachers.math.steps=5", "mopd.algorithm.steps=3"))
    folders = [[stage.folder for stage in group] for group in groups]
    assert folders[3:] == [["round2/teachers/code", "round2/teachers/math"], ["round2/mopd"]]
    assert [stage.steps for stage in groups[3]] == [100, 5] and groups[4][0].steps == 3


@pytest.mark.parametrize("number", [1, 2])
def test_every_kind_of_teacher_starts_from_the_rounds_model(monkeypatch, number):
    seen = {}

    def run(cfg, engines):
        seen[cfg.name] = cfg
        return f"model of {cfg.name}"

    monkeypatch.setattr(pipeline.rl, "run", run)
    monkeypatch.setattr(pipeline.sft, "run", run)
    monkeypatch.setattr(pipeline, "locate", lambda path, *key: path)  # no checkpoint is there
    monkeypatch.setattr(pipeline, "fingerprint", lambda path, *key: path)
    cfg = config("teachers.math.steps=5", "teachers.code.steps=7")
    found = {d: pipeline.teacher_model(cfg, d, "/start", None, number) for d in sorted(cfg.teachers)}
    prefix = "run/" if number == 1 else "run/round2/"
    assert found == {
        "code": f"model of {prefix}teachers/code",
        "given": "/g",
        "math": f"model of {prefix}teachers/math",
        "tool": "/start",
    }
    math, code = seen[f"{prefix}teachers/math"], seen[f"{prefix}teachers/code"]
    assert (math.model.path, math.domain, math.algorithm.steps) == ("/start", "math", 5)
    assert (code.model.path, code.domain, code.algorithm.steps) == ("/start", "code", 7)
    student = pipeline.mopd_config(cfg, "/start", found, number)
    assert student.name == f"{prefix}mopd" and student.model.path == "/start" and student.domain is None
    assert {d: t.path for d, t in student.teachers.items()} == found
    assert [d for d, t in student.teachers.items() if t.self] == ["tool"], (
        "train=none: the student, on purpose"
    )


def test_a_default_teacher_stands_for_every_domain_without_one(monkeypatch):
    cfg = config("~teachers.code", "~teachers.math", "teachers.default.path=/d")
    domains = ("math", "code", "given", "tool")
    found = [SimpleNamespace(domain=domain) for domain in domains]
    monkeypatch.setattr(pipeline, "load_prompts", lambda *asked: found)
    teachers = pipeline.teacher_of_each_domain(cfg, None)
    assert {d: t.path for d, t in teachers.items()} == {
        "math": "/d",
        "code": "/d",
        "given": "/g",
        "tool": None,
    }
    assert pipeline.teacher_of_each_domain(config(), None) == config().teachers
