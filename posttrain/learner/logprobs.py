"""Log-probabilities of given tokens from hidden states, a few tokens at a time.

Owns the vocabulary softmax. Never holds logits of more than ``chunk_tokens`` tokens: the forward pass keeps one
number a token, the backward pass makes the logits of each chunk again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, V] float32. The product is taken in the type of the model, as an engine does it."""
    return F.linear(hidden, weight, bias).float()


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, chunk_tokens: int
    ) -> Tensor:
        num_tokens = hidden.shape[0]
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _chunk_logits(hidden[part], weight, bias)
            normalisers[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(1, target_ids[part, None])[:, 0] - normalisers[part]
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalisers)
        ctx.chunk_tokens = chunk_tokens
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logprobs,) = grad_outputs
        hidden, weight, bias, target_ids, normalisers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Summed over chunks in float32 whatever the model's type.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = _chunk_logits(hidden[part], weight, bias)
            # d logp / d logits = onehot - softmax, written into the logits' own memory.
            grad = logits.sub_(normalisers[part, None]).exp_().neg_()
            grad.scatter_add_(1, target_ids[part, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logprobs[part, None])
            grad_model = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_model @ weight
            if grad_weight is not None:
                grad_weight += (grad_model.t() @ hidden[part]).float()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def target_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, chunk_tokens: int
) -> Tensor:
    """log p(target) at temperature 1 over the full vocabulary, [N] float32, differentiable.

    ``hidden`` [N, H] predicts ``target_ids`` [N] int64 through ``weight`` [V, H] and ``bias`` [V] or None. N may be 0.
    """
    return _TargetLogprobs.apply(hidden, weight, bias, target_ids, chunk_tokens)
