"""Clipped surrogate with clip-higher (DAPO, arXiv 2503.14476), times the train/inference correction.

L = - sum_t weight_t * c_t * min(r_t * A_t, clip(r_t, 1 - clip_low, 1 + clip_high) * A_t), r_t = pi / pi_old and
c_t = sg of the correction on pi_old / mu. pi_old is the learner's policy before the first update on the batch, so the
PPO clip measures movement of the policy and the correction measures the difference of the engines. Signals other than
``sampled`` add `divergence.py`, whose term is that of the policy as it is now: no ratio and no PPO clip on it.
"""

from __future__ import annotations

import torch

from posttrain.learner.losses import divergence, metrics
from posttrain.learner.losses.advantage import token_advantages
from posttrain.learner.losses.base import LossInputs, LossOutput, mean, required
from posttrain.learner.losses.correction import correction_weights
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """``clip/ppo`` is the share of tokens whose gradient the clip stopped."""
    rollout_logprobs = required(inputs.rollout_logprobs, "rollout_logprobs", "ppo_clip")
    old_logprobs = required(inputs.old_logprobs, "old_logprobs", "ppo_clip").detach()
    ratio_weights, touched = correction_weights(old_logprobs, rollout_logprobs, settings)
    advantages = token_advantages(inputs, settings)
    ratio = (inputs.policy_logprobs - old_logprobs).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    stopped = (clipped < unclipped).detach()
    teacher_loss, teacher_metrics = divergence.teacher_loss(inputs, touched, settings)
    mismatch, maxima = metrics.mismatch(inputs.policy_logprobs, inputs)
    active = inputs.weights != 0
    return LossOutput(
        loss=-(inputs.weights * ratio_weights * surrogate).sum() + teacher_loss,
        metrics={
            "clip/ratio_dropped": mean(touched, active),
            "clip/ppo": mean(stopped, active),
            **mismatch,
            **metrics.teacher(inputs, settings),
            **teacher_metrics,
            **metrics.entropy(inputs),
        },
        maxima=maxima,
    )
