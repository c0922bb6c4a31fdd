"""Derives signals.json: every teacher signal and its gradient on a vocabulary of five tokens, without torch.

Probabilities are fractions; logarithms are taken of fractions in 50-digit decimals; a gradient is worked out entry by
entry from dD/dz_u = sum_v dD/dp_v * p_v * ([u = v] - p_u), with dD/dp_v written down by hand for each signal. In the
first case all probabilities are powers of two, so that every number can be checked on paper in units of ln 2:

    p_S = 1/2 1/4 1/8 1/16 1/16,  p_T = 1/4 1/8 1/2 1/16 1/16,  log2(p_S / p_T) = 1 1 -2 0 0
    full          1/2 + 1/4 - 2/8                                           = 1/2 ln 2            = 0.3466
    top_k, k = 2  the teacher's top are ids 2 and 0: (-2/8 + 1/2) ln 2 - (1/8 + 1/2) + (1/2 + 1/4)
                                                                            = 1/4 ln 2 + 1/8      = 0.2983
    renormalised  p_S = 1/5 4/5, p_T = 2/3 1/3: 1/5 ln(3/10) + 4/5 ln(12/5)                       = 0.4596

`python tests/unit/golden/derive_signals.py` writes the file again.
"""

from __future__ import annotations

import json
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path

getcontext().prec = 50
FILE = Path(__file__).with_name("signals.json")
CASES = [
    ("powers of two", "1/2 1/4 1/8 1/16 1/16", "1/4 1/8 1/2 1/16 1/16", 2),
    ("thirds", "1/3 1/6 1/6 1/4 1/12", "1/10 3/10 1/5 1/4 3/20", 3),
    ("far apart", "97/100 1/100 1/200 1/100 1/200", "1/1000 1/1000 99/100 1/250 1/250", 1),
    ("whole vocabulary", "3/10 1/10 1/5 1/4 3/20", "1/4 1/8 3/8 1/6 1/12", 5),
    ("equal", "1/2 1/5 1/10 3/20 1/20", "1/2 1/5 1/10 3/20 1/20", 3),
]


def ln(x: Fraction) -> Decimal:
    return Decimal(x.numerator).ln() - Decimal(x.denominator).ln()


def dec(x: Fraction) -> Decimal:
    return Decimal(x.numerator) / Decimal(x.denominator)


def through_softmax(p: list[Fraction], dp: list[Decimal]) -> list[Decimal]:
    """dD/dz from dD/dp, by the Jacobian of the softmax."""
    n = range(len(p))
    return [sum((dp[v] * dec(p[v] * ((u == v) - p[u])) for v in n), Decimal(0)) for u in n]


def full(p: list[Fraction], q: list[Fraction]) -> tuple[Decimal, list[Decimal]]:
    """sum p ln(p/q); d/dp = ln(p/q) + 1."""
    value = sum((dec(a) * ln(a / b) for a, b in zip(p, q, strict=True)), Decimal(0))
    return value, through_softmax(p, [ln(a / b) + 1 for a, b in zip(p, q, strict=True)])


def top_k(p: list[Fraction], q: list[Fraction], top: list[int]) -> tuple[Decimal, list[Decimal]]:
    """sum over the top of p ln(p/q) - p + q; d/dp = ln(p/q) there and 0 elsewhere."""
    value = sum((dec(p[v]) * ln(p[v] / q[v]) - dec(p[v]) + dec(q[v]) for v in top), Decimal(0))
    slope = [ln(p[v] / q[v]) if v in top else Decimal(0) for v in range(len(p))]
    return value, through_softmax(p, slope)


def top_k_renorm(p: list[Fraction], q: list[Fraction], top: list[int]) -> tuple[Decimal, list[Decimal]]:
    """sum over the top of a ln(a/b), a = p / P, b = q / Q with P, Q the masses of the top.

    da_w/dp_v = ([w = v] - a_w) / P, so d/dp_v = (ln(a_v/b_v) - sum_w a_w ln(a_w/b_w)) / P in the top, 0 elsewhere.
    """
    mass_p, mass_q = sum(p[v] for v in top), sum(q[v] for v in top)
    gap = {v: ln((p[v] / mass_p) / (q[v] / mass_q)) for v in top}
    value = sum((dec(p[v] / mass_p) * gap[v] for v in top), Decimal(0))
    slope = [(gap[v] - value) / dec(mass_p) if v in top else Decimal(0) for v in range(len(p))]
    return value, through_softmax(p, slope)


def derive() -> list[dict]:
    """One row per case: distributions, the teacher's top, and value and gradient of every signal as decimal strings."""
    rows = []
    for name, policy, teacher, k in CASES:
        p, q = ([Fraction(x) for x in text.split()] for text in (policy, teacher))
        assert sum(p) == sum(q) == 1
        top = sorted(range(len(q)), key=lambda v: (-q[v], v))[:k]
        results = {"full": full(p, q), "top_k": top_k(p, q, top), "top_k_renorm": top_k_renorm(p, q, top)}
        rows.append(
            {
                "name": name,
                "policy": policy,
                "teacher": teacher,
                "top": top,
                "mass": str(dec(sum(q[v] for v in top))),
                "log_ratio": [f"{ln(b / a):.20f}" for a, b in zip(p, q, strict=True)],
                "signals": {
                    signal: {"value": f"{value:.20f}", "gradient": [f"{g:.20f}" for g in gradient]}
                    for signal, (value, gradient) in results.items()
                },
            }
        )
    return rows


if __name__ == "__main__":
    FILE.write_text(json.dumps(derive(), indent=1) + "\n")
