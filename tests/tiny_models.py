"""Tiny random checkpoints for the tests of every room, all with the same character-level tokenizer.

Tests import it as `from tests.tiny_models import tiny_mimo` (the repository root is on the path).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.tiny.model import build_model


def tiny_mimo(out_dir: str | Path, seed: int = 0, **shape: Any) -> Path:
    """MiMo-V2-Flash architecture: sinks, sliding window, sigmoid router with expert bias. Engine needs bfloat16."""
    return build_model(out_dir, seed, family="mimo_v2_flash", **shape)


def tiny_qwen3_moe(out_dir: str | Path, seed: int = 0, **shape: Any) -> Path:
    """Qwen3-MoE: softmax router, full attention everywhere. Runs in float32 in both engines."""
    return build_model(out_dir, seed, family="qwen3_moe", **shape)


def tiny_dense(out_dir: str | Path, seed: int = 0, **shape: Any) -> Path:
    """Qwen3, no experts."""
    return build_model(out_dir, seed, family="qwen3", **shape)
