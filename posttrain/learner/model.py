"""Loads a Hugging Face checkpoint for training. Safetensors only; nothing is initialised at random in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.config import ModelConfig, UserError

logger = logging.getLogger(__name__)

CHECKPOINT_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]


def resolve(config: ModelConfig) -> Path:
    """Local directory of the checkpoint; a hub id is downloaded. `UserError` where there is none."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.path={config.path!r}: no config.json in it; give a Hugging Face checkpoint directory"
            )
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"model.path={config.path!r}: no *.safetensors in it; save the model in that format"
            )
        return path
    if path.is_absolute() or path.exists() or config.path.count("/") != 1:
        raise UserError(
            f"model.path={config.path!r}: no such directory; give a checkpoint directory or a hub id"
        )
    return _download(config)


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    try:  # the network is the other side
        folder = snapshot_download(config.path, revision=config.revision, allow_patterns=CHECKPOINT_PATTERNS)
    except Exception as error:
        raise UserError(
            f"model.path={config.path!r}: no such directory, and the hub does not give it ({_line(error)})"
        ) from error
    return Path(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is on disk, with keys that Transformers does not know."""
    return json.loads((folder / "config.json").read_text())


def load(config: ModelConfig, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The causal LM in ``folder`` on the CPU, parameters in ``dtype`` (buffers that a family keeps in float32 stay).

    `UserError` for a checkpoint that is broken, quantized, of another shape, or lacks tensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    where = f"model.path={config.path!r}"
    if "quantization_config" in read_config(folder):
        raise UserError(f"{where}: a quantized checkpoint cannot be trained; give the unquantized one")
    try:  # the checkpoint is the other side
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
            output_loading_info=True,
        )
        if config.experts_implementation is not None and model._can_set_experts_implementation():
            model.set_experts_implementation(config.experts_implementation)
    except Exception as error:
        raise UserError(f"{where}: cannot be loaded ({type(error).__name__}: {_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{where}: the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, first {missing[0]}"
        )
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])
        logger.warning("%s: %d tensors that the model does not use, first %s", where, len(names), names[0])
    return model


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
