"""Models of families that nobody has seen: routes are followed, or the family is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.config import UserError
from posttrain.learner.moe.balance import freeze_routers
from posttrain.learner.moe.replay import RouterReplay

HIDDEN, EXPERTS, VOCAB = 16, 6, 32


class Block(nn.Module):
    """A router and experts that are modules of their own; variants below change one thing each."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, ids) [N, K]."""
        weights, ids = torch.topk(self.gate(hidden).softmax(-1), self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, hidden: Tensor) -> Tensor:
        shape, hidden = hidden.shape, hidden.reshape(-1, HIDDEN)
        weights, ids = self.route(hidden)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(ids == number)
            out = out.index_add(0, rows, expert(hidden[rows]) * weights[rows, places, None])
        return out.view(shape)


class NeedsMore(Block):
    """A block that does not run on hidden states alone."""

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden) + 0 * residual


class ByMethod(Block):
    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(hidden).sigmoid().topk(self.top_k, sorted=False)
        return weights, ids


class ByMax(Block):
    """One expert after the other."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = rest = self.gate(hidden).softmax(-1)
        ids = []
        for _ in range(self.top_k):
            ids.append(rest.max(dim=-1, keepdim=True)[1])
            rest = rest.scatter(1, ids[-1], -1.0)
        chosen = torch.cat(ids, dim=1)
        return scores.gather(1, chosen), chosen


class TopOne(Block):
    """Switch: argmax finds the expert, max its weight."""

    top_k = 1

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        return scores.max(dim=-1).values[:, None], torch.argmax(scores, dim=-1)[:, None]


class Dense(Block):
    """Every expert computes every token; a weight of 0 leaves the others out."""

    def forward(self, hidden: Tensor) -> Tensor:
        weights, ids = self.route(hidden.reshape(-1, HIDDEN))
        gates = weights.new_zeros(len(ids), EXPERTS).scatter(1, ids, weights).view(*hidden.shape[:2], EXPERTS)
        outs = torch.stack([expert(hidden) for expert in self.experts], dim=-1)
        return (outs * gates[:, :, None, :]).sum(-1)


class DenseFused(Block):
    """Fused experts that get the weights of all experts, 0 for the others."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) * 0.2)

        def forward(self, hidden: Tensor, gates: Tensor) -> Tensor:
            return torch.einsum("nh,ehi,ne->ni", hidden, self.weight, gates)

    def __init__(self) -> None:
        super().__init__()
        self.experts = self.Experts()  # type: ignore[assignment]

    def forward(self, hidden: Tensor) -> Tensor:
        weights, ids = self.route(hidden.reshape(-1, HIDDEN))
        gates = weights.new_zeros(len(ids), EXPERTS).scatter(1, ids, weights)
        return self.experts(hidden.reshape(-1, HIDDEN), gates).view(hidden.shape)


class Grouped(Block):
    """Only the better half of the experts may be selected; masked as DeepSeek does."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).sigmoid()
        best = scores.view(-1, 2, EXPERTS // 2).max(-1).values.argmax(-1, keepdim=True)
        outside = torch.arange(EXPERTS) // (EXPERTS // 2) != best
        weights, ids = torch.topk(scores.masked_fill(outside, 0.0), self.top_k, dim=-1)
        return weights, ids


class GroupedByProduct(Block):
    """The mask multiplies: an expert outside of it has weight 0 and no gradient."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).sigmoid()
        best = scores.view(-1, 2, EXPERTS // 2).max(-1).values.argmax(-1, keepdim=True)
        inside = torch.arange(EXPERTS) // (EXPERTS // 2) == best
        weights, ids = torch.topk(scores * inside, self.top_k, dim=-1)
        return weights, ids


class Sorted(Block):
    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = torch.sort(self.gate(hidden).softmax(-1), descending=True)
        return values[:, : self.top_k], ids[:, : self.top_k]


class Sampled(Block):
    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        ids = torch.multinomial(scores, self.top_k)
        return scores.gather(1, ids), ids


class Twice(Block):
    """What it selects by is not what it computes with."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        ids = (scores >= scores.kthvalue(EXPERTS - self.top_k + 1, dim=-1, keepdim=True).values).nonzero()[
            :, 1
        ]
        return torch.topk(scores, self.top_k, dim=-1).values, ids.view(-1, self.top_k)


class TwoCalls(Block):
    """One topk for the weights, another one for the experts."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        return torch.topk(scores, self.top_k).values, torch.topk(scores, self.top_k).indices


class TwoCallsTopOne(TwoCalls):
    top_k = 1


class Model(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, hidden_size=HIDDEN)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            extra = (hidden,) if isinstance(layer, NeedsMore) else ()
            hidden = hidden + layer(hidden, *extra)
        return self.head(hidden)


def built(block: type[Block]) -> Model:
    torch.manual_seed(0)
    model = Model(block)
    for layer in model.layers:
        layer.gate.weight.data.normal_(0, 1)
    return model


KNOWN = [Block, NeedsMore, ByMethod, ByMax, TopOne, Dense, DenseFused, Grouped]
IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("block", KNOWN, ids=lambda block: block.__name__)
def test_routes_are_followed_in_an_unknown_family(block: type[Block]) -> None:
    model = built(block)
    plain = model(IDS)
    replay = RouterReplay.attach(model)
    assert replay is not None
    assert (replay.layers, replay.num_experts, replay.top_k) == ([0, 1], EXPERTS, block.top_k)
    chosen: dict[int, Tensor] = {}
    select = replay._select

    def note(context: Any, index: int, live: Tensor, scores: Any) -> Tensor:
        chosen[index] = live
        return select(context, index, live, scores)

    replay._select = note  # type: ignore[method-assign]
    with replay.routes(None):
        assert torch.equal(model(IDS), plain)
    live = torch.stack([chosen[0], chosen[1]], dim=1).view(2, 5, 2, -1)
    with replay.routes(live):
        assert torch.equal(model(IDS), plain)
    other = (live.max(-1, keepdim=True).values + 1 + torch.arange(block.top_k)) % EXPERTS
    with replay.routes(other):
        assert not torch.equal(model(IDS), plain)
        if isinstance(model.layers[0].experts, nn.ModuleList):
            model.zero_grad()
            model(IDS[:1, :1].expand(2, 5)).sum().backward()
            counts = torch.bincount(other[:, :, 0].flatten(), minlength=EXPERTS)
            got = [e.weight.grad is not None and bool(e.weight.grad.any()) for e in model.layers[0].experts]
            assert got == (counts > 0).tolist()
            assert model.layers[0].gate.weight.grad.abs().sum() > 0
    freeze_routers(replay)
    assert not any(p.requires_grad for layer in model.layers for p in layer.gate.parameters())


def test_a_masked_expert_keeps_its_weight() -> None:
    model = built(Grouped)
    replay = RouterReplay.attach(model)
    assert replay is not None
    layer: Any = model.layers[0]
    given: list[Tensor] = []
    layer.experts[0].register_forward_hook(lambda _, args, out: given.append(out.detach()))
    outs = []
    for ids in ([0, 5], [1, 5]):  # of two groups, which the mask never allows
        routes = torch.tensor(ids).expand(2, 5, 2, 2).contiguous()
        with replay.routes(routes):
            outs.append(layer(model.embed(IDS)))
    gate = torch.sigmoid(layer.gate(model.embed(IDS)))
    hidden = model.embed(IDS)
    expected = layer.experts[0](hidden) * gate[..., :1] - layer.experts[1](hidden) * gate[..., 1:2]
    torch.testing.assert_close(outs[0] - outs[1], expected)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (GroupedByProduct, "weights vanish"),
        (Sorted, "selects neither by topk"),
        (Sampled, "selects neither by topk"),
        (Twice, "not handed the exchanged selection"),
        (TwoCalls, "weights stay those of the live selection"),
        (TwoCallsTopOne, "weights stay those of the live selection"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(block: type[Block], why: str) -> None:
    with pytest.raises(UserError, match=rf"does not know {block.__name__}/.*layers\.0.*{why}"):
        RouterReplay.attach(built(block))


def test_experts_that_nobody_declares_are_no_dense_model() -> None:
    class HiddenExperts(nn.Module):
        pass

    model = built(Block)
    model.layers = nn.ModuleList([HiddenExperts()])
    with pytest.raises(UserError, match="Model has experts but no MoE block"):
        RouterReplay.attach(model)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = built(Block).train()
    model.layers[1].eval()
    model.layers[1].gate.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert RouterReplay.attach(model) is not None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and model.layers[0].training and not model.layers[1].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_weight_that_rounds_to_nothing_is_no_reason_to_refuse() -> None:
    """Large logits: over the hidden states as they are, the weight of a forced expert would be exactly 0."""
    model = built(Block)
    for layer in model.layers:
        layer.gate.weight.data.mul_(1e2)
    scores = model.layers[0].gate(F.normalize(model.embed(IDS), dim=-1) * HIDDEN**0.5).softmax(-1)
    assert (scores == 0).any()
    assert RouterReplay.attach(model) is not None
