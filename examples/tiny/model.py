"""Random tiny checkpoints in Hugging Face format, from a config and a seed, that Transformers and vLLM both load.

Owns the shapes. The default family is MiMo-V2-Flash: hybrid sliding-window and full attention with attention sinks,
sigmoid router with an expert bias, first layer dense. Its config.json carries the keys of Transformers and the
original ones that vLLM reads. Attention heads have size 32, the smallest that vLLM runs on CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MiMoV2FlashConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from examples.tiny.tokenizer import VOCABULARY, build_tokenizer

FAMILIES = ("mimo_v2_flash", "qwen3_moe", "qwen3")
HEAD_DIM = 32


def _common(hidden: int, max_positions: int) -> dict[str, Any]:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": hidden,
        "num_attention_heads": hidden // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": max_positions,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": VOCABULARY.index("<|end|>"),
        # None on purpose: with an id, Transformers would freeze that row of the embedding at zero.
        "pad_token_id": None,
    }


def _mimo_config(
    hidden: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    moe_width: int,
    window: int,
    max_positions: int,
) -> MiMoV2FlashConfig:
    sliding = [0 < layer < num_layers - 1 for layer in range(num_layers)]
    num_heads, num_kv_heads = hidden // HEAD_DIM, hidden // HEAD_DIM // 2
    theta, rotary = 100.0, 1.0
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary}
    config = MiMoV2FlashConfig(
        **_common(hidden, max_positions),
        num_hidden_layers=num_layers,
        num_key_value_heads=num_kv_heads,
        v_head_dim=HEAD_DIM,
        intermediate_size=2 * hidden,
        moe_intermediate_size=moe_width,
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        sliding_window=window,
        layer_types=["sliding_attention" if flag else "full_attention" for flag in sliding],
        mlp_layer_types=["dense"] + ["sparse"] * (num_layers - 1),
        rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)},
    )
    original = {
        "hybrid_layer_pattern": [int(flag) for flag in sliding],
        "moe_layer_freq": [0] + [1] * (num_layers - 1),
        "swa_num_attention_heads": num_heads,
        "swa_num_key_value_heads": 2 * num_kv_heads,  # Transformers doubles them on sliding layers
        "swa_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "sliding_window_size": window,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "rope_theta": theta,
        "swa_rope_theta": theta,
        "partial_rotary_factor": rotary,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "layernorm_epsilon": config.rms_norm_eps,
        "n_shared_experts": None,
    }
    for key, value in original.items():
        setattr(config, key, value)
    return config


def _qwen3_moe_config(
    hidden: int, num_layers: int, num_experts: int, top_k: int, moe_width: int, max_positions: int
) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **_common(hidden, max_positions),
        num_hidden_layers=num_layers,
        num_key_value_heads=hidden // HEAD_DIM // 2,
        intermediate_size=2 * hidden,
        moe_intermediate_size=moe_width,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
    )


def _qwen3_config(hidden: int, num_layers: int, max_positions: int) -> Qwen3Config:
    return Qwen3Config(
        **_common(hidden, max_positions),
        num_hidden_layers=num_layers,
        num_key_value_heads=hidden // HEAD_DIM // 2,
        intermediate_size=2 * hidden,
    )


def build_model(
    out_dir: str | Path,
    seed: int,
    *,
    family: str = "mimo_v2_flash",
    hidden: int = 128,
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int = 2,
    moe_width: int = 128,
    window: int = 32,
    max_positions: int = 512,
) -> Path:
    """Write a random checkpoint (float32 safetensors, config, tokenizer) to ``out_dir`` and return that path.

    ``family``: mimo_v2_flash (default), qwen3_moe, or qwen3 (dense; the expert arguments do not apply). The layer 0
    MLP is dense in both MoE families. The same arguments and seed give the same bytes.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: choose one of {', '.join(FAMILIES)}")
    if family == "mimo_v2_flash":
        config = _mimo_config(hidden, num_layers, num_experts, top_k, moe_width, window, max_positions)
    elif family == "qwen3_moe":
        config = _qwen3_moe_config(hidden, num_layers, num_experts, top_k, moe_width, max_positions)
    else:
        config = _qwen3_config(hidden, num_layers, max_positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Transformers would derive a padding id of its own while generating; the end mark serves.
    model.generation_config.pad_token_id = config.eos_token_id
    out = Path(out_dir)
    model.save_pretrained(out)
    build_tokenizer(max_positions).save_pretrained(out)
    return out


def main() -> None:
    """`python -m examples.tiny.model OUT --seed 0`"""
    parser = argparse.ArgumentParser(description="Write a random tiny checkpoint.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    arguments = parser.parse_args()
    print(build_model(arguments.out_dir, arguments.seed, family=arguments.family))


if __name__ == "__main__":
    main()
