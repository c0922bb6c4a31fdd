"""How much of the way from SFT to the teacher a model went, with its uncertainty. Pure numpy.

normalised = (x - sft) / (teacher - sft), where each letter is a mean over the same held-out prompts. The interval
is a paired bootstrap over prompts: one draw of prompts serves all three models, so what is hard for all of them
cancels. Refuses unpaired arrays; says None where the teacher is no better than SFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 4000
CONFIDENCE = 0.95
CHUNK_DRAWS = 500


@dataclass(kw_only=True, slots=True)
class Interval:
    """A value with its two ends. An end is infinite where the resampled teacher gain reaches zero."""

    value: float | None  # None: the teacher is not better than SFT, so there is no way to go
    low: float
    high: float


def normalised(
    sft: dict[str, np.ndarray],
    teacher: dict[str, np.ndarray],
    model: dict[str, np.ndarray],
    seed: int,
    num_draws: int = NUM_DRAWS,
) -> tuple[dict[str, Interval], Interval]:
    """Per domain and mean over domains, each with its 95 % interval.

    Arguments: domain -> rewards [num_prompts] or [num_prompts, num_samples] in [0, 1], with the same prompts in the
    same order for all three. Domains are resampled independently; the mean has the interval of the mean of draws.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, Interval] = {}
    draws: list[np.ndarray] = []
    for domain in sft:
        columns = [_per_prompt(table[domain]) for table in (sft, teacher, model)]
        assert len({len(column) for column in columns}) == 1, (
            f"{domain}: models were evaluated on different prompts"
        )
        prompts_P3 = np.stack(columns, axis=1)
        draws.append(_ratio(_means(prompts_P3, rng, num_draws)))
        value = float(_ratio(prompts_P3.mean(axis=0)[None])[0])
        values[domain] = _interval(value, draws[-1])
    points = [interval.value for interval in values.values()]
    mean = (
        float(np.mean([p for p in points if p is not None])) if all(p is not None for p in points) else np.nan
    )
    with np.errstate(invalid="ignore"):
        return values, _interval(mean, np.mean(draws, axis=0))


def difference(
    sft: dict[str, np.ndarray],
    teacher: dict[str, np.ndarray],
    model: dict[str, np.ndarray],
    other: dict[str, np.ndarray],
    seed: int,
    num_draws: int = NUM_DRAWS,
) -> Interval:
    """Mean over domains of normalised(model) - normalised(other), paired: one draw of prompts serves all four models."""
    rng = np.random.default_rng(seed)
    points: list[np.ndarray] = []
    draws: list[np.ndarray] = []
    for domain in sft:
        columns = [_per_prompt(table[domain]) for table in (sft, teacher, model, other)]
        prompts_P4 = np.stack(columns, axis=1)
        for means_D4, found in (
            (prompts_P4.mean(axis=0)[None], points),
            (_means(prompts_P4, rng, num_draws), draws),
        ):
            with np.errstate(invalid="ignore"):
                found.append(_ratio(means_D4[:, [0, 1, 2]]) - _ratio(means_D4[:, [0, 1, 3]]))
    return _interval(float(np.mean(points)), np.mean(draws, axis=0))


def standard_error(rewards: np.ndarray) -> float:
    """Standard error of the mean over prompts; samples of one prompt are averaged first."""
    per_prompt = _per_prompt(rewards)
    return float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt))) if len(per_prompt) > 1 else 0.0


def _per_prompt(rewards: np.ndarray) -> np.ndarray:
    return rewards.mean(axis=1) if rewards.ndim == 2 else np.asarray(rewards, dtype=np.float64)


def _means(prompts_PK: np.ndarray, rng: np.random.Generator, num_draws: int) -> np.ndarray:
    """[num_draws, K] means over resampled prompts."""
    num_prompts = len(prompts_PK)
    parts = []
    for start in range(0, num_draws, CHUNK_DRAWS):
        size = min(CHUNK_DRAWS, num_draws - start)
        chosen = rng.integers(num_prompts, size=(size, num_prompts), dtype=np.int32)
        parts.append(prompts_PK[chosen].mean(axis=1))
    return np.concatenate(parts)


def _ratio(means_D3: np.ndarray) -> np.ndarray:
    """(x - sft) / (teacher - sft); without a gain of the teacher, plus or minus infinity by whether x reaches it."""
    sft, teacher, model = means_D3.T
    gain = teacher - sft
    safe = np.where(gain > 1e-9, gain, 1.0)
    return np.where(gain > 1e-9, (model - sft) / safe, np.where(model >= teacher, np.inf, -np.inf))


def _interval(value: float, draws: np.ndarray) -> Interval:
    """Ends that are themselves draws, so that infinite ones are neither averaged nor hidden."""
    tail = (1 - CONFIDENCE) / 2
    low = np.quantile(np.nan_to_num(draws, nan=-np.inf, posinf=np.inf, neginf=-np.inf), tail, method="lower")
    high = np.quantile(
        np.nan_to_num(draws, nan=np.inf, posinf=np.inf, neginf=-np.inf), 1 - tail, method="higher"
    )
    return Interval(value=value if np.isfinite(value) else None, low=float(low), high=float(high))
