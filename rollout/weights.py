"""New weights in a running vLLM engine, and the proof that they arrived.

Two functions run inside vLLM's worker (`collective_rpc`): `apply_bundle` loads a bundle of Hugging Face tensors into
the living model, `engine_tensors` reads every tensor back, packed layouts included, for comparison with an engine
freshly loaded from the same checkpoint. vLLM's layer-wise reload alone is silently wrong in two ways:

* On CPU, `UnquantizedFusedMoEMethod` packs the experts on the first load only. Without its kernel object it takes
  the first-load path again, padding and packing included.
* Attention sinks are copied into a meta tensor that is then thrown away (`mimo_v2.py`, `gpt_oss.py`). Named in the
  reload's skip lists they stay where they are and the model's own loader writes into them, sharded as usual.

A bundle that does not fit is refused before anything is touched (`check_bundle`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch

from posttrain.records import WeightBundle

SINKS = {"attention_sink_bias", "sinks"}


class WeightMismatch(ValueError):
    """The bundle does not hold the weights of the engine's model."""


def check_bundle(
    bundle: WeightBundle, expected: dict[str, tuple[int, ...]], *, num_layers: int, tied_embeddings: bool
) -> None:
    """Raise `WeightMismatch` unless the bundle holds the tensors ``expected`` (names and shapes of the checkpoint).

    Tensors that the engine does not use may be absent: those of multi-token prediction heads, stored as `mtp` or as
    layers beyond ``num_layers``, rotary tables, and the output head where it is tied to the embedding.
    """

    def optional(name: str) -> bool:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        beyond = layer is not None and int(layer.group(1)) >= num_layers
        tied = tied_embeddings and name.endswith("lm_head.weight")
        return beyond or tied or "mtp" in name or name.endswith("rotary_emb.inv_freq")

    missing = [name for name in expected if name not in bundle.tensors and not optional(name)]
    extra = [name for name in bundle.tensors if name not in expected and not optional(name)]
    for kind, names in (("misses", missing), ("has unknown", extra)):
        if names:
            raise WeightMismatch(
                f"weights of version {bundle.policy_version}: {kind} {len(names)} tensors: {names[:3]}"
            )
    for name, content in bundle.tensors.items():
        shape = tuple(bundle.shapes[name])
        if name in expected and shape != expected[name]:
            raise WeightMismatch(
                f"weights of version {bundle.policy_version}: {name} has shape {shape}, the engine's {expected[name]}"
            )
        itemsize = getattr(torch, bundle.dtypes[name]).itemsize
        if content.nbytes != math.prod(shape) * itemsize:
            raise WeightMismatch(
                f"weights of version {bundle.policy_version}: {name} has {content.nbytes} bytes, "
                f"{bundle.dtypes[name]} {shape} needs {math.prod(shape) * itemsize}"
            )


def bundle_tensors(bundle: WeightBundle) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every entry. The tensors are read-only views of the bundle's bytes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, content in bundle.tensors.items():
            flat = torch.from_numpy(content).view(getattr(torch, bundle.dtypes[name]))
            yield name, flat.reshape(bundle.shapes[name])


def apply_bundle(worker: Any, bundle: WeightBundle) -> None:
    """Load ``bundle`` into the model of a vLLM worker (runs there). Raises `WeightMismatch` when a module that has
    weights got none; the engine is then half updated and must not be used."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, SKIP_TENSORS

    SKIP_TENSORS.update(SINKS)
    SKIP_LOAD_TENSORS.update(SINKS)
    runner = worker.model_runner
    model = runner.get_model()
    with torch.inference_mode(), set_current_vllm_config(worker.vllm_config):
        _forget_cpu_expert_kernels(model)
        initialize_layerwise_reload(model)
        model.load_weights(bundle_tensors(bundle))
        untouched = _modules_without_weights(model)
        finalize_layerwise_reload(model, runner.model_config)
    if untouched:
        raise WeightMismatch(
            f"weights of version {bundle.policy_version} left modules untouched: {untouched[:3]}"
        )


def _forget_cpu_expert_kernels(model: torch.nn.Module) -> None:
    """Make the reload of CPU experts take the first-load path, which pads and packs."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "unquantized_backend", None) is UnquantizedMoeBackend.CPU:
            method.moe_kernel = None


def _modules_without_weights(model: torch.nn.Module) -> list[str]:
    """Modules with parameters that no tensor of the bundle reached; read between loading and finalizing."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    names = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        has_weights = any(key not in SINKS for key, value in module._parameters.items() if value is not None)
        untouched = info.can_load() and info.load_numel == 0 and bool(info.load_numel_total)
        if has_weights and untouched and not is_deferred_attention_layer(module):
            names.append(name)
    return names


def engine_tensors(worker: Any) -> dict[str, np.ndarray]:
    """Every tensor that the model of a vLLM worker computes with (runs there): parameters, buffers, tensors held by
    modules and attention back ends, and what packed linear layers hold, read out by multiplying with the identity.
    bfloat16 comes as its int16 bits. The KV cache is left out."""
    model = worker.model_runner.get_model()
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for name, module in model.named_modules():
            found |= {f"{name}.{key}": value for key, value in _held_tensors(module).items()}
            if hasattr(module, "cpu_linear"):
                found[f"{name}.cpu_linear"] = _multiply_identity(
                    module, worker.model_runner.model_config.dtype
                )
    return {name: _bits(tensor) for name, tensor in found.items()}


def _held_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a module holds in any way but the KV cache, by attribute."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    holders: dict[str, Any] = {
        "": dict(module._parameters) | dict(module._buffers) | vars(module),
        "impl.": vars(module.impl) if hasattr(module, "impl") and hasattr(module.impl, "__dict__") else {},
        "experts.": vars(kernel.fused_experts) if kernel is not None else {},
    }
    for key, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__closure__:
            cells = zip(value.__code__.co_freevars, value.__closure__, strict=True)
            holders[f"{key}."] = {name: cell.cell_contents for name, cell in cells}
    return {
        prefix + key: value
        for prefix, holder in holders.items()
        for key, value in holder.items()
        if isinstance(value, torch.Tensor) and not key.startswith("kv_cache")
    }


def _multiply_identity(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """[K, N] transposed weight of a linear layer whose packed form cannot be read."""
    weight = module.weight
    partition = getattr(module, "input_size_per_partition", None)  # replicated layers have none
    width = weight.shape[1] if weight.numel() else partition or module.input_size
    return module.cpu_linear(torch.eye(width, dtype=dtype), weight, None)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy().copy()
