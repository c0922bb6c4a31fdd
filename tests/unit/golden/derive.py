"""Golden numbers of the outcome losses in plain Python, from the formulas as papers print them: no torch, no numpy and
nothing of this system. `python -m tests.unit.golden.derive` writes outcome_losses.json; README.md has the same case by hand.

Every loss is written twice: `objective` follows the papers, `published_loss` the form in which open trainers publish it
(a maximum of two negative terms, masked sums over a padded matrix, one denominator).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

FILE = Path(__file__).with_name("outcome_losses.json")
LOSSES = ("policy_gradient", "ppo_clip", "gspo", "cispo", "reinforce")
CORRECTIONS = ("icepop", "tis", "off")
AGGREGATIONS = ("seq_mean", "token_mean", "token_mean_balanced", "constant")
CLIPS = {"ppo_clip": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
TARGET = {"math": 0.25, "code": 0.75}
LENGTH_NORM = 8

# (domain, outcome advantage, [(pi / pi_old, pi_old / mu, log pi) of every token]) of four answers
SEQUENCES = [
    ("math", 1.0, [(1.5, 1.0, -1.0), (0.5, 2.0, -2.0)]),
    ("math", -0.5, [(1.25, 8.0, -1.0), (0.9, 0.25, -0.5)]),
    ("code", 2.0, [(6.0, 1.0, -0.25), (1.0, 1.0, -3.0)]),
    ("code", -1.0, [(0.6, 1.0, -1.0), (0.6, 1.0, -1.0), (1.0, 1.0, -1.0), (1.0, 1.0, -1.0)]),
]


def corrected(name: str, ratio: float) -> float:
    """What the train/inference correction makes of a ratio: IcePop band [0.5, 5], truncation at 2, or nothing."""
    if name == "icepop":
        return ratio if 0.5 <= ratio <= 5 else 0.0
    return min(ratio, 2.0) if name == "tis" else 1.0


def geometric_mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def token_weight(aggregation: str, domain: str, length: int) -> float:
    if aggregation == "seq_mean":  # mean over answers of the mean over tokens
        return 1 / len(SEQUENCES) / length
    if aggregation == "token_mean":
        return 1 / sum(len(tokens) for _, _, tokens in SEQUENCES)
    if aggregation == "constant":  # mean over answers of the sum over tokens, by a constant
        return 1 / len(SEQUENCES) / LENGTH_NORM
    return TARGET[domain] / sum(len(tokens) for name, _, tokens in SEQUENCES if name == domain)


def objective(loss: str, sequence: int, token: int, correction: str) -> tuple[float, float]:
    """Objective of one token, to be maximised, and its derivative by log pi; factors under stop-gradient are constants."""
    _, advantage, tokens = SEQUENCES[sequence]
    moved, engines, log_pi = tokens[token]
    factor = corrected(correction, moved * engines if loss == "policy_gradient" else engines)
    if loss in ("policy_gradient", "reinforce"):
        return factor * advantage * log_pi, factor * advantage
    low, high = CLIPS[loss]
    if loss == "cispo":
        weight = min(max(moved, 1 - low), 1 + high)
        return factor * weight * advantage * log_pi, factor * weight * advantage
    ratio = geometric_mean([r for r, _, _ in tokens]) if loss == "gspo" else moved
    inside = min(max(ratio, 1 - low), 1 + high)
    if inside * advantage < ratio * advantage:
        return factor * inside * advantage, 0.0
    return factor * ratio * advantage, factor * ratio * advantage


def case(loss: str, correction: str, aggregation: str) -> dict[str, object]:
    """Loss, and its derivative by the log pi of the ten tokens in order."""
    total, gradient = 0.0, []
    for index, (domain, _, tokens) in enumerate(SEQUENCES):
        for token in range(len(tokens)):
            weight = token_weight(aggregation, domain, len(tokens))
            value, slope = objective(loss, index, token, correction)
            total -= weight * value
            gradient.append(-weight * slope)
    return {"loss": total, "gradient": gradient}


def published_loss(loss: str, correction: str, aggregation: str) -> float:
    """The same number in the form of open trainers: per-token losses in a padded matrix, then a masked mean."""
    width = max(len(tokens) for _, _, tokens in SEQUENCES)
    matrix, mask = [], []
    for _, advantage, tokens in SEQUENCES:
        log_ratio = [math.log(r) for r, _, _ in tokens]
        if loss == "gspo":
            log_ratio = [sum(log_ratio) / len(log_ratio)] * len(log_ratio)
        row = []
        for (moved, engines, log_pi), x in zip(tokens, log_ratio, strict=True):
            low, high = CLIPS.get(loss, (0.0, 0.0))
            coefficient = math.exp(x)
            bounded = sorted((1 - low, coefficient, 1 + high))[1]
            if loss in ("ppo_clip", "gspo"):
                entry = max(-advantage * coefficient, -advantage * bounded)
            elif loss == "cispo":
                entry = -bounded * advantage * log_pi
            else:
                entry = -advantage * log_pi
            gap = math.log(engines) + (math.log(moved) if loss == "policy_gradient" else 0.0)
            row.append(entry * corrected(correction, math.exp(gap)))
        mask.append([1.0] * len(row) + [0.0] * (width - len(row)))
        matrix.append(row + [0.0] * (width - len(row)))
    lengths = [sum(row) for row in mask]
    sums = [sum(row) for row in matrix]
    if aggregation == "seq_mean":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    if aggregation == "token_mean":
        return sum(sums) / sum(lengths)
    if aggregation == "constant":
        return sum(s / LENGTH_NORM for s in sums) / len(sums)
    means = {}
    for domain in TARGET:
        own = [i for i, (name, _, _) in enumerate(SEQUENCES) if name == domain]
        means[domain] = sum(sums[i] for i in own) / sum(lengths[i] for i in own)
    return sum(TARGET[domain] * mean for domain, mean in means.items())


def all_cases() -> dict[str, dict[str, object]]:
    return {
        f"{loss}/{correction}/{aggregation}": case(loss, correction, aggregation)
        for loss in LOSSES
        for correction in CORRECTIONS
        for aggregation in AGGREGATIONS
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_cases(), indent=1) + "\n")
