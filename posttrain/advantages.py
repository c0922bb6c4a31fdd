"""Outcome advantages within one rollout group. Numpy only, pure.

A rollout without a reward (failed, masked) leaves the loss *and* the baseline: it is never a reward of 0.
"""

from __future__ import annotations

import numpy as np

from posttrain.config import Advantage


def group_advantages(rewards: np.ndarray, valid: np.ndarray, kind: Advantage) -> np.ndarray:
    """Advantages [G] float64 of the G samples of one prompt; 0 where ``valid`` [G] is False.

    grpo (arXiv 2402.03300): (r - mean) / std, population std. dr_grpo (arXiv 2503.20783): r - mean; its constant
    length normaliser is aggregation=constant. rloo (arXiv 2402.14740): r_i minus the mean of the others.
    Equal rewards, or fewer than two valid samples, give exactly 0. Raises ValueError for a reward that is not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    valid = np.asarray(valid, dtype=bool)
    assert rewards.ndim == 1 and rewards.shape == valid.shape, "rewards and valid are [G]"
    advantages = np.zeros_like(rewards)
    scored = rewards[valid]
    if not np.isfinite(scored).all():
        raise ValueError(f"rewards {scored.tolist()} are not all finite")
    if len(scored) < 2 or np.all(scored == scored[0]):
        return advantages
    centred = scored - scored.mean()
    if kind is Advantage.grpo:
        advantages[valid] = centred / scored.std()
    elif kind is Advantage.dr_grpo:
        advantages[valid] = centred
    elif kind is Advantage.rloo:
        advantages[valid] = centred * len(scored) / (len(scored) - 1)
    else:
        raise ValueError(f"algorithm.advantage={kind!r}: choose grpo, dr_grpo or rloo")
    return advantages


def overlong_penalties(
    num_tokens: np.ndarray, truncated: np.ndarray, max_tokens: int, buffer: int, penalty: float
) -> np.ndarray:
    """What the rewards of G answers lose for their length [G] float64 (DAPO eq. 13, arXiv 2503.14476).

    0 up to ``max_tokens - buffer`` sampled tokens, then linear to ``penalty`` at ``max_tokens``; an answer that was cut
    off, by whatever limit, loses all of it. DAPO has a buffer of 4,096 of 20,480 tokens and a penalty of 1.
    """
    over = (np.asarray(num_tokens, dtype=np.float64) - (max_tokens - buffer)) / buffer
    return penalty * np.where(truncated, 1.0, over.clip(0.0, 1.0))
