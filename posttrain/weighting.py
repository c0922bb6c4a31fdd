"""How the tokens of a global batch add up to the loss: one weight per sequence, the same for all its loss tokens.

Every denominator is taken over the global batch before it is cut for ranks and micro-batches (design invariant 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.config import Aggregation, UserError, require


@dataclass(kw_only=True, slots=True)
class Weighting:
    """``weights`` [S] float64: weight of each loss token of sequence s. Shares are over loss tokens and over sequences."""

    weights: np.ndarray
    token_shares: dict[str, float]
    sequence_shares: dict[str, float]


def token_weights(
    num_loss_tokens: Sequence[int],
    domains: Sequence[str],
    aggregation: Aggregation,
    target_shares: Mapping[str, float] | None = None,
) -> Weighting:
    """Weights of S sequences with ``num_loss_tokens`` [S] and ``domains`` [S].

    seq_mean (MiMo eq. 7): 1 / (N |y|). token_mean: 1 / total. token_mean_balanced (arXiv 2608.19098): token_mean times
    target share / token share of the domain, so the token-weighted mean of that factor is 1. Without ``target_shares``
    a domain's target is its share of the sequences; targets of domains without a token here are spread over the others.
    A sequence without loss tokens has weight 0 and is not counted in N. `UserError` for unusable target shares.
    """
    counts = np.asarray(num_loss_tokens, dtype=np.float64)
    names = list(domains)
    assert counts.shape == (len(names),) and (counts >= 0).all(), "one count of 0 or more per domain label"
    present = counts > 0
    total = counts.sum()
    token_shares = _shares(names, counts)
    sequence_shares = _shares(names, present.astype(np.float64))
    weights = np.zeros_like(counts)
    if total == 0:
        return Weighting(weights=weights, token_shares=token_shares, sequence_shares=sequence_shares)
    if aggregation is Aggregation.seq_mean:
        weights[present] = 1.0 / (present.sum() * counts[present])
    elif aggregation is Aggregation.token_mean:
        weights[present] = 1.0 / total
    else:
        factors = _domain_factors(token_shares, sequence_shares, dict(target_shares or {}))
        weights[present] = [factors[name] / total for name, here in zip(names, present, strict=True) if here]
    return Weighting(weights=weights, token_shares=token_shares, sequence_shares=sequence_shares)


def _shares(names: list[str], amounts: np.ndarray) -> dict[str, float]:
    total = float(amounts.sum())
    sums = dict.fromkeys(sorted(set(names)), 0.0)
    for name, amount in zip(names, amounts, strict=True):
        sums[name] += float(amount)
    return {name: amount / total if total else 0.0 for name, amount in sums.items()}


def _domain_factors(
    token_shares: dict[str, float], sequence_shares: dict[str, float], target_shares: dict[str, float]
) -> dict[str, float]:
    """Target share / token share of every domain that has tokens; sum of token share * factor is 1."""
    targets = target_shares or sequence_shares
    present = [name for name, share in token_shares.items() if share > 0]
    key = "algorithm.target_shares"
    for name, share in targets.items():
        require(bool(np.isfinite(share)) and share >= 0, f"{key}.{name}", share, "give a share of 0 or more")
    for name in present:
        if name not in targets:
            raise UserError(
                f"{key}={target_shares!r}: domain {name!r} has prompts but no share; add {key}.{name}"
            )
    scale = sum(targets[name] for name in present)
    require(scale > 0, key, target_shares, "the domains of this batch have no share above 0")
    return {name: targets[name] / scale / token_shares[name] for name in present}
