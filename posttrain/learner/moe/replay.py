"""Routing replay (R3, arXiv 2510.11370): the recorded experts, weighted by the live router.

Owns what happens inside routers during a forward pass of the policy. Refuses routes of another shape or with ids
that no router can have had. Never used for teachers: a model without `RouterReplay.attach` cannot receive routes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.learner.errors import NonFiniteRouterError
from posttrain.learner.moe import routers as finding
from posttrain.learner.moe.probe import is_materialised, probe
from posttrain.learner.moe.routers import Router, Selection, num_rows_of


@dataclass(kw_only=True, slots=True)
class LiveRouting:
    """What the routers did in one forward pass, over the real tokens (``token_mask``). Sums, so that micro-batches and
    ranks add up. L MoE layers, E experts, N = B * T rows."""

    counts_LE: Tensor  # float64: tokens per expert, by the live selection (what the bias update needs)
    mismatched_L: Tensor  # float64: replayed tokens whose live set differs from the recorded one
    replayed_L: Tensor  # float64: real tokens that followed a recorded route
    num_tokens: Tensor  # float64: real tokens
    num_expected: Tensor  # float64: tokens that must have a route (``expected_mask``)
    outside_LN: Tensor  # uint8: recorded experts of each token that its live set lacks
    # float64, zero without measure_health: tokens per expert by the recorded routes; entropy of the scores, 1 where all
    # are equal, summed over tokens; tokens in that sum
    replayed_counts_LE: Tensor = field(default_factory=lambda: torch.zeros(0))
    entropy_L: Tensor = field(default_factory=lambda: torch.zeros(0))
    scored_L: Tensor = field(default_factory=lambda: torch.zeros(0))
    scores: list[Tensor | None] = field(
        default_factory=list
    )  # per layer [N, E] with graph; only with keep_scores
    indices: list[Tensor | None] = field(
        default_factory=list
    )  # per layer [N, K] live selection; only with keep_scores

    def route_mismatch(self) -> tuple[Tensor, Tensor]:
        """(sum, count) of replay/route_mismatch over (token, layer) pairs."""
        return self.mismatched_L.sum(), self.replayed_L.sum()

    def coverage(self) -> tuple[Tensor, Tensor]:
        """(sum, count) of replay/coverage: replayed (token, layer) pairs of those expected. 1 or something is lost."""
        return self.replayed_L.sum(), self.num_expected * len(self.replayed_L)


@dataclass(slots=True)
class _Context:
    """The open `RouterReplay.routes` block; flat over N = B * T."""

    routes: Tensor | None  # [N, L, K]
    token_mask: Tensor | None  # [N] bool; None: every token is real
    keep_scores: bool
    is_nan_L: Tensor  # bool: layers whose router computed NaN for a real token
    measure_health: bool = False
    has_entropy: set[int] = field(default_factory=set)  # layers: a recompute need not measure again


class RouterReplay:
    """Routers of one model, wrapped. Outside of `routes` they run exactly as before; inside they follow their
    evaluation rule also in train mode, as the engine does: none samples experts or adds noise to its input."""

    def __init__(self, routers: list[Router]) -> None:
        self.routers = routers
        self.num_layers = len(routers)
        self.num_experts = max(router.num_choices for router in routers)
        self.top_k = routers[0].top_k
        self.layers = [router.layer for router in routers]
        self.last: LiveRouting | None = None
        self._context: _Context | None = None
        for index, router in enumerate(routers):
            self._wrap(index, router)

    @classmethod
    def attach(cls, model: nn.Module) -> RouterReplay | None:
        """Wraps every router of a Transformers causal LM; None for a dense model. Expert biases become buffers. Call it
        once, before the model meets DeepSpeed. Raises `UserError` for a family that cannot be replayed exactly."""
        routers = finding.find(model)
        if not routers:
            return None
        assert all(is_materialised(router.block) for router in routers), (
            "attach routing replay before the weights are partitioned"
        )
        measured: dict[tuple[type, type], Router] = {}
        for router in routers:
            router.take_bias_out()
            kind = (type(router.block), type(router.module))
            if kind not in measured:
                probe(router, model)
                measured[kind] = router
            router.measured_as(measured[kind])
        return cls(routers)

    def detach(self) -> None:
        """Gives the routers their own forward back."""
        for router in self.routers:
            for module in dict.fromkeys((router.module, router.block)):
                del module.forward

    @contextmanager
    def routes(
        self,
        routes_BTLK: Tensor | None,
        token_mask_BT: Tensor | None = None,
        expected_mask_BT: Tensor | None = None,
        keep_scores: bool = False,
        measure_health: bool = False,
    ) -> Iterator[RouterReplay]:
        """Replays ``routes_BTLK`` (int64, on the model's device) in every forward pass inside the block.

        Keep the block open through backward: activation checkpointing runs the routers again. A token with -1 in all K
        slots of a layer selects live; None selects live everywhere. ``token_mask_BT`` says which tokens are real (all
        by default) and ``expected_mask_BT`` which of them must have a route (the real ones by default), for `last`.
        ``keep_scores`` keeps every layer's scores until the block closes, for `balance.sequence_auxiliary_loss`;
        ``measure_health`` fills what `monitors.experts` needs.
        Raises ValueError for routes of another shape or type, out of range, partial or with an expert twice, and
        `NonFiniteRouterError` when the block ends and a router computed NaN for a real token.
        """
        assert self._context is None, "routes() blocks do not nest"
        self._context = self._open(routes_BTLK, token_mask_BT, keep_scores)
        self._context.measure_health = measure_health
        self.last = self._empty(self._context, expected_mask_BT)
        try:
            yield self
            self._check_finite(self._context)
        finally:
            self._context = None
            self.last.scores, self.last.indices = [], []

    def _open(self, routes_BTLK: Tensor | None, token_mask_BT: Tensor | None, keep_scores: bool) -> _Context:
        mask = None if token_mask_BT is None else token_mask_BT.reshape(-1).bool()
        device = next(self.routers[0].block.parameters()).device
        is_nan_L = torch.zeros(self.num_layers, dtype=torch.bool, device=device)
        if routes_BTLK is None:
            return _Context(None, mask, keep_scores, is_nan_L)
        if routes_BTLK.dtype != torch.int64:
            raise ValueError(f"routes of type {routes_BTLK.dtype}, expected torch.int64")
        if routes_BTLK.dim() != 4 or routes_BTLK.shape[2:] != (self.num_layers, self.top_k):
            raise ValueError(
                f"routes of shape {tuple(routes_BTLK.shape)}, expected [B, T, {self.num_layers}, {self.top_k}]"
            )
        routes = routes_BTLK.flatten(0, 1)
        mask = torch.ones(len(routes), dtype=torch.bool, device=routes.device) if mask is None else mask
        ordered = routes.sort(dim=-1).values
        live = (routes == -1).all(-1)
        bad = (
            (ordered[..., 0] < 0)
            | (ordered[..., -1] >= self.num_experts)
            | (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        )
        bad &= ~live
        if bool(bad.any()):
            row, layer = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"route {routes[row, layer].tolist()} of token {row}, MoE layer {layer}: expected {self.top_k} "
                f"different experts below {self.num_experts}, or -1 throughout"
            )
        return _Context(routes, mask, keep_scores, is_nan_L)

    def _empty(self, context: _Context, expected_mask_BT: Tensor | None) -> LiveRouting:
        mask = context.token_mask
        device = context.is_nan_L.device if mask is None else mask.device
        num_tokens = (
            torch.zeros((), dtype=torch.float64, device=device) if mask is None else mask.sum().double()
        )
        expected = num_tokens if expected_mask_BT is None else expected_mask_BT.sum().double()
        zeros = torch.zeros(self.num_layers, dtype=torch.float64, device=device)
        layers: list[Tensor | None] = [None] * self.num_layers
        counts = zeros[:, None].repeat(1, self.num_experts)
        return LiveRouting(
            counts_LE=counts,
            replayed_counts_LE=counts.clone(),
            entropy_L=zeros.clone(),
            scored_L=zeros.clone(),
            mismatched_L=zeros.clone(),
            replayed_L=zeros.clone(),
            num_tokens=num_tokens,
            num_expected=expected,
            outside_LN=torch.zeros(
                self.num_layers,
                0 if context.routes is None else len(context.routes),
                dtype=torch.uint8,
                device=device,
            ),
            scores=layers,
            indices=list(layers),
        )

    def _check_finite(self, context: _Context) -> None:
        broken = [self.layers[index] for index in context.is_nan_L.nonzero()[:, 0].tolist()]
        if broken:
            raise NonFiniteRouterError(
                f"the router of layer {broken[0]} computed NaN for a real token ({len(broken)} of {self.num_layers} MoE "
                "layers did): the weights or the hidden states are broken"
            )

    def _wrap(self, index: int, router: Router) -> None:
        original = router.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            context = self._context
            if context is None:
                return original(*args, **kwargs)

            def select(live: Tensor, scores: Tensor | None) -> Tensor:
                return self._select(context, index, live, scores)

            with Selection(router, num_rows_of(args, kwargs), select) as selection:
                out = original(*args, **kwargs)
            assert selection.has_selected, f"{router.name} selected no experts"
            if context.keep_scores and self.last is not None:
                self.last.scores[index] = selection.scores
            if context.measure_health and index not in context.has_entropy and selection.scores is not None:
                context.has_entropy.add(index)
                self._add_entropy(context, index, selection.scores)
            return out

        router.module.forward = forward  # type: ignore[method-assign]
        of_block = router.block.forward

        def forward_of_block(*args: Any, **kwargs: Any) -> Any:
            if self._context is None:
                return of_block(*args, **kwargs)
            with _evaluating(router.drawing_modules()):
                return of_block(*args, **kwargs)

        router.block.forward = forward_of_block  # type: ignore[method-assign]

    @torch.no_grad()
    def _add_entropy(self, context: _Context, index: int, scores: Tensor) -> None:
        """``scores`` [N, E] >= 0; those of a token are divided by their sum first."""
        assert self.last is not None
        values = scores.detach().float()
        total = values.sum(-1).clamp(min=1e-30)
        entropy = total.log() - torch.xlogy(values, values).sum(-1) / total
        if context.token_mask is not None:
            entropy = entropy[context.token_mask]
        self.last.entropy_L[index] = entropy.double().sum() / math.log(max(scores.shape[-1], 2))
        self.last.scored_L[index] = len(entropy)

    def _select(self, context: _Context, index: int, live: Tensor, scores: Tensor | None) -> Tensor:
        """Indices [N, K] for MoE layer ``index``. Written by layer, not by call, so that a recompute changes nothing."""
        last = self.last
        assert last is not None
        num_rows = live.shape[0]
        mask = context.token_mask
        for rows in (mask, context.routes):
            if rows is not None and len(rows) != num_rows:
                raise ValueError(f"the router sees {num_rows} tokens, routes or token mask hold {len(rows)}")
        weights = (
            torch.ones(num_rows, dtype=torch.float64, device=live.device) if mask is None else mask.double()
        )
        last.counts_LE[index] = weights.new_zeros(self.num_experts).scatter_add_(
            0, live.flatten(), weights[:, None].expand_as(live).flatten()
        )
        if mask is None:
            last.num_tokens = weights.sum()
        if scores is not None:
            context.is_nan_L[index] = (scores.isnan().any(-1) & (weights > 0)).any()
        if context.keep_scores:
            last.indices[index] = live
        if context.routes is None:
            return live
        recorded = context.routes[:, index]
        is_live = recorded[:, 0] < 0
        outside = (recorded[:, :, None] != live[:, None, :]).all(-1).sum(-1)
        same = outside == 0
        replayed = weights * ~is_live
        last.replayed_L[index] = replayed.sum()
        last.mismatched_L[index] = (replayed * ~same).sum()
        last.outside_LN[index] = (outside * replayed).to(torch.uint8)
        if context.measure_health:
            last.replayed_counts_LE[index] = weights.new_zeros(self.num_experts).scatter_add_(
                0, recorded.clamp(min=0).flatten(), replayed[:, None].expand_as(recorded).flatten()
            )
        # Equal sets keep the live order: where nothing differs, no bit of the output changes. Where the weights depend
        # on the order, the order is part of what was recorded.
        keep = is_live if self.routers[index].is_ordered else is_live | same
        return torch.where(keep[:, None], live, recorded)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Evaluation mode for these modules alone, not for what is in them."""
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.training = was_training
