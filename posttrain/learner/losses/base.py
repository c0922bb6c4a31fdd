"""What goes into a loss and what comes out. Losses are pure functions over flat per-token tensors.

Only loss tokens are in the tensors: the learner has gathered them from its padded or packed rows. A loss knows no
algorithm, no teacher and no rank; every denominator is already inside ``weights`` (design invariant 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Metric = tuple[Tensor, Tensor]
"""(sum, count), float64 scalars: means reduce over micro-batches and ranks by adding both."""


@dataclass(kw_only=True, slots=True)
class LossInputs:
    """Streams over the N loss tokens of one micro-batch. All tensors [N], where nothing else is said; N may be 0.

    Made by the learner. ``policy_logprobs`` carries a gradient, and with it ``policy_topk_logprobs`` and
    ``teacher_kl``, one of which the signals other than ``sampled`` need. ``domain_ids`` index ``domains``, which must be
    the same list on every rank so that the metric names agree.
    """

    policy_logprobs: Tensor
    weights: Tensor
    domain_ids: Tensor  # int64
    domains: list[str] = field(default_factory=list)
    rollout_logprobs: Tensor | None = None  # log mu, None in SFT
    old_logprobs: Tensor | None = None  # log pi of the policy before the first update on this batch
    teacher_logprobs: Tensor | None = None
    policy_topk_logprobs: Tensor | None = None  # [N, k], of the teacher's likeliest tokens
    teacher_topk_logprobs: Tensor | None = None  # [N, k]; -inf: no token of the policy's vocabulary
    teacher_kl: Tensor | None = None  # reverse KL over the vocabulary
    orm_advantages: Tensor | None = None
    policy_versions: Tensor | None = None  # int64
    sequence_ids: Tensor | None = None  # int64, equal within one rollout


@dataclass(kw_only=True, slots=True)
class LossOutput:
    """``loss`` is the scalar to call backward on (times the number of ranks). Metrics carry no gradient."""

    loss: Tensor
    metrics: dict[str, Metric]
    maxima: dict[str, Tensor] = field(default_factory=dict)  # reduced by maximum, not by mean


def mean(values: Tensor, active: Tensor) -> Metric:
    """(sum, count) of ``values`` [N] over the tokens where ``active`` [N] holds. Accepts bool and float values."""
    selected = values.detach()[active].double()
    return selected.sum(), torch.tensor(selected.numel(), dtype=torch.float64, device=values.device)


def mean_by_domain(name: str, values: Tensor, active: Tensor, inputs: LossInputs) -> dict[str, Metric]:
    """``{"<domain>/<name>": (sum, count)}`` for every domain of the run, also those without a token here."""
    num_domains = len(inputs.domains)
    ids = inputs.domain_ids[active]
    selected = values.detach()[active].double()
    sums = torch.zeros(num_domains, dtype=torch.float64, device=values.device).index_add_(0, ids, selected)
    counts = torch.zeros_like(sums).index_add_(0, ids, torch.ones_like(selected))
    return {f"{domain}/{name}": (sums[i], counts[i]) for i, domain in enumerate(inputs.domains)}


def required(stream: Tensor | None, name: str, kind: str) -> Tensor:
    """The stream, or an error naming what the caller forgot."""
    assert stream is not None, f"the {kind} loss needs {name}"
    return stream
