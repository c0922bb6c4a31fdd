"""Two config.json of models with the same tensors: whether they compute the same function of them.

A tensor says nothing of the rotary base, the number of experts a token takes or how their weights are normalised: a teacher
whose config.json was lost and written anew, or taken from a sibling, has whole weights and wrong scores. Owns which keys
decide about a forward. The same keys tell two checkpoints of equal tensors apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

# Nothing in a scoring forward depends on these. Rows of the vocabulary and marks have gates of their own; whether the head
# is tied shows in the tensors.
INERT = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|auto_map|use_cache|return_dict|torchscript|problem_type"
    r"|vocab_size|tie_word_embeddings|max_sequence_length|(bos|eos|pad|sep|unk|cls)_token_id"
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


def differences(teacher: Path, student: Path) -> tuple[list[str], list[str]]:
    """(what changes the forward, what may) of the config.json of one checkpoint folder against another's, as
    ``key=theirs (student ours)``.

    Files that differ are read again by Transformers where it knows the family, which fills in its defaults and gives old
    keys their present names. What only one of the two names then, is told where it decides, as something that may change the
    forward.
    """
    raw = [json.loads((folder / "config.json").read_text()) for folder in (teacher, student)]
    found = _compare(*raw)
    if not any(found):
        return found
    filled = [_filled(folder) for folder in (teacher, student)]
    return found if None in filled else _compare(*filled)  # type: ignore[arg-type]


def digest(config: dict[str, Any]) -> str:
    """12 hex digits of everything in config.json that a forward may depend on."""
    kept = {
        key: float(value) if isinstance(value, int | float) else value
        for key, value in _flat(config).items()
        if value is not None and not _is_inert(key)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _compare(teacher: dict[str, Any], student: dict[str, Any]) -> tuple[list[str], list[str]]:
    theirs, ours = _flat(teacher), _flat(student)
    for flat in (theirs, ours):
        if flat.get("head_dim") is None and flat.get("hidden_size") and flat.get("num_attention_heads"):
            flat["head_dim"] = flat["hidden_size"] // flat["num_attention_heads"]
    unused = set() if _uses_context(theirs) or _uses_context(ours) else {"max_position_embeddings"}
    if theirs.get("use_sliding_window") is ours.get("use_sliding_window") is False:
        unused |= {"sliding_window", "max_window_layers"}
    wrong: list[str] = []
    unclear: list[str] = []
    for key in sorted(theirs.keys() | ours.keys()):
        one, other = theirs.get(key), ours.get(key)
        if _is_inert(key) or key in unused or one == other:  # null is as good as absent
            continue
        text = f"{key}={_words(one)} (student {_words(other)})"
        decides = DECIDING.fullmatch(key) or DECIDING.fullmatch(key.rpartition(".")[2])
        if one is not None and other is not None:
            (wrong if decides else unclear).append(text)
        elif decides:
            unclear.append(text)
    return wrong, unclear


def _words(value: Any) -> str:
    return "not given" if value is None else str(value)


def _is_inert(key: str) -> bool:
    return any(INERT.fullmatch(part) for part in key.split("."))


def _uses_context(flat: dict[str, Any]) -> bool:
    """Whether the rotary settings may depend on the longest context (YaRN, dynamic scaling)."""
    kinds = {value for key, value in flat.items() if key.startswith("rope.") and key.endswith("rope_type")}
    return not kinds <= {"default", "linear", "llama3"}


def _filled(folder: Path) -> dict[str, Any] | None:
    """config.json with the defaults of its family; None where Transformers does not know it."""
    from transformers import AutoConfig

    try:  # someone else's file; families raise half a dozen types for what they do not like
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception:
        return None


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
            found[prefix + str(key)] = value
