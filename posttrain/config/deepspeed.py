"""Refuses what of the ``learner.deepspeed`` block the learner sets itself, or cannot work with."""

from __future__ import annotations

from typing import Any

from posttrain.config.choices import Dtype
from posttrain.config.errors import UserError, require
from posttrain.config.learner import LearnerConfig

OWNED_KEYS = ("gradient_clipping", "optimizer", "scheduler", "data_types", "steps_per_print")
FORMER_KEYS = {
    "cpu_offload": "offload_optimizer.device=cpu",
    "cpu_offload_param": "offload_param.device=cpu",
    "cpu_offload_params": "offload_param.device=cpu",
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory, offload_param.pin_memory",
}


def check_deepspeed(learner: LearnerConfig, key: str = "learner") -> None:
    """`UserError` naming what cannot work; ``key`` is where the section stands in the run's configuration."""
    for owned in OWNED_KEYS:
        require(
            owned not in learner.deepspeed,
            f"{key}.deepspeed.{owned}",
            learner.deepspeed.get(owned),
            "the learner sets this itself; remove the key",
        )
    prefix = f"{key}.deepspeed.zero_optimization"
    zero = _mapping(learner.deepspeed, "zero_optimization", prefix, "overlap_comm=false")
    require("stage" not in zero, f"{prefix}.stage", zero.get("stage"), f"use {key}.zero_stage")
    require(
        learner.dtype is not Dtype.bfloat16 or learner.zero_stage >= 2,
        f"{key}.zero_stage",
        learner.zero_stage,
        f"with {key}.dtype=bfloat16 the float32 master weights live in the ZeRO optimizer; use {key}.zero_stage=2 or 3 "
        "(also on one rank)",
    )
    for former in FORMER_KEYS:
        way_out = f"use {prefix}.{FORMER_KEYS[former]}"
        require(former not in zero, f"{prefix}.{former}", zero.get(former), way_out)
    _check_optimizer_offload(zero, learner, key, prefix)
    _check_parameter_offload(zero, learner, key, prefix)


def _mapping(parent: dict[str, Any], name: str, key: str, example: str) -> dict[str, Any]:
    """The options under ``name``, none where it is absent or null."""
    value = parent.get(name)
    require(
        value is None or isinstance(value, dict), key, value, f"give its options by name: {key}.{example}"
    )
    return value or {}


def _device(block: dict[str, Any], name: str) -> str:
    """What ``block`` offloads to, none where it does not."""
    device = str(block.get("device", "none"))
    if device in ("none", "cpu"):
        return device
    raise UserError(
        f"{name}.device={device!r}: only cpu; what lies on a disk cannot be read to check and count every gradient"
    )


def _check_optimizer_offload(zero: dict[str, Any], learner: LearnerConfig, key: str, prefix: str) -> None:
    name = f"{prefix}.offload_optimizer"
    block = _mapping(zero, "offload_optimizer", name, "device=cpu")
    if _device(block, name) == "none":
        return
    require(
        learner.zero_stage >= 1,
        f"{name}.device",
        "cpu",
        f"{key}.zero_stage=0 has nothing to offload; use {key}.zero_stage=1, 2 or 3",
    )
    super_offload = bool(block.get("super_offload", False))
    way_out = "it steps by an optimizer of its own, not by the learner's AdamW; remove the key"
    require(not super_offload, f"{name}.super_offload", super_offload, way_out)
    ratio = block.get("ratio", 1)
    require(
        ratio == 1, f"{name}.ratio", ratio, "the whole optimizer goes to the CPU, or nothing; remove the key"
    )


def _check_parameter_offload(zero: dict[str, Any], learner: LearnerConfig, key: str, prefix: str) -> None:
    name = f"{prefix}.offload_param"
    block = _mapping(zero, "offload_param", name, "device=cpu")
    if _device(block, name) == "none":
        return
    way_out = f"only {key}.zero_stage=3 offloads parameters"
    require(learner.zero_stage == 3, f"{name}.device", "cpu", way_out)
