"""Where DeepSpeed keeps the accumulated gradient, and the weights, of a parameter under each ZeRO stage.

Every rank sees its own fragment; the fragments of all ranks tile a parameter exactly once, padding left out. Valid
between the last backward of a batch and ``engine.step()``. With an offloaded optimizer the gradients are in float32
buffers on the CPU that DeepSpeed never empties and, for some parameters, not fills: `finish_offload` and
`clear_partitions` do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def module_of(engine: Any) -> nn.Module:
    """The bare model inside a DeepSpeed engine, or the model itself."""
    return engine if not hasattr(engine, "zero_optimization_stage") else engine.module


def local_fragment(parameter: nn.Parameter, rank: int, num_ranks: int) -> tuple[int, int, Tensor | None]:
    """(start, length, gradient) of this rank's share of the flattened parameter; gradient [length], or None for zero.

    ZeRO-3: the partition, cut where its padding begins. ZeRO-1 and 2: the piece that overlaps this rank's flat
    partition. ZeRO-0, where all ranks hold the same averaged gradient: every rank looks at an equal share.
    """
    if hasattr(parameter, "ds_id"):
        return _zero3_fragment(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return _zero12_fragment(parameter)
    start, length = _share(parameter, rank, num_ranks)
    gradient = parameter.grad
    return start, length, None if gradient is None else gradient.reshape(-1)[start : start + length]


def weight_fragment(parameter: nn.Parameter, rank: int, num_ranks: int) -> tuple[int, Tensor]:
    """(start, weights [length]) of a share of the flattened parameter; those of all ranks tile it once. ZeRO-3: the
    partition, cut where its padding begins; every other stage has all weights, and each rank looks at an equal share."""
    if hasattr(parameter, "ds_id"):
        partitioned: Any = parameter
        size = partitioned.partition_numel()
        start = partitioned._z3_optimizer._get_param_partition_rank(partitioned) * size
        return start, partitioned.ds_tensor.detach()[: max(min(size, partitioned.ds_numel - start), 0)]
    start, length = _share(parameter, rank, num_ranks)
    return start, parameter.detach().reshape(-1)[start : start + length]


def _share(parameter: nn.Parameter, rank: int, num_ranks: int) -> tuple[int, int]:
    share = -(-parameter.numel() // num_ranks)
    start = min(rank * share, parameter.numel())
    return start, min(share, parameter.numel() - start)


def _zero3_fragment(parameter: Any) -> tuple[int, int, Tensor | None]:
    optimizer = parameter._z3_optimizer
    start = min(
        optimizer._get_param_partition_rank(parameter) * parameter.partition_numel(), parameter.ds_numel
    )
    length = min(parameter.partition_numel(), parameter.ds_numel - start)
    return start, length, optimizer.get_local_fp32_grad_for_param(parameter)[:length]


def _zero12_fragment(parameter: Any) -> tuple[int, int, Tensor | None]:
    mapping = parameter._hp_mapping
    if mapping is None:  # nothing of this parameter lies in this rank's partition
        return 0, 0, None
    address = mapping.lp_fragment_address
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
    if gradient.numel() == parameter.numel():  # the bf16 optimizer keeps the whole gradient on every rank
        gradient = gradient[address.start : address.start + address.numel]
    assert gradient.numel() == address.numel, (
        "DeepSpeed's gradient fragment has another length than its address"
    )
    return address.start, address.numel, gradient.to(parameter.device)


def offloads(engine: Any) -> bool:
    """Whether the optimizer, and so every gradient that it reads, is offloaded to the CPU."""
    if not hasattr(engine, "zero_optimization_stage") or engine.zero_optimization_stage() == 0:
        return False
    name = "offload_optimizer" if engine.zero_optimization_stage() == 3 else "cpu_offload"
    return bool(getattr(engine.optimizer, name))


def finish_offload(engine: Any) -> None:
    """Completes the offloaded gradients; nothing without offload. Call it after the last backward, before they are read.

    DeepSpeed sends to the optimizer what the last micro-batch gave a gradient. A parameter that only earlier ones used,
    such as an expert that the last one has no token for, has its sum elsewhere, and would be left out.
    """
    if not offloads(engine):
        return
    optimizer = engine.optimizer
    sent = optimizer.norm_for_param_grads
    if engine.zero_optimization_stage() == 3:
        parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        optimizer._offload_boundary_param_ids -= {
            parameter.ds_id for parameter in parameters if optimizer.get_param_id(parameter) in sent
        }
    else:
        optimizer._offload_accumulated_param_ids -= sent.keys()
    optimizer.finalize_gradient_accumulation_boundary()
    if torch.device(engine.device).type == "cuda":
        torch.cuda.synchronize()  # copies to the CPU may be under way


@torch.no_grad()
def clear_partitions(engine: Any) -> None:
    """Zeroes what ZeRO keeps of the gradients. Call it after every ``engine.step()``, or instead of one.

    Without it a parameter that gets no gradient in a step, such as an expert without tokens, is updated with the
    gradient of the step before: ZeRO-3, and every stage with an offloaded optimizer, overwrite a partition only when a
    new gradient arrives.
    """
    if hasattr(engine, "zero_optimization_stage") and engine.zero_optimization_stage() == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
    if not offloads(engine):
        return
    optimizer = engine.optimizer
    optimizer.reset_cpu_buffers()
    if engine.zero_optimization_stage() == 3:
        optimizer._offload_boundary_param_ids = set()
        kept = [flat.grad for flat in optimizer.fp32_partitioned_groups_flat]
    else:
        optimizer._offload_accumulated_param_ids = set()
        kept = [flat.grad for flat in optimizer.single_partition_of_fp32_groups]
        kept += optimizer.accumulated_grads_in_cpu.values()
    for gradient in kept:
        gradient.zero_()
