"""Tiny random models of MoE families, and what each family's papers say its gates are, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

torch.set_num_threads(1)  # at this size threads only wait for each other
NUM_EXPERTS, TOP_K = 8, 2
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPED = {"n_group": 4, "topk_group": 2}
Rule = Callable[[Tensor, Tensor], Tensor]  # (logits [N, E] float64, indices [N, K]) -> gates [N, K]


def softmax_of_set(logits: Tensor, indices: Tensor) -> Tensor:
    """exp(s_i) / sum over the set of exp(s_j) (R3)."""
    return logits.gather(1, indices).softmax(-1)


def softmax_of_all(scale: float = 1.0) -> Rule:
    return lambda logits, indices: scale * logits.softmax(-1).gather(1, indices)


def sigmoid_of_set(scale: float = 1.0) -> Rule:
    def rule(logits: Tensor, indices: Tensor) -> Tensor:
        chosen = torch.sigmoid(logits).gather(1, indices)
        return scale * chosen / chosen.sum(-1, keepdim=True)

    return rule


@dataclass
class Family:
    model_class: str
    config: dict[str, Any]
    rule: Rule
    num_moe_layers: int = 3
    has_bias: bool = False
    set_only: bool = True  # gates depend on the logits of the set alone
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        config_class = getattr(transformers, self.model_class.replace("ForCausalLM", "Config"))
        model = getattr(transformers, self.model_class)(config_class(**{**self.shape, **self.config}))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "sinks")) and "norm" not in name:
                tensor.data.normal_(0, 0.3)
            elif (
                tensor.dim() >= 2
                and tensor.is_floating_point()
                and "rotary" not in name
                and "conv" not in name
            ):
                tensor.data.normal_(0, 0.15)
        return model.float().eval()


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
        softmax_of_set,
        num_moe_layers=2,
    ),
    "qwen3_moe_unnormalised": Family(
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": False},
        softmax_of_all(),
        set_only=False,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        softmax_of_set,
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_hidden_layers": 4,
        },
        softmax_of_set,
        num_moe_layers=4,
    ),
    "mixtral": Family(
        "MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}, softmax_of_set
    ),
    "olmoe": Family(
        "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2}, softmax_of_all(), set_only=False
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        {
            **MLA,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.5,
        },
        softmax_of_all(1.5),
        num_moe_layers=2,
        set_only=False,
    ),
    "deepseek_v2_grouped": Family(
        "DeepseekV2ForCausalLM",
        {
            **MLA,
            **GROUPED,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
        softmax_of_all(1.5),
        num_moe_layers=2,
        set_only=False,
    ),
    "deepseek_v3_grouped": Family(
        "DeepseekV3ForCausalLM",
        {
            **MLA,
            **GROUPED,
            "head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        sigmoid_of_set(2.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
        },
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "num_key_value_heads": 1,
            "v_head_dim": 16,
            "sliding_window": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
                for kind in ("full_attention", "sliding_attention")
            },
        },
        sigmoid_of_set(),
        num_moe_layers=2,
        has_bias=True,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
        softmax_of_set,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 16},
        sigmoid_of_set(),
        has_bias=True,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        softmax_of_set,
        num_moe_layers=2,
        has_bias=True,
    ),
    "granite_moe": Family(
        "GraniteMoeForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}, softmax_of_set
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
        },
        sigmoid_of_set(),
        has_bias=True,
    ),
    "afmoe": Family(
        "AfmoeForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
            "route_scale": 1.5,
        },
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        sigmoid_of_set(),
        num_moe_layers=2,
        has_bias=True,
    ),
    "hy_v3": Family(
        "HYV3ForCausalLM",
        {
            "num_experts": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "router_scaling_factor": 1.5,
        },
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "cohere2_moe": Family(
        "Cohere2MoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2}, softmax_of_set
    ),
    "flex_olmo": Family(
        "FlexOlmoForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2}, softmax_of_all(), set_only=False
    ),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", {"num_experts": 8, "moe_topk": 2}, softmax_of_set),
    "jamba": Family(
        "JambaForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        softmax_of_all(),
        set_only=False,
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "sliding_window": 4,
        },
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "jetmoe": ("JetMoeForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 16}),
}
