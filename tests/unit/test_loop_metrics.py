"""What a step says about its rollouts."""

from __future__ import annotations

from posttrain.records import GroupSummary, RewardResult, RolloutStatus
from posttrain.waves import Collected, Wave, rollout_metrics


def test_rewards_lengths_and_dropped_rollouts() -> None:
    summary = GroupSummary(
        group_id="g",
        prompt_id="p",
        domain="math",
        source="s",
        statuses=[
            RolloutStatus.completed,
            RolloutStatus.truncated,
            RolloutStatus.engine_error,
            RolloutStatus.truncated,
        ],
        num_tokens=[5, 9, 4, 6],
        num_loss_tokens=[2, 6, 1, 3],
        min_policy_version=3,
        max_policy_version=3,
        engine_s=0.1,
        errors=[None, None, "short routes", None],
        repeated=[False, True, True, False],
    )
    rewards = [
        RewardResult(reward=1.0),
        RewardResult(reward=0.5),
        RewardResult(reward=0.0, error="no rollout"),
        RewardResult(reward=0.0, error="the reward took too long"),
    ]
    wave = Wave(step=4, waiting=set(), done=[Collected(ref=None, summary=summary, rewards=rewards)])
    metrics = rollout_metrics(wave, step=4)
    assert metrics["reward/all"] == metrics["reward/math"] == 0.75
    assert metrics["length/all"] == 3.0 and metrics["tokens/all"] == 12.0
    assert metrics["repeated/math"] == 1 / 4, "the prompt of a failed rollout is no answer"
    assert metrics["truncated/math"] == metrics["failed/all"] == 1 / 2
    assert metrics["dropped/engine_error"] == metrics["dropped/reward_error"] == 1.0
    assert metrics["share/prompts/math"] == 1.0 and metrics["policy_age/max"] == 0.0
