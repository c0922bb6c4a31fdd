"""How the tokens of a global batch add up to the loss: one weight per sequence, the same for all its loss tokens.

Every denominator is taken over the global batch before it is cut for ranks and micro-batches (design invariant 5).
Owns the balance between domains: target shares, and gap-following, which moves them by the domains' mean |A|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from posttrain.config import Aggregation, UserError, require


@dataclass(kw_only=True, slots=True)
class Weighting:
    """``weights`` [S] float64: weight of each loss token of sequence s. Shares are over loss tokens and over sequences.
    ``target_shares``: share of the weighted tokens that a balanced domain gets; empty under other aggregations."""

    weights: np.ndarray
    token_shares: dict[str, float]
    sequence_shares: dict[str, float]
    target_shares: dict[str, float] = field(default_factory=dict)


MIN_GAP_FACTOR, MAX_GAP_FACTOR = 0.05, 20.0  # arXiv 2608.19098
GAP_DECAY = 0.9  # of the running mean, per step; the report gives none


class GapFollower:
    """Mean |A| per token of every domain over former steps, and what it makes of the domains' shares.

    The factor of domain d is m_d / m_ref between 0.05 and 20, m_ref the plain mean over the domains. Exponent 1: a wide
    gap gets more weight; the inverse exponent diverges (arXiv 2608.19098).
    """

    def __init__(self, means: Mapping[str, float] | None = None) -> None:
        """``means``: what `state` returned."""
        self._means = dict(means or {})

    def factors(self) -> dict[str, float]:
        """Factor of every domain that has been seen; empty while all gaps are 0 or nothing has been seen."""
        reference = float(np.mean(list(self._means.values()))) if self._means else 0.0
        if reference == 0:
            return {}
        clamped = {name: mean / reference for name, mean in self._means.items()}
        return {name: min(max(ratio, MIN_GAP_FACTOR), MAX_GAP_FACTOR) for name, ratio in clamped.items()}

    def observe(self, mean_abs: Mapping[str, float]) -> None:
        """Take in the mean |A| per token of the domains of a step. A domain's first value is its mean."""
        for name, value in mean_abs.items():
            self._means[name] = GAP_DECAY * self._means.get(name, value) + (1 - GAP_DECAY) * value

    def state(self) -> dict[str, float]:
        """JSON-able state for a checkpoint."""
        return dict(self._means)


def token_weights(
    num_loss_tokens: Sequence[int],
    domains: Sequence[str],
    aggregation: Aggregation,
    target_shares: Mapping[str, float] | None = None,
    gap_factors: Mapping[str, float] | None = None,
    length_norm: int | None = None,
) -> Weighting:
    """Weights of S sequences with ``num_loss_tokens`` [S] and ``domains`` [S].

    seq_mean (MiMo eq. 7): 1 / (N |y|). token_mean: 1 / total. token_mean_balanced (arXiv 2608.19098): token_mean times
    target share / token share of the domain, so the token-weighted mean of that factor is 1. Without ``target_shares``
    a domain's target is its share of the sequences; targets of domains without a token here are spread over the others;
    ``gap_factors`` (`GapFollower.factors`, 1 for a domain not in it) multiply them. constant (arXiv 2503.20783):
    1 / (N * ``length_norm``), so that no answer's length is divided out. A sequence without loss tokens has weight 0 and
    is not counted in N. `UserError` for unusable target shares.
    """
    counts = np.asarray(num_loss_tokens, dtype=np.float64)
    names = list(domains)
    assert counts.shape == (len(names),) and (counts >= 0).all(), "one count of 0 or more per domain label"
    present = counts > 0
    total = counts.sum()
    token_shares = _shares(names, counts)
    sequence_shares = _shares(names, present.astype(np.float64))
    weights = np.zeros_like(counts)
    targets: dict[str, float] = {}
    if total == 0:
        return Weighting(weights=weights, token_shares=token_shares, sequence_shares=sequence_shares)
    if aggregation is Aggregation.seq_mean:
        weights[present] = 1.0 / (present.sum() * counts[present])
    elif aggregation is Aggregation.token_mean:
        weights[present] = 1.0 / total
    elif aggregation is Aggregation.constant:
        assert length_norm is not None, "aggregation=constant needs length_norm"
        weights[present] = 1.0 / (present.sum() * length_norm)
    else:
        targets = _targets(token_shares, dict(target_shares or sequence_shares), gap_factors or {})
        factors = {name: target / token_shares[name] for name, target in targets.items()}
        weights[present] = [factors[name] / total for name, here in zip(names, present, strict=True) if here]
    return Weighting(
        weights=weights,
        token_shares=token_shares,
        sequence_shares=sequence_shares,
        target_shares=targets,
    )


def _shares(names: list[str], amounts: np.ndarray) -> dict[str, float]:
    total = float(amounts.sum())
    sums = dict.fromkeys(sorted(set(names)), 0.0)
    for name, amount in zip(names, amounts, strict=True):
        sums[name] += float(amount)
    return {name: amount / total if total else 0.0 for name, amount in sums.items()}


def _targets(
    token_shares: dict[str, float], targets: dict[str, float], gap_factors: Mapping[str, float]
) -> dict[str, float]:
    """Share of the weighted tokens of every domain that has tokens; they add up to 1."""
    present = [name for name, share in token_shares.items() if share > 0]
    key = "algorithm.target_shares"
    for name, share in targets.items():
        require(bool(np.isfinite(share)) and share >= 0, f"{key}.{name}", share, "give a share of 0 or more")
    for name in present:
        if name not in targets:
            raise UserError(f"{key}={targets!r}: domain {name!r} has prompts but no share; add {key}.{name}")
    wanted = {name: targets[name] * gap_factors.get(name, 1.0) for name in present}
    scale = sum(wanted.values())
    require(scale > 0, key, targets, "the domains of this batch have no share above 0")
    return {name: share / scale for name, share in wanted.items()}
