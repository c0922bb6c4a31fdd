"""Token weights: what every aggregation promises about sequences, tokens and domains."""

from __future__ import annotations

import json

import numpy as np
import pytest

from posttrain.config import Aggregation, UserError
from posttrain.weighting import GapFollower, Weighting, token_weights

COUNTS = [10, 30, 0, 5, 5]
DOMAINS = ["math", "math", "math", "instruct", "instruct"]


def weigh(aggregation: Aggregation) -> Weighting:
    return token_weights(COUNTS, DOMAINS, aggregation, length_norm=40)


def mass(weights: np.ndarray) -> dict[str, float]:
    totals: dict[str, float] = {}
    for weight, count, domain in zip(weights, COUNTS, DOMAINS, strict=True):
        totals[domain] = totals.get(domain, 0.0) + weight * count
    return totals


def test_seq_mean_gives_every_sequence_the_same() -> None:
    got = token_weights(COUNTS, DOMAINS, Aggregation.seq_mean)
    np.testing.assert_allclose(got.weights, [1 / 40, 1 / 120, 0, 1 / 20, 1 / 20])
    assert (got.weights * COUNTS).sum() == pytest.approx(1)


def test_token_mean_gives_every_token_the_same() -> None:
    got = token_weights(COUNTS, DOMAINS, Aggregation.token_mean)
    np.testing.assert_allclose(got.weights, [0.02, 0.02, 0, 0.02, 0.02])
    assert got.token_shares == pytest.approx({"math": 0.8, "instruct": 0.2})
    assert got.sequence_shares == pytest.approx({"math": 0.5, "instruct": 0.5})


def test_balanced_gives_every_domain_its_share_and_keeps_the_mean_at_one() -> None:
    got = token_weights(COUNTS, DOMAINS, Aggregation.token_mean_balanced, {"math": 0.25, "instruct": 0.75})
    assert mass(got.weights) == pytest.approx({"math": 0.25, "instruct": 0.75})
    assert got.weights[0] * 50 == pytest.approx(0.25 / 0.8)  # target share / token share
    assert (got.weights * COUNTS).sum() == pytest.approx(1)
    assert got.weights[0] == got.weights[1]  # within a domain every token counts the same


def test_balanced_without_targets_follows_the_sequences() -> None:
    got = token_weights(COUNTS, DOMAINS, Aggregation.token_mean_balanced)
    assert mass(got.weights) == pytest.approx({"math": 0.5, "instruct": 0.5})


def test_targets_of_absent_domains_are_spread_over_the_present() -> None:
    targets = {"math": 0.2, "instruct": 0.2, "code": 0.6}
    got = token_weights(COUNTS, DOMAINS, Aggregation.token_mean_balanced, targets)
    assert mass(got.weights) == pytest.approx({"math": 0.5, "instruct": 0.5})


def test_a_domain_whose_sequences_are_all_empty_counts_as_absent() -> None:
    got = token_weights([4, 0], ["math", "code"], Aggregation.token_mean_balanced, {"math": 0.1, "code": 0.9})
    np.testing.assert_allclose(got.weights, [0.25, 0])


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_batch_without_loss_tokens_has_weight_zero(aggregation: Aggregation) -> None:
    assert (token_weights([0, 0], ["math", "code"], aggregation, length_norm=40).weights == 0).all()
    assert len(token_weights([], [], aggregation, length_norm=40).weights) == 0


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_weights_do_not_depend_on_order(aggregation: Aggregation) -> None:
    order = [3, 0, 4, 2, 1]
    straight = weigh(aggregation).weights[order]
    shuffled = token_weights(
        [COUNTS[i] for i in order], [DOMAINS[i] for i in order], aggregation, length_norm=40
    ).weights
    np.testing.assert_allclose(straight, shuffled)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"math": 1.0}, "instruct"),
        ({"math": -0.5, "instruct": 1.5}, r"target_shares\.math=-0\.5"),
        ({"math": 0.0, "instruct": 0.0}, "no share above 0"),
    ],
)
def test_unusable_targets_are_named(targets: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_weights(COUNTS, DOMAINS, Aggregation.token_mean_balanced, targets)


def test_constant_divides_by_no_length() -> None:
    """Dr. GRPO: every token of every answer weighs the same, and twice as many tokens weigh twice as much in all."""
    got = weigh(Aggregation.constant)
    np.testing.assert_allclose(got.weights, np.array([1, 1, 0, 1, 1]) / (4 * 40))
    longer = token_weights([20, 60, 0, 10, 10], DOMAINS, Aggregation.constant, length_norm=40)
    assert (longer.weights * [20, 60, 0, 10, 10]).sum() == pytest.approx(2 * (got.weights * COUNTS).sum())


def test_gap_factors_move_the_target_shares() -> None:
    targets = {"math": 0.5, "instruct": 0.5}
    got = token_weights(COUNTS, DOMAINS, Aggregation.token_mean_balanced, targets, {"math": 3.0})
    assert mass(got.weights) == pytest.approx({"math": 0.75, "instruct": 0.25}) == got.target_shares
    assert (got.weights * COUNTS).sum() == pytest.approx(1)


def test_gap_following_gives_the_wide_gap_more() -> None:
    """Exponent +1: m_d / m_ref with m_ref the mean over the domains, within 0.05 and 20."""
    gaps = GapFollower()
    assert gaps.factors() == {}
    gaps.observe({"math": 0.3, "code": 0.1})
    assert gaps.factors() == pytest.approx({"math": 1.5, "code": 0.5})
    gaps.observe({"math": 0.3, "code": 0.2})
    means = {"math": 0.3, "code": 0.9 * 0.1 + 0.1 * 0.2}
    reference = sum(means.values()) / 2
    assert gaps.factors() == pytest.approx({d: m / reference for d, m in means.items()})
    many = GapFollower({"wide": 1.0} | {f"d{i}": 1e-6 for i in range(30)})
    assert many.factors()["wide"] == 20.0 and many.factors()["d0"] == 0.05
    assert GapFollower({"math": 0.0}).factors() == {}


def test_gap_following_goes_on_after_a_restart() -> None:
    rng = np.random.default_rng(0)
    whole, first = GapFollower(), GapFollower()
    steps = [{"math": float(a), "code": float(b)} for a, b in rng.random((6, 2))]
    for step in steps:
        whole.observe(step)
    for step in steps[:3]:
        first.observe(step)
    second = GapFollower(json.loads(json.dumps(first.state())))
    for step in steps[3:]:
        second.observe(step)
    assert second.factors() == whole.factors()


def test_gap_following_narrows_the_wide_gap_first_and_comes_to_rest() -> None:
    """Two domains whose gaps shrink in proportion to their shares: the gaps become equal, and stay so."""
    gaps, gap = GapFollower(), {"math": 1.0, "code": 0.2}
    ratios = []
    for _ in range(200):
        got = token_weights([50, 50], ["math", "code"], Aggregation.token_mean_balanced, None, gaps.factors())
        gaps.observe(gap)
        gap = {d: g * (1 - 0.05 * got.target_shares[d]) for d, g in gap.items()}
        ratios.append(gap["math"] / gap["code"])
    assert ratios[0] > 4
    assert all(0.9 < ratio < 1.2 for ratio in ratios[150:])
