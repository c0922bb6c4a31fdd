"""Log-probabilities of given tokens by the fused kernel of Liger (`liger_kernel`, Triton), on NVIDIA GPUs.

Same meaning as `logprobs.target_logprobs`: float32, and a gradient with a weight of its own for every token. Liger
makes the logits again in its backward pass too, with softmax and gradient in one kernel. Refuses a head with a bias,
which Liger adds after rounding. Logits of a bfloat16 model are rounded to bfloat16 first, which `posttrain.logits` avoids.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from posttrain.config import UserError

IGNORED = -100  # no token has this id


def require(device: torch.device) -> None:
    """`UserError` unless ``device`` is a GPU and the package is installed."""
    missing = "a GPU" if device.type != "cuda" else "the package liger-kernel"
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        raise UserError(f"learner.fused_loss='liger': needs {missing}, which is not here; use 'off'")


def serves(hidden: Tensor, bias: Tensor | None, target_ids: Tensor) -> bool:
    """Whether the kernel can compute these; it wants one token or more and one target for each."""
    return bias is None and target_ids.dim() == 1 and len(target_ids) > 0 and hidden.dtype != torch.float64


def fused_logprobs(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """log p(target) at temperature 1 over the full vocabulary, [N] float32, differentiable.

    ``hidden`` [N, H] predicts ``target_ids`` [N] int64 through ``weight`` [V, H]. The gradient of ``weight`` is summed
    in float32.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    bias = class_weights = softcap = None
    z_loss = smoothing = 0.0
    losses, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden,
        weight,
        target_ids,
        bias,
        class_weights,
        IGNORED,
        z_loss,
        smoothing,
        "none",
        softcap,
        False,  # z-loss
        torch.float32,
    )
    return -losses
