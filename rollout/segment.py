"""What crosses between episodes and the engine: a run of tokens to continue, its continuation, and
the check of its routes. No vLLM here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(kw_only=True, slots=True)
class Segment:
    """Work for the engine: continue ``token_ids``. ``score`` asks for the logprobs of the prompt instead."""

    request_id: str
    token_ids: list[int]
    max_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    routes_start: int = 0  # first prompt token whose routes are wanted
    score: bool = False


@dataclass(kw_only=True, slots=True)
class SegmentResult:
    """A finished segment of n sampled tokens after P prompt tokens."""

    request_id: str
    token_ids: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32; score: [P], entry 0 is 0.0
    policy_versions: np.ndarray  # [n] int32
    routed_experts: np.ndarray | None  # [P + n - 1 - routes_start, L_moe, K]; score: [P - 1, L_moe, K]
    finish_reason: str  # "stop" | "length"
    error: str | None = None


def recording_problem(hf_config: Any) -> str | None:
    """Why vLLM's routes for a model of this configuration are not the experts that it chose, or None."""
    if getattr(hf_config, "zero_expert_num", None):
        return "vLLM records its identity experts (zero_expert_num) as expert 0"
    return None


def routes_problem(routes: np.ndarray | None, num_rows: int, num_experts: int) -> str | None:
    """Why ``routes`` ([rows, L_moe, K]) cannot be used, or None."""
    if routes is None:
        return "the engine returned no routes"
    if len(routes) != num_rows:
        return f"the engine returned routes of {len(routes)} tokens, {num_rows} were consumed"
    if routes.size and int(routes.max()) >= num_experts:
        return f"a route names expert {int(routes.max())} of {num_experts}"
    ordered = np.sort(routes, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "a route names one expert twice: it was not recorded"
    return None
