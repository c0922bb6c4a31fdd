"""Routing replay on a tiny random model of every family: which experts change, how they are weighted does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from posttrain.config import UserError
from posttrain.learner.moe.replay import RouterReplay
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, REFUSED, SHAPE, TOP_K
from tests.unit.moe_passes import (
    B,
    Handed,
    T,
    attached,
    live_routes,
    never_live,
    random_routes,
    reference_gates,
    router_weights,
    tokens,
)


def outputs(model: Any) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_is_read(name: str) -> None:
    family, model, replay = attached(name)
    assert replay.num_layers == family.num_moe_layers
    assert (replay.num_experts, replay.top_k) == (family.num_choices, family.top_k)
    num_layers = model.config.get_text_config().num_hidden_layers
    last = [*range(num_layers - family.num_moe_layers, num_layers)]
    assert replay.layers == (family.layers or last)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_live_routes_change_no_bit(name: str) -> None:
    """In train mode too: a router that draws experts or noise there follows its evaluation rule inside the block."""
    family, model, replay = attached(name)
    plain = outputs(model)
    routes = live_routes(model, replay)
    replays = [None, routes]
    if not replay.routers[0].is_ordered:
        replays.append(routes.flip(-1))  # the order within a set means nothing
    for recorded in replays:
        with replay.routes(recorded):
            assert torch.equal(outputs(model), plain)
    assert replay.last is not None
    assert replay.last.mismatched_L.sum() == 0
    assert (replay.last.replayed_L == B * T).all()
    model.train()
    try:
        drawn = outputs(model)
        with replay.routes(routes):
            assert torch.equal(outputs(model), plain)
    finally:
        model.eval()
    assert torch.equal(drawn, plain) != family.draws


@pytest.mark.parametrize("name", FAMILIES)
def test_other_experts_get_the_family_rule_on_the_recorded_set(name: str) -> None:
    family, model, replay = attached(name)
    routes = random_routes(replay)
    with Handed(replay) as handed, replay.routes(routes):
        outputs(model)
    for layer in range(replay.num_layers):
        recorded = routes[:, :, layer].reshape(-1, replay.top_k)
        assert torch.equal(handed.indices[layer].sort(-1).values, recorded.sort(-1).values)
        expected = reference_gates(family, handed, layer, router_weights(replay, layer)[1])
        torch.testing.assert_close(handed.gates[layer].double(), expected, rtol=1e-5, atol=1e-6)
    assert replay.last is not None
    assert replay.last.mismatched_L.sum() == (replay.last.outside_LN != 0).sum() > 0


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, False) for name in FAMILIES] + [(name, True) for name, f in FAMILIES.items() if f.draws],
)
def test_router_gradient_equals_float64_reference(name: str, training: bool) -> None:
    """For recorded experts outside the live top-k, which a gather from masked scores would leave without one."""
    family, model, replay = attached(name)
    routes = never_live(live_routes(model, replay))
    model.train(training)
    try:
        with Handed(replay) as handed, replay.routes(routes):
            outputs(model)
    finally:
        model.eval()
    generator = torch.Generator().manual_seed(3)
    for layer in range(replay.num_layers):
        factors = torch.randn(B * T, replay.top_k, generator=generator)
        parameters, weights = router_weights(replay, layer)
        gates = reference_gates(family, handed, layer, weights)
        expected = torch.autograd.grad((gates * factors).sum(), list(weights.values()), allow_unused=True)
        got = torch.autograd.grad(
            (handed.gates[layer] * factors).sum(), parameters, retain_graph=True, allow_unused=True
        )
        for g, e in zip(got, expected, strict=True):
            if e is None:
                assert g is None
                continue
            assert g is not None
            size = e.abs().max()
            assert size > 1e-5
            torch.testing.assert_close(g.double() / size, e / size, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.rule.set_only])
def test_experts_outside_the_set_get_no_router_gradient(name: str) -> None:
    _, model, replay = attached(name)
    first = NUM_EXPERTS - replay.top_k
    routes = torch.arange(first, NUM_EXPERTS).expand(B, T, replay.num_layers, -1).contiguous()
    factors = torch.randn(B * T, replay.top_k, generator=torch.Generator().manual_seed(3))
    with Handed(replay) as handed, replay.routes(routes):
        outputs(model)
        for layer in range(replay.num_layers):
            matrix = next(p for p in router_weights(replay, layer)[0] if p.dim() == 2)
            total = (handed.gates[layer] * factors).sum()
            (grad,) = torch.autograd.grad(total, [matrix], retain_graph=True)
            # A softmax over all experts, normalised afterwards, cancels up to rounding.
            assert grad[:first].abs().max() <= 1e-6 * grad[first:].abs().max()
            assert (grad[first:NUM_EXPERTS] != 0).any(dim=1).all()


def test_a_recorded_pair_has_an_order_where_the_gates_depend_on_it() -> None:
    """Phi-3.5-MoE: the second expert is weighed without the first one. vLLM records the pair in the order chosen."""
    family, model, replay = attached("phimoe")
    assert replay.routers[0].is_ordered
    routes = live_routes(model, replay)
    gates = []
    for recorded in (routes, routes.flip(-1)):
        with Handed(replay) as handed, replay.routes(recorded):
            outputs(model)
        assert torch.equal(handed.indices[0], recorded[:, :, 0].reshape(-1, TOP_K))
        expected = reference_gates(family, handed, 0, router_weights(replay, 0)[1])
        torch.testing.assert_close(handed.gates[0].double(), expected, rtol=1e-5, atol=1e-6)
        gates.append(handed.gates[0])
    assert (gates[0] - gates[1].flip(-1)).abs().max() > 0.1
    assert replay.last is not None
    assert replay.last.mismatched_L[0] == 0  # the sets do not differ


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_replayed_are_refused_by_name(name: str) -> None:
    refused = REFUSED[name]
    model = getattr(transformers, refused.model_class)
    with pytest.raises(UserError, match=f"(?i)model.path: .*{name}.*{refused.message}"):
        RouterReplay.attach(model(model.config_class(**{**SHAPE, **refused.config})))


@pytest.mark.parametrize(
    ("model_class", "extra"),
    [
        ("Qwen3ForCausalLM", {}),
        ("DogeForCausalLM", {}),  # its configuration counts experts that only its MoE variant has
        ("Gemma4ForCausalLM", {"hidden_size_per_layer_input": 0}),
    ],
)
def test_dense_models_have_nothing_to_replay(model_class: str, extra: dict[str, Any]) -> None:
    model = getattr(transformers, model_class)
    assert RouterReplay.attach(model(model.config_class(**{**SHAPE, **extra}))) is None


def test_a_model_that_hides_its_experts_is_refused() -> None:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE))
    model.config.num_experts = 8
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        RouterReplay.attach(model)


def test_heads_that_predict_further_tokens_are_no_layers() -> None:
    """Neither as modules of their own nor as layers beyond the decoder's, where DeepSeek-V3 checkpoints have them."""
    model = FAMILIES["glm4_moe"].build()
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
    model.model.mtp = nn.ModuleList([copy.deepcopy(model.model.layers[-1])])
    replay = RouterReplay.attach(model)
    assert replay is not None
    assert replay.layers == [1, 2]
    plain = outputs(model)
    with replay.routes(live_routes(model, replay)):
        assert torch.equal(outputs(model), plain)


def test_minus_one_selects_live_for_that_token_alone() -> None:
    _, model, replay = attached("mimo_v2_flash")
    live = live_routes(model, replay)
    routes = random_routes(replay)
    routes[:, -1] = -1
    expected = torch.ones(B, T, dtype=torch.bool)
    expected[:, -1] = False
    with Handed(replay) as handed, replay.routes(routes, expected_mask_BT=expected):
        outputs(model)
    got = handed.indices[0].view(B, T, TOP_K)
    # First MoE layer: its input has not been changed by replay.
    assert torch.equal(got[:, -1], live[:, -1, 0])
    assert torch.equal(got[:, :-1].sort(-1).values, routes[:, :-1, 0].sort(-1).values)
    assert replay.last is not None
    covered, wanted = replay.last.coverage()
    assert covered == wanted == B * (T - 1) * replay.num_layers


def test_monitor_counts_real_tokens_and_names_what_differs() -> None:
    _, model, replay = attached("qwen3_moe")
    live = live_routes(model, replay)
    routes = live.clone()
    routes[0, 2, 0] = never_live(live)[0, 2, 0]  # one token, first MoE layer
    routes[1, 5, 1] = never_live(live)[1, 5, 1]  # a padding token
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    with replay.routes(routes, token_mask_BT=mask):
        outputs(model)
    last = replay.last
    assert last is not None
    assert last.num_tokens == B * T - 3
    assert last.mismatched_L[0] == 1
    assert last.replayed_L.tolist() == [B * T - 3] * replay.num_layers
    expected = torch.bincount(live[:, :, 0][mask].flatten(), minlength=NUM_EXPERTS).double()
    assert torch.equal(last.counts_LE[0], expected)


def test_outside_the_block_nothing_is_replayed() -> None:
    _, model, replay = attached("qwen3_moe")
    plain = outputs(model)
    with replay.routes(random_routes(replay)):
        assert not torch.equal(outputs(model), plain)
    assert torch.equal(outputs(model), plain)


@pytest.mark.parametrize("name", ["qwen3_moe", "jamba", "gemma4"])
def test_detach_gives_the_forward_back(name: str) -> None:
    model = FAMILIES[name].build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    replay.detach()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert RouterReplay.attach(model) is not None
