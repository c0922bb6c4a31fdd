"""REINFORCE (Williams 1992): L = - sum_t weight_t * c_t * A_t * log pi(y_t), c_t the correction on pi_old / mu.

No ratio of the policy's own movement and no PPO clip: `policy_gradient` follows pi / mu of every update, this one keeps
the correction of the first. With one update per batch both are the same.
"""

from __future__ import annotations

from posttrain.learner.losses.base import LossInputs, LossOutput
from posttrain.learner.losses.outcome import Surrogate, begin, finish
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """The gradient runs through log pi alone."""
    outcome = begin(inputs, settings, "reinforce")
    value = outcome.advantages * inputs.policy_logprobs
    return finish(inputs, settings, outcome, Surrogate(value=value, slope=outcome.advantages, clipped=None))
