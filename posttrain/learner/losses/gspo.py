"""Group sequence policy optimization, arXiv 2507.18071: the ratio is that of the whole answer, and so is the clip.

s_i = exp(mean over the loss tokens of sequence i of log pi / pi_old), and L = - sum_t weight_t * c_t * min(s_it * A_t,
clip(s_it, 1 - clip_low, 1 + clip_high) * A_t) with s_it = sg[s_i] * pi / sg[pi] (the report's GSPO-token). With one
advantage per sequence this has the value and the gradient of the sequence form under aggregation seq_mean, and the
train/inference correction c_t can still drop single tokens; dropped tokens stay in s_i. Clips of section 5.1: 3e-4 and
4e-4. A sequence is never split over micro-batches (`learner.batching.plan`), so its ratio is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.learner.losses.base import LossInputs, LossOutput, required
from posttrain.learner.losses.outcome import begin, clipped_surrogate, finish
from posttrain.records import LossSettings


def loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """``clip/ppo`` is the share of tokens in sequences whose gradient the clip stopped."""
    outcome = begin(inputs, settings, "gspo")
    sequence_ids = required(inputs.sequence_ids, "sequence_ids", "gspo")
    own = outcome.log_ratio
    whole = sequence_means(own.detach(), sequence_ids, inputs.weights != 0)
    ratio = (whole + (own - own.detach())).exp()
    return finish(inputs, settings, outcome, clipped_surrogate(ratio, outcome, settings))


def sequence_means(values: Tensor, sequence_ids: Tensor, active: Tensor) -> Tensor:
    """[N]: at every token the mean of ``values`` [N] over the active tokens of its sequence, summed in float64."""
    _, index = torch.unique(sequence_ids, return_inverse=True)
    sums = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, index, values.double() * active)
    counts.index_add_(0, index, active.double())
    return (sums / counts.clamp(min=1.0))[index].to(values.dtype)
