"""Outcome advantages by hand, and who takes part in the baseline."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.advantages import group_advantages, overlong_penalties
from posttrain.config import Advantage

ALL = np.ones(4, dtype=bool)


def test_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    assert group_advantages(rewards, ALL, Advantage.grpo).tolist() == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages(rewards, ALL, Advantage.dr_grpo).tolist() == [0.5, -0.5, -0.5, 0.5]
    np.testing.assert_allclose(group_advantages(rewards, ALL, Advantage.rloo), np.array([2, -2, -2, 2]) / 3)


def test_rloo_is_the_reward_minus_the_mean_of_the_others() -> None:
    rewards = np.array([0.3, 1.7, -0.4, 0.9])
    expected = [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)]
    np.testing.assert_allclose(group_advantages(rewards, ALL, Advantage.rloo), expected)


@pytest.mark.parametrize("kind", list(Advantage))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -0.3, 1e-9])
def test_equal_rewards_give_exactly_zero(kind: Advantage, reward: float) -> None:
    assert (group_advantages(np.full(3, reward), ALL[:3], kind) == 0).all()


@pytest.mark.parametrize("kind", list(Advantage))
def test_failed_rollouts_leave_the_baseline(kind: Advantage) -> None:
    valid = np.array([True, False, True, True])
    got = group_advantages(np.array([1.0, np.nan, 0.0, 0.25]), valid, kind)
    alone = group_advantages(np.array([1.0, 0.0, 0.25]), ALL[:3], kind)
    assert got[1] == 0
    assert got[valid].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", list(Advantage))
def test_one_or_no_valid_sample_has_nothing_to_compare_with(kind: Advantage) -> None:
    assert (group_advantages(np.array([1.0, 0.0]), np.array([True, False]), kind) == 0).all()
    assert (group_advantages(np.array([1.0, 0.0]), np.array([False, False]), kind) == 0).all()


@pytest.mark.parametrize("kind", list(Advantage))
def test_advantages_of_a_group_sum_to_zero(kind: Advantage) -> None:
    rewards = np.random.default_rng(0).normal(size=16)
    assert group_advantages(rewards, np.ones(16, dtype=bool), kind).sum() == pytest.approx(0, abs=1e-12)


def test_a_reward_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([1.0, np.nan, 0.0, 0.0]), ALL, Advantage.grpo)


def test_overlong_penalty_of_dapo_by_hand() -> None:
    """Limit 20, buffer 4: nothing up to 16, a quarter a token from there, all of it for an answer that was cut off."""
    lengths = np.array([1, 16, 17, 18, 20, 20, 5])
    cut = np.array([False, False, False, False, False, True, True])
    got = overlong_penalties(lengths, cut, max_tokens=20, buffer=4, penalty=1.0)
    assert got.tolist() == [0, 0, 0.25, 0.5, 1, 1, 1]
    assert overlong_penalties(lengths, cut, 20, 4, penalty=0.5).tolist() == (got / 2).tolist()
