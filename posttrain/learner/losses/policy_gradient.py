"""MiMo-V2-Flash report, eq. 7 to 9 (arXiv 2601.02780): L = - sum_t weight_t * w_t * A_t * log pi(y_t).

No PPO clip and no return-to-go: every token is scored by itself. Signals other than ``sampled`` add `divergence.py`.
"""

from __future__ import annotations

from posttrain.learner.losses import divergence, metrics
from posttrain.learner.losses.advantage import token_advantages
from posttrain.learner.losses.base import LossInputs, LossOutput, mean, required
from posttrain.learner.losses.correction import correction_weights
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """w_t = sg[pi/mu] through the correction, A_t from teacher and outcome; its gradient runs through log pi alone."""
    rollout_logprobs = required(inputs.rollout_logprobs, "rollout_logprobs", "policy_gradient")
    ratio_weights, touched = correction_weights(inputs.policy_logprobs, rollout_logprobs, settings)
    factors = inputs.weights * ratio_weights * token_advantages(inputs, settings)
    teacher_loss, teacher_metrics = divergence.teacher_loss(inputs, touched, settings)
    mismatch, maxima = metrics.mismatch(inputs.policy_logprobs, inputs)
    return LossOutput(
        loss=-(factors * inputs.policy_logprobs).sum() + teacher_loss,
        metrics={
            "clip/ratio_dropped": mean(touched, inputs.weights != 0),
            **mismatch,
            **metrics.teacher(inputs, settings),
            **teacher_metrics,
            **metrics.entropy(inputs),
        },
        maxima=maxima,
    )
