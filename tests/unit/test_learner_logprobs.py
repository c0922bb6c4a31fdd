"""Chunked logprobs: the numbers and gradients of the plain computation, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.learner.logprobs import target_logprobs

N, HIDDEN, VOCAB = 23, 8, 50


def make(num_tokens: int = N, vocab: int = VOCAB) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equal_to_log_softmax_with_gradients(chunk: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = make()
    upstream = torch.linspace(-1, 2, N)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    plain = [leaf.clone().double().requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(*plain)
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    (expected * upstream.double()).sum().backward()

    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    logprobs = target_logprobs(ours[0], ours[1], ours[2] if with_bias else None, targets, chunk)
    (logprobs * upstream).sum().backward()

    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=1e-6)
    for mine, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=5e-6, rtol=1e-5)


def test_no_tokens() -> None:
    hidden, weight, _, targets = make(0)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs = target_logprobs(hidden, weight, None, targets, 4)
    (logprobs.sum() * 3).backward()
    assert logprobs.shape == (0,) and hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("chunk", [4, 16])
def test_never_all_logits_at_once(chunk: int) -> None:
    hidden, weight, _, targets = make(256, 1000)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LargestTensor() as largest:
        target_logprobs(hidden, weight, None, targets, chunk).sum().backward()
    assert largest.elements == max(chunk * 1000, weight.numel())
    assert largest.elements < 256 * 1000 / 8


def test_bfloat16_sums_the_weight_gradient_in_float32() -> None:
    hidden, weight, _, targets = make(512)
    exact = weight.clone().requires_grad_()
    target_logprobs(hidden.bfloat16().float(), exact, None, targets, 1000).sum().backward()
    low = weight.bfloat16().requires_grad_()
    target_logprobs(hidden.bfloat16(), low, None, targets, 2).sum().backward()
    error = (low.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert low.grad.dtype == torch.bfloat16 and error < 0.02
