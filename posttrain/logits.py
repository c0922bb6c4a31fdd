"""The LM head's product in float32, for the learner and for teachers.

A product of bfloat16 weights that is rounded to bfloat16 has steps of 1/8 nat at a logit of 20. vLLM's
``head_dtype=float32`` (`rollout.head_dtype`) does not round; who is compared with an engine must not either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def float32_logits(weight: Tensor, bias: Tensor | None, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The LM head ``weight`` [V, H], ``bias`` [V], as a function of hidden states [n, H] of ``like``'s type and device,
    which gives their logits [n, V] in float32 (float64 for float64 states), under autocast too.

    On GPUs the operands stay in their type and only the sums are float32, as in vLLM; elsewhere a cast copy of the head
    lives as long as the function. Not differentiable: callers have a backward pass of their own, or none.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if like.is_cuda and like.dtype is weight.dtype is not dtype:
        return lambda hidden: _sums_in(dtype, hidden, weight, bias)
    cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def logits(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), cast_weight, cast_bias)

    return logits


def _sums_in(dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
    return logits if bias is None else logits.add_(bias)
