"""One forward of a family's model: tokens, routes, and what its routers and experts were handed, against its rule."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.learner.moe.replay import RouterReplay
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, Family
from tests.unit.moe_rules import Weights

B, T = 2, 7


@cache
def attached(name: str) -> tuple[Family, Any, RouterReplay]:
    """One model per family for all tests that leave it as it is, in evaluation mode."""
    family = FAMILIES[name]
    model = family.build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    return family, model, replay


def tokens(rows: int = B, length: int = T) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def random_routes(replay: RouterReplay, rows: int = B, length: int = T, seed: int = 0) -> Tensor:
    """[B, T, L, K] int64: different experts, in random order."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, length, replay.num_layers, NUM_EXPERTS, generator=generator)
    return scores.argsort(-1)[..., : replay.top_k]


class Handed:
    """What routers were given in the last forward pass, and what the experts got from them. By MoE layer."""

    def __init__(self, replay: RouterReplay) -> None:
        self.top_k = replay.top_k
        self.hidden: dict[int, Tensor] = {}  # [N, H]
        self.arguments: dict[int, dict[str, Any]] = {}
        self.indices: dict[int, Tensor] = {}  # [N, K]
        self.gates: dict[int, Tensor] = {}  # [N, K]
        self.hooks = []
        for layer, router in enumerate(replay.routers):
            self.hooks += [
                router.module.register_forward_pre_hook(self._router(layer), with_kwargs=True),
                router.module.register_forward_hook(self._dense(layer)),
                router.block.experts.register_forward_pre_hook(self._experts(layer), with_kwargs=True),
            ]

    def _router(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = (*args, *kwargs.values())[0]
            self.hidden[layer] = hidden.reshape(-1, hidden.shape[-1])
            self.arguments[layer] = kwargs

        return hook

    def _experts(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            num_rows = len(self.hidden[layer])
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            pairs = [t for t in given if t.shape == (num_rows, self.top_k)]
            if pairs:
                self.indices[layer] = next(t for t in pairs if not t.is_floating_point())
                self.gates[layer] = next(t for t in pairs if t.is_floating_point())

        return hook

    def _dense(self, layer: int) -> Any:
        """Llama 4 hands every expert every token, times a score that is 0 unless it was chosen."""

        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            if isinstance(out, tuple) and len(out) == 2:
                self.indices[layer] = out[0].topk(self.top_k).indices
                self.gates[layer] = out[0].gather(1, self.indices[layer])

        return hook

    def __enter__(self) -> Handed:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def live_routes(model: Any, replay: RouterReplay) -> Tensor:
    """[B, T, L, K] in the router's own order, without any replay."""
    with Handed(replay) as handed:
        model(input_ids=tokens(), use_cache=False)
    # ZAYA1 hands its skip choice on as expert 0 with weight 0.
    layers = [handed.indices[i].where(handed.gates[i] != 0, NUM_EXPERTS) for i in range(replay.num_layers)]
    return torch.stack(layers, dim=1).view(B, T, -1, replay.top_k)


def never_live(live: Tensor) -> Tensor:
    """Routes of which no expert is in the live selection, where there are enough experts for that."""
    top_k = live.shape[-1]
    return (live.max(-1, keepdim=True).values + 1 + torch.arange(top_k)) % NUM_EXPERTS


def router_weights(replay: RouterReplay, layer: int) -> tuple[list[nn.Parameter], Weights]:
    """Trainable parameters of a router, and fresh float64 copies of them by name."""
    router = replay.routers[layer]
    wanted = {id(p) for p in router.parameters() if p.requires_grad}
    owner = router.block if router.module is router.block else router.module
    named = {name: p for name, p in owner.named_parameters() if id(p) in wanted}
    assert len(named) == len(wanted) > 0
    return list(named.values()), {k: p.detach().double().requires_grad_() for k, p in named.items()}


def reference_gates(family: Family, handed: Handed, layer: int, weights: Weights) -> Tensor:
    """[N, K] float64, by the rule of the family, of the experts that were handed on."""
    hidden = handed.hidden[layer].detach().double()
    logits = family.logits(weights, hidden, handed.arguments[layer])
    return family.rule.gates(logits, handed.indices[layer], weights)
