"""num-zeros without an engine: classes of parameters, dead experts, and fragments that cut experts in two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.learner.monitors import num_zeros
from posttrain.learner.monitors.num_zeros import CLASSES, NumZeros, Slot
from tests.metric_names import undocumented
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS


def classes_of(model: nn.Module) -> dict[str, str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(slot.parameter)]: slot.module_class for slot in NumZeros(model).slots}


def test_every_parameter_of_mimo_is_in_its_class() -> None:
    got = classes_of(FAMILIES["mimo_v2_flash"].build())
    expected = {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.mlp.gate_proj.weight": "other",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.1.self_attn.sinks": "attention",
        "model.layers.1.mlp.gate.weight": "router",
        "model.layers.1.mlp.experts.gate_up_proj": "routed_expert",
        "model.layers.1.mlp.experts.down_proj": "routed_expert",
        "model.layers.1.input_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    }
    assert {name: got[name] for name in expected} == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_all_families_have_experts_routers_and_attention(name: str) -> None:
    family = FAMILIES[name]
    counter = NumZeros(family.build())
    assert (counter.num_layers, counter.num_experts) == (family.num_moe_layers, NUM_EXPERTS)
    for module_class in ("embedding", "router", "routed_expert", "attention", "norm", "head"):
        assert counter.sizes[module_class] > 0, module_class
    model = family.build()
    assert sum(counter.sizes.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_layers = sorted(layer for layer in counter.layer_sizes if layer >= 0)
    assert in_layers == list(range(len(in_layers))), "every decoder layer, and no other"
    layers = family.layers or in_layers[-family.num_moe_layers :]
    assert counter.moe_layers == layers, "global numbers, as those of routes"


def test_rows_beyond_the_experts_count_for_their_class_and_layer() -> None:
    model = FAMILIES["longcat_flash"].build()
    counter = NumZeros(model)
    experts = model.model.layers[1].mlp.experts
    fused = [p for p in experts.parameters() if len(p) > NUM_EXPERTS]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in fused:
        parameter.grad[NUM_EXPERTS:] = 0
    got = counter.count()
    beyond = sum(p[NUM_EXPERTS:].numel() for p in fused)
    assert got["num_zeros/routed_expert"] == got["num_zeros/layer_1"] == got["num_zeros/total"] == beyond
    assert got["num_zeros/dead_experts"] == 0


def test_frozen_experts_are_not_dead() -> None:
    model = FAMILIES["mimo_v2_flash"].build()
    model.model.layers[1].mlp.experts.requires_grad_(False)
    got = NumZeros(model).count()
    assert got["num_zeros/dead_experts/layer_1"] == 0
    assert got["num_zeros/dead_experts/layer_2"] == got["num_zeros/dead_experts"] == NUM_EXPERTS


@pytest.mark.parametrize("name", ["deepseek_v3_grouped", "qwen2_moe", "ernie4_5_moe"])
def test_shared_experts_are_not_routed_experts(name: str) -> None:
    got = classes_of(FAMILIES[name].build())
    shared = {name for name, module_class in got.items() if module_class == "shared_expert"}
    assert shared and all("shared_expert" in name for name in shared)


def test_planted_zeros_are_counted_exactly() -> None:
    model = FAMILIES["mimo_v2_flash"].build()
    counter = NumZeros(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert counter.count()["num_zeros/total"] == 0
    gate_up, down = (
        model.model.layers[1].mlp.experts.gate_up_proj,
        model.model.layers[1].mlp.experts.down_proj,
    )
    gate_up.grad[3] = 0  # half an expert is not a dead expert
    gate_up.grad[5] = 0
    down.grad[5] = 0
    model.model.embed_tokens.weight.grad[7:9] = -0.0
    model.model.norm.weight.grad = None
    got = counter.count()
    planted = 2 * gate_up[0].numel() + down[0].numel()
    assert got["num_zeros/routed_expert"] == planted
    assert got["num_zeros/embedding"] == 2 * 32
    assert got["num_zeros/norm"] == 32
    assert got["num_zeros/dead_experts"] == 1
    assert got["num_zeros/total"] == planted + 3 * 32
    assert [got[f"num_zeros/layer_{layer}"] for layer in (0, 1, 2)] == [0, planted, 0]
    experts = got["num_zeros/routed_expert"]
    assert [got[f"num_zeros/not_experts/layer_{layer}"] for layer in (0, 1, 2)] == [0, planted - experts, 0]
    assert [got[f"num_zeros/dead_experts/layer_{layer}"] for layer in (1, 2)] == [1, 0]
    assert undocumented(got) == set()
    assert got["num_zeros/share"] == got["num_zeros/total"] / sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = FAMILIES["qwen3_moe"].build()
    whole = NumZeros(model).count()["num_zeros/total"]
    model.lm_head.weight.requires_grad_(False)
    got = num_zeros.count(model)
    assert got["num_zeros/total"] == whole - model.lm_head.weight.numel()
    assert "num_zeros/head" not in got


def test_a_dense_model_has_no_experts() -> None:
    got = num_zeros.count(nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
    assert got["num_zeros/total"] == 12 + 6 + 8
    assert set(got) == {f"num_zeros/{name}" for name in ("total", "share", "embedding", "norm", "other")}
    assert "num_zeros/dead_experts" not in got


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 13, 30, 48])
def test_fragments_that_cut_experts_add_up(cut: int) -> None:
    parameter = nn.Parameter(torch.zeros(4, 3, 4))
    gradient = torch.randn(48, generator=torch.Generator().manual_seed(cut)).clamp(min=0)
    gradient[12:24] = 0
    slot = Slot(parameter=parameter, module_class="routed_expert", layer=0, expert_size=12)
    counts = torch.zeros(4, dtype=torch.int64)
    for start, piece in ((0, gradient[:cut]), (cut, gradient[cut:])):
        if len(piece):
            num_zeros.add_by_expert(counts, slot, start, piece, num_zeros._nonzeros)
    assert torch.equal(counts, gradient.view(4, 12).count_nonzero(1))
    assert counts[1] == 0
    assert len(CLASSES) == len(set(CLASSES))
