"""A_t = beta * clip(sg[log pi_d - log pi], +-teacher_clip) + alpha * A_ORM (MiMo eq. 9, clip of arXiv 2606.30406)."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.learner.losses.base import LossInputs, required
from posttrain.records import LossSettings


def token_advantages(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """Advantages [N] without gradient. The teacher term is formed against this very forward pass, so it is never
    stale; other signals than ``sampled`` have it in `divergence.py` instead. A stream whose factor is 0 is not needed."""
    advantages = torch.zeros_like(inputs.policy_logprobs, requires_grad=False)
    if settings.beta != 0 and settings.signal == "sampled":
        teacher_logprobs = required(
            inputs.teacher_logprobs, "teacher_logprobs (beta is not 0)", settings.kind
        )
        gap = (teacher_logprobs - inputs.policy_logprobs).detach()
        advantages = advantages + settings.beta * gap.clamp(-settings.teacher_clip, settings.teacher_clip)
    if settings.alpha != 0:
        orm_advantages = required(inputs.orm_advantages, "orm_advantages (alpha is not 0)", settings.kind)
        advantages = advantages + settings.alpha * orm_advantages
    return advantages.detach()
