"""AdamW groups and the learning-rate schedule. DeepSpeed gets a finished optimizer and never changes the rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from posttrain.config import LearnerConfig, Schedule


def build_optimizer(module: nn.Module, learner: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases, sinks) are not decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": learner.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    first, second = learner.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learner.lr,
        betas=(first, second),
        eps=learner.eps,
    )


def set_adamw(groups: list[dict[str, Any]], learner: LearnerConfig) -> None:
    """Betas, epsilon and decay of ``learner`` in the groups of `build_optimizer`: a loaded state brings those it was saved
    with. The group of matrices is the first."""
    for index, group in enumerate(groups):
        group["betas"], group["eps"] = tuple(learner.betas), learner.eps
        group["weight_decay"] = learner.weight_decay if index == 0 else 0.0


def learning_rate(learner: LearnerConfig, step: int, total_steps: int) -> float:
    """Rate of ``step`` (1-indexed): ``lr * step / warmup_steps`` while warming up, then the schedule, which ends at
    ``min_lr_ratio * lr`` on the last of ``total_steps``."""
    assert step >= 1, "steps are counted from 1"
    if step <= learner.warmup_steps:
        return learner.lr * step / learner.warmup_steps
    progress = min(1.0, (step - learner.warmup_steps) / max(1, total_steps - learner.warmup_steps))
    if learner.schedule is Schedule.constant:
        shape = 1.0
    elif learner.schedule is Schedule.cosine:
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        shape = 1.0 - progress
    return learner.lr * (learner.min_lr_ratio + (1.0 - learner.min_lr_ratio) * shape)


def batch_rates(
    learner: LearnerConfig, step: int, updates: int, total_steps: int, skipped: int = 0
) -> list[float]:
    """Rates of the ``updates`` optimizer steps on batch ``step`` (1-indexed), which has ``updates`` before it for every
    earlier batch, less those that were ``skipped``. ``total_steps`` counts optimizer steps."""
    first = (step - 1) * updates + 1 - skipped
    return [learning_rate(learner, first + i, total_steps) for i in range(updates)]
