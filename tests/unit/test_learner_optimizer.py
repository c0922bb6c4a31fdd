"""Learning rate by hand, and which parameters are decayed."""

from __future__ import annotations

import pytest
import torch

from posttrain.config import LearnerConfig, Schedule
from posttrain.learner.optimizer import batch_rates, build_optimizer, learning_rate, set_adamw


def rates(total: int, **options: object) -> list[float]:
    learner = LearnerConfig(lr=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(learner, step, total) for step in range(1, total + 1)]


def test_constant_with_warmup() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_ends_at_the_last_rate() -> None:
    expected = [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]
    assert rates(6, warmup_steps=2, schedule=Schedule.linear, min_lr_ratio=0.1) == pytest.approx(expected)


def test_cosine() -> None:
    got = rates(4, warmup_steps=0, schedule=Schedule.cosine, min_lr_ratio=0.2)
    assert got == pytest.approx([0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2], rel=1e-5)


def test_warmup_longer_than_the_run_and_steps_beyond_it() -> None:
    learner = LearnerConfig(lr=2.0, warmup_steps=10, schedule=Schedule.linear)
    assert learning_rate(learner, 5, 5) == 1.0
    assert learning_rate(learner, 99, 20) == 0.0


def test_several_updates_a_batch_go_through_the_whole_schedule() -> None:
    learner = LearnerConfig(lr=1.0, warmup_steps=2, schedule=Schedule.linear)
    batches = [batch_rates(learner, step, 3, 6) for step in (1, 2)]
    assert batches[0] + batches[1] == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert batches[0] + batches[1] == [learning_rate(learner, update, 6) for update in range(1, 7)]
    assert [batch_rates(learner, step, 1, 6)[0] for step in range(1, 7)] == batches[0] + batches[1]
    assert batch_rates(learner, 2, 3, 6, skipped=1) == [*batches[0][2:], *batches[1][:2]]


def test_vectors_are_not_decayed_and_frozen_parameters_left_out() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    groups = build_optimizer(module, LearnerConfig(weight_decay=0.1)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (4, 0.0)]


def test_a_loaded_state_takes_the_settings_of_the_config() -> None:
    module = torch.nn.Linear(3, 3)
    saved = build_optimizer(module, LearnerConfig(weight_decay=0.0, eps=1e-8)).state_dict()
    learner = LearnerConfig(weight_decay=0.1, eps=1e-6, betas=[0.8, 0.9])
    optimizer = build_optimizer(module, learner)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0, "torch brings back what was saved"
    set_adamw(optimizer.param_groups, learner)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["eps"] == 1e-6 and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
