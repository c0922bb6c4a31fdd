"""A LoRA adapter in PEFT's format, read from its files alone and compared with the base that it is to sit on.

Refuses pickled weights, other kinds of adapter, ranks that contradict `adapter_config.json` and shapes of another base;
the gate `adapter` looks at its values and at the base that it names. What only the loaded model can tell (modules that are
not there) is refused by `teachers.lora`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import UserError
from teachers.checkpoint import TensorEntry, locate, read_header, read_json, read_tensors
from teachers.fingerprint import fingerprint, hash_tensors
from teachers.gates import GateRow, Subject
from teachers.tensor_values import READABLE, read_whole
from teachers.weights import compare_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
REFUSED = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
)  # they replace parts of the base
# Initialisations that change the base's own weights.
REWRITING = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Settings that may be on: where and how large the matrices are, how they were initialised, what only training reads. Each
# other one that is on makes PEFT compute something else, which scoring would not know or other adapters would feel.
KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "inference_mode"),
    *("bias", "modules_to_save", "trainable_token_indices", "layer_replication"),  # by what they are set to
    *("fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size", "runtime_config"),
    "lora_bias",
}


def read_adapter(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """adapter_config.json and the tensors of an adapter folder. Raises `UserError` naming ``key``."""
    if not (folder / CONFIG).is_file():
        hint = "a whole checkpoint belongs in path" if (folder / "config.json").exists() else "is it there?"
        raise UserError(f"{key}={str(folder)!r}: no {CONFIG}; give a PEFT adapter directory ({hint})")
    if not (folder / WEIGHTS).is_file():
        pickled = " (pickled weights are not read)" if list(folder.glob("*.bin")) else ""
        raise UserError(
            f"{key}={str(folder)!r}: no {WEIGHTS}{pickled}; save the adapter with save_pretrained"
        )
    return read_json(folder / CONFIG, folder, key), {
        e.name: e for e in read_header(folder / WEIGHTS, folder, key)
    }


def adapter_fingerprint(folder: str, key: str = "adapter") -> str:
    """sha256 (hex) of the adapter's tensors and settings (its scaling is one), without the name of its base."""
    config, tensors = read_adapter(_folder(folder, key), key)
    config.pop("base_model_name_or_path", None)
    settings = json.dumps(config, sort_keys=True)
    return hashlib.sha256(f"{settings} {hash_tensors(tensors)}".encode()).hexdigest()


def target_parameters(adapter: str, key: str) -> frozenset[str]:
    """Parameters without a module of their own that the adapter changes; equal for all adapters of one base that have
    any."""
    key = f"{key}.adapter"
    return frozenset(read_adapter(_folder(adapter, key), key)[0].get("target_parameters") or ())


def check_adapter(adapter: str, base: str, key: str) -> None:
    """Compare the adapter in ``adapter`` with the checkpoint folder ``base``. Raises `UserError` naming
    ``key``.adapter."""
    key = f"{key}.adapter"
    config, tensors = read_adapter(_folder(adapter, key), key)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{key}={adapter!r}: peft_type is {config.get('peft_type')!r}; only LORA is scored with"
        )
    replaced = [name for name in REFUSED if config.get(name)]
    if replaced or config.get("bias", "none") != "none":
        raise UserError(
            f"{key}={adapter!r}: {', '.join(replaced) or 'bias'} changes the base itself, which other adapters share;"
            " merge it into a checkpoint and give that as path"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REWRITING):
        raise UserError(
            f"{key}={adapter!r}: init_lora_weights is {init!r}, which rewrites the base as the adapter is put on it, and other"
            " adapters share it; save it with save_pretrained(..., path_initial_model_for_weight_conversion=...) or merge it"
        )
    unknown = sorted(n for n, value in config.items() if value not in (None, False) and n not in KNOWN)
    if unknown:
        raise UserError(
            f"{key}={adapter!r}: {unknown[0]}={config[unknown[0]]!r} in {CONFIG}: a kind of LoRA that is not scored with (plain,"
            " rsLoRA and DoRA are); merge it into a checkpoint and give that as path"
        )
    for name, alpha in _alphas(config).items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise UserError(
                f"{key}={adapter!r}: {name}={alpha!r} in {CONFIG}: a number is needed; save it again"
            )
    if whole := sorted(name for name in tensors if ".lora_" not in name):
        raise UserError(
            f"{key}={adapter!r}: {whole[0]} is a weight of the base itself, which other adapters share; save the adapter"
            " with save_pretrained(..., save_embedding_layers=False)"
        )
    _check_layers(tensors, adapter, base, key)
    _check_shapes(config, tensors, adapter, base, key)


def adapter_row(subject: Subject, base: str) -> GateRow:
    """The gate `adapter` of a teacher whose adapter passed `check_adapter`: finite tensors, some that do something, and the
    base that it was trained on, ``base`` being the folder of the present one."""
    teacher = subject.teacher
    assert teacher.adapter is not None
    key = f"{teacher.key}.adapter"
    config, tensors = read_adapter(_folder(teacher.adapter, key), key)
    moved = {}
    for name, entry in tensors.items():
        if entry.dtype not in READABLE:
            return subject.warn(
                "adapter", "not read", f"{name} is of type {entry.dtype}", "look at scoring and initial_kl"
            )
        values = read_whole(entry)
        if not np.isfinite(values).all():
            problem = f"{name} holds NaN or infinite values ({int((~np.isfinite(values)).sum())})"
            return subject.red("adapter", "broken", problem, "save or copy the adapter again")
        moved[name] = bool(values.any())
    named = config.get("base_model_name_or_path")
    is_base = _is_base(str(named), base, key) if named else None
    if is_base is False:
        return subject.red(
            "adapter",
            "another base",
            f"it was trained on {named!r}, whose weights are not those of {base!r}",
            f"give {teacher.key}.path={named}",
        )
    alphas = _alphas(config)
    if negative := {name: alpha for name, alpha in alphas.items() if alpha < 0}:
        return subject.red(
            "adapter",
            "negative scale",
            f"{CONFIG} has {', '.join(f'{name}={alpha}' for name, alpha in negative.items())}: it would teach the opposite",
            "give the lora_alpha that it was trained with",
        )
    is_scaled = any(alphas.values())
    if is_scaled and any(
        moved[a] and moved.get(a.replace(".lora_A.", ".lora_B.")) for a in moved if ".lora_A." in a
    ):
        where = "" if is_base else ", base not compared"
        return subject.ok("adapter", f"{len(tensors)} tensors{where}")
    if teacher.is_student:
        return subject.ok("adapter", "no effect, on purpose")
    return subject.red(
        "adapter",
        "no effect",
        f"lora_alpha, or lora_A or lora_B of every module, is zero: it computes what its base {teacher.path!r} computes",
        f"give the trained adapter, or the base alone as {teacher.key}.path",
    )


def _folder(adapter: str, key: str) -> Path:
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}={adapter!r}: no such directory; give a PEFT adapter directory")
    return folder


def _is_base(named: str, base: str, key: str) -> bool | None:
    """Whether the checkpoint that the adapter names holds the weights of ``base``, in whatever type; None where it is not
    here, or in a form that cannot be compared. Weights, not names, decide: a checkpoint may have moved."""
    try:  # the folder in which it was trained may be on another machine, or gone
        other = str(locate(named, key))
        if fingerprint(other, key) == fingerprint(base, key):
            return True
        theirs, ours = read_tensors(Path(other), key), read_tensors(Path(base), key)
    except UserError:
        return None
    report = compare_weights(theirs, ours, vocab_size=0)
    same_shapes = {n: e.shape for n, e in theirs.items()} == {n: e.shape for n, e in ours.items()}
    if report.not_read or not same_shapes:  # quantized, padded: another form, perhaps of the same weights
        return None
    return report.is_student


def _alphas(config: dict[str, Any]) -> dict[str, Any]:
    return {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}


def _check_layers(tensors: dict[str, TensorEntry], adapter: str, base: str, key: str) -> None:
    """What else is not there, only the loaded model can tell: stacked experts have other names in it than on the disk."""
    layer = re.compile(r"\.(\d+)\.")
    present = {found[1] for name in read_tensors(locate(base, key), key) if (found := layer.search(name))}
    for name in sorted(tensors):
        found = layer.search(name)
        if found and present and found[1] not in present:
            raise UserError(
                f"{key}={adapter!r}: {name} is for layer {found[1]}, which {base!r} does not have; it is an adapter of another"
                " base"
            )


def _check_shapes(
    config: dict[str, Any], tensors: dict[str, TensorEntry], adapter: str, base: str, key: str
) -> None:
    ranks = {int(config["r"]), *(int(r) for r in (config.get("rank_pattern") or {}).values())}
    weights = read_tensors(locate(base, key), key)
    modules = sorted(
        {name.partition(".lora_")[0] for name in tensors if ".lora_A." in name or ".lora_B." in name}
    )
    if not modules:
        raise UserError(f"{key}={adapter!r}: {WEIGHTS} holds no lora_A and lora_B; save the adapter again")
    for module in modules:
        pair = [tensors.get(f"{module}.lora_{half}.weight") for half in "AB"]
        if pair[0] is None or pair[1] is None:
            raise UserError(f"{key}={adapter!r}: {module} has only one of lora_A and lora_B; save it again")
        (rank_a, num_in), (num_out, rank_b) = pair[0].shape, pair[1].shape
        weight = weights.get(module.removeprefix(PREFIX).replace(".base_layer", "") + ".weight")
        # Adapters of stacked experts hold all of them side by side: a multiple of the rank.
        fits = rank_a in ranks if weight is not None else any(rank_a % rank == 0 for rank in ranks)
        if rank_a != rank_b or not fits:
            raise UserError(
                f"{key}={adapter!r}: {module} has rank {rank_a} (lora_A) and {rank_b} (lora_B), {CONFIG} says"
                f" {sorted(ranks)}; save the adapter again"
            )
        if weight is not None and len(weight.shape) == 2 and weight.shape != (num_out, num_in):
            raise UserError(
                f"{key}={adapter!r}: {module} is for a weight of shape {[num_out, num_in]}, that of {base!r} is"
                f" {list(weight.shape)}; it is an adapter of another base"
            )
