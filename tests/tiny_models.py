"""Tiny random checkpoints for the tests of every room, all with the same character-level tokenizer.

Tests import it as `from tests.tiny_models import tiny_mimo` (the repository root is on the path).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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


def tiny_teacher(student: Path, out_dir: str | Path, seed: int = 0) -> Path:
    """``student`` with every tensor moved by about 1 % of its length, the distance that training leaves."""
    folder = Path(shutil.copytree(student, out_dir))
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor += 0.01 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
