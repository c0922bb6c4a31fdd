"""Routing replay (R3, arXiv 2510.11370): the recorded experts, weighted by the live router.

Owns what happens inside routers during a forward pass of the policy. Refuses routes of another shape or with ids
that no router can have had. Never used for teachers: a model without `RouterReplay.attach` cannot receive routes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.learner.moe import routers as finding
from posttrain.learner.moe.probe import is_materialised, probe
from posttrain.learner.moe.routers import Router, Selection


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


class RouterReplay:
    """Routers of one model, wrapped. Outside of `routes` they run exactly as before."""

    def __init__(self, routers: list[Router]) -> None:
        self.routers = routers
        self.num_layers = len(routers)
        self.num_experts = routers[0].num_experts
        self.top_k = routers[0].top_k
        self.layers = [router.layer for router in routers]
        self.last: LiveRouting | None = None
        self._context: _Context | None = None
        for index, router in enumerate(routers):
            self._wrap(index, router)

    @classmethod
    def attach(cls, model: nn.Module) -> RouterReplay | None:
        """Wraps every router of a Transformers causal LM; None for a dense model. Call it once, before the model
        meets DeepSpeed. Raises `UserError` for a family that cannot be replayed exactly."""
        routers = finding.find(model)
        if not routers:
            return None
        hidden_size = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        measured: dict[tuple[type, type], int] = {}
        for router in routers:
            assert is_materialised(router.block), (
                f"{router.name}: attach routing replay before the weights are partitioned"
            )
            kind = (type(router.block), type(router.module))
            if kind not in measured:
                probe(router, hidden_size)
                measured[kind] = router.selecting_call
            router.selecting_call = measured[kind]
        return cls(routers)

    def detach(self) -> None:
        """Gives the routers their own forward back."""
        for router in self.routers:
            del router.module.forward
            router.original_forward = None

    @contextmanager
    def routes(
        self,
        routes_BTLK: Tensor | None,
        token_mask_BT: Tensor | None = None,
        expected_mask_BT: Tensor | None = None,
        keep_scores: bool = False,
    ) -> Iterator[RouterReplay]:
        """Replays ``routes_BTLK`` (int64, on the model's device) in every forward pass inside the block.

        Keep the block open through backward: activation checkpointing runs the routers again. A token with -1 in all K
        slots of a layer selects live; None selects live everywhere. ``token_mask_BT`` says which tokens are real (all
        by default) and ``expected_mask_BT`` which of them must have a route (the real ones by default), for `last`.
        ``keep_scores`` keeps every layer's scores until the block closes, for `balance.sequence_auxiliary_loss`.
        Raises ValueError for routes of another shape, out of range, partial or with an expert twice.
        """
        assert self._context is None, "routes() blocks do not nest"
        self._context = self._open(routes_BTLK, token_mask_BT, keep_scores)
        self.last = self._empty(self._context, expected_mask_BT)
        try:
            yield self
        finally:
            self._context = None
            self.last.scores, self.last.indices = [], []

    def _open(self, routes_BTLK: Tensor | None, token_mask_BT: Tensor | None, keep_scores: bool) -> _Context:
        mask = None if token_mask_BT is None else token_mask_BT.reshape(-1).bool()
        if routes_BTLK is None:
            return _Context(None, mask, keep_scores)
        if routes_BTLK.dim() != 4 or routes_BTLK.shape[2:] != (self.num_layers, self.top_k):
            raise ValueError(
                f"routes of shape {tuple(routes_BTLK.shape)}, expected [B, T, {self.num_layers}, {self.top_k}]"
            )
        routes = routes_BTLK.flatten(0, 1).long()
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
        return _Context(routes, mask, keep_scores)

    def _empty(self, context: _Context, expected_mask_BT: Tensor | None) -> LiveRouting:
        mask = context.token_mask
        device = next(self.routers[0].module.parameters()).device if mask is None else mask.device
        num_tokens = (
            torch.zeros((), dtype=torch.float64, device=device) if mask is None else mask.sum().double()
        )
        expected = num_tokens if expected_mask_BT is None else expected_mask_BT.sum().double()
        zeros = torch.zeros(self.num_layers, dtype=torch.float64, device=device)
        layers: list[Tensor | None] = [None] * self.num_layers
        return LiveRouting(
            counts_LE=zeros[:, None].repeat(1, self.num_experts),
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

    def _wrap(self, index: int, router: Router) -> None:
        original = router.module.forward
        router.original_forward = original

        def forward(*args: Any, **kwargs: Any) -> Any:
            context = self._context
            if context is None:
                return original(*args, **kwargs)
            with Selection(router, lambda live: self._select(context, index, live)) as selection:
                out = original(*args, **kwargs)
            assert selection.num_candidates > router.selecting_call, f"{router.name} selected no experts"
            if context.keep_scores and self.last is not None:
                self.last.scores[index] = selection.scores
            return out

        router.module.forward = forward  # type: ignore[method-assign]

    def _select(self, context: _Context, index: int, live: Tensor) -> Tensor:
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
        # Equal sets keep the live order: where nothing differs, no bit of the output changes.
        return torch.where((is_live | same)[:, None], live, recorded)
