"""Finds the routers of any Transformers MoE model and takes over the call in them that selects experts.

A router is wrapped, never rewritten: its own forward runs, and only the result of the call that selects is exchanged.
That call is one ``topk``, K calls of ``max`` or ``argmax`` one after the other, or a look-up in a table. Scoring,
normalisation, scaling, shared experts and auxiliary outputs stay the model's own, so a new family needs no code here.
Which call it is, and whether exchanging it works, is measured in `probe`; a family for which it does not is refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from posttrain.config import UserError

ROUTER_CLASS = re.compile(r"Router|Gate(?!d)|Gating")
BIAS_NAME = re.compile(r"(correction|expert)_bias$")
NOT_DECODER = re.compile(
    r"(^|\.)(mtp|nextn|draft)[^.]*\."
)  # further-token heads: engines record none for them
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a router selects, as `probe` measured it."""

    name: str  # topk, max or argmax, or __getitem__ for a look-up in a table
    calls: tuple[int, ...]  # which of the calls that could select do; several of max: an expert each
    num_choices: int  # the experts, and what some families offer beside them: skip, identity


@dataclass(slots=True, eq=False)
class Router:
    """One MoE layer: ``module`` is what is wrapped, a router or, where the block itself selects, the MoE block."""

    name: str
    layer: int  # global layer number, dense layers counted
    block: nn.Module
    module: nn.Module
    num_experts: int
    top_k: int
    choice: Choice | None = None

    @property
    def family(self) -> str:
        """Class names, for messages and for the list of supported families."""
        return f"{type(self.block).__name__}/{type(self.module).__name__}"

    @property
    def is_ordered(self) -> bool:
        """The weight of an expert depends on its place in the selection, not on the set alone."""
        return self.choice is not None and self.top_k > 1 and len(self.choice.calls) > 1

    @property
    def is_table(self) -> bool:
        """The token id alone selects: there is nothing to balance, and no bias."""
        return self.choice is not None and self.choice.name == "__getitem__"

    @property
    def num_choices(self) -> int:
        """Recorded ids are below this."""
        return self.num_experts if self.choice is None else self.choice.num_choices

    def measured_as(self, other: Router) -> None:
        """Takes over what `probe` measured on a router of the same classes."""
        self.choice = other.choice
        if other.module is other.block:
            self.module = self.block

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that decide the logits, those of adapters around the router too."""
        gates = _router_children(self.block)
        if not gates:
            gates = [m for m in self.block.children() if _is_linear(unwrapped(m), self.num_experts)]
        return [p for gate in gates for p in gate.parameters()]

    def drawing_modules(self) -> list[nn.Module]:
        """Modules that may draw experts, or noise for their input, in train mode."""
        children = [unwrapped(child) for child in _router_children(self.block)]
        return list(dict.fromkeys((self.block, self.module, *children)))

    def correction_bias(self) -> Tensor | None:
        """The bias [E] that takes part in the selection only and gets no gradient, or None."""
        return next((getattr(module, name) for module, name in self._biases()), None)

    def take_bias_out(self) -> None:
        """Makes a buffer of a correction bias that is a parameter. `from_pretrained` lets such a parameter train, though the
        loss says nothing about it, and ZeRO-3 would part it among the ranks."""
        for module, name in list(self._biases()):
            if isinstance(bias := getattr(module, name), nn.Parameter):
                delattr(module, name)
                module.register_buffer(name, bias.detach())

    def _biases(self) -> Iterator[tuple[nn.Module, str]]:
        """(owner, name) of every correction bias."""
        for owner in (self.module, self.block):
            for prefix, module in owner.named_modules():
                if "experts" not in prefix.split("."):
                    own = module.named_buffers(recurse=False), module.named_parameters(recurse=False)
                    yield from ((module, name) for name, _ in chain(*own) if BIAS_NAME.search(name))


@dataclass(kw_only=True, slots=True)
class Call:
    """A call inside a router that could be the selection."""

    name: str
    num_choices: int  # 0: a look-up, which does not say
    indices: Tensor  # [N, K] or [N, 1]


class Selection(TorchFunctionMode):
    """Active during one router forward over ``num_rows`` tokens. Calls ``select(live_indices, scores)`` at the selecting
    call and answers with what it returns. Values are gathered from the scores as they were before any group mask, so
    that an expert outside the live selection keeps its weight and its gradient."""

    def __init__(
        self, router: Router, num_rows: int, select: Callable[[Tensor, Tensor | None], Tensor]
    ) -> None:
        super().__init__()
        self.router = router
        self.num_rows = num_rows
        self.select = select
        self.calls: list[Call] = []
        self._scores: Tensor | None = None  # [.., E] what a softmax or sigmoid makes of the logits
        self._logits: Tensor | None = None  # what was selected by, if nothing had made scores of it before
        self._chosen: Tensor | None = None  # [N, K]
        # id -> (masked, before); the tensors keep ids alive
        self._unmasked: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("topk", "max", "argmax"):
            return self._ranking(name, out, args, kwargs)
        if name == "__getitem__":
            return self._item(out, args[0])
        if name in ("softmax", "sigmoid"):
            self._score(name, out)
        elif name in ("masked_fill", "where") and self._is_row_per_token(out):
            source = args[0] if name == "masked_fill" else args[1] if len(args) > 1 else None
            if self._is_row_per_token(source):
                self._unmasked[id(out)] = (out, self._before_masks(source))
        return out

    @property
    def has_selected(self) -> bool:
        return self._chosen is not None

    @property
    def scores(self) -> Tensor | None:
        """[N, E] with graph, from 0 to 1; None for a router that scores otherwise than by softmax or sigmoid."""
        return None if self._scores is None else self._scores.reshape(self.num_rows, -1)

    def _is_row_per_token(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.dim() in (2, 3)
            and tensor.shape[-1] >= self.router.num_experts
            and tensor.numel() == self.num_rows * tensor.shape[-1]
        )

    def _before_masks(self, tensor: Tensor) -> Tensor:
        return self._unmasked[id(tensor)][1] if id(tensor) in self._unmasked else tensor

    def _score(self, name: str, out: Any) -> None:
        if self._chosen is None and self._is_row_per_token(out):
            self._scores = out
        elif self._scores is None and self._logits is not None:  # families that score after the selection
            logits = self._logits.float()
            self._scores = torch.softmax(logits, dim=-1) if name == "softmax" else torch.sigmoid(logits)

    def _ranking(self, name: str, out: Any, args: tuple, kwargs: dict) -> Any:
        """topk, max or argmax over the choices of every token."""
        names = ("input", "k", "dim") if name == "topk" else ("input", "dim")
        given = dict(zip(names, args, strict=False)) | kwargs
        scores, dim = given["input"], given.get("dim", -1 if name == "topk" else None)
        if not self._is_row_per_token(scores) or not isinstance(dim, int):
            return out
        if dim not in (-1, scores.dim() - 1):
            return out
        if given.get("k", self.router.top_k) != self.router.top_k:
            return out
        indices = out if name == "argmax" else out.indices
        selected = self._exchange(name, indices, scores)
        if selected is None:
            return out
        selected = selected.view(*scores.shape[:-1], -1)
        values = self._before_masks(scores).gather(-1, selected)
        if name == "topk":
            return torch.return_types.topk((values, selected))
        selected, values = selected.view_as(indices), values.view_as(indices)
        return selected if name == "argmax" else torch.return_types.max((values, selected))

    def _item(self, out: Any, source: Any) -> Any:
        """A look-up of the experts in a table, or a slice of the scores."""
        if source is self._scores and self._is_row_per_token(out):
            self._scores = out
        is_table = isinstance(source, Tensor) and source.dim() == 2 and source.shape[1] == self.router.top_k
        if not is_table or source.dtype not in (torch.int32, torch.int64):
            return out
        if not isinstance(out, Tensor) or out.shape != (self.num_rows, self.router.top_k):
            return out
        selected = self._exchange("__getitem__", out, None)
        return out if selected is None else selected.to(out.dtype)

    def _exchange(self, name: str, indices: Tensor, scores: Tensor | None) -> Tensor | None:
        """Notes the call; the experts [N, k] that it shall return, None where it does not select."""
        number = len(self.calls)
        rows = indices.reshape(self.num_rows, -1)
        width = 0 if scores is None else scores.shape[-1]
        self.calls.append(Call(name=name, num_choices=width, indices=rows))
        choice = self.router.choice
        if choice is None or number not in choice.calls:
            return None
        if self._chosen is None:
            full = None if scores is None else self._before_masks(scores)
            self._logits = full if self._scores is None else None
            full = None if full is None else full.reshape(self.num_rows, width)
            self._chosen = self.select(self._live(rows, full), full)
        if not self.router.is_ordered:
            return self._chosen
        place = choice.calls.index(number)
        return self._chosen[:, place : place + 1]

    def _live(self, first: Tensor, scores: Tensor | None) -> Tensor:
        """[N, K] what the router would select: for a row of max calls, each without the experts before it."""
        if not self.router.is_ordered:
            return first
        assert scores is not None
        chosen, rest = [first], scores.detach()
        while len(chosen) < self.router.top_k:
            rest = rest.scatter(1, chosen[-1], float("-inf"))
            chosen.append(rest.max(dim=-1, keepdim=True).indices)
        return torch.cat(chosen, dim=1)


def find(model: nn.Module) -> list[Router]:
    """The MoE layers of the decoder in order of depth; empty for a dense model. `UserError` where a model says it has
    experts but keeps them where nothing is found."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    routers = [
        _describe(name, module, config) for name, module in blocks(model) if not NOT_DECODER.search(name)
    ]
    num_layers = getattr(config, "num_hidden_layers", None)
    routers = [r for r in routers if num_layers is None or r.layer < num_layers]
    declared = {key: getattr(config, key, None) for key in EXPERT_COUNT_KEYS}
    has_experts = any("Expert" in type(module).__name__ for module in model.modules())
    if getattr(config, "is_moe", True):
        has_experts = has_experts or any(isinstance(n, int) and n > 1 for n in declared.values())
    if not routers and has_experts:
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
    children = _router_children(block)
    module = unwrapped(children[0]) if len(children) == 1 else block
    owners = (module, block, unwrapped(block.experts), config)  # type: ignore[arg-type]
    num_experts = _first_int(owners, EXPERT_COUNT_KEYS)
    top_k = _first_int(owners, TOP_K_KEYS)
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if num_experts is None or top_k is None or not numbers:
        raise UserError(
            f"model.path: routing replay cannot read the shape of {type(block).__name__} ({name})"
        )
    return Router(name, numbers[0], block, module, num_experts, top_k)


def num_rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in the first tensor of real numbers among the arguments of a router or block, [.., H]; 0 without one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value.numel() // max(value.shape[-1], 1)
    return 0


def _router_children(block: nn.Module) -> list[nn.Module]:
    return [
        child
        for child in block.children()
        if ROUTER_CLASS.search(type(unwrapped(child)).__name__) and child is not block.experts
    ]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself inside of adapters (PEFT keeps it as ``base_layer``)."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _is_linear(module: nn.Module, num_outputs: int) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == num_outputs


def _first_int(owners: tuple[Any, ...], keys: tuple[str, ...]) -> int | None:
    for owner in owners:
        for key in keys:
            value = getattr(owner, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
