"""bfloat16 matrix products on CPUs that cannot do them (no AVX-512).

There PyTorch's bfloat16 GEMM is a plain loop, 9 times slower than float32 for 128 rows. The linear layers that vLLM
leaves to it are computed in float32 and rounded once, which is what a bfloat16 GEMM with float32 sums gives.
"""

from __future__ import annotations

from typing import Any

import torch

MIN_ROWS = 4  # a single row is a matrix-vector product, which is fast in bfloat16 too


def _linear_in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[0] < MIN_ROWS:
        return torch.nn.functional.linear(x, weight, bias)
    product = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return product.to(x.dtype)


def use_float32_products(worker: Any) -> int:
    """Replace the slow products of a vLLM worker's model (runs there; again after every load of weights). Returns
    how many linear layers it changed: 0 on GPUs, in float32, and on CPUs with AVX-512."""
    model_config = worker.model_runner.model_config
    on_cpu = worker.device.type == "cpu"
    if not on_cpu or model_config.dtype is not torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    layers = [module for module in worker.model_runner.get_model().modules() if _is_unpacked(module)]
    for layer in layers:
        layer.cpu_linear = _linear_in_float32
    return len(layers)


def _is_unpacked(module: torch.nn.Module) -> bool:
    """Whether vLLM calls PyTorch for this layer: with its packed kernels the weight or the closure says otherwise."""
    linear = getattr(module, "cpu_linear", None)
    weight = getattr(module, "weight", None)
    has_own_kernel = linear is None or bool(getattr(linear, "__closure__", None))
    return not has_own_kernel and isinstance(weight, torch.Tensor) and weight.numel() > 0
