"""Routing replay in a model with LoRA adapters (PEFT), attached before or after they are put on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.learner.moe.balance import freeze_routers
from posttrain.learner.moe.replay import RouterReplay
from tests.unit.moe_families import FAMILIES
from tests.unit.moe_passes import Handed, random_routes, reference_gates, router_weights, tokens

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ROUTER = {"target_parameters": ["gate.weight"]}
LINEAR_ROUTER = {"target_modules": ["router"]}
CASES = {
    "attention": ("qwen3_moe", ATTENTION),
    "experts": ("qwen3_moe", EXPERTS),
    "router": ("qwen3_moe", ROUTER),
    "router_with_groups": ("deepseek_v3_grouped", ROUTER),
    "everything": ("mimo_v2_flash", {**ATTENTION, "target_parameters": ["experts.down_proj", "gate.weight"]}),
    "router_in_the_block": ("jamba", LINEAR_ROUTER),
    "ordered_router": ("phimoe", EXPERTS),
}


def wrapped(case: str, attach_first: bool) -> tuple[Any, Any, RouterReplay]:
    """(plain model with the merged weights, model with adapters that are not 0, its replay)."""
    import peft

    name, targets = CASES[case]
    model, plain = FAMILIES[name].build(), FAMILIES[name].build()
    replay = RouterReplay.attach(model) if attach_first else None
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **targets)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.normal_(0, 0.3)
    replay = replay or RouterReplay.attach(adapted)
    assert replay is not None
    return plain, adapted.eval(), replay


def merged(plain: Any, adapted: Any) -> Any:
    """``plain`` with the weights of ``adapted``, its adapters folded in."""
    adapted.merge_adapter()
    state = {n: t.clone() for n, t in adapted.get_base_model().state_dict().items() if "lora_" not in n}
    adapted.unmerge_adapter()
    plain.load_state_dict({n.replace(".base_layer", ""): t for n, t in state.items()})
    return plain


@pytest.mark.parametrize("attach_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("case", CASES)
def test_routes_are_replayed_with_adapters(case: str, attach_first: bool) -> None:
    plain, adapted, replay = wrapped(case, attach_first)
    reference = merged(plain, adapted)
    own = RouterReplay.attach(reference)
    assert own is not None
    assert replay.layers == own.layers
    routes = random_routes(replay)
    with Handed(replay) as handed, replay.routes(routes):
        got = adapted(input_ids=tokens(), use_cache=False).logits
        got.square().mean().backward()
    with Handed(own) as expected, own.routes(routes):
        logits = reference(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    for layer in range(replay.num_layers):
        assert torch.equal(handed.indices[layer], expected.indices[layer])
        torch.testing.assert_close(handed.gates[layer], expected.gates[layer], rtol=1e-4, atol=1e-5)
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert trained == {n for n, p in adapted.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("attach_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("case", ["router", "router_with_groups", "router_in_the_block"])
def test_adapters_of_the_router_get_the_gradient_of_the_family_rule(case: str, attach_first: bool) -> None:
    """The gradient of the adapted matrix, by the float64 rule, taken to the adapters by the chain rule."""
    plain, adapted, replay = wrapped(case, attach_first)
    reference = merged(plain, adapted)
    own = RouterReplay.attach(reference)
    assert own is not None
    routes = random_routes(replay)
    with Handed(replay) as handed, replay.routes(routes):
        adapted(input_ids=tokens(), use_cache=False)
    factors = torch.randn(handed.gates[0].shape, generator=torch.Generator().manual_seed(3))
    adapters = [p for p in replay.routers[0].parameters() if p.requires_grad]
    assert len(adapters) == 2
    got = torch.autograd.grad((handed.gates[0] * factors).sum(), adapters)
    _, weights = router_weights(own, 0)
    gates = reference_gates(FAMILIES[CASES[case][0]], handed, 0, weights)
    (of_matrix,) = torch.autograd.grad((gates * factors).sum(), list(weights.values()))
    a, b = (p.detach().double() for p in adapters)  # [r, H] and [E, r]; the matrix gains alpha / r * b @ a
    for g, e in zip(got, (2 * b.T @ of_matrix, 2 * of_matrix @ a.T), strict=True):
        size: Tensor = e.abs().max()
        assert size > 1e-4
        torch.testing.assert_close(g.double() / size, e / size, rtol=0, atol=1e-5)


def test_frozen_routers_freeze_their_adapters() -> None:
    _, adapted, replay = wrapped("everything", True)
    freeze_routers(replay)
    left = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert left
    assert not [n for n in left if ".gate." in n]
