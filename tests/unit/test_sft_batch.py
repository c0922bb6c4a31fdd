"""Weights of a batch of conversations: what their tokens add up to."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.config import Aggregation, SFTAlgorithm, UserError
from posttrain.records import TrainingSample
from posttrain.runs import sft


def samples() -> list[TrainingSample]:
    """2, 6 and 0 loss tokens of one domain, 2 of another."""
    made = []
    for count, domain in ((2, "math"), (6, "math"), (0, "math"), (2, "tool")):
        mask = np.arange(8) >= 8 - count
        weights = np.zeros(8, np.float32)
        made.append(
            TrainingSample(
                token_ids=np.arange(8, dtype=np.int32), loss_mask=mask, weights=weights, domain=domain
            )
        )
    return made


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        (Aggregation.token_mean, [0.1, 0.1, 0.0, 0.1]),
        (Aggregation.seq_mean, [1 / 6, 1 / 18, 0.0, 1 / 6]),
        (Aggregation.token_mean_balanced, [1 / 12, 1 / 12, 0.0, 1 / 6]),  # 2/3 and 1/3 of the conversations
    ],
)
def test_weights_by_hand(monkeypatch, aggregation, weights):
    monkeypatch.setattr("posttrain.runs.sft.ray.put", lambda value: value)
    refs = sft.batch(samples(), aggregation)
    assert [ref.weight for ref in refs] == pytest.approx(weights)
    assert [ref.domain for ref in refs] == ["math", "math", "math", "tool"]
    total = sum(ref.weight * int(s.loss_mask.sum()) for ref, s in zip(refs, samples(), strict=True))
    assert total == pytest.approx(1.0)


def test_constant_has_no_length_here():
    with pytest.raises(UserError, match=r"^algorithm\.aggregation='constant': choose token_mean"):
        SFTAlgorithm(aggregation=Aggregation.constant)
