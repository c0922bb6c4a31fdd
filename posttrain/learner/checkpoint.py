"""Training state on disk: DeepSpeed's own files, the generators of every rank, and what model they belong to.

The caller gives an empty folder and renames it when it is whole. Refuses the state of another model or layout. With
adapters (LoRA) the frozen weights are not written again: a digest says which they were.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.config import LearnerConfig, LoraConfig, UserError
from posttrain.learner.metrics import agree
from posttrain.learner.monitors.gradients import weight_fragment
from posttrain.learner.optimizer import set_adamw

TAG = "state"
IDENTITY = "learner.json"
LORA_KEYS = tuple(field.name for field in fields(LoraConfig))  # rank first


def frozen_digest(module: nn.Module) -> str:
    """sha256 (hex) over the frozen parameters as the ranks hold them, each rank reading its share once, without ZeRO-3's
    padding, which is whatever lay in that memory. A collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters(), key=lambda pair: pair[0]):
        if not parameter.requires_grad:
            _, own = weight_fragment(parameter, rank, num_ranks)
            digest.update(name.encode())
            digest.update(own.cpu().contiguous().view(torch.uint8).numpy())
    digests: list[str] = [""] * num_ranks
    dist.all_gather_object(digests, digest.hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def identity(module: nn.Module, learner: LearnerConfig, base: str | None) -> dict[str, Any]:
    """What must agree between a checkpoint and the learner that loads it. ``base`` is the `frozen_digest` of a learner with
    adapters."""
    shapes = [(name, list(getattr(p, "ds_shape", p.shape))) for name, p in module.named_parameters()]
    shapes += [(name, list(buffer.shape)) for name, buffer in module.named_buffers()]
    return {
        "model": hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest(),
        "num_ranks": learner.num_ranks,
        "zero_stage": learner.zero_stage,
        "dtype": learner.dtype.value,
        "lora": lora_settings(learner),
        "base": base,
    }


def lora_settings(learner: LearnerConfig) -> dict[str, Any] | None:
    """`learner.lora` in an order of its own; None: full fine-tuning."""
    if learner.lora.rank == 0:
        return None
    settings = asdict(learner.lora)
    return {key: sorted(value) if isinstance(value, list) else value for key, value in settings.items()}


def save(
    folder: Path, engine: Any, learner: LearnerConfig, state: dict[str, Any], base: str | None = None
) -> None:
    """Writes everything an exact resume needs into ``folder``, the worker's own ``state`` too; without the frozen weights
    where ``base`` says which they are. A collective."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    engine.save_checkpoint(
        str(folder),
        tag=TAG,
        client_state=state,
        save_latest=False,
        exclude_frozen_parameters=base is not None,
    )
    torch.save(_generators(), folder / f"generators_{rank}.pt")
    if rank == 0:
        own = identity(engine.module, learner, base)
        (folder / IDENTITY).write_text(json.dumps(own, indent=2) + "\n")
    dist.barrier()


def check(folder: Path, module: nn.Module, learner: LearnerConfig, base: str | None = None) -> None:
    """`UserError` unless ``folder`` holds the state of this very model and layout. A collective."""
    agree(_difference(folder, identity(module, learner, base)))


def _difference(folder: Path, own: dict[str, Any]) -> UserError | None:
    file = folder / IDENTITY
    if not file.is_file():
        return UserError(f"checkpoint {folder}: no learner state in it; give a checkpoint folder of this run")
    saved = json.loads(file.read_text())
    for key in LORA_KEYS:
        was, now = (_lora_key(identity["lora"], key) for identity in ({"lora": None} | saved, own))
        if was != now:
            return UserError(
                f"learner.lora.{key}={now!r}: checkpoint {folder} was written with {was!r}; use that, or fresh=true"
            )
    if saved["model"] != own["model"]:
        return UserError(
            f"checkpoint {folder}: it belongs to a model of another shape; set model.path to that model, or fresh=true"
        )
    for key in ("num_ranks", "zero_stage", "dtype"):
        if saved[key] != own[key]:
            return UserError(
                f"learner.{key}={own[key]!r}: checkpoint {folder} was written with {saved[key]!r}; use that, or fresh=true"
            )
    if saved.get("base") not in (None, own["base"]):
        return UserError(
            f"checkpoint {folder}: its adapters belong to other base weights; set model.path to the model that they were"
            " trained on, or fresh=true"
        )
    return None


def _lora_key(settings: dict[str, Any] | None, key: str) -> Any:
    return (settings or {"rank": 0}).get(key)


def load(folder: Path, engine: Any, learner: LearnerConfig) -> dict[str, Any]:
    """Restores weights, buffers, optimizer state and generators into a freshly built engine; AdamW's own settings are
    those of ``learner``. Returns the ``state`` that was saved. A collective."""
    loaded, state = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=learner.lora.rank == 0)
    assert loaded is not None, f"DeepSpeed found no checkpoint in {folder}"
    set_adamw(engine.basic_optimizer.param_groups, learner)
    _set_generators(torch.load(folder / f"generators_{dist.get_rank()}.pt", weights_only=True))
    return dict(state)


def _generators() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generators(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
