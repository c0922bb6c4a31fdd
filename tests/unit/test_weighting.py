"""Token weights: what every aggregation promises about sequences, tokens and domains."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.config import Aggregation, UserError
from posttrain.weighting import token_weights

COUNTS = [10, 30, 0, 5, 5]
DOMAINS = ["math", "math", "math", "instruct", "instruct"]


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
    assert (token_weights([0, 0], ["math", "code"], aggregation).weights == 0).all()
    assert len(token_weights([], [], aggregation).weights) == 0


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_weights_do_not_depend_on_order(aggregation: Aggregation) -> None:
    order = [3, 0, 4, 2, 1]
    straight = token_weights(COUNTS, DOMAINS, aggregation).weights[order]
    shuffled = token_weights([COUNTS[i] for i in order], [DOMAINS[i] for i in order], aggregation).weights
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
