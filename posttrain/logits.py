"""The LM head's product in float32, for the learner and for teachers.

A product of bfloat16 weights that is rounded to bfloat16 has steps of 1/8 nat at a logit of 20. vLLM's
``head_dtype=float32`` (`rollout.head_dtype`) does not round; who is compared with an engine must not either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def float32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden`` [n, H] @ ``weight`` [V, H].T + ``bias`` [V], as [n, V] float32 (float64 for float64 weights).

    On GPUs the operands stay in their type and only the sums are float32, as in vLLM; elsewhere operands are cast.
    Not differentiable: callers have a backward pass of their own, or none.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype is weight.dtype is not dtype:
        logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
        return logits if bias is None else logits.add_(bias)
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
