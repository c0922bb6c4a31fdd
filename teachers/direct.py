"""Scores of fixed texts by the plainest way there is, and what the scores of a pool are if they are something else.

One text at a time through the model's own forward, float32 log-softmax over its logits, gather: written apart from
every scoring back end, so that an error in theirs is seen. A difference is compared with the mistakes that are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TEMPERATURES = np.geomspace(0.2, 5.0, 41)
MIN_TOKENS = 3
ROUNDING = 2**-7  # a step of bfloat16, relative
NAMED_SHARE = 0.2  # an alternative is named when it explains all but this share of the difference


@dataclass(kw_only=True, slots=True)
class Examination:
    """Scores of a pool against the direct forward, over all tokens but the first of each text; nat."""

    mean_abs: float
    max_abs: float
    num_tokens: int
    explanation: str | None  # what the scores are instead, where one of the alternatives fits


@torch.no_grad()
def examine(model: Any, texts: list[np.ndarray], scores: list[np.ndarray]) -> Examination:
    """Compare ``scores`` [T] of ``texts`` [T] with the direct forward of ``model``, a causal model of Transformers."""
    pairs = []
    for ids, given in zip(texts, scores, strict=True):
        if len(ids) < MIN_TOKENS:
            continue
        tokens = torch.from_numpy(np.asarray(ids, np.int64)).to(model.device)
        logits = _logits(model, tokens).cpu()
        pairs.append((logits, tokens.cpu(), np.asarray(given, np.float64)))
    assert pairs, f"no text of {MIN_TOKENS} tokens to compare on"
    right = _differences(pairs, _direct)
    mean = float(right.mean())
    return Examination(
        mean_abs=mean, max_abs=float(right.max()), num_tokens=right.size, explanation=_explain(pairs, mean)
    )


def _logits(model: Any, tokens_T: torch.Tensor) -> torch.Tensor:
    """[T, V] float32 of the model's own forward, with the last product of a plain head not rounded to the model's type."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        logits: torch.Tensor = model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
    if type(head) is not torch.nn.Linear or logits.dtype is seen[0].dtype:
        return logits
    bias = None if head.bias is None else head.bias.float()
    exact = torch.nn.functional.linear(seen[0][0].float(), head.weight.float(), bias)
    same = torch.allclose(exact.to(seen[0].dtype).float(), logits, rtol=ROUNDING, atol=ROUNDING)
    return exact if same else logits


def _explain(pairs: list[Any], mean: float) -> str | None:
    alternatives = {
        "the score of the token before (shifted by one)": float(_differences(pairs, _late).mean()),
        "the score of the token after (shifted by one)": float(_differences(pairs, _early).mean()),
        "read from the token's own position (shifted by one)": float(_differences(pairs, _own).mean()),
    }
    by_temperature = {t: float(_differences(pairs, _direct, t).mean()) for t in TEMPERATURES}
    best = min(by_temperature, key=lambda t: by_temperature[t])
    for step in (0.02, 0.004):  # narrower around the best
        near = [best * (1 + step * i) for i in range(-5, 6)]
        by_temperature |= {t: float(_differences(pairs, _direct, t).mean()) for t in near}
        best = min(by_temperature, key=lambda t: by_temperature[t])
    alternatives[f"taken at temperature {best:.2f} instead of 1"] = by_temperature[best]
    name = min(alternatives, key=lambda n: alternatives[n])
    return name if alternatives[name] <= NAMED_SHARE * mean else None


def _differences(pairs: list[Any], read: Any, temperature: float = 1.0) -> np.ndarray:
    """|score - what ``read`` gives| over all tokens that both define."""
    parts = []
    for logits, tokens, given in pairs:
        logprobs = (logits / temperature).log_softmax(-1)
        wanted, start = read(logprobs, tokens)
        parts.append(np.abs(given[start : start + len(wanted)] - wanted.double().numpy()))
    return np.concatenate(parts)


def _direct(logprobs_TV: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, int]:
    """log p(token t | before t), from position 1 on."""
    return logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0], 1


def _late(logprobs_TV: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, int]:
    return _direct(logprobs_TV, tokens_T)[0][:-1], 2


def _early(logprobs_TV: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, int]:
    return _direct(logprobs_TV, tokens_T)[0][1:], 1


def _own(logprobs_TV: torch.Tensor, tokens_T: torch.Tensor) -> tuple[torch.Tensor, int]:
    return logprobs_TV.gather(1, tokens_T[:, None])[1:, 0], 1
