"""What crosses between episodes and the engine: a run of tokens to continue, and its continuation. No vLLM here."""

from __future__ import annotations

from dataclasses import dataclass

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
