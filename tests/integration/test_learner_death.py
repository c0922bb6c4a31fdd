"""A learner process that is killed: one line that says what to do, at once, whatever the other ranks wait for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray

from posttrain.cli import user_problem
from posttrain.config import LearnerConfig, ModelConfig, UserError
from posttrain.learner.group import LearnerGroup
from tests.tiny_models import tiny_dense


@pytest.mark.integration
def test_a_killed_rank_ends_the_run_with_one_line(local_ray: None, tmp_path: Path) -> None:
    model = tiny_dense(tmp_path / "model", num_layers=1)
    group = LearnerGroup.start(LearnerConfig(num_ranks=2), ModelConfig(path=str(model)), 10, 0)
    ids = np.arange(20, dtype=np.int32)
    assert len(group.logprobs([ids])[0]) == 20
    os.kill(ray.get(group._ranks[1].__ray_call__.remote(lambda rank: os.getpid())), signal.SIGKILL)
    with pytest.raises(UserError) as error:
        group.logprobs([ids, ids])
    line = user_problem(error.value)
    assert line is not None and line.startswith("learner.num_ranks=2: a learner process died (The actor died")
    assert "start the same command again to resume from the last checkpoint" in line
    group.shutdown()
