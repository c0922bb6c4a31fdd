"""Clipped surrogate with clip-higher (DAPO, arXiv 2503.14476), times the train/inference correction.

L = - sum_t weight_t * c_t * min(r_t * A_t, clip(r_t, 1 - clip_low, 1 + clip_high) * A_t), r_t = pi / pi_old and
c_t = sg of the correction on pi_old / mu. pi_old is the learner's policy before the first update on the batch, so the
PPO clip measures movement of the policy and the correction measures the difference of the engines. Clips of DAPO:
0.2 and 0.28. The teacher's term stands beside it, see `outcome`.
"""

from __future__ import annotations

from posttrain.learner.losses.base import LossInputs, LossOutput
from posttrain.learner.losses.outcome import begin, clipped_surrogate, finish
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """``clip/ppo`` is the share of tokens whose gradient the clip stopped."""
    outcome = begin(inputs, settings, "ppo_clip")
    return finish(inputs, settings, outcome, clipped_surrogate(outcome.log_ratio.exp(), outcome, settings))
