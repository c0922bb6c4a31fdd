"""Tiny random models of every MoE family of Transformers, and what each family's papers say its gates are, in float64.

`scripts/write_replay_families.py` writes the table of docs/routing-replay.md from `FAMILIES` and `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.learner.moe.replay import RouterReplay

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

Weights = dict[str, Tensor]  # trainable parameters of a router by name, float64
Logits = Callable[[Weights, Tensor, dict[str, Any]], Tensor]  # (weights, hidden [N, H], arguments) -> [N, C]


@dataclass(frozen=True)
class Rule:
    """How the logits [N, C] of a router weigh the experts [N, K] that were chosen: gates [N, K]."""

    text: str
    gates: Callable[[Tensor, Tensor, Weights], Tensor]
    set_only: bool = True  # the logits of other experts do not matter


SOFTMAX_OF_SET = Rule(
    "softmax over the chosen experts", lambda logits, chosen, _: logits.gather(1, chosen).softmax(-1)
)


def softmax_of_all(scale: float = 1.0) -> Rule:
    return Rule(
        "softmax over all experts",
        lambda logits, chosen, _: scale * logits.softmax(-1).gather(1, chosen),
        set_only=False,
    )


def sigmoid_of_set(scale: float = 1.0) -> Rule:
    def gates(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
        scores = torch.sigmoid(logits).gather(1, chosen)
        return scale * scores / scores.sum(-1, keepdim=True)

    return Rule("sigmoid, divided by the sum over the chosen experts", gates)


def _sigmoid(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
    return torch.sigmoid(logits.gather(1, chosen))


def _root_softplus(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
    scores = F.softplus(logits).sqrt().gather(1, chosen)
    return 1.5 * scores / scores.sum(-1, keepdim=True)


def _sparse_mixer(logits: Tensor, chosen: Tensor, _: Weights) -> Tensor:
    """Phi-3.5-MoE, section 2: one expert after the other, softmax over those within 2 * jitter of the chosen one."""
    gates, taken = [], torch.zeros_like(logits, dtype=torch.bool)
    for place in range(chosen.shape[1]):
        expert = chosen[:, place : place + 1]
        top = logits.gather(1, expert).detach()
        far = (top - logits.detach()) / torch.maximum(logits.detach().abs(), top) > 0.02
        near = logits.masked_fill(far | taken, float("-inf"))
        gates.append(near.softmax(-1).gather(1, expert))
        taken = taken.scatter(1, expert, True)
    return torch.cat(gates, dim=1)


def _scaled_per_expert(logits: Tensor, chosen: Tensor, weights: Weights) -> Tensor:
    return logits.gather(1, chosen).softmax(-1) * weights["per_expert_scale"][chosen]


def _with_shared_sink(logits: Tensor, chosen: Tensor, weights: Weights) -> Tensor:
    """Inkling: the two shared experts have logits of their own and take part in the sum."""
    scores = torch.sigmoid(torch.cat([logits[:, :8].gather(1, chosen), logits[:, 8:]], dim=1))
    return 8.0 * weights["global_scale"] * (scores / scores.sum(-1, keepdim=True))[:, : chosen.shape[1]]


SIGMOID = Rule("sigmoid", _sigmoid)
ROOT_SOFTPLUS = Rule("root of softplus, divided by the sum over the chosen experts", _root_softplus)
SPARSE_MIXER = Rule("SparseMixer, in the order chosen", _sparse_mixer, set_only=False)
SCALED_PER_EXPERT = Rule("softmax over the chosen experts, times a scale per expert", _scaled_per_expert)
SHARED_SINK = Rule("sigmoid, divided by the sum over the chosen and the shared experts", _with_shared_sink)


def linear(weights: Weights, hidden: Tensor, _: dict[str, Any]) -> Tensor:
    logits = hidden @ next(w for w in weights.values() if w.dim() == 2).T
    for bias in (w for w in weights.values() if w.dim() == 1):
        logits = logits + bias
    return logits


def _soft_capped(weights: Weights, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    return 3.0 * torch.tanh(linear(weights, hidden, arguments) / 3.0)


def _rms_norm(hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


def _normed(weights: Weights, hidden: Tensor, _: dict[str, Any]) -> Tensor:
    """Gemma 4: root mean square norm, a learned scale, then the projection."""
    return (_rms_norm(hidden) * weights["scale"] * hidden.shape[-1] ** -0.5) @ weights["proj.weight"].T


def _without_scales(weights: Weights, hidden: Tensor, _: dict[str, Any]) -> Tensor:
    return hidden @ weights["weight"].T


def _zaya(weights: Weights, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """ZAYA1: down projection, a share of the former layer's router state, an MLP of three layers."""
    states = hidden @ weights["down_proj.weight"].T + weights["down_proj.bias"]
    if arguments.get("router_states") is not None and "router_states_scale" in weights:
        before = arguments["router_states"].detach().double().reshape(len(hidden), -1)
        states = states + before * weights["router_states_scale"]
    states = _rms_norm(states) * weights["router_mlp.norm.weight"]
    for name in ("router_mlp.fc1", "router_mlp.fc2"):
        states = F.gelu(states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    return states @ weights["router_mlp.out_proj.weight"].T


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
        logits=_normed,
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
        logits=_without_scales,
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
        logits=_soft_capped,
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
        logits=_zaya,
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
B, T = 2, 7


@cache
def attached(name: str) -> tuple[Family, Any, RouterReplay]:
    """One model per family for all tests that leave it as it is, in evaluation mode."""
    family = FAMILIES[name]
    model = family.build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    return family, model, replay


def tokens(rows: int = B, length: int = T) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def random_routes(replay: RouterReplay, rows: int = B, length: int = T, seed: int = 0) -> Tensor:
    """[B, T, L, K] int64: different experts, in random order."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, length, replay.num_layers, NUM_EXPERTS, generator=generator)
    return scores.argsort(-1)[..., : replay.top_k]


class Handed:
    """What routers were given in the last forward pass, and what the experts got from them. By MoE layer."""

    def __init__(self, replay: RouterReplay) -> None:
        self.top_k = replay.top_k
        self.hidden: dict[int, Tensor] = {}  # [N, H]
        self.arguments: dict[int, dict[str, Any]] = {}
        self.indices: dict[int, Tensor] = {}  # [N, K]
        self.gates: dict[int, Tensor] = {}  # [N, K]
        self.hooks = []
        for layer, router in enumerate(replay.routers):
            self.hooks += [
                router.module.register_forward_pre_hook(self._router(layer), with_kwargs=True),
                router.module.register_forward_hook(self._dense(layer)),
                router.block.experts.register_forward_pre_hook(self._experts(layer), with_kwargs=True),
            ]

    def _router(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = (*args, *kwargs.values())[0]
            self.hidden[layer] = hidden.reshape(-1, hidden.shape[-1])
            self.arguments[layer] = kwargs

        return hook

    def _experts(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            num_rows = len(self.hidden[layer])
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            pairs = [t for t in given if t.shape == (num_rows, self.top_k)]
            if pairs:
                self.indices[layer] = next(t for t in pairs if not t.is_floating_point())
                self.gates[layer] = next(t for t in pairs if t.is_floating_point())

        return hook

    def _dense(self, layer: int) -> Any:
        """Llama 4 hands every expert every token, times a score that is 0 unless it was chosen."""

        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            if isinstance(out, tuple) and len(out) == 2:
                self.indices[layer] = out[0].topk(self.top_k).indices
                self.gates[layer] = out[0].gather(1, self.indices[layer])

        return hook

    def __enter__(self) -> Handed:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def live_routes(model: Any, replay: RouterReplay) -> Tensor:
    """[B, T, L, K] in the router's own order, without any replay."""
    with Handed(replay) as handed:
        model(input_ids=tokens(), use_cache=False)
    # ZAYA1 hands its skip choice on as expert 0 with weight 0.
    layers = [handed.indices[i].where(handed.gates[i] != 0, NUM_EXPERTS) for i in range(replay.num_layers)]
    return torch.stack(layers, dim=1).view(B, T, -1, replay.top_k)


def never_live(live: Tensor) -> Tensor:
    """Routes of which no expert is in the live selection, where there are enough experts for that."""
    top_k = live.shape[-1]
    return (live.max(-1, keepdim=True).values + 1 + torch.arange(top_k)) % NUM_EXPERTS


def router_weights(replay: RouterReplay, layer: int) -> tuple[list[nn.Parameter], Weights]:
    """Trainable parameters of a router, and fresh float64 copies of them by name."""
    router = replay.routers[layer]
    wanted = {id(p) for p in router.parameters() if p.requires_grad}
    owner = router.block if router.module is router.block else router.module
    named = {name: p for name, p in owner.named_parameters() if id(p) in wanted}
    assert len(named) == len(wanted) > 0
    return list(named.values()), {k: p.detach().double().requires_grad_() for k, p in named.items()}


def reference_gates(family: Family, handed: Handed, layer: int, weights: Weights) -> Tensor:
    """[N, K] float64, by the rule of the family, of the experts that were handed on."""
    hidden = handed.hidden[layer].detach().double()
    logits = family.logits(weights, hidden, handed.arguments[layer])
    return family.rule.gates(logits, handed.indices[layer], weights)
