"""Routing replay under activation checkpointing, packing, train mode and every implementation of the experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import UserError
from posttrain.learner.moe.replay import RouterReplay
from posttrain.learner.policy import check_packable
from tests.unit.moe_families import FAMILIES
from tests.unit.moe_passes import B, Handed, T, attached, live_routes, never_live, random_routes, tokens

LENGTHS = (4, 3)  # of the documents in a pack


def gradients(model: Any, replay: RouterReplay, routes: Tensor) -> dict[str, Tensor]:
    """Of a loss over all outputs, by parameter; the model is left without any."""
    model.zero_grad(set_to_none=True)
    with replay.routes(routes):
        model(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_recomputes_with_the_same_routes(name: str) -> None:
    """In train mode, where some routers would draw other experts in the second run."""
    _, model, replay = attached(name)
    routes = never_live(live_routes(model, replay))
    runs: list[int] = []
    hook = replay.routers[0].module.register_forward_pre_hook(lambda *_: runs.append(1))
    model.train()
    try:
        plain = gradients(model, replay, routes)
        assert len(runs) == 1
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            runs.clear()
            recomputed = gradients(model, replay, routes)
            assert replay.last is not None
            assert len(runs) == 2
            # The second run counts nothing twice.
            assert (replay.last.counts_LE.sum(1) == B * T * replay.top_k).all()
            assert plain.keys() == recomputed.keys()
            for key, grad in plain.items():
                torch.testing.assert_close(recomputed[key], grad, rtol=1e-4, atol=1e-7)
    finally:
        hook.remove()
        model.gradient_checkpointing_disable()
        model.eval()
    names = {id(p): n for n, p in model.named_parameters()}
    for router in replay.routers:
        assert any((plain[names[id(p)]] != 0).any() for p in router.parameters() if names[id(p)] in plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pack_gives_what_its_documents_give(name: str) -> None:
    """Routes lie on tokens, wherever these lie. Families whose attention runs across documents are marked as such."""
    family, model, replay = attached(name)
    ids = tokens(1, sum(LENGTHS))
    routes = random_routes(replay, 1, sum(LENGTHS))
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with replay.routes(routes):
        packed = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    apart = []
    for part, own in zip(ids.split(LENGTHS, dim=1), routes.split(LENGTHS, dim=1), strict=True):
        with replay.routes(own):
            apart.append(model(input_ids=part, use_cache=False).logits)
    difference = (packed - torch.cat(apart, dim=1)).abs().max()
    assert (difference < 1e-5) == family.packs, difference
    if not family.packs:
        with pytest.raises(UserError, match="would mix packed documents"):
            check_packable(model)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped", "gpt_oss", "phimoe", "zaya"])
def test_every_implementation_of_the_experts_follows_the_routes(name: str, implementation: str) -> None:
    _, model, replay = attached(name)
    assert model.config._experts_implementation == "grouped_mm"
    routes = random_routes(replay)
    model.set_experts_implementation("grouped_mm" if implementation == "eager" else "eager")
    try:
        expected = gradients(model, replay, routes)
        model.set_experts_implementation(implementation)
        plain = model(input_ids=tokens(), use_cache=False).logits
        with replay.routes(live_routes(model, replay)):
            assert torch.equal(model(input_ids=tokens(), use_cache=False).logits, plain)
        got = gradients(model, replay, routes)
    finally:
        model.set_experts_implementation("grouped_mm")
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.draws])
def test_inside_the_block_nothing_is_drawn(name: str) -> None:
    """And outside of it the family trains as Transformers has it."""
    _, model, replay = attached(name)
    model.train()
    try:
        for recorded in (None, random_routes(replay)):
            before = torch.get_rng_state()
            with Handed(replay) as handed, replay.routes(recorded):
                model(input_ids=tokens(), use_cache=False)
            assert torch.equal(torch.get_rng_state(), before)
            assert all(module.training for module in model.modules())
        del handed
        model(input_ids=tokens(), use_cache=False)
        assert not torch.equal(torch.get_rng_state(), before)
    finally:
        model.eval()
