"""The teacher's term of the signals that look at more than the sampled token: L = beta * sum_t weight_t * m_t * D_t.

D_t compares the next-token distributions p_S of policy and p_T of teacher at the position of token t:

* top_k (arXiv 2606.30406): sum over v in the teacher's top k of p_S log(p_S / p_T) - p_S + p_T. Every summand is at
  least 0, and 0 at p_S = p_T alone; without the last two the sum falls by moving mass away from the top k.
* top_k_renorm: reverse KL of both renormalised over the top k. Says nothing about the mass outside.
* full: reverse KL over the vocabulary, formed in `posttrain.learner.divergence`.

The gradient runs through the policy's logits. m_t is the mask of the icepop correction and no more: the expectation
over the token at t is taken exactly, under p_S itself, so the sampled token's pi/mu is not multiplied in (and tis, which
drops nothing, leaves the term alone). The prefix remains the rollout engine's, as in MiMo eq. 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.learner.losses.base import LossInputs, Metric, mean, mean_by_domain, required
from posttrain.records import LossSettings


@dataclass(kw_only=True, slots=True)
class TeacherTerm:
    """What a signal other than ``sampled`` adds to a loss; zeros and no metrics for ``sampled``, whose term is an advantage."""

    loss: Tensor  # scalar, with gradient
    divergence: Tensor  # beta * D_t [N], without gradient: in the place of |A_t| in the balance of domains
    factors: Tensor  # the same times weight and mask
    metrics: dict[str, Metric]


def teacher_term(inputs: LossInputs, touched: Tensor, settings: LossSettings) -> TeacherTerm:
    """``touched`` [N] are the tokens that the correction touched. Metrics: D_t before the mask as ``teacher/kl`` and by
    domain, and the share of the teacher's mass that its top k holds."""
    nothing = torch.zeros_like(inputs.policy_logprobs, requires_grad=False)
    if settings.beta == 0 or settings.signal == "sampled":
        zero = inputs.policy_logprobs.new_zeros(())
        return TeacherTerm(loss=zero, divergence=nothing, factors=nothing, metrics={})
    divergence = token_divergence(inputs, settings)
    kept = torch.where(touched, 0.0, inputs.weights) if settings.correction == "icepop" else inputs.weights
    active = inputs.weights != 0
    metrics = {
        "teacher/kl": mean(divergence, active),
        **mean_by_domain("teacher_kl", divergence, active, inputs),
    }
    if inputs.teacher_topk_logprobs is not None:
        metrics["teacher/topk_mass"] = mean(inputs.teacher_topk_logprobs.exp().sum(-1), active)
    size = settings.beta * divergence.detach()
    return TeacherTerm(
        loss=settings.beta * (kept * divergence).sum(), divergence=size, factors=kept * size, metrics=metrics
    )


def token_divergence(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """D_t [N] with its gradient."""
    signal = settings.signal
    if signal == "full":
        return required(inputs.teacher_kl, "teacher_kl (signal full)", settings.kind)
    if signal not in ("top_k", "top_k_renorm"):
        raise ValueError(f"algorithm.signal={signal!r}: choose sampled, top_k, top_k_renorm or full")
    policy = required(inputs.policy_topk_logprobs, f"policy_topk_logprobs (signal {signal})", settings.kind)
    teacher = required(
        inputs.teacher_topk_logprobs, f"teacher_topk_logprobs (signal {signal})", settings.kind
    )
    absent = teacher == -torch.inf
    if signal == "top_k_renorm":
        policy = policy.masked_fill(absent, -torch.inf).log_softmax(-1)
        teacher = teacher.log_softmax(-1)
    # The gradient of D is p_S * log(p_S / p_T) * d log p_S: what the logarithm itself moves is cancelled, by d(-p_S) or,
    # renormalised, by the sum of p_S staying 1. Written so, it is exactly 0 at the teacher.
    probs, log_ratio = policy.exp(), (policy - teacher).detach()
    terms = probs * log_ratio.masked_fill(absent, 0.0)
    if signal == "top_k":
        terms = terms - (probs - teacher.exp()).detach()
    return terms.masked_fill(absent, 0.0).sum(-1)
