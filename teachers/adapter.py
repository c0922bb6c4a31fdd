"""A LoRA adapter in PEFT's format, read from its files alone and compared with the base that it is to sit on.

Refuses pickled weights, other kinds of adapter, ranks that contradict `adapter_config.json`, shapes of another base,
and an adapter that names a base with other weights; the gate `adapter` looks at its values. What only the loaded model can tell (modules that are not there)
is refused by `teachers.lora`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import UserError
from teachers.checkpoint import TensorEntry, locate, read_header, read_json, read_tensors
from teachers.fingerprint import fingerprint, hash_tensors
from teachers.gates import GateRow, Subject
from teachers.weights import READABLE, read_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
REFUSED = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
)  # they replace parts of the base


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
    if whole := sorted(name for name in tensors if ".lora_" not in name):
        raise UserError(
            f"{key}={adapter!r}: {whole[0]} is a weight of the base itself, which other adapters share; save the adapter"
            " with save_pretrained(..., save_embedding_layers=False)"
        )
    _check_named_base(config, adapter, base, key)
    _check_shapes(config, tensors, adapter, base, key)


def adapter_row(subject: Subject) -> GateRow:
    """The gate `adapter` of a teacher whose adapter passed `check_adapter`: finite tensors, and a lora_B that is not all
    zero, as it is before the first step of training."""
    teacher = subject.teacher
    assert teacher.adapter is not None
    key = f"{teacher.key}.adapter"
    _, tensors = read_adapter(_folder(teacher.adapter, key), key)
    does_something = False
    for name, entry in tensors.items():
        if entry.dtype not in READABLE:
            return subject.warn(
                "adapter", "not read", f"{name} is of type {entry.dtype}", "look at scoring and initial_kl"
            )
        values = read_whole(entry)
        if not np.isfinite(values).all():
            problem = f"{name} holds NaN or infinite values ({int((~np.isfinite(values)).sum())})"
            return subject.red("adapter", "broken", problem, "save or copy the adapter again")
        does_something |= ".lora_B." in name and bool(values.any())
    if does_something:
        return subject.ok("adapter", f"{len(tensors)} tensors")
    if teacher.is_student:
        return subject.ok("adapter", "no effect, on purpose")
    return subject.red(
        "adapter",
        "no effect",
        f"every lora_B is zero: it computes what its base {teacher.path!r} computes",
        f"give the trained adapter, or the base alone as {teacher.key}.path",
    )


def _folder(adapter: str, key: str) -> Path:
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}={adapter!r}: no such directory; give a PEFT adapter directory")
    return folder


def _check_named_base(config: dict[str, Any], adapter: str, base: str, key: str) -> None:
    """Weights, not names, decide: a checkpoint may have moved. A base that is not here is judged by shapes alone."""
    named = config.get("base_model_name_or_path")
    try:  # the folder in which it was trained may be on another machine, or gone
        other = fingerprint(str(locate(str(named), key)), key) if named else None
    except UserError:
        return
    if other is not None and other != fingerprint(base, key.replace(".adapter", ".path")):
        raise UserError(
            f"{key}={adapter!r}: it was trained on {named!r}, whose weights are not those of {base!r}; give"
            f" {key.replace('.adapter', '.path')}={named}"
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
