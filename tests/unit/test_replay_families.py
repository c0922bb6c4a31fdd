"""No MoE family of the pinned Transformers is forgotten, and the documentation lists what the tests cover."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from posttrain.learner.moe.replay import RouterReplay
from rollout.segment import recording_problem
from tests.unit.moe_families import FAMILIES, REFUSED, SHAPE, SPARSE
from tests.unit.moe_passes import random_routes, tokens

EXPERTS = re.compile(r"^class \w*(Experts|CDMoE|MoA)\(", re.MULTILINE)


def test_every_causal_lm_with_experts_is_tested_or_refused() -> None:
    models = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text() for path in models.glob("*/modeling_*.py")}
    with_experts = {name for name, source in sources.items() if EXPERTS.search(source)}
    causal = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        for name in [names] if isinstance(names, str) else names:
            causal.add(getattr(transformers, name).__module__.split(".")[-2])
    known = [f.model_class for f in FAMILIES.values()] + [r.model_class for r in REFUSED.values()]
    covered = {getattr(transformers, name).__module__.split(".")[-2] for name in known}
    assert len(with_experts & causal) > 40
    assert with_experts & causal - covered == set()


def test_the_documentation_lists_the_families() -> None:
    from scripts.write_replay_families import PAGE, page

    assert PAGE.read_text() == page(PAGE.read_text()), "run: python scripts/write_replay_families.py"


def test_identity_experts_are_not_recorded() -> None:
    """vLLM reports them as expert 0, which the replay would then compute."""
    config = FAMILIES["longcat_flash"].build().config
    assert "expert 0" in (recording_problem(config) or "")
    config.zero_expert_num = 0
    assert recording_problem(config) is None
    assert recording_problem(FAMILIES["mixtral"].build().config) is None


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        ("Qwen3VLMoeForConditionalGeneration", {**SHAPE, **SPARSE}),
        ("Gemma4ForConditionalGeneration", {**SHAPE, **FAMILIES["gemma4"].config}),
    ],
)
def test_the_text_model_inside_of_another_is_replayed(model_class: str, config: dict[str, Any]) -> None:
    vision = dict(hidden_size=16, intermediate_size=16, num_heads=2, depth=1, out_hidden_size=32)
    if "rope_parameters" not in config and "Qwen3" in model_class:
        config["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    model = getattr(transformers, model_class)
    parts = dict(vision_config=vision | dict(deepstack_visual_indexes=[0])) if "Qwen3" in model_class else {}
    torch.manual_seed(0)
    built = model(model.config_class(text_config=config, **parts)).eval()
    replay = RouterReplay.attach(built)
    assert replay is not None
    assert replay.layers == [0, 1, 2]
    with replay.routes(random_routes(replay)):
        built(input_ids=tokens(), use_cache=False)
    assert replay.last is not None
    assert replay.last.coverage() == (42, 42)
