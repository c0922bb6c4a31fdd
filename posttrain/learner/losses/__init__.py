"""Losses as pure functions, one file each. `compute` picks one by `LossSettings.kind`."""

from __future__ import annotations

from posttrain.learner.losses import cispo, gspo, policy_gradient, ppo_clip, reinforce, sft
from posttrain.learner.losses.base import LossInputs, LossOutput
from posttrain.records import LossSettings

LOSSES = {
    "sft": sft.loss,
    "policy_gradient": policy_gradient.loss,
    "ppo_clip": ppo_clip.loss,
    "gspo": gspo.loss,
    "cispo": cispo.loss,
    "reinforce": reinforce.loss,
}


def compute(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """Loss and metrics of one micro-batch; ``settings.kind`` is a key of `LOSSES`."""
    if settings.kind not in LOSSES:
        raise ValueError(f"loss kind={settings.kind!r}: choose {', '.join(LOSSES)}")
    return LOSSES[settings.kind](inputs, settings)


__all__ = ["LossInputs", "LossOutput", "compute"]
