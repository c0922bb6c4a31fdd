"""Two config.json of models with the same tensors: whether they compute the same function of them.

A tensor says nothing of the rotary base, the number of experts a token takes or how their weights are normalised: a teacher
whose config.json was lost and written anew, or taken from a sibling, has whole weights and wrong scores. Owns which keys
decide about a forward; reads JSON only. The same keys tell two checkpoints of equal tensors apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

# Nothing in a scoring forward depends on these. Rows of the vocabulary and marks have gates of their own; whether the head
# is tied shows in the tensors.
INERT = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|auto_map|use_cache|return_dict|torchscript|problem_type"
    r"|vocab_size|tie_word_embeddings|max_position_embeddings|max_sequence_length|(bos|eos|pad|sep|unk|cls)_token_id"
    r"|.*init(ializer)?_(range|std)|.*dropout.*|.*_pdrop|.*aux_loss.*|output_.*|id2label|label2id|num_labels"
    r"|.*gradient_checkpointing.*|use_bfloat16|is_encoder_decoder|chunk_size_feed_forward|tokenizer_class|finetuning_task"
    r"|attn_implementation|experts_implementation|seq_aux|moe_aux.*|.*z_loss.*"
)
# These do, whatever the family; a difference in any other key is a warning.
DECIDING = re.compile(
    r"model_type|rope\..*|.*rope.*|.*rotary.*|.*theta|.*eps|.*epsilon|hidden_act(ivation)?|activation.*|.*head_dim|num_hidden_layers"
    r"|num_.*heads|num_(local_)?experts|n_routed_experts|num_experts_per_tok(en)?|moe_top_?k|experts_top_k|norm_topk_prob"
    r"|routed_scaling_factor|scoring_func|topk_method|n_group|topk_group|.*sliding_window.*|max_window_layers|.*layer_types"
    r"|layers_block_type|.*_pattern|.*_freq|first_k_dense_replace|mlp_only_layers|decoder_sparse_step|n_shared_experts"
    r"|.*softcap.*|.*soft_cap.*|logit_scale|attention_multiplier|residual_multiplier|embedding_multiplier|logits_scaling"
    r"|query_pre_attn_scalar|.*attention_chunk.*|attention_sink.*|add_.*sink.*|use_qk_norm|qk_norm|swa_.*|attention_bias|attention_value_scale|.*clamp.*|swiglu_limit"
)


def differences(teacher: dict[str, Any], student: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what changes the forward, what may) of the teacher's config.json against the student's: ``key=theirs (student ours)``.

    Values that only one of the two names are told where they decide, as something that may change the forward: the
    other's default is not known here.
    """
    theirs, ours = _flat(teacher), _flat(student)
    wrong: list[str] = []
    unclear: list[str] = []
    for key in sorted(theirs.keys() | ours.keys()):
        name = key.rpartition(".")[2]
        if INERT.fullmatch(name) or theirs.get(key) == ours.get(key):  # null is as good as absent
            continue
        decides = DECIDING.fullmatch(key) or DECIDING.fullmatch(name)
        text = f"{key}={theirs.get(key, '(not given)')} (student {ours.get(key, '(not given)')})"
        if key in theirs and key in ours:
            (wrong if decides else unclear).append(text)
        elif decides:
            unclear.append(text)
    return wrong, unclear


def digest(config: dict[str, Any]) -> str:
    """12 hex digits of everything in config.json that a forward may depend on."""
    kept = {
        key: value
        for key, value in _flat(config).items()
        if value is not None and not INERT.fullmatch(key.rpartition(".")[2])
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Key by key, the text model's own ones of a model with several, and the rotary settings in one form: Transformers has
    written them as rope_theta with rope_scaling, and as rope_parameters."""
    config = dict(config.get("text_config") or config)
    rope = config.pop("rope_parameters", None)
    scaling = config.pop("rope_scaling", None)
    if rope is None:
        rope = dict(scaling or {})
        if "rope_theta" in config:
            rope["rope_theta"] = config["rope_theta"]
    config.pop("rope_theta", None)
    if isinstance(rope, dict):
        rope = dict(rope)
        if "type" in rope:
            rope.setdefault("rope_type", rope["type"])
            del rope["type"]
        if not any(isinstance(value, dict) for value in rope.values()):
            rope.setdefault("rope_type", "default")
        config["rope"] = rope
    found: dict[str, Any] = {}
    _spread(config, "", found)
    return found


def _spread(node: dict[str, Any], prefix: str, found: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _spread(value, f"{prefix}{key}.", found)
        else:
            found[prefix + key] = value
