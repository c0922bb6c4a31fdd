"""What the teachers' signals need of the policy beside the logprob of the sampled token, a few tokens at a time.

`gathered_logprobs` serves signals over a teacher's likeliest tokens, `target_and_divergence` the one over the whole
vocabulary. As in `posttrain.learner.logprobs` logits of more than ``chunk_tokens`` tokens never exist at once, those
of policy and teacher counted together; the forward pass keeps a few numbers a token and the backward pass makes the
logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.learner.logprobs import HeadGradients, maths_dtype
from posttrain.logits import float32_logits

TeacherStates = list[tuple[Tensor, Tensor, Tensor]]
"""Of each LM head: indices [n] int64 of its tokens, the teacher's hidden states [n, H'] that predict them, and the
head [V, H'], frozen. H' need not be the policy's. Together the indices name every token once."""


class _GatheredLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, chunk_tokens: int
    ) -> Tensor:
        logprobs = torch.empty(ids.shape, dtype=maths_dtype(hidden), device=hidden.device)
        normalisers = torch.empty_like(logprobs[:, :1])
        logits_of = float32_logits(weight, bias, hidden)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = logits_of(hidden[part])
            normalisers[part] = torch.logsumexp(logits, dim=-1, keepdim=True)
            logprobs[part] = logits.gather(1, ids[part]) - normalisers[part]
        ctx.save_for_backward(hidden, weight, bias, ids, normalisers)
        ctx.chunk_tokens = chunk_tokens
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logprobs,) = grad_outputs
        hidden, weight, bias, ids, normalisers = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad[:3], hidden, weight, bias)
        logits_of = float32_logits(weight, bias, hidden)
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = logits_of(hidden[part])
            # d log p_j / d logits = onehot_j - softmax, summed over the columns j.
            softmax = logits.sub_(normalisers[part]).exp_()
            grad = softmax.mul_(-grad_logprobs[part].sum(1, keepdim=True))
            gradients.add(part, grad.scatter_add_(1, ids[part], grad_logprobs[part]))
        return (*gradients.result(), None, None)


def gathered_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, chunk_tokens: int
) -> Tensor:
    """log p(id) at temperature 1 over the full vocabulary, [N, m] float32, differentiable.

    ``hidden`` [N, H] predicts through ``weight`` [V, H] and ``bias`` [V] or None; ``ids`` [N, m] int64. N may be 0.
    """
    return _GatheredLogprobs.apply(hidden, weight, bias, ids, chunk_tokens)


class _TargetAndDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        teacher: TeacherStates,
        chunk_tokens: int,
    ) -> Tensor:
        output = torch.empty(hidden.shape[0], 2, dtype=maths_dtype(hidden), device=hidden.device)
        normalisers = torch.empty_like(output)
        logits_of = float32_logits(weight, bias, hidden)
        for rows, theirs in _cut(teacher, chunk_tokens):
            logits, other = logits_of(hidden[rows]), theirs.to(output.dtype)
            own = torch.stack([logits.logsumexp(-1), other.logsumexp(-1)], 1)
            normalisers[rows] = own
            logprobs = logits.gather(1, target_ids[rows, None])[:, 0] - own[:, 0]
            softmax, log_ratio = _compare(logits, other, own)
            output[rows] = torch.stack([logprobs, log_ratio.mul_(softmax).sum(-1)], 1)
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalisers, output)
        ctx.teacher, ctx.chunk_tokens = teacher, chunk_tokens
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        hidden, weight, bias, target_ids, normalisers, output = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad[:3], hidden, weight, bias)
        logits_of = float32_logits(weight, bias, hidden)
        for rows, theirs in _cut(ctx.teacher, ctx.chunk_tokens):
            logits, other = logits_of(hidden[rows]), theirs.to(output.dtype)
            softmax, log_ratio = _compare(logits, other, normalisers[rows])
            grad_logprobs, grad_divergence = grad_output[rows].split(1, 1)
            # d KL / d logits = softmax * (log ratio - KL), d log p / d logits = onehot - softmax.
            grad = log_ratio.sub_(output[rows, 1:]).mul_(grad_divergence).sub_(grad_logprobs).mul_(softmax)
            gradients.add(rows, grad.scatter_add_(1, target_ids[rows, None], grad_logprobs))
        return (*gradients.result(), None, None, None)


def _cut(teacher: TeacherStates, chunk_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and the teacher's logits of them, half a chunk at a time: they exist beside the policy's."""
    size = max(1, chunk_tokens // 2)
    for rows, states, head in teacher:
        logits_of = float32_logits(head, None, states)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            yield rows[part], logits_of(states[part])


def _compare(logits: Tensor, other: Tensor, normalisers: Tensor) -> tuple[Tensor, Tensor]:
    """(p_S, log p_S - log p_T) [n, V] from the logits of both, whose memory they take; ``normalisers`` are [n, 2]."""
    logprobs = logits.sub_(normalisers[:, :1])
    log_ratio = other.sub_(normalisers[:, 1:]).neg_().add_(logprobs)
    return logprobs.exp_(), log_ratio


def target_and_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    teacher: TeacherStates,
    chunk_tokens: int,
) -> Tensor:
    """[N, 2] float32, differentiable: log p(target), and the reverse KL sum_v p_S log(p_S / p_T) over the vocabulary.

    ``hidden`` [N, H] predicts ``target_ids`` [N] int64 through ``weight`` [V, H] and ``bias`` [V] or None; both
    softmaxes are at temperature 1 over the same V ids. N may be 0.
    """
    return _TargetAndDivergence.apply(hidden, weight, bias, target_ids, teacher, chunk_tokens)
