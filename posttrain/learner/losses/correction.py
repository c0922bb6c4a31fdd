"""Train/inference correction: what the ratio pi/mu does to a token. The first of three clips, never mixed with the
teacher's (`advantage.py`) or PPO's (`ppo_clip.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.records import LossSettings


def correction_weights(
    policy_logprobs: Tensor, rollout_logprobs: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Weights [N] without gradient, and the mask [N] of tokens that the correction touched.

    icepop (MiMo eq. 8): pi/mu inside [ratio_low, ratio_high], both ends included, else 0: dropped, not clamped.
    tis: min(pi/mu, ratio_truncate). off: 1.
    """
    log_ratio = (policy_logprobs - rollout_logprobs).detach()
    ratio = log_ratio.exp()
    if settings.correction == "icepop":
        outside = (ratio < settings.ratio_low) | (ratio > settings.ratio_high)
        return torch.where(outside, torch.zeros_like(ratio), ratio), outside
    if settings.correction == "tis":
        return ratio.clamp(max=settings.ratio_truncate), ratio > settings.ratio_truncate
    if settings.correction == "off":
        return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
    raise ValueError(f"algorithm.correction={settings.correction!r}: choose icepop, tis or off")
