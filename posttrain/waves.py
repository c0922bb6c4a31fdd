"""The prompts of one step on their way through the loop, and what their rollouts say of the policy."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.records import GroupSummary, RewardResult, RolloutStatus

TRAINABLE = (RolloutStatus.completed, RolloutStatus.truncated)


@dataclass(kw_only=True, slots=True)
class Collected:
    """One finished group of a wave: where it lies, its scalars, and what rewards and teachers said."""

    ref: Any
    summary: GroupSummary
    rewards: list[RewardResult] | None = None
    teacher_ref: Any = None
    teacher_offset: int = 0


@dataclass(kw_only=True, slots=True)
class Wave:
    """The prompts of one step and what has come back of them."""

    step: int
    waiting: set[str]
    done: list[Collected] = field(default_factory=list)
    dropped: list[Collected] = field(
        default_factory=list
    )  # equal rewards, replaced; in the metrics, not in the loss


def rollout_metrics(wave: Wave, step: int) -> dict[str, float]:
    """Rewards, lengths, truncation and age of a wave, overall and per domain."""
    values: dict[str, list[float]] = defaultdict(list)
    sampled = wave.done + wave.dropped
    for collected in sampled:
        summary = collected.summary
        for i, status in enumerate(summary.statuses):
            both = ("all", summary.domain)
            is_truncated = status is RolloutStatus.truncated
            has_reward = collected.rewards is not None and collected.rewards[i].error is None
            if status in TRAINABLE and collected.rewards is not None and not has_reward:
                status = RolloutStatus.reward_error
            for name in both:
                values[f"length/{name}"].append(summary.num_loss_tokens[i])
                values[f"truncated/{name}"].append(is_truncated)
                values[f"failed/{name}"].append(status not in TRAINABLE)
                values[f"repeated/{name}"].append(summary.repeated[i] and status in TRAINABLE)
                if collected.rewards is not None and has_reward:
                    values[f"reward/{name}"].append(collected.rewards[i].reward)
            if status not in TRAINABLE:
                values[f"dropped/{status}"].append(1.0)
        values[f"share/prompts/{summary.domain}"].append(1.0)
    counted = {k: float(sum(v)) for k, v in values.items() if k.startswith("dropped/")}
    metrics = {k: float(np.mean(v)) for k, v in values.items() if not k.startswith(("share/", "dropped/"))}
    metrics |= counted
    metrics |= {k: sum(v) / len(sampled) for k, v in values.items() if k.startswith("share/")}
    metrics["tokens/all"] = float(sum(sum(c.summary.num_loss_tokens) for c in sampled))
    metrics["policy_age/max"] = float(max(step - 1 - c.summary.min_policy_version for c in sampled))
    if wave.dropped:
        metrics["reward/dropped_groups"] = float(len(wave.dropped))
    return metrics


def by_domain(metrics: dict[str, float], name: str) -> dict[str, float]:
    """domain -> value of the learner's metrics ``<domain>/<name>``."""
    return {k.removesuffix(f"/{name}"): v for k, v in metrics.items() if k.endswith(f"/{name}")}
