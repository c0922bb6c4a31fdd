"""MiMo-V2-Flash report, eq. 7 to 9 (arXiv 2601.02780): L = - sum_t weight_t * w_t * A_t * log pi(y_t).

No PPO clip and no return-to-go: every token is scored by itself. Signals other than ``sampled`` add `divergence.py`.
"""

from __future__ import annotations

from torch import Tensor

from posttrain.learner.losses import divergence, metrics
from posttrain.learner.losses.advantage import token_advantages
from posttrain.learner.losses.base import LossInputs, LossOutput, required
from posttrain.learner.losses.correction import correction_weights
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """w_t = sg[pi/mu] through the correction, A_t from teacher and outcome; its gradient runs through log pi alone."""
    factors, touched = token_factors(inputs, settings)
    teacher = divergence.teacher_term(inputs, touched, settings)
    mismatch, maxima = metrics.mismatch(inputs.policy_logprobs, inputs)
    return LossOutput(
        loss=-(factors * inputs.policy_logprobs).sum() + teacher.loss,
        metrics={
            **metrics.share_and_domains("clip", "ratio_dropped", touched, inputs),
            **mismatch,
            **metrics.teacher(inputs, settings),
            **teacher.metrics,
            **metrics.entropy(inputs),
            **metrics.balance(
                inputs, token_advantages(inputs, settings) + teacher.divergence, factors + teacher.factors
            ),
        },
        maxima=maxima,
    )


def token_factors(inputs: LossInputs, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """weight_t * w_t * A_t [N] without gradient, and the mask [N] of tokens that the correction touched."""
    rollout_logprobs = required(inputs.rollout_logprobs, "rollout_logprobs", "policy_gradient")
    ratio_weights, touched = correction_weights(inputs.policy_logprobs, rollout_logprobs, settings)
    return inputs.weights * ratio_weights * token_advantages(inputs, settings), touched
