"""Training state on disk: DeepSpeed's own files, the generators of every rank, and what model they belong to.

The caller gives an empty folder and renames it when it is whole. Refuses the state of another model or layout.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.config import LearnerConfig, UserError
from posttrain.learner.metrics import agree
from posttrain.learner.optimizer import set_adamw

TAG = "state"
IDENTITY = "learner.json"


def identity(module: nn.Module, learner: LearnerConfig) -> dict[str, Any]:
    """What must agree between a checkpoint and the learner that loads it."""
    shapes = [(name, list(getattr(p, "ds_shape", p.shape))) for name, p in module.named_parameters()]
    shapes += [(name, list(buffer.shape)) for name, buffer in module.named_buffers()]
    return {
        "model": hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest(),
        "num_ranks": learner.num_ranks,
        "zero_stage": learner.zero_stage,
        "dtype": learner.dtype.value,
    }


def save(folder: Path, engine: Any, learner: LearnerConfig, state: dict[str, Any]) -> None:
    """Writes everything an exact resume needs into ``folder``, the worker's own ``state`` too. A collective."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    engine.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)
    torch.save(_generators(), folder / f"generators_{rank}.pt")
    if rank == 0:
        (folder / IDENTITY).write_text(json.dumps(identity(engine.module, learner), indent=2) + "\n")
    dist.barrier()


def check(folder: Path, module: nn.Module, learner: LearnerConfig) -> None:
    """`UserError` unless ``folder`` holds the state of this very model and layout. A collective."""
    agree(_difference(folder, identity(module, learner)))


def _difference(folder: Path, own: dict[str, Any]) -> UserError | None:
    file = folder / IDENTITY
    if not file.is_file():
        return UserError(f"checkpoint {folder}: no learner state in it; give a checkpoint folder of this run")
    saved = json.loads(file.read_text())
    if saved["model"] != own["model"]:
        return UserError(
            f"checkpoint {folder}: it belongs to a model of another shape; set model.path to that model, or fresh=true"
        )
    for key in ("num_ranks", "zero_stage", "dtype"):
        if saved[key] != own[key]:
            return UserError(
                f"learner.{key}={own[key]!r}: checkpoint {folder} was written with {saved[key]!r}; use that, or fresh=true"
            )
    return None


def load(folder: Path, engine: Any, learner: LearnerConfig) -> dict[str, Any]:
    """Restores weights, buffers, optimizer state and generators into a freshly built engine; AdamW's own settings are
    those of ``learner``. Returns the ``state`` that was saved. A collective."""
    loaded, state = engine.load_checkpoint(str(folder), tag=TAG)
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
