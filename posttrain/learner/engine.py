"""Builds the DeepSpeed engine, and reads and clears the gradients that it keeps.

DeepSpeed runs with ``gradient_accumulation_steps = 1``; the learner sets the accumulation boundary itself. Refuses
settings that would make the numbers depend on the ZeRO stage.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from pydantic import ValidationError
from torch import Tensor, nn

from posttrain.config import Dtype, LearnerConfig, UserError, check_deepspeed
from posttrain.learner.monitors.gradients import clear_partitions, finish_offload, offloads
from posttrain.learner.optimizer import build_optimizer
from posttrain.learner.policy import num_parameters

LARGEST_BUCKET = 500_000_000


def init_distributed(backend: str, store: dist.Store, rank: int, num_ranks: int) -> None:
    """Process group over ``store``, known to torch and DeepSpeed."""
    # DeepSpeed calls torch under former names at every gather.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # On CPU DeepSpeed would compile a shared-memory all-reduce, which takes a minute and a compiler. Gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Every rank sees its own device only, so it is always the first one.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"}
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def check_options(learner: LearnerConfig) -> None:
    """`check_deepspeed`, and what DeepSpeed itself refuses of its ZeRO options, in one line."""
    check_deepspeed(learner)
    options = copy.deepcopy(learner.deepspeed.get("zero_optimization") or {})
    prefix = "learner.deepspeed.zero_optimization"
    try:  # the names are DeepSpeed's
        DeepSpeedZeroConfig(**{str(name): value for name, value in options.items()}, stage=learner.zero_stage)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join((prefix, *map(str, first["loc"])))
        unknown = "DeepSpeed has no such option; correct the name, or remove the key"
        way_out = unknown if first["type"] == "extra_forbidden" else " ".join(first["msg"].split())
        raise UserError(f"{key}={first['input']!r}: {way_out}") from error


def deepspeed_config(learner: LearnerConfig, num_elements: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: ours, with the user's ``learner.deepspeed`` block laid over it."""
    check_options(learner)
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "zero_optimization": {
            "stage": learner.zero_stage,
            # Buckets are allocated whole: no larger than the model.
            "reduce_bucket_size": min(LARGEST_BUCKET, max(1_000_000, num_elements)),
        },
    }
    if learner.dtype is Dtype.bfloat16:
        own["bf16"] = {"enabled": True}
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    user = copy.deepcopy(learner.deepspeed)
    own["zero_optimization"].update(user.pop("zero_optimization", None) or {})
    return own | user


def build(module: nn.Module, learner: LearnerConfig) -> Any:
    """A DeepSpeed engine around ``module`` with a fresh AdamW. The process group must be there."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    optimizer = build_optimizer(module, learner)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config(learner, num_parameters(module)),
        dist_init_required=False,
    )
    return engine


def destroy(engine: Any) -> None:
    """Frees weights, optimizer state and hooks of ``engine``; the process group stays."""
    engine.destroy()
    gc.collect()


def local_gradients(engine: Any) -> list[Tensor]:
    """Accumulated gradients as this rank holds them, between the last backward and the step.

    Stage 0: whole and equal on every rank. Stages 1 to 3: this rank's partitions, padding (zeros) included; on the CPU
    where the optimizer is offloaded.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if offloads(engine):
        finish_offload(engine)
        if stage == 3:
            return [
                grad for group in optimizer.get_fp32_grad_partitions().values() for grad in group.values()
            ]
        return [grad for group in optimizer.offload_gradient_dict.values() for grad in group]
    groups = optimizer.averaged_gradients.values()
    return [grad for group in groups if group is not None for grad in group if grad is not None]


def gradient_norm(engine: Any) -> float:
    """Global L2 norm of the gradient of the whole batch before clipping, the same on every rank; NaN or infinity if any
    element is."""
    gradients = local_gradients(engine)
    device = engine.device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        squares += gradient.detach().float().norm().double().to(device) ** 2
    dist.all_reduce(squares)  # without ZeRO every rank has it all; still they must agree on NaN
    if engine.zero_optimization_stage() == 0:
        squares /= dist.get_world_size()
    return float(squares.sqrt())


def clear_gradients(engine: Any) -> None:
    """After every step, or instead of one. What DeepSpeed keeps of a step would be applied again for a parameter that
    gets no gradient in the next one."""
    engine.zero_grad()
    if engine.zero_optimization_stage() == 0:
        return
    optimizer = engine.optimizer
    optimizer.zero_grad()
    clear_partitions(engine)
    if engine.zero_optimization_stage() == 3:
        optimizer.averaged_gradients = {}
        return
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID  # as `step` does, which may be left out
    for group in list(optimizer.averaged_gradients):
        optimizer.averaged_gradients[group] = None
        optimizer.all_grad_tensors[group] = None


def set_learning_rate(engine: Any, rate: float) -> None:
    """For the next step, in every parameter group."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate
