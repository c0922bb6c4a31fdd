"""Tiny random models of every MoE family of Transformers: class, configuration, and which rule its gates follow.

`scripts/write_replay_families.py` writes the table of docs/routing-replay.md from `FAMILIES` and `REFUSED`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.unit.moe_rules import (
    ROOT_SOFTPLUS,
    SCALED_PER_EXPERT,
    SHARED_SINK,
    SIGMOID,
    SOFTMAX_OF_SET,
    SPARSE_MIXER,
    Logits,
    Rule,
    linear,
    normed,
    sigmoid_of_set,
    soft_capped,
    softmax_of_all,
    without_scales,
    zaya,
)

torch.set_num_threads(1)  # at this size threads only wait for each other
NUM_EXPERTS, TOP_K = 8, 2
SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
INDEXED = dict(**MLA, index_n_heads=2, index_head_dim=16, index_topk=64)
GROUPED = dict(n_group=4, topk_group=2)
UNGROUPED = dict(n_group=1, topk_group=1)
SPARSE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
LOCAL = dict(num_local_experts=8, num_experts_per_tok=2)
SHARED = dict(shared_expert_intermediate_size=24)
ROUTED = dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
DENSE_FIRST = dict(mlp_layer_types=["dense", "sparse", "sparse"])
FULL = ["full_attention"] * 3


@dataclass
class Family:
    model_class: str
    config: dict[str, Any]
    rule: Rule
    num_moe_layers: int = 3
    layers: list[int] | None = None  # global numbers; None: the last num_moe_layers
    top_k: int = TOP_K
    num_choices: int = NUM_EXPERTS
    has_bias: bool = False
    packs: bool = True  # position_ids that start again keep packed documents apart
    draws: bool = False  # its routers draw experts or noise in train mode
    logits: Logits = linear
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    @property
    def config_class(self) -> Any:
        return getattr(transformers, self.model_class).config_class

    def notes(self) -> list[str]:
        """For the documentation."""
        return [
            *(["bias in the selection"] if self.has_bias else []),
            *(["group-limited selection"] if self.config.get("n_group", 1) > 1 else []),
            *(["draws or jitters in train mode"] if self.draws else []),
            *(["choices that are no experts"] if self.num_choices > NUM_EXPERTS else []),
            *(
                ["looks up in its first layers"]
                if "hash_moe" in self.config.get("mlp_layer_types", ())
                else []
            ),
        ]

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config_class(**{**self.shape, **self.config}))
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
            elif name.endswith(("scale", "balancing_biases")):
                tensor.data.add_(torch.randn_like(tensor) * 0.1)
            elif name.endswith("tid2eid"):
                tensor.data.copy_(torch.rand(len(tensor), NUM_EXPERTS).argsort(-1)[:, :TOP_K])
        return model.float().eval()


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        dict(**SPARSE, norm_topk_prob=True, mlp_only_layers=[0]),
        SOFTMAX_OF_SET,
        num_moe_layers=2,
    ),
    "qwen3_moe_unnormalised": Family(
        "Qwen3MoeForCausalLM", dict(**SPARSE, norm_topk_prob=False), softmax_of_all()
    ),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", dict(**SPARSE, **SHARED, norm_topk_prob=True), SOFTMAX_OF_SET),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        dict(**SPARSE, **SHARED, **LINEAR, norm_topk_prob=True, num_hidden_layers=4),
        SOFTMAX_OF_SET,
        num_moe_layers=4,
        packs=False,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        dict(**SPARSE, **SHARED, **LINEAR, num_hidden_layers=4),
        SOFTMAX_OF_SET,
        num_moe_layers=4,
        packs=False,
    ),
    "qwen4_exp": Family(
        "Qwen4ExpForCausalLM",
        dict(
            **SPARSE,
            **SHARED,
            **LINEAR,
            norm_topk_prob=True,
            num_hidden_layers=4,
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=16,
            indexer_budget=64,
            indexer_compress_ratio=4,
        ),
        SOFTMAX_OF_SET,
        num_moe_layers=4,
        packs=False,
    ),
    "mixtral": Family(
        "MixtralForCausalLM", dict(**LOCAL, router_jitter_noise=0.3), SOFTMAX_OF_SET, draws=True
    ),
    "olmoe": Family("OlmoeForCausalLM", dict(**SPARSE), softmax_of_all()),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        dict(**MLA, **ROUTED, first_k_dense_replace=1, topk_method="greedy", routed_scaling_factor=1.5),
        softmax_of_all(1.5),
        num_moe_layers=2,
    ),
    "deepseek_v2_grouped": Family(
        "DeepseekV2ForCausalLM",
        dict(
            **MLA,
            **ROUTED,
            **GROUPED,
            first_k_dense_replace=1,
            topk_method="group_limited_greedy",
            routed_scaling_factor=1.5,
        ),
        softmax_of_all(1.5),
        num_moe_layers=2,
    ),
    "deepseek_v3_grouped": Family(
        "DeepseekV3ForCausalLM",
        dict(**MLA, **ROUTED, **GROUPED, head_dim=8, first_k_dense_replace=1, routed_scaling_factor=2.5),
        sigmoid_of_set(2.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        dict(**INDEXED, **ROUTED, **GROUPED, **DENSE_FIRST, head_dim=8, routed_scaling_factor=2.5),
        sigmoid_of_set(2.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        dict(
            **ROUTED,
            mlp_layer_types=["hash_moe", "moe", "moe"],
            layer_types=["sliding_attention"] * 3,
            q_lora_rank=16,
            o_groups=1,
            o_lora_rank=16,
            num_key_value_heads=1,
            qk_rope_head_dim=8,
            partial_rotary_factor=0.5,
            hc_mult=2,
            sliding_window=8,
            routed_scaling_factor=1.5,
        ),
        ROOT_SOFTPLUS,
        has_bias=True,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        dict(**ROUTED, **UNGROUPED, first_k_dense_replace=1, routed_scaling_factor=1.5, norm_topk_prob=True),
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        dict(**MLA, **ROUTED, **UNGROUPED, **DENSE_FIRST, routed_scaling_factor=1.8),
        sigmoid_of_set(1.8),
        num_moe_layers=2,
        has_bias=True,
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        dict(**INDEXED, **ROUTED, **UNGROUPED, **DENSE_FIRST, head_dim=8, routed_scaling_factor=2.5),
        sigmoid_of_set(2.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        dict(
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            num_key_value_heads=1,
            v_head_dim=16,
            sliding_window=4,
            **DENSE_FIRST,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                kind: dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
                for kind in ("full_attention", "sliding_attention")
            },
        ),
        sigmoid_of_set(),
        num_moe_layers=2,
        has_bias=True,
    ),
    "gpt_oss": Family("GptOssForCausalLM", dict(**LOCAL, sliding_window=8), SOFTMAX_OF_SET, packs=False),
    "minimax": Family(
        "MiniMaxForCausalLM",
        dict(
            **LOCAL,
            layer_types=["full_attention", "linear_attention", "full_attention"],
            router_jitter_noise=0.3,
        ),
        SOFTMAX_OF_SET,
        packs=False,
        draws=True,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        dict(**LOCAL, rotary_dim=16, router_jitter_noise=0.3),
        sigmoid_of_set(),
        has_bias=True,
        draws=True,
    ),
    "minimax_m3": Family(
        "MiniMaxM3VLForCausalLM",
        dict(
            **LOCAL,
            **DENSE_FIRST,
            dense_intermediate_size=48,
            shared_intermediate_size=24,
            rotary_dim=8,
            layer_types=FULL,
            index_n_heads=2,
            index_head_dim=16,
        ),
        sigmoid_of_set(),
        num_moe_layers=2,
        has_bias=True,
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        dict(
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=24,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
        SOFTMAX_OF_SET,
        num_moe_layers=2,
        has_bias=True,
    ),
    "granite_moe": Family("GraniteMoeForCausalLM", LOCAL, SOFTMAX_OF_SET),
    "granite_moe_shared": Family(
        "GraniteMoeSharedForCausalLM", dict(**LOCAL, shared_intermediate_size=24), SOFTMAX_OF_SET
    ),
    "granite_moe_swa": Family("GraniteMoeSWAForCausalLM", dict(**LOCAL, sliding_window=8), SOFTMAX_OF_SET),
    "granite_moe_hybrid": Family(
        "GraniteMoeHybridForCausalLM",
        dict(
            **LOCAL,
            shared_intermediate_size=24,
            layer_types=["mamba", "attention", "mamba"],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
        ),
        SOFTMAX_OF_SET,
        packs=False,
    ),
    "phimoe": Family("PhimoeForCausalLM", dict(**LOCAL, input_jitter_noise=0.3), SPARSE_MIXER, draws=True),
    "llama4": Family(
        "Llama4ForCausalLM",
        dict(
            num_local_experts=8,
            num_experts_per_tok=1,
            intermediate_size_mlp=48,
            moe_layers=[1, 2],
            attention_chunk_size=64,
        ),
        SIGMOID,
        num_moe_layers=2,
        top_k=1,
    ),
    "llama4_top2": Family(
        "Llama4ForCausalLM",
        dict(**LOCAL, intermediate_size_mlp=48, interleave_moe_layer_step=2, attention_chunk_size=64),
        SIGMOID,
        num_moe_layers=1,
        layers=[1],
    ),
    "aria": Family("AriaTextForCausalLM", dict(moe_num_experts=8, moe_topk=2), SOFTMAX_OF_SET),
    "axk1": Family(
        "AXK1ForCausalLM",
        dict(**MLA, **ROUTED, **GROUPED, head_dim=8, first_k_dense_replace=1, routed_scaling_factor=2.5),
        sigmoid_of_set(2.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "axk2": Family(
        "AXK2ForCausalLM",
        dict(**INDEXED, **ROUTED, **GROUPED, **DENSE_FIRST, head_dim=8, routed_scaling_factor=2.5),
        sigmoid_of_set(2.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "dbrx": Family(
        "DbrxForCausalLM",
        dict(
            d_model=32,
            n_heads=2,
            n_layers=3,
            max_seq_len=64,
            vocab_size=64,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
            ffn_config=dict(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2, moe_jitter_eps=0.3),
        ),
        SOFTMAX_OF_SET,
        draws=True,
        shape={},
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        dict(**ROUTED, **UNGROUPED, first_k_dense_replace=0, routed_scaling_factor=1.0, norm_topk_prob=True),
        sigmoid_of_set(),
        has_bias=True,
    ),
    "afmoe": Family(
        "AfmoeForCausalLM",
        dict(**SPARSE, num_dense_layers=1, route_scale=1.5),
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
        packs=False,
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        dict(
            **SPARSE,
            num_dense_layers=1,
            norm_topk_prob=True,
            use_expert_bias=True,
            layer_types=["conv", "full_attention", "conv"],
        ),
        sigmoid_of_set(),
        num_moe_layers=2,
        has_bias=True,
        packs=False,
    ),
    "hy_v3": Family(
        "HYV3ForCausalLM",
        dict(**SPARSE, num_local_experts=8, router_scaling_factor=1.5),
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "hy_v4": Family(
        "HYV4ForCausalLM",
        dict(**INDEXED, **ROUTED, **UNGROUPED, **DENSE_FIRST, routed_scaling_factor=2.8, hc_mult=2),
        sigmoid_of_set(2.8),
        num_moe_layers=2,
        has_bias=True,
    ),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", dict(**SPARSE), SOFTMAX_OF_SET),
    "cohere2_moe_sigmoid": Family(
        "Cohere2MoeForCausalLM",
        dict(**SPARSE, expert_selection_fn="sigmoid", norm_topk_prob=False),
        SIGMOID,
    ),
    "flex_olmo": Family("FlexOlmoForCausalLM", dict(**SPARSE), softmax_of_all()),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        dict(
            num_experts=8,
            top_k_experts=2,
            moe_intermediate_size=24,
            enable_moe_block=True,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=64,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        SCALED_PER_EXPERT,
        logits=normed,
    ),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", dict(num_experts=8, moe_topk=2), SOFTMAX_OF_SET),
    "inkling": Family(
        "InklingForCausalLM",
        dict(
            **{**ROUTED, "n_shared_experts": 2},
            **DENSE_FIRST,
            layer_types=FULL,
            swa_num_attention_heads=2,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            d_rel=4,
            rel_extent=16,
        ),
        SHARED_SINK,
        num_moe_layers=2,
        has_bias=True,
        packs=False,
        logits=without_scales,
    ),
    "jamba": Family(
        "JambaForCausalLM",
        dict(
            num_experts=8,
            num_experts_per_tok=2,
            expert_layer_period=1,
            expert_layer_offset=0,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        softmax_of_all(),
        packs=False,
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        dict(
            **MLA,
            num_experts=8,
            num_experts_per_token=2,
            num_shared_experts=1,
            moe_intermediate_size=24,
            routed_scaling_factor=2.4,
            **DENSE_FIRST,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_head_dim=8,
            linear_num_heads=2,
        ),
        sigmoid_of_set(2.4),
        num_moe_layers=2,
        has_bias=True,
        packs=False,
    ),
    "laguna": Family(
        "LagunaForCausalLM",
        dict(
            **SPARSE,
            **SHARED,
            **DENSE_FIRST,
            layer_types=FULL,
            num_attention_heads_per_layer=[2, 2, 2],
            moe_router_logit_softcapping=3.0,
        ),
        sigmoid_of_set(),
        num_moe_layers=2,
        has_bias=True,
        logits=soft_capped,
    ),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        dict(
            **MLA,
            num_layers=3,
            head_dim=8,
            n_routed_experts=8,
            zero_expert_num=2,
            moe_topk=2,
            ffn_hidden_size=48,
            expert_ffn_hidden_size=24,
            routed_scaling_factor=6.0,
        ),
        softmax_of_all(6.0),
        layers=[0, 1, 2],  # num_hidden_layers counts its attentions, two to a layer
        num_choices=10,
        has_bias=True,
        shape={k: v for k, v in SHAPE.items() if k not in ("num_hidden_layers", "head_dim")},
    ),
    "mellum": Family(
        "MellumForCausalLM",
        dict(**LOCAL, **DENSE_FIRST, layer_types=FULL, moe_intermediate_size=24),
        SOFTMAX_OF_SET,
        num_moe_layers=2,
    ),
    "mistral4": Family(
        "Mistral4ForCausalLM",
        dict(**MLA, **ROUTED, **GROUPED, first_k_dense_replace=1),
        SOFTMAX_OF_SET,
        num_moe_layers=2,
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        dict(
            **ROUTED,
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            num_hidden_layers=4,
            use_mamba_kernels=False,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=1,
            moe_shared_expert_intermediate_size=24,
            moe_latent_size=16,
            routed_scaling_factor=1.5,
        ),
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        layers=[1, 3],
        has_bias=True,
        packs=False,
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        dict(
            **SPARSE,
            **UNGROUPED,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            norm_topk_prob=True,
            sliding_window=4,
        ),
        sigmoid_of_set(1.5),
        num_moe_layers=2,
        has_bias=True,
    ),
    "solar_open": Family(
        "SolarOpenForCausalLM", dict(**ROUTED, **UNGROUPED), sigmoid_of_set(), has_bias=True
    ),
    "zaya": Family(
        "ZayaForCausalLM",
        dict(**{**SPARSE, "num_experts_per_tok": 1}, router_hidden_size=16),
        softmax_of_all(),
        top_k=1,
        num_choices=9,
        packs=False,
        logits=zaya,
    ),
}


@dataclass
class Refused:
    model_class: str
    config: dict[str, Any]
    message: str  # of the refusal
    reason: str  # for the documentation


REFUSED: dict[str, Refused] = {
    "jetmoe": Refused(
        "JetMoeForCausalLM",
        {**LOCAL, "kv_channels": 16},
        "does not show which tokens",
        "two routers to a layer, one of them for attention heads; vLLM does not have it, so nobody records routes",
    ),
    "doge": Refused(
        "DogeForCausalLM",
        dict(is_moe=True, num_experts=16, num_experts_per_tok=2),
        "no MoE block",
        "product keys over embeddings instead of experts; vLLM does not have it, so nobody records routes",
    ),
}
