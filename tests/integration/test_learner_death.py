"""A learner process that is killed: one line that says what to do, whatever the other ranks wait for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from posttrain.cli import user_problem
from posttrain.config import ModelConfig, UserError
from posttrain.learner.group import LearnerGroup
from tests.integration.test_learner_training import SFT, config, make_batch, references
from tests.tiny_models import tiny_qwen3_moe


def die_soon(rank: Any) -> None:
    """The other rank comes to its first collective, finds nobody, and fails as well when the connection breaks."""
    time.sleep(2.0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.integration
@pytest.mark.parametrize("is_waited_for", [False, True])
def test_a_killed_rank_ends_the_run_with_one_line(
    local_ray: None, tmp_path: Path, is_waited_for: bool
) -> None:
    model = ModelConfig(path=str(tiny_qwen3_moe(tmp_path / "model", num_layers=2)))
    group = LearnerGroup.start(config(num_ranks=2), model, 10, 0)
    samples = references(make_batch((0, 8)))
    group.train_step(samples, SFT, 1)
    if is_waited_for:
        group._ranks[1].__ray_call__.remote(die_soon)
    else:
        os.kill(ray.get(group._ranks[1].__ray_call__.remote(lambda rank: os.getpid())), signal.SIGKILL)
    with pytest.raises(UserError) as error:
        group.train_step(samples, SFT, 2)
    line = user_problem(error.value)
    assert line is not None and line.startswith("learner.num_ranks=2: a learner process died (The actor died")
    assert "start the same command again to resume from the last checkpoint" in line
    group.shutdown()
