"""Tiny checkpoints: load in Transformers, keys of both engines, tokenizer without unused ids."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny.model import build_model
from examples.tiny.tokenizer import MARKS, VOCABULARY, build_tokenizer
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe

BUILDERS = {
    "MiMoV2FlashForCausalLM": tiny_mimo,
    "Qwen3MoeForCausalLM": tiny_qwen3_moe,
    "Qwen3ForCausalLM": tiny_dense,
}


@pytest.mark.parametrize(("architecture", "builder"), BUILDERS.items(), ids=BUILDERS.keys())
def test_checkpoint_loads_and_runs(tmp_path, architecture, builder):
    path = builder(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert type(model).__name__ == architecture
    assert model.config.vocab_size == len(tokenizer) == len(VOCABULARY)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    logits = model(torch.tensor([tokenizer("47+85=?")["input_ids"]])).logits
    assert logits.shape == (1, 7, len(VOCABULARY)) and bool(logits.isfinite().all())
    # the end mark is also the padding of the tokenizer, and must stay trainable
    assert bool((model.get_input_embeddings().weight[tokenizer.eos_token_id] != 0).any())


def test_mimo_shape(tmp_path):
    path = tiny_mimo(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    layers = model.model.layers
    assert [layer.self_attn.sinks is not None for layer in layers] == [False, True, True, False]
    assert [hasattr(layer.mlp, "gate") for layer in layers] == [False, True, True, True]
    config = json.loads((path / "config.json").read_text())
    assert config["hybrid_layer_pattern"] == [
        int(kind == "sliding_attention") for kind in config["layer_types"]
    ]
    assert config["moe_layer_freq"] == [int(kind == "sparse") for kind in config["mlp_layer_types"]]
    assert config["swa_num_key_value_heads"] == 2 * config["num_key_value_heads"]
    assert config["sliding_window_size"] == config["sliding_window"]
    assert config["swa_rope_theta"] == config["rope_parameters"]["sliding_attention"]["rope_theta"]


def test_seed_decides_the_weights(tmp_path):
    files = [
        (build_model(tmp_path / str(number), seed) / "model.safetensors").read_bytes()
        for number, seed in enumerate((0, 0, 1))
    ]
    assert files[0] == files[1] != files[2]


def test_building_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny_dense(tmp_path / "model")
    assert torch.equal(torch.rand(1), expected)


def test_unknown_family(tmp_path):
    with pytest.raises(ValueError, match="family='gpt'"):
        build_model(tmp_path, 0, family="gpt")


def test_tokenizer_is_lossless_over_its_alphabet():
    tokenizer = build_tokenizer()
    text = "".join(VOCABULARY)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(len(VOCABULARY)))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text[len("".join(MARKS)) :]
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|end|>"


def test_template_refuses_tool_calls_that_it_would_drop():
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "mul"}}]}]
    with pytest.raises(Exception, match="tool_calls are not rendered"):
        build_tokenizer().apply_chat_template(messages, tokenize=False)
