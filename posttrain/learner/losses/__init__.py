"""Losses as pure functions, one file each. `compute` picks one by `LossSettings.kind`."""

from __future__ import annotations

from posttrain.learner.losses import policy_gradient, ppo_clip, sft
from posttrain.learner.losses.base import LossInputs, LossOutput
from posttrain.records import LossSettings

LOSSES = {"sft": sft.loss, "policy_gradient": policy_gradient.loss, "ppo_clip": ppo_clip.loss}


def compute(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """Loss and metrics of one micro-batch; ``settings.kind`` is "sft", "policy_gradient" or "ppo_clip"."""
    if settings.kind not in LOSSES:
        raise ValueError(f"loss kind={settings.kind!r}: choose {', '.join(LOSSES)}")
    return LOSSES[settings.kind](inputs, settings)


__all__ = ["LossInputs", "LossOutput", "compute"]
