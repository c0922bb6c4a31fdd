"""The type in which a vLLM engine computes logits, for rollouts and for teachers."""

from __future__ import annotations

from typing import Any

from posttrain.config import Dtype


def with_head_dtype(options: dict[str, Any], head_dtype: Dtype | None) -> dict[str, Any]:
    """Engine ``options`` in which the LM head's product is taken in ``head_dtype``, if they do not say otherwise."""
    overrides = options.get("hf_overrides")
    if head_dtype is None or callable(overrides):
        return options
    return options | {"hf_overrides": {"head_dtype": head_dtype.value} | (overrides or {})}
