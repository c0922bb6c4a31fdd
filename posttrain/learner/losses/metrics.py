"""Health numbers that the losses share: train/inference mismatch, distance to the teacher, sampled entropy.

Sums are float64 whatever the type of the streams. Tokens of weight 0 take no part: they are padding of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.learner.losses.base import LossInputs, Metric, mean, mean_by_domain
from posttrain.records import LossSettings

RATIO_THRESHOLDS = (1.1, 1.25, 2.0)


def entropy(inputs: LossInputs) -> dict[str, Metric]:
    """Sampled estimate -mean log pi of the loss tokens, in all and by domain."""
    active = inputs.weights != 0
    values = -inputs.policy_logprobs.detach()
    return {"entropy": mean(values, active), **mean_by_domain("entropy", values, active, inputs)}


def cross_entropy(inputs: LossInputs) -> dict[str, Metric]:
    """Mean -log pi of given tokens, by domain: the same sum as `entropy`, which only samples of the policy estimate."""
    return mean_by_domain("loss", -inputs.policy_logprobs.detach(), inputs.weights != 0, inputs)


def share_and_domains(group: str, name: str, mask: Tensor, inputs: LossInputs) -> dict[str, Metric]:
    """``group/name``, the share of tokens where ``mask`` [N] holds, and the same by domain as ``<domain>/group_name``."""
    active = inputs.weights != 0
    by_domain = mean_by_domain(f"{group}_{name}", mask, active, inputs)
    return {f"{group}/{name}": mean(mask, active), **by_domain}


def balance(inputs: LossInputs, advantages: Tensor, factors: Tensor) -> dict[str, Metric]:
    """Who gets how much of the step: mean |A|, and by domain its share of the weights and of the gradient.

    ``factors`` [N] are the derivatives of -L by log pi(y_t): a domain's share of the gradient is its share of the sum
    of their absolute values. A share is a (sum, count) pair whose count is the sum over all domains, so that it adds up
    over micro-batches and ranks like every mean.
    """
    active = inputs.weights != 0
    sizes = advantages.detach().abs()
    found = {
        "advantage/mean_abs": mean(sizes, active),
        **mean_by_domain("advantage_abs", sizes, active, inputs),
    }
    for name, amounts in (("weight", inputs.weights), ("gradient", factors)):
        amounts = amounts.detach().double().abs()
        sums = amounts.new_zeros(len(inputs.domains)).index_add_(0, inputs.domain_ids, amounts)
        for domain, own in zip(inputs.domains, sums, strict=True):
            if domain:
                found[f"share/{name}/{domain}"] = (own, sums.sum())
    return found


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x per token, float64: the non-negative KL estimator for log ratios x of samples."""
    x = log_ratio.detach().double()
    return torch.expm1(x) - x


def mismatch(policy_logprobs: Tensor, inputs: LossInputs) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """Metrics and maxima of r = pi/mu on loss tokens (R3, arXiv 2510.11370): k3 and F(tau) = P[max(r, 1/r) > tau]."""
    assert inputs.rollout_logprobs is not None
    active = inputs.weights != 0
    log_ratio = (policy_logprobs - inputs.rollout_logprobs).detach().double()
    metrics = {"mismatch/k3": mean(k3(log_ratio), active)}
    for threshold in RATIO_THRESHOLDS:
        far = log_ratio.abs() > torch.log(
            torch.tensor(threshold, dtype=torch.float64, device=log_ratio.device)
        )
        metrics[f"mismatch/f{threshold:g}"] = mean(far, active)
    gaps = log_ratio.abs()[active]
    largest = gaps.max() if gaps.numel() else gaps.new_zeros(())
    return metrics, {"mismatch/max_abs": largest}


def teacher(inputs: LossInputs, settings: LossSettings) -> dict[str, Metric]:
    """Distance to the teacher before its clip: k1 = mean(log pi - log pi_d), k3 with r = pi_d/pi, mean |log-ratio|.

    Signed gaps average out while real ones persist, hence all three; ``clip/teacher`` is the share of clipped tokens,
    for the signal ``sampled`` alone.
    """
    if inputs.teacher_logprobs is None:
        return {}
    active = inputs.weights != 0
    gap = (inputs.teacher_logprobs - inputs.policy_logprobs).detach()
    clipped = share_and_domains("clip", "teacher", gap.abs() > settings.teacher_clip, inputs)
    return {
        "teacher/k1": mean(-gap, active),
        "teacher/k3": mean(k3(gap), active),
        "teacher/mean_abs": mean(gap.abs(), active),
        **(clipped if settings.signal == "sampled" else {}),
        **mean_by_domain("teacher_k1", -gap, active, inputs),
        **mean_by_domain("teacher_k3", k3(gap), active, inputs),
        **mean_by_domain("teacher_abs", gap.abs(), active, inputs),
    }
