"""CISPO, MiniMax-M1 report, eq. 4 and 5 (arXiv 2506.13585): the importance weight is clipped, no token is dropped.

L = - sum_t weight_t * c_t * sg[clip(r_t, 1 - clip_low, 1 + clip_high)] * A_t * log pi(y_t), r_t = pi / pi_old and c_t
the correction on pi_old / mu. The report averages over tokens (aggregation token_mean), sets no bound below (clip_low 1)
and gives no value for the bound above; clip_high 4, a weight of at most 5, is a choice.
"""

from __future__ import annotations

from posttrain.learner.losses.base import LossInputs, LossOutput
from posttrain.learner.losses.outcome import Surrogate, begin, finish
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """``clip/ppo`` is the share of tokens whose weight was clipped; they keep their gradient."""
    outcome = begin(inputs, settings, "cispo")
    ratio = outcome.log_ratio.detach().exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    slope = clipped * outcome.advantages
    surrogate = Surrogate(value=slope * inputs.policy_logprobs, slope=slope, clipped=clipped != ratio)
    return finish(inputs, settings, outcome, surrogate)
