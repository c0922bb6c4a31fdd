"""num-zeros (MiMo-V2-Flash report, section 4.2): gradient elements that are exactly 0, over the global batch.

Counted once on each rank's own fragment of every trainable parameter, routed experts by expert, and summed with one
all-reduce, so no gradient is gathered; classes, layers and dead experts are sums of these counts. A parameter without
gradient counts with all its elements, ZeRO's padding never counts, and the number is the same for any ZeRO stage and any
number of ranks. Rising: the load of the experts gets less even. Falling: overfitting.
Both are claims of the report, not of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.learner import lora
from posttrain.learner.moe import routers as finding
from posttrain.learner.moe.routers import NOT_DECODER, ROUTER_CLASS
from posttrain.learner.monitors.gradients import finish_offload, local_fragment, module_of

CLASSES = ("embedding", "router", "routed_expert", "shared_expert", "attention", "norm", "head", "other")
ATTENTION_MARKS = ("attention", "attn", "mixer", "deltanet")


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """One trainable parameter: its module class and decoder layer, and for routed experts how they lie in it."""

    parameter: nn.Parameter
    module_class: str
    decoder_layer: int = -1  # global number; -1 outside of the decoder layers
    layer: int = -1  # of routed experts: index among the MoE layers
    expert: int = (
        -1
    )  # of a parameter that holds one expert; -1 for fused parameters, whose first axis is the expert
    expert_size: int = 0  # of fused parameters: elements of one expert
    takes_turns: bool = False  # a LoRA factor (B) whose experts take turns along its last axis, not in blocks
    is_adapter: bool = False  # a LoRA factor, in the class of the weight that it adapts


class NumZeros:
    """Counts for one model. Build it once; `count` between the last backward and ``engine.step()``, on all ranks."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.num_experts, self.moe_layers, self.slots = _classify(module_of(engine))
        self.num_layers = len(self.moe_layers)
        self.sizes = dict.fromkeys(CLASSES, 0)
        self.layer_sizes: Counter[int] = Counter()
        for slot in self.slots:
            self.sizes[slot.module_class] += _numel(slot.parameter)
            self.layer_sizes[slot.decoder_layer] += _numel(slot.parameter)
        # LongCat has rows beyond the experts.
        fused = [_numel(slot.parameter) // slot.expert_size for slot in self.slots if slot.expert_size]
        self._num_rows = max(fused, default=self.num_experts)
        self._trained = torch.zeros(self.num_layers, self.num_experts, dtype=torch.bool)
        for slot in self.slots:
            if slot.module_class == "routed_expert":
                self._trained[slot.layer, slot.expert if slot.expert >= 0 else slice(None)] = True

    @torch.no_grad()
    def count(self) -> dict[str, float]:
        """``num_zeros/total``, ``num_zeros/<class>`` for classes that the model has, ``num_zeros/layer_<n>`` of each
        decoder layer, ``num_zeros/not_experts/layer_<n>`` of it without routed experts, ``num_zeros/share`` (of all
        trainable elements) and, for MoE models, ``num_zeros/dead_experts``: routed experts, over all layers and by layer,
        whose whole gradient is 0. Collective."""
        finish_offload(self._engine)
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        device = self.slots[0].parameter.device
        num_slots, shape = len(self.slots), (self.num_layers, self._num_rows)
        packed = torch.zeros(num_slots + shape[0] * shape[1], dtype=torch.int64, device=device)
        nonzeros, experts = packed[:num_slots], packed[num_slots:].view(shape)
        for index, slot in enumerate(self.slots):
            start, length, gradient = local_fragment(slot.parameter, rank, num_ranks)
            if gradient is None or length == 0:
                continue
            if slot.module_class == "routed_expert":
                add_by_expert(experts[slot.layer], slot, start, gradient, _nonzeros)
            else:
                nonzeros[index] = torch.count_nonzero(gradient)
        if num_ranks > 1:
            dist.all_reduce(packed)
        return self._metrics(nonzeros.tolist(), experts.cpu())

    def _metrics(self, nonzeros: list[int], experts: Tensor) -> dict[str, float]:
        """``nonzeros`` by slot, 0 for routed experts, which are in ``experts`` [MoE layer, row]."""
        classes, layers = Counter(self.sizes), Counter(self.layer_sizes)
        rest = Counter[int]()  # by layer, without routed experts
        for slot, number in zip(self.slots, nonzeros, strict=True):
            classes[slot.module_class] -= number
            layers[slot.decoder_layer] -= number
            if slot.module_class != "routed_expert":
                rest[slot.decoder_layer] += _numel(slot.parameter) - number
        for layer, number in zip(self.moe_layers, experts.sum(1).tolist(), strict=True):
            classes["routed_expert"] -= number
            layers[layer] -= number
        total = sum(classes.values())
        metrics = {"num_zeros/total": float(total), "num_zeros/share": total / sum(self.sizes.values())}
        metrics |= {f"num_zeros/{name}": float(classes[name]) for name in CLASSES if self.sizes[name]}
        for name, zeros in (("num_zeros", layers), ("num_zeros/not_experts", rest)):
            metrics |= {f"{name}/layer_{layer}": float(n) for layer, n in sorted(zeros.items()) if layer >= 0}
        return metrics | self._dead_experts(experts[:, : self.num_experts])

    def _dead_experts(self, experts: Tensor) -> dict[str, float]:
        if not self.sizes["routed_expert"]:
            return {}
        dead = (self._trained & (experts == 0)).sum(1).tolist()
        by_layer = zip(self.moe_layers, dead, strict=True)
        return {"num_zeros/dead_experts": float(sum(dead))} | {
            f"num_zeros/dead_experts/layer_{layer}": float(number) for layer, number in by_layer if layer >= 0
        }


def _numel(parameter: Any) -> int:
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def _nonzeros(rows: Tensor) -> Tensor:
    return torch.count_nonzero(rows, dim=1)


def add_by_expert(
    totals_E: Tensor, slot: Slot, start: int, fragment: Tensor, measure: Callable[[Tensor], Tensor]
) -> None:
    """Adds ``measure`` ([n, size] -> [n], 0 for zeros) of a fragment [length] of a routed expert's parameter, which begins
    at element ``start``, to the totals of its experts. Rows beyond ``totals_E`` are left out. Copies nothing."""
    if slot.expert >= 0:
        totals_E[slot.expert] += measure(fragment[None])[0].to(totals_E.device)
        return
    size = slot.expert_size
    if slot.takes_turns:
        num_stacked = _numel(slot.parameter) // size
        ends = (start % num_stacked, -(start + len(fragment)) % num_stacked)
        values = measure(nn.functional.pad(fragment, ends).view(-1, num_stacked).T)[: len(totals_E)]
        totals_E[: len(values)] += values.to(totals_E.device)
        return
    head = min(-start % size, len(fragment))  # the rest of an expert that begins before the fragment
    whole = (len(fragment) - head) // size * size
    for piece in (fragment[:head], fragment[head : head + whole], fragment[head + whole :]):
        if not len(piece):
            continue
        values = measure(piece.view(-1, size) if len(piece) % size == 0 else piece[None])
        totals = totals_E[start // size :][: len(values)]
        totals += values[: len(totals)].to(totals.device)
        start += len(piece)


def _classify(model: nn.Module) -> tuple[int, list[int], list[Slot]]:
    """(experts per layer, decoder layer of each MoE layer, one slot per trainable parameter; a tied one appears once)."""
    blocks = dict(finding.blocks(model))
    counts = [_experts_in(block) for block in blocks.values()]
    assert len(set(counts)) <= 1, "MoE layers with different numbers of experts"
    num_experts = counts[0] if counts else 0
    layers = {name: index for index, name in enumerate(blocks)}
    modules = dict(model.named_modules())
    stack, factors = _decoder_stack(modules), _lora_factors(model)
    slots = []
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = lora.plain_name(full_name)
        owner = next((block for block in blocks if name.startswith(f"{block}.") or block == ""), None)
        if owner is None:
            slot = Slot(parameter=parameter, module_class=_plain_class(name, modules))
        else:
            slot = _block_slot(name.removeprefix(owner).lstrip("."), parameter, blocks[owner], layers[owner])
        slot.decoder_layer = _decoder_layer(name, stack)
        num_stacked, slot.takes_turns, slot.is_adapter = factors.get(id(parameter), (0, False, False))
        if slot.module_class == "routed_expert" and slot.expert < 0:
            slot.expert_size = (
                _numel(parameter) // num_stacked if num_stacked else _expert_size(parameter, num_experts)
            )
        slots.append(slot)
    return num_experts, [_decoder_layer(f"{block}.", stack) for block in blocks], slots


def _decoder_stack(modules: dict[str, nn.Module]) -> str | None:
    """Name of the list of decoder layers: the list of modules that holds most parameters."""
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    sizes = {name: sum(_numel(p) for p in module.parameters()) for name, module in lists.items()}
    return max(sizes, key=sizes.__getitem__, default=None)


def _decoder_layer(name: str, stack: str | None) -> int:
    """Global layer number of a parameter or module, -1 outside of the decoder layers."""
    if stack is None or not name.startswith(f"{stack}.") or NOT_DECODER.search(name):
        return -1
    return int(name.removeprefix(f"{stack}.").split(".")[0])


def _expert_size(parameter: nn.Parameter, num_experts: int) -> int:
    """Elements of one expert in a fused parameter. DBRX lays several rows to an expert; LongCat has rows beyond the experts,
    for choices that compute nothing."""
    num_rows = _shape(parameter)[0]
    assert num_rows >= num_experts, "fused experts do not lie along the first axis"
    return _numel(parameter) // (num_experts if num_rows % num_experts == 0 else num_rows)


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
