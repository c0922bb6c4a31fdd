"""num-zeros (MiMo-V2-Flash report, section 4.2): gradient elements that are exactly 0, over the global batch.

Counted on each rank's own fragment of every trainable parameter and summed with one all-reduce, so no gradient is
gathered. A parameter without gradient counts with all its elements, ZeRO's padding never counts, and the number is the
same for any ZeRO stage and any number of ranks. Rising: the load of the experts gets less even. Falling: overfitting.
Both are claims of the report, not of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.learner import lora
from posttrain.learner.moe import routers as finding
from posttrain.learner.moe.routers import ROUTER_CLASS
from posttrain.learner.monitors.gradients import local_fragment, module_of

CLASSES = ("embedding", "router", "routed_expert", "shared_expert", "attention", "norm", "head", "other")
ATTENTION_MARKS = ("attention", "attn", "mixer", "deltanet")


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """One trainable parameter: its module class, and for routed experts which MoE layer and how experts lie in it."""

    parameter: nn.Parameter
    module_class: str
    layer: int = -1  # index among the MoE layers
    expert: int = (
        -1
    )  # of a parameter that holds one expert; -1 for fused parameters, whose first axis is the expert
    num_stacked: int = 0  # LoRA factors of fused experts: experts that lie in the factor
    is_last_axis: bool = (
        False  # and whether they take turns along its last axis (B), not in blocks along the first (A)
    )
    is_adapter: bool = False  # a LoRA factor, in the class of the weight that it adapts


class NumZeros:
    """Counts for one model. Build it once; `count` between the last backward and ``engine.step()``, on all ranks."""

    def __init__(self, engine: Any) -> None:
        model = module_of(engine)
        self.num_experts, self.num_layers, self.slots = _classify(model)
        self.sizes = dict.fromkeys(CLASSES, 0)
        for slot in self.slots:
            self.sizes[slot.module_class] += _numel(slot.parameter)

    @torch.no_grad()
    def count(self) -> dict[str, float]:
        """``num_zeros/total``, ``num_zeros/<class>`` for classes that the model has, ``num_zeros/share`` (of all
        trainable elements) and, for MoE models, ``num_zeros/dead_experts``: routed experts, over all layers, whose
        whole gradient is 0. Collective."""
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        device = self.slots[0].parameter.device
        nonzeros = torch.zeros(len(CLASSES), dtype=torch.int64, device=device)
        experts = torch.zeros(self.num_layers, self.num_experts, dtype=torch.int64, device=device)
        for slot in self.slots:
            start, length, gradient = local_fragment(slot.parameter, rank, num_ranks)
            if gradient is None or length == 0:
                continue
            nonzeros[CLASSES.index(slot.module_class)] += torch.count_nonzero(gradient)
            if slot.module_class == "routed_expert":
                add_by_expert(experts[slot.layer], slot, start, gradient, _nonzeros)
        packed = torch.cat([nonzeros, experts.flatten()])
        if num_ranks > 1:
            dist.all_reduce(packed)
        return self._metrics(packed.cpu())

    def _metrics(self, packed: Tensor) -> dict[str, float]:
        nonzeros, experts = packed[: len(CLASSES)].tolist(), packed[len(CLASSES) :]
        zeros = {
            name: self.sizes[name] - n for name, n in zip(CLASSES, nonzeros, strict=True) if self.sizes[name]
        }
        total = sum(zeros.values())
        metrics = {"num_zeros/total": float(total), "num_zeros/share": total / sum(self.sizes.values())}
        metrics |= {f"num_zeros/{name}": float(n) for name, n in zeros.items()}
        if self.sizes["routed_expert"]:
            metrics["num_zeros/dead_experts"] = float((experts == 0).sum())
        return metrics


def _numel(parameter: Any) -> int:
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def _nonzeros(rows: Tensor) -> Tensor:
    return torch.count_nonzero(rows, dim=1)


def add_by_expert(
    totals_E: Tensor, slot: Slot, start: int, fragment: Tensor, measure: Callable[[Tensor], Tensor]
) -> None:
    """Adds ``measure`` ([n, size] -> [n], 0 for zeros) of a fragment [length] of a routed expert's parameter, which begins at
    element ``start``, to the totals of its experts."""
    if slot.expert >= 0:
        totals_E[slot.expert] += measure(fragment[None])[0]
        return
    num_experts, num_rows = len(totals_E), slot.num_stacked or _shape(slot.parameter)[0]
    if slot.is_last_axis:
        ends = (start % num_rows, -(start + len(fragment)) % num_rows)
        totals = measure(nn.functional.pad(fragment, ends).view(-1, num_rows).T)[:num_experts]
        totals_E[: len(totals)] += totals
        return
    # DBRX lays several rows to an expert; LongCat has rows beyond the experts, for choices that compute nothing.
    size = _numel(slot.parameter) // (num_experts if num_rows % num_experts == 0 else num_rows)
    first, last = start // size, (start + len(fragment) - 1) // size
    if start % size or len(fragment) % size:
        padded = fragment.new_zeros((last - first + 1) * size)
        padded[start - first * size :][: len(fragment)] = fragment
        fragment = padded
    totals = measure(fragment.view(-1, size))[: max(num_experts - first, 0)]
    totals_E[first : first + len(totals)] += totals


def _classify(model: nn.Module) -> tuple[int, int, list[Slot]]:
    """(experts per layer, MoE layers, one slot per trainable parameter; a tied one appears once)."""
    blocks = dict(finding.blocks(model))
    counts = [_experts_in(block) for block in blocks.values()]
    assert len(set(counts)) <= 1, "MoE layers with different numbers of experts"
    num_experts = counts[0] if counts else 0
    layers = {name: index for index, name in enumerate(blocks)}
    modules = dict(model.named_modules())
    factors = _lora_factors(model)
    slots = []
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = lora.plain_name(full_name)
        owner = next((block for block in blocks if name.startswith(f"{block}.") or block == ""), None)
        if owner is None:
            slots.append(Slot(parameter=parameter, module_class=_plain_class(name, modules)))
        else:
            slots.append(
                _block_slot(name.removeprefix(owner).lstrip("."), parameter, blocks[owner], layers[owner])
            )
    for slot in slots:
        slot.num_stacked, slot.is_last_axis, slot.is_adapter = factors.get(
            id(slot.parameter), (0, False, False)
        )
        fused = slot.module_class == "routed_expert" and slot.expert < 0
        assert not fused or _shape(slot.parameter)[0] >= num_experts, (
            "fused experts do not lie along the first axis"
        )
    return num_experts, len(blocks), slots


def _lora_factors(model: nn.Module) -> dict[int, tuple[int, bool, bool]]:
    """By id: experts stacked in the factor, whether along its last axis, True."""
    found: dict[int, tuple[int, bool, bool]] = {}
    for adapter in lora.adapters(model):
        for factor, is_b in zip(adapter.factors, (False, True), strict=True):
            found[id(factor)] = (adapter.num_stacked, is_b and adapter.num_stacked > 0, True)
    return found


def _experts_in(block: nn.Module) -> int:
    experts: Any = finding.unwrapped(block.experts)  # type: ignore[arg-type]
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    for declared in ("num_experts", "num_routed_experts"):
        if isinstance(number := getattr(experts, declared, None), int):
            return number
    return _shape(next(p for p in experts.parameters() if len(_shape(p)) >= 2))[0]


def _block_slot(name: str, parameter: nn.Parameter, block: nn.Module, layer: int) -> Slot:
    parts = name.split(".")
    if parts[0] == "experts":
        expert = int(parts[1]) if parts[1].isdigit() else -1
        return Slot(parameter=parameter, module_class="routed_expert", layer=layer, expert=expert)
    # Gemma 4: the block is the decoder layer.
    for mark, module_class in (("norm", "norm"), ("attn", "attention")):
        if mark in parts[0]:
            return Slot(parameter=parameter, module_class=module_class)
    child = finding.unwrapped(getattr(block, parts[0]))
    is_router = parts[0] in ("gate", "router") or bool(ROUTER_CLASS.search(type(child).__name__))
    return Slot(parameter=parameter, module_class="router" if is_router else "shared_expert")


def _plain_class(name: str, modules: dict[str, nn.Module]) -> str:
    path = name.split(".")[:-1]
    own = finding.unwrapped(modules[".".join(path)])
    if isinstance(own, nn.Embedding):
        return "embedding"
    if "norm" in type(own).__name__.lower():
        return "norm"
    if path and path[-1] in ("lm_head", "output", "embed_out"):
        return "head"
    ancestors = [type(modules[".".join(path[: i + 1])]).__name__.lower() for i in range(len(path))]
    if any(mark in text for text in (*ancestors, *path) for mark in ATTENTION_MARKS):
        return "attention"
    return "other"


def count(engine: Any) -> dict[str, float]:
    """`NumZeros(engine).count()`: for callers that count once."""
    return NumZeros(engine).count()
