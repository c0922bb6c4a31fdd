"""Finds the routers of any Transformers MoE model and takes over the one call in them that selects experts.

A router is wrapped, never rewritten: its own forward runs, and only the result of its selecting ``torch.topk`` is
exchanged. Scoring, normalisation, scaling, shared experts and auxiliary outputs stay the model's own, so a new family
needs no code here. Whether that holds for a family is measured in `probe`, and a family for which it does not hold is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from posttrain.config import UserError

ROUTER_CLASS = re.compile(r"Router|Gate|Gating")
BIAS_NAME = re.compile(r"(correction|expert)_bias$")
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(slots=True, eq=False)
class Router:
    """One MoE layer: ``module`` is what is wrapped, a router or, where routing is inlined, the MoE block itself."""

    name: str
    layer: int  # global layer number, dense layers counted
    block: nn.Module
    module: nn.Module
    num_experts: int
    top_k: int
    selecting_call: int = 0  # which of the topk calls of the right shape selects; set by `probe`
    original_forward: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def family(self) -> str:
        """Class names, for messages and for the list of supported families."""
        return f"{type(self.block).__name__}/{type(self.module).__name__}"

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that decide the logits."""
        if self.module is not self.block:
            return list(self.module.parameters())
        gates = [
            m
            for m in self.block.children()
            if isinstance(m, nn.Linear) and m.out_features == self.num_experts
        ]
        return [p for gate in gates for p in gate.parameters()]

    def correction_bias(self) -> Tensor | None:
        """The bias [E] that takes part in the selection only and gets no gradient, or None."""
        for owner in (self.module, self.block):
            for prefix, module in owner.named_modules():
                if "experts" in prefix.split("."):
                    continue
                for name, tensor in [
                    *module.named_buffers(recurse=False),
                    *module.named_parameters(recurse=False),
                ]:
                    if BIAS_NAME.search(name) and not tensor.requires_grad:
                        return tensor
        return None


class Selection(TorchFunctionMode):
    """Active during one router forward. Calls ``select(live_indices)`` at the selecting topk and returns values that
    are gathered over its answer, from the tensor as it was before any group mask."""

    def __init__(self, router: Router, select: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router = router
        self.select = select
        self.num_candidates = 0
        self.scores: Tensor | None = None  # [N, E] what a softmax or sigmoid made of the logits
        self._unmasked: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # id -> (masked, before); the tensors keep ids alive

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "topk":
            return self._topk(out, args, kwargs)
        if name in ("softmax", "sigmoid") and self.num_candidates == 0 and self._is_row_per_token(out):
            self.scores = out
        elif name in ("masked_fill", "where") and self._is_row_per_token(out):
            source = args[0] if name == "masked_fill" else args[1] if len(args) > 1 else None
            if self._is_row_per_token(source):
                self._unmasked[id(out)] = (out, self._before_masks(source))
        return out

    def _is_row_per_token(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.router.num_experts

    def _before_masks(self, tensor: Tensor) -> Tensor:
        return self._unmasked[id(tensor)][1] if id(tensor) in self._unmasked else tensor

    def _topk(self, out: Any, args: tuple, kwargs: dict) -> Any:
        given = dict(zip(("input", "k", "dim"), args, strict=False)) | kwargs
        scores, k, dim = given["input"], given["k"], given.get("dim", -1)
        if not (self._is_row_per_token(scores) and k == self.router.top_k and dim in (-1, 1)):
            return out
        self.num_candidates += 1
        if self.num_candidates - 1 != self.router.selecting_call:
            return out
        full = self._before_masks(scores)
        if self.scores is None:
            self.scores = torch.softmax(full.float(), dim=-1)  # families that normalise after the selection
        indices = self.select(out.indices)
        return torch.return_types.topk((full.gather(1, indices), indices))


def find(model: nn.Module) -> list[Router]:
    """The MoE layers in order of depth; empty for a dense model. `UserError` where a model says it has experts but
    keeps them where nothing is found."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    routers = [_describe(name, module, config) for name, module in blocks(model)]
    declared = {key: getattr(config, key, None) for key in EXPERT_COUNT_KEYS}
    if not routers and any(isinstance(n, int) and n > 1 for n in declared.values()):
        raise UserError(
            f"model.path: {type(model).__name__} has experts but no MoE block that routing replay knows"
        )
    routers.sort(key=lambda router: router.layer)
    if len({(r.num_experts, r.top_k) for r in routers}) > 1 or len({r.layer for r in routers}) != len(
        routers
    ):
        raise UserError(
            f"model.path: {type(model).__name__} has MoE layers of different shape, or several in one layer"
        )
    return routers


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything that owns an ``experts`` module: the MoE blocks."""
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and any(True for _ in experts.parameters()):
            yield name, module


def _describe(name: str, block: nn.Module, config: Any) -> Router:
    children = [
        m for m in block.children() if ROUTER_CLASS.search(type(m).__name__) and m is not block.experts
    ]
    module = children[0] if len(children) == 1 else block
    owners = (module, block, block.experts, config)
    num_experts = _first_int(owners, EXPERT_COUNT_KEYS)
    top_k = _first_int(owners, TOP_K_KEYS)
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if num_experts is None or top_k is None or not numbers:
        raise UserError(
            f"model.path: routing replay cannot read the shape of {type(block).__name__} ({name})"
        )
    return Router(name, numbers[0], block, module, num_experts, top_k)


def _first_int(owners: tuple[Any, ...], keys: tuple[str, ...]) -> int | None:
    for owner in owners:
        for key in keys:
            value = getattr(owner, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
