"""LoRA without an engine: what is adapted, what it amounts to, and what is refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.config import LearnerConfig, LoraConfig, UserError
from posttrain.learner import lora
from posttrain.learner.moe import balance
from posttrain.learner.moe.replay import RouterReplay
from posttrain.learner.monitors import num_zeros
from posttrain.learner.monitors.experts import ExpertHealth
from posttrain.learner.monitors.num_zeros import NumZeros, Slot
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS
from tests.unit.moe_passes import random_routes, tokens

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def attached(family: str, **settings: Any) -> tuple[Any, Any, RouterReplay]:
    """(plain model, the same with adapters that are not 0, its replay)."""
    model = FAMILIES[family].build()
    plain = copy.deepcopy(model)
    replay = RouterReplay.attach(model)
    assert replay is not None
    lora.attach(model, replay, LoraConfig(rank=2, **settings), Path("base"), 0)
    generator = torch.Generator().manual_seed(3)
    for adapter in lora.adapters(model):
        for factor in adapter.factors:
            factor.data.normal_(0, 0.3, generator=generator)
    return plain, model.eval(), replay


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    names = {id(p): lora.plain_name(name) for name, p in model.named_parameters()}
    return {names[id(adapter.weight)]: adapter.merged() for adapter in lora.adapters(model)}


# gpt_oss stacks [E, in, out], llama4 calls its experts otherwise, longcat_flash has more rows than experts, jamba has Mamba
# layers, mimo a dense layer
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mimo_v2_flash", "gpt_oss", "llama4", "longcat_flash", "jamba"]
)
def test_the_merged_weights_compute_what_the_adapters_compute(family: str, rslora: bool) -> None:
    plain, model, replay = attached(family, target_parameters=EXPERTS, use_rslora=rslora)
    routes = random_routes(replay)
    with replay.routes(routes):
        got = model(input_ids=tokens(), use_cache=False).logits
    got.square().mean().backward()
    without = plain.eval()(input_ids=tokens(), use_cache=False).logits
    assert (got - without).abs().max() > 0.01 * without.abs().max(), "adapters that do nothing"
    plain.load_state_dict(plain.state_dict() | merged_weights(model))
    own = RouterReplay.attach(plain)
    assert own is not None
    with own.routes(routes), torch.no_grad():
        expected = plain(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    factors = {id(f) for adapter in lora.adapters(model) for f in adapter.factors}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in factors), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [(["q_proj", "v_proj"], []), ([], EXPERTS), (["o_proj"], ["gate.weight", *EXPERTS])],
)
def test_forward_and_merge_are_those_of_peft(modules: list[str], parameters: list[str]) -> None:
    import peft

    plain, model, _ = attached("qwen3_moe", target_modules=modules, target_parameters=parameters)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=modules,
        target_parameters=parameters or None,
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(plain, config).eval()
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    state = {name: p for name, p in theirs.get_base_model().named_parameters() if "lora_" in name}
    assert own.keys() == state.keys() and own
    for name, parameter in own.items():
        state[name].data.copy_(parameter)
    expected = theirs(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(model(input_ids=tokens(), use_cache=False).logits, expected)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, weight in merged_weights(model).items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-6)


def test_a_new_adapter_changes_nothing_and_is_the_same_on_every_rank() -> None:
    plain = FAMILIES["qwen3_moe"].build().eval()
    expected = plain(input_ids=tokens(), use_cache=False).logits
    states = []
    for rank in range(2):
        model = copy.deepcopy(plain)
        torch.manual_seed(100 + rank)
        before = torch.get_rng_state()
        lora.attach(
            model,
            RouterReplay.attach(model),
            LoraConfig(rank=2, target_parameters=EXPERTS),
            Path("base"),
            5,
        )
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(
            model(input_ids=tokens(), use_cache=False).logits, expected, rtol=0, atol=1e-6
        )
        states.append({name: p for name, p in model.named_parameters() if "lora_A" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_names_and_settings_are_those_of_peft(tmp_path: Path) -> None:
    import peft

    plain, model, _ = attached("qwen3_moe", alpha=6.0, target_parameters=EXPERTS)
    names = lora.file_names(model)
    lora.write(tmp_path / "adapter", lora.settings(model), {n: p.detach().clone() for n, p in names.items()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    got = theirs(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(got, model(input_ids=tokens(), use_cache=False).logits)
    config = theirs.peft_config["default"]
    assert config.r == 2 and config.lora_alpha == 6
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


# ---- num-zeros ----


def test_factors_count_in_the_class_of_what_they_adapt() -> None:
    _, model, _ = attached(
        "deepseek_v3_grouped", target_modules=["o_proj"], target_parameters=[*EXPERTS, "gate.weight"]
    )
    counter = NumZeros(model)
    names = {id(p): name for name, p in model.named_parameters()}
    got = {names[id(slot.parameter)]: slot for slot in counter.slots}
    assert all("lora_" in name for name in got) and all(slot.is_adapter for slot in got.values())
    marks = {"self_attn": "attention", ".experts.": "routed_expert", ".gate.": "router"}
    for name, slot in got.items():
        assert slot.module_class == next(c for mark, c in marks.items() if mark in name), name
    assert {name for name, size in counter.sizes.items() if size} == set(marks.values())
    assert counter.num_experts == NUM_EXPERTS


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "longcat_flash"])
def test_an_expert_without_tokens_is_dead_in_both_factors(family: str) -> None:
    _, model, replay = attached(family, target_modules=[], target_parameters=EXPERTS)
    routes = random_routes(replay)
    routes = torch.where(routes == 5, (routes.sum(-1, keepdim=True) - routes + 1) % 5, routes)
    with replay.routes(routes):
        model(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
    used = sum(len(routes[:, :, layer].unique()) for layer in range(replay.num_layers))
    assert used < replay.num_layers * NUM_EXPERTS
    got = num_zeros.count(model)
    assert got["num_zeros/dead_experts"] == replay.num_layers * NUM_EXPERTS - used
    zeros = sum(int((p.grad == 0).sum()) for p in model.parameters() if p.requires_grad)
    assert got["num_zeros/total"] == got["num_zeros/routed_expert"] == zeros


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 13, 30, 48])
@pytest.mark.parametrize("takes_turns", [False, True])
def test_fragments_of_stacked_factors_add_up(cut: int, takes_turns: bool) -> None:
    """4 experts of rank 2: A [8, 6], an expert being 2 rows of it; B [6, 8], an expert being every fourth column."""
    gradient = torch.randn(48, generator=torch.Generator().manual_seed(cut)).clamp(min=0)
    parameter = nn.Parameter(torch.zeros((6, 8) if takes_turns else (8, 6)))
    slot = Slot(
        parameter=parameter,
        module_class="routed_expert",
        layer=0,
        expert_size=12,
        takes_turns=takes_turns,
        is_adapter=True,
    )
    counts = torch.zeros(4, dtype=torch.int64)
    for start, piece in ((0, gradient[:cut]), (cut, gradient[cut:])):
        if len(piece):
            num_zeros.add_by_expert(counts, slot, start, piece, num_zeros._nonzeros)
    expected = gradient.view(6, 2, 4).count_nonzero((0, 1)) if takes_turns else gradient.view(4, 12)
    assert torch.equal(counts, expected if takes_turns else expected.count_nonzero(1))


def test_expert_health_leaves_norms_of_adapters_out() -> None:
    _, model, replay = attached("qwen3_moe", target_parameters=EXPERTS)
    health = ExpertHealth(replay, NumZeros(model), 3)
    assert health._slots == []


# ---- refusals ----


def refusal(family: str, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        attached(family, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("qwen3_moe", {"target_modules": ["q_prj"]}, ("target_modules", "'q_prj'", "k_proj, o_proj, q_proj")),
        ("qwen3_moe", {"target_modules": ["lm_head"]}, ("target_modules", "LM head")),
        ("qwen3_moe", {"target_modules": ["embed_tokens"]}, ("target_modules", "Embedding")),
        ("qwen3_moe", {"target_modules": ["gate"]}, ("target_modules", "target_parameters")),
        ("qwen3_moe", {"target_modules": ["gate_proj"]}, ("fused experts", "experts.gate_up_proj")),
        ("jamba", {"target_modules": ["dt_proj"]}, ("target_modules", "Mamba")),
        ("qwen3_moe", {"target_parameters": ["experts.w1"]}, ("target_parameters", "experts.down_proj")),
        ("qwen3_moe", {"target_parameters": ["embed_tokens.weight"]}, ("target_parameters", "embedding")),
        ("qwen3_moe", {"target_parameters": ["norm.weight"]}, ("target_parameters", "[32]")),
        ("qwen3_moe", {"target_parameters": ["q_proj.weight"]}, ("target_parameters", "leave it out of one")),
    ],
)
def test_targets_that_cannot_be_adapted(
    family: str, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    text = refusal(family, **settings)
    assert text.startswith("learner.lora.") and all(word in text for word in words), text


def test_routers_are_adapted_only_by_name() -> None:
    for family in ("jamba", "qwen3_moe"):
        _, model, replay = attached(family)
        assert not any(p.requires_grad for router in replay.routers for p in router.parameters())
    _, model, replay = attached("jamba", target_modules=["router"])
    assert NumZeros(model).sizes["router"] > 0


def test_what_frozen_routers_rule_out() -> None:
    settings = LoraConfig(rank=2)
    _, _, replay = attached("qwen3_moe")
    assert balance.resolve_freezing(replay, LearnerConfig(lora=settings))
    assert balance.resolve_freezing(replay, LearnerConfig(lora=settings, freeze_router=True))
    with pytest.raises(UserError, match=r"learner\.aux_loss_coef=0\.1"):
        balance.resolve_freezing(replay, LearnerConfig(lora=settings, aux_loss_coef=0.1))
    _, _, replay = attached("qwen3_moe", target_parameters=["gate.weight"])
    assert not balance.resolve_freezing(replay, LearnerConfig(lora=settings, aux_loss_coef=0.1))
    with pytest.raises(UserError, match=r"learner\.freeze_router=True"):
        balance.resolve_freezing(replay, LearnerConfig(lora=settings, freeze_router=True))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2, "alpha": 0.0}, "alpha=0.0"),
        ({"rank": 2, "dropout": 1.0}, "dropout=1.0"),
        ({"rank": 2, "dropout": 0.1, "target_parameters": EXPERTS}, "dropout=0.1"),
        ({"rank": 2, "target_modules": []}, "target_modules=[]"),
        ({"alpha": 16.0}, "alpha=16.0"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"target_modules": ["q_proj"]}, "target_modules=['q_proj']"),
        ({"target_parameters": EXPERTS}, "target_parameters="),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        LoraConfig(**settings)
    assert str(error.value).startswith(f"learner.lora.{key}") and "\n" not in str(error.value)
