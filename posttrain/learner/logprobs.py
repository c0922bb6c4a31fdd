"""Log-probabilities of given tokens from hidden states, a few tokens at a time.

Owns the vocabulary softmax. Never holds logits of more than ``chunk_tokens`` tokens: the forward pass keeps one
number a token, the backward pass makes the logits of each chunk again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.logits import float32_logits


def maths_dtype(hidden: Tensor) -> torch.dtype:
    """Type of the vocabulary softmax."""
    return torch.promote_types(hidden.dtype, torch.float32)


class HeadGradients:
    """Gradients of hidden states, weight and bias of the LM head, from those of the logits, chunk by chunk.

    ``needed`` are autograd's flags for the three. Weight and bias are summed in float32 whatever the model's type.
    """

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.inputs = hidden, weight, bias
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=maths_dtype(weight)) if needed[1] else None
        self.bias = None
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=maths_dtype(bias))

    def add(self, rows: slice | Tensor, grad: Tensor) -> None:
        """``grad`` [n, V] is that of the logits of ``hidden[rows]``."""
        hidden, weight, _ = self.inputs
        grad_model = grad.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = grad_model @ weight
        if self.weight is not None:
            self.weight += (grad_model.t() @ hidden[rows]).to(self.weight.dtype)
        if self.bias is not None:
            self.bias += grad.sum(0)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three, in the types of what they belong to; None for those that are not needed."""
        _, weight, bias = self.inputs
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, chunk_tokens: int
    ) -> Tensor:
        num_tokens = hidden.shape[0]
        logprobs = torch.empty(num_tokens, dtype=maths_dtype(hidden), device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        logits_of = float32_logits(weight, bias, hidden)
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = logits_of(hidden[part])
            normalisers[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(1, target_ids[part, None])[:, 0] - normalisers[part]
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalisers)
        ctx.chunk_tokens = chunk_tokens
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logprobs,) = grad_outputs
        hidden, weight, bias, target_ids, normalisers = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad[:3], hidden, weight, bias)
        logits_of = float32_logits(weight, bias, hidden)
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = logits_of(hidden[part])
            # d logp / d logits = onehot - softmax, written into the logits' own memory.
            grad = logits.sub_(normalisers[part, None]).exp_().neg_()
            grad.scatter_add_(1, target_ids[part, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logprobs[part, None])
            gradients.add(part, grad)
        return (*gradients.result(), None, None)


def target_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, chunk_tokens: int
) -> Tensor:
    """log p(target) at temperature 1 over the full vocabulary, [N] float32, differentiable.

    ``hidden`` [N, H] predicts ``target_ids`` [N] int64 through ``weight`` [V, H] and ``bias`` [V] or None. N may be 0.
    """
    return _TargetLogprobs.apply(hidden, weight, bias, target_ids, chunk_tokens)
