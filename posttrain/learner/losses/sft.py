"""Weighted negative log-likelihood: L = - sum_t weight_t * log pi(y_t)."""

from __future__ import annotations

from posttrain.learner.losses import metrics
from posttrain.learner.losses.base import LossInputs, LossOutput
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """``weights`` hold the denominators, e.g. 1 / (loss tokens of the global batch)."""
    del settings
    loss = -(inputs.weights * inputs.policy_logprobs).sum()
    return LossOutput(loss=loss, metrics=metrics.cross_entropy(inputs))
