"""Routing replay on a tiny random model of every family: which experts change, how they are weighted does not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from posttrain.config import UserError
from posttrain.learner.moe.replay import RouterReplay
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, REFUSED, SHAPE, TOP_K, Family

B, T = 2, 7


@cache
def attached(name: str) -> tuple[Family, nn.Module, RouterReplay]:
    family = FAMILIES[name]
    model = family.build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    return family, model, replay


def tokens() -> Tensor:
    return torch.randint(3, 64, (B, T), generator=torch.Generator().manual_seed(1))


def random_routes(num_layers: int, seed: int = 0) -> Tensor:
    scores = torch.rand(B, T, num_layers, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1)[..., :TOP_K]


class Handed:
    """What every MoE block and its experts were given in the last forward pass."""

    def __init__(self, replay: RouterReplay) -> None:
        self.hidden: dict[int, Tensor] = {}
        self.indices: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}
        self.hooks = []
        for layer, router in enumerate(replay.routers):
            self.hooks += [
                router.block.register_forward_pre_hook(self._block(layer), with_kwargs=True),
                router.block.experts.register_forward_pre_hook(self._experts(layer), with_kwargs=True),
            ]

    def _block(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.hidden[layer] = (*args, *kwargs.values())[0].reshape(-1, SHAPE["hidden_size"])

        return hook

    def _experts(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [
                t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.shape == (B * T, TOP_K)
            ]
            self.indices[layer] = next(t for t in given if not t.is_floating_point())
            self.gates[layer] = next(t for t in given if t.is_floating_point())

        return hook

    def __enter__(self) -> Handed:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def live_routes(model: nn.Module, replay: RouterReplay) -> Tensor:
    """[B, T, L, K] in the router's own order, without any replay."""
    with Handed(replay) as handed:
        model(tokens())
    return torch.stack([handed.indices[layer] for layer in range(replay.num_layers)], dim=1).view(
        B, T, -1, TOP_K
    )


def reference_logits(replay: RouterReplay, layer: int, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """float64 logits [N, E] from fresh float64 copies of the router's parameters."""
    weights = [
        p.detach().double().requires_grad_() for p in replay.routers[layer].parameters() if p.requires_grad
    ]
    matrix = next(w for w in weights if w.dim() == 2)
    logits = hidden.detach().double() @ matrix.T
    for bias in (w for w in weights if w.dim() == 1):
        logits = logits + bias
    return logits, weights


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_is_read(name: str) -> None:
    family, model, replay = attached(name)
    assert (replay.num_layers, replay.num_experts, replay.top_k) == (
        family.num_moe_layers,
        NUM_EXPERTS,
        TOP_K,
    )
    num_hidden_layers = model.config.num_hidden_layers
    assert replay.layers == list(range(num_hidden_layers - family.num_moe_layers, num_hidden_layers))


@pytest.mark.parametrize("name", FAMILIES)
def test_own_live_routes_change_no_bit(name: str) -> None:
    _, model, replay = attached(name)
    plain = model(tokens()).logits
    routes = live_routes(model, replay)
    for recorded in (None, routes, routes.flip(-1)):  # the order within a set means nothing
        with replay.routes(recorded):
            replayed = model(tokens()).logits
        assert torch.equal(plain, replayed)
    assert replay.last is not None
    assert replay.last.mismatched_L.sum() == 0
    assert (replay.last.replayed_L == B * T).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_other_experts_get_the_family_rule_on_the_recorded_set(name: str) -> None:
    family, model, replay = attached(name)
    routes = random_routes(replay.num_layers)
    with Handed(replay) as handed, replay.routes(routes):
        model(tokens())
    for layer in range(replay.num_layers):
        recorded = routes[:, :, layer].reshape(-1, TOP_K)
        assert torch.equal(handed.indices[layer].sort(-1).values, recorded.sort(-1).values)
        logits, _ = reference_logits(replay, layer, handed.hidden[layer])
        expected = family.rule(logits, handed.indices[layer])
        torch.testing.assert_close(handed.gates[layer].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_router_gradient_equals_float64_reference(name: str) -> None:
    """Also for recorded experts outside the live top-k, which a gather from masked scores would leave without one."""
    family, model, replay = attached(name)
    live = live_routes(model, replay)
    top = live.max(-1, keepdim=True).values
    routes = (top + 1 + torch.arange(TOP_K)) % NUM_EXPERTS  # never the live set
    with Handed(replay) as handed, replay.routes(routes), torch.enable_grad():
        model(tokens())
        factors = torch.randn(B * T, TOP_K, generator=torch.Generator().manual_seed(3))
        for layer, router in enumerate(replay.routers):
            logits, weights = reference_logits(replay, layer, handed.hidden[layer])
            gates = family.rule(logits, handed.indices[layer])
            expected = torch.autograd.grad((gates * factors).sum(), weights)
            parameters = [p for p in router.parameters() if p.requires_grad]
            got = torch.autograd.grad((handed.gates[layer] * factors).sum(), parameters, retain_graph=True)
            for g, e in zip(got, expected, strict=True):
                assert e.abs().max() > 1e-4
                torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.set_only])
def test_experts_outside_the_set_get_no_router_gradient(name: str) -> None:
    _, model, replay = attached(name)
    routes = torch.tensor([6, 7]).expand(B, T, replay.num_layers, TOP_K).contiguous()
    with Handed(replay) as handed, replay.routes(routes):
        model(tokens())
        for layer, router in enumerate(replay.routers):
            matrix = next(p for p in router.parameters() if p.dim() == 2 and p.requires_grad)
            (grad,) = torch.autograd.grad((handed.gates[layer][:, 0] ** 2).sum(), [matrix], retain_graph=True)
            # A softmax over all experts, normalised afterwards, cancels up to rounding.
            assert grad[:6].abs().max() <= 1e-6 * grad[6:].abs().max()
            assert (grad[6:] != 0).any(dim=1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_recomputes_with_the_same_routes(name: str) -> None:
    family, _, _ = attached(name)
    grads = []
    for reentrant in (None, True, False):
        model = family.build().train()
        replay = RouterReplay.attach(model)
        assert replay is not None
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        routes = random_routes(replay.num_layers)
        model.get_input_embeddings().weight.requires_grad_(True)
        with replay.routes(routes):
            inputs = model.get_input_embeddings()(tokens())
            model(inputs_embeds=inputs, use_cache=False).logits.square().mean().backward()
        assert replay.last is not None
        assert (replay.last.counts_LE.sum(1) == B * T * TOP_K).all()  # the second run counts nothing twice
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for recomputed in grads[1:]:
        assert grads[0].keys() == recomputed.keys()
        for key, grad in grads[0].items():
            torch.testing.assert_close(recomputed[key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_replayed_are_refused_by_name(name: str) -> None:
    model_class, extra = REFUSED[name]
    config = getattr(transformers, model_class.replace("ForCausalLM", "Config"))(**{**SHAPE, **extra})
    with pytest.raises(UserError, match=f"(?i){name}"):
        RouterReplay.attach(getattr(transformers, model_class)(config))


def test_dense_models_have_nothing_to_replay() -> None:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE))
    assert RouterReplay.attach(model) is None


def test_a_model_that_hides_its_experts_is_refused() -> None:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE))
    model.config.num_experts = 8
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        RouterReplay.attach(model)


def test_minus_one_selects_live_for_that_token_alone() -> None:
    _, model, replay = attached("mimo_v2_flash")
    live = live_routes(model, replay)
    routes = random_routes(replay.num_layers)
    routes[:, -1] = -1
    expected = torch.ones(B, T, dtype=torch.bool)
    expected[:, -1] = False
    with Handed(replay) as handed, replay.routes(routes, expected_mask_BT=expected):
        model(tokens())
    got = handed.indices[0].view(B, T, TOP_K)
    assert torch.equal(
        got[:, -1], live[:, -1, 0]
    )  # first MoE layer: its input has not been changed by replay
    assert torch.equal(got[:, :-1].sort(-1).values, routes[:, :-1, 0].sort(-1).values)
    assert replay.last is not None
    covered, wanted = replay.last.coverage()
    assert covered == wanted == B * (T - 1) * replay.num_layers


def test_monitor_counts_real_tokens_and_names_what_differs() -> None:
    _, model, replay = attached("qwen3_moe")
    live = live_routes(model, replay)
    routes = live.clone()
    routes[0, 2, 0] = (
        live[0, 2, 0].max() + 1 + torch.arange(TOP_K)
    ) % NUM_EXPERTS  # one token, first MoE layer
    routes[1, 5, 1] = (live[1, 5, 1].max() + 1 + torch.arange(TOP_K)) % NUM_EXPERTS  # a padding token
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    with replay.routes(routes, token_mask_BT=mask):
        model(tokens())
    last = replay.last
    assert last is not None
    assert last.num_tokens == B * T - 3
    assert last.mismatched_L[0] == 1
    assert last.replayed_L.tolist() == [B * T - 3] * replay.num_layers
    expected = torch.bincount(live[:, :, 0][mask].flatten(), minlength=NUM_EXPERTS).double()
    assert torch.equal(last.counts_LE[0], expected)


@pytest.mark.parametrize("bad", [[0, NUM_EXPERTS], [3, 3], [-1, 2], [-2, 2]])
def test_impossible_routes_are_refused(bad: list[int]) -> None:
    _, model, replay = attached("qwen3_moe")
    routes = random_routes(replay.num_layers)
    routes[1, 2, 1] = torch.tensor(bad)
    with pytest.raises(ValueError, match="token 9, MoE layer 1"), replay.routes(routes):
        model(tokens())


def test_routes_of_another_shape_are_refused() -> None:
    _, model, replay = attached("qwen3_moe")
    with pytest.raises(ValueError, match=r"expected \[B, T, 2, 2\]"), replay.routes(random_routes(3)):
        model(tokens())
    with pytest.raises(ValueError, match="sees 14 tokens"), replay.routes(random_routes(2)[:, :-1]):
        model(tokens())


def test_outside_the_block_nothing_is_replayed() -> None:
    _, model, replay = attached("qwen3_moe")
    plain = model(tokens()).logits
    with replay.routes(random_routes(replay.num_layers)):
        assert not torch.equal(model(tokens()).logits, plain)
    assert torch.equal(model(tokens()).logits, plain)


def test_detach_gives_the_forward_back() -> None:
    model = FAMILIES["qwen3_moe"].build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    replay.detach()
    assert all("forward" not in vars(router.module) for router in replay.routers)
    assert RouterReplay.attach(model) is not None
