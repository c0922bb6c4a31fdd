"""What a run says before its processes start."""

from __future__ import annotations

import pytest

from posttrain.config import MOPDRun, TeacherConfig
from posttrain.engines import Engines


def test_what_is_not_there_is_not_told(monkeypatch, capsys):
    monkeypatch.setattr("posttrain.engines.cluster.start", lambda ray: None)
    cfg = MOPDRun(name="student", rewards={"math": "exact"})
    cfg.algorithm.beta, cfg.algorithm.alpha, cfg.reward_workers.num_workers = 0.0, 1.0, 8
    Engines.of(cfg)
    assert capsys.readouterr().out == "student: starting Ray, learner x1, rollout x1, rewards x8 ...\n"


@pytest.mark.parametrize("shown", [True, False])
def test_a_run_of_its_own_says_what_it_starts(monkeypatch, capsys, shown):
    started = []
    monkeypatch.setattr("posttrain.engines.cluster.start", started.append)
    cfg = MOPDRun(name="student", teachers={"math": TeacherConfig(path="/math")})
    cfg.rollout.num_workers, cfg.tracking.console = 2, shown
    Engines.of(cfg)
    assert started == [cfg.ray]
    said = "student: starting Ray, learner x1, rollout x2, teachers x1 ...\n" if shown else ""
    assert capsys.readouterr().out == said
