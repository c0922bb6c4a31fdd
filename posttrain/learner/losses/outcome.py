"""What the outcome losses share: advantage, train/inference correction, the teacher's term beside them, metrics.

L = L_teacher + L_outcome. The outcome loss sees alpha * A_ORM alone. The teacher's term is the plain policy gradient of
MiMo eq. 7 to 9 (`policy_gradient` with alpha 0), whatever the outcome loss is: its advantage is formed against the policy
of this very update, so it fades as the policy moves and needs no PPO clip, and a clip of the sum would stop a token by
the sign of two advantages together. So the three clips stay apart: pi/mu, teacher and PPO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.learner.losses import divergence, metrics, policy_gradient
from posttrain.learner.losses.advantage import token_advantages
from posttrain.learner.losses.base import LossInputs, LossOutput, required
from posttrain.learner.losses.correction import correction_weights
from posttrain.records import LossSettings


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Parts of an outcome loss before its surrogate. All tensors [N]; ``log_ratio`` alone carries a gradient."""

    advantages: Tensor  # alpha * A_ORM
    log_ratio: Tensor  # log pi / pi_old
    correction: Tensor  # c_t, on pi_old / mu
    touched: Tensor  # bool: tokens that the correction touched


@dataclass(kw_only=True, slots=True)
class Surrogate:
    """An outcome objective per token, to be maximised. All tensors [N]."""

    value: Tensor
    slope: Tensor  # its derivative by log pi(y_t), without gradient
    clipped: Tensor | None  # bool, None for a loss without PPO clip


def begin(inputs: LossInputs, settings: LossSettings, kind: str) -> Outcome:
    """Parts that every outcome loss needs; ``kind`` is for messages."""
    rollout_logprobs = required(inputs.rollout_logprobs, "rollout_logprobs", kind)
    old_logprobs = required(inputs.old_logprobs, "old_logprobs", kind).detach()
    correction, touched = correction_weights(old_logprobs, rollout_logprobs, settings)
    return Outcome(
        advantages=token_advantages(inputs, replace(settings, beta=0.0)),
        log_ratio=inputs.policy_logprobs - old_logprobs,
        correction=correction,
        touched=touched,
    )


def clipped_surrogate(ratio: Tensor, outcome: Outcome, settings: LossSettings) -> Surrogate:
    """min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) for ratios [N] with d r / d log pi = r."""
    unclipped = ratio * outcome.advantages
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * outcome.advantages
    stopped = (clipped < unclipped).detach()
    slope = torch.where(stopped, torch.zeros_like(unclipped), unclipped).detach()
    return Surrogate(value=torch.minimum(unclipped, clipped), slope=slope, clipped=stopped)


def finish(inputs: LossInputs, settings: LossSettings, outcome: Outcome, surrogate: Surrogate) -> LossOutput:
    """-sum of weight_t * c_t * surrogate_t, plus the teacher's term where beta is not 0."""
    weights = inputs.weights * outcome.correction
    loss, factors = -(weights * surrogate.value).sum(), weights * surrogate.slope
    advantages, more = token_advantages(inputs, settings), {}
    if settings.beta != 0:
        teacher, touched = policy_gradient.token_factors(inputs, replace(settings, alpha=0.0))
        term = divergence.teacher_term(inputs, touched, settings)  # signals other than sampled
        loss = loss - (teacher * inputs.policy_logprobs).sum() + term.loss
        factors = factors + teacher + term.factors
        advantages, more = advantages + term.divergence, term.metrics
    mismatch, maxima = metrics.mismatch(inputs.policy_logprobs, inputs)
    clips = metrics.share_and_domains("clip", "ratio_dropped", outcome.touched, inputs)
    if surrogate.clipped is not None:
        clips |= metrics.share_and_domains("clip", "ppo", surrogate.clipped, inputs)
    return LossOutput(
        loss=loss,
        metrics={
            **clips,
            **mismatch,
            **metrics.teacher(inputs, settings),
            **more,
            **metrics.entropy(inputs),
            **metrics.balance(inputs, advantages, factors),
        },
        maxima=maxima,
    )
