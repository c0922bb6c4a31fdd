"""What the papers of the MoE families say their gates are, in float64: from hidden states to logits, from logits to gates.

Written apart from the code that replays; `tests/unit/moe_families.py` says which family follows which rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]  # trainable parameters of a router by name, float64
Logits = Callable[[Weights, Tensor, dict[str, Any]], Tensor]  # (weights, hidden [N, H], arguments) -> [N, C]


@dataclass(frozen=True)
class Rule:
    """How the logits [N, C] of a router weigh the experts [N, K] that were chosen: gates [N, K]."""

    text: str
    gates: Callable[[Tensor, Tensor, Weights], Tensor]
    set_only: bool = True  # the logits of other experts do not matter


SOFTMAX_OF_SET = Rule(
    "softmax over the chosen experts", lambda logits, chosen, _: logits.gather(1, chosen).softmax(-1)
)


def softmax_of_all(scale: float = 1.0) -> Rule:
    return Rule(
        "softmax over all experts",
        lambda logits, chosen, _: scale * logits.softmax(-1).gather(1, chosen),
        set_only=False,
    )


def sigmoid_of_set(scale: float = 1.0) -> Rule:
    def gates(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
        scores = torch.sigmoid(logits).gather(1, chosen)
        return scale * scores / scores.sum(-1, keepdim=True)

    return Rule("sigmoid, divided by the sum over the chosen experts", gates)


def _sigmoid(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
    return torch.sigmoid(logits.gather(1, chosen))


def _root_softplus(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
    scores = F.softplus(logits).sqrt().gather(1, chosen)
    return 1.5 * scores / scores.sum(-1, keepdim=True)


def _sparse_mixer(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
    """Phi-3.5-MoE, section 2: one expert after the other, softmax over those within 2 * jitter of the chosen one."""
    gates, taken = [], torch.zeros_like(logits, dtype=torch.bool)
    for place in range(chosen.shape[1]):
        expert = chosen[:, place : place + 1]
        top = logits.gather(1, expert).detach()
        far = (top - logits.detach()) / torch.maximum(logits.detach().abs(), top) > 0.02
        near = logits.masked_fill(far | taken, float("-inf"))
        gates.append(near.softmax(-1).gather(1, expert))
        taken = taken.scatter(1, expert, True)
    return torch.cat(gates, dim=1)


def _scaled_per_expert(logits: Tensor, chosen: Tensor, weights: Weights) -> Tensor:
    return logits.gather(1, chosen).softmax(-1) * weights["per_expert_scale"][chosen]


def _with_shared_sink(logits: Tensor, chosen: Tensor, weights: Weights) -> Tensor:
    """Inkling: the two shared experts have logits of their own and take part in the sum."""
    scores = torch.sigmoid(torch.cat([logits[:, :8].gather(1, chosen), logits[:, 8:]], dim=1))
    return 8.0 * weights["global_scale"] * (scores / scores.sum(-1, keepdim=True))[:, : chosen.shape[1]]


SIGMOID = Rule("sigmoid", _sigmoid)
ROOT_SOFTPLUS = Rule("root of softplus, divided by the sum over the chosen experts", _root_softplus)
SPARSE_MIXER = Rule("SparseMixer, in the order chosen", _sparse_mixer, set_only=False)
SCALED_PER_EXPERT = Rule("softmax over the chosen experts, times a scale per expert", _scaled_per_expert)
SHARED_SINK = Rule("sigmoid, divided by the sum over the chosen and the shared experts", _with_shared_sink)


def linear(weights: Weights, hidden: Tensor, _: dict[str, Any]) -> Tensor:
    logits = hidden @ next(w for w in weights.values() if w.dim() == 2).T
    for bias in (w for w in weights.values() if w.dim() == 1):
        logits = logits + bias
    return logits


def soft_capped(weights: Weights, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    return 3.0 * torch.tanh(linear(weights, hidden, arguments) / 3.0)


def _rms_norm(hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


def normed(weights: Weights, hidden: Tensor, _: dict[str, Any]) -> Tensor:
    """Gemma 4: root mean square norm, a learned scale, then the projection."""
    return (_rms_norm(hidden) * weights["scale"] * hidden.shape[-1] ** -0.5) @ weights["proj.weight"].T


def without_scales(weights: Weights, hidden: Tensor, _: dict[str, Any]) -> Tensor:
    return hidden @ weights["weight"].T


def zaya(weights: Weights, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """ZAYA1: down projection, a share of the former layer's router state, an MLP of three layers."""
    states = hidden @ weights["down_proj.weight"].T + weights["down_proj.bias"]
    if arguments.get("router_states") is not None and "router_states_scale" in weights:
        before = arguments["router_states"].detach().double().reshape(len(hidden), -1)
        states = states + before * weights["router_states_scale"]
    states = _rms_norm(states) * weights["router_mlp.norm.weight"]
    for name in ("router_mlp.fc1", "router_mlp.fc2"):
        states = F.gelu(states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    return states @ weights["router_mlp.out_proj.weight"].T
