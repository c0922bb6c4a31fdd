"""The LM head's product in float32: what rounding it would cost, on both sides of a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig
from posttrain.learner.logprobs import target_logprobs
from posttrain.logits import float32_logits
from teachers.direct import examine
from teachers.scorer import Scorer
from teachers.teacher import Teacher
from teachers.worker import TeacherWorker
from tests.tiny_models import tiny_dense

N, HIDDEN, VOCAB = 40, 16, 90


def make(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Logits of about 20, where bfloat16 has steps of 1/8."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    return tuple((torch.randn(shape, generator=generator) * 2.2).to(device, dtype) for shape in shapes)


def exact(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )


def check(device: str, dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight, bias = make(dtype, device)
    given = bias if with_bias else None
    logits_of = float32_logits(weight, given, hidden)
    for rows in (hidden[3:7], hidden[:0], hidden):
        found = logits_of(rows)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact(rows, weight, given), atol=1e-4, rtol=0)
    with torch.autocast(device, torch.bfloat16):
        assert (
            torch.equal(logits_of(rows), found)
            and float32_logits(weight, given, hidden)(rows).dtype == found.dtype
        )
    ours, plain = (weight.clone().requires_grad_() for _ in range(2))
    targets = torch.arange(N, device=device)
    target_logprobs(hidden, ours, given, targets, 7).sum().backward()
    torch.nn.functional.linear(hidden, plain, given).float().log_softmax(-1)[
        targets, targets
    ].sum().backward()
    gap = (ours.grad.double() - plain.grad.double()).norm() / plain.grad.double().norm()  # type: ignore[union-attr]
    assert gap < 0.05


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_rounded(dtype: torch.dtype, with_bias: bool) -> None:
    check("cpu", dtype, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_rounded_on_a_gpu(dtype: torch.dtype, with_bias: bool) -> None:
    check("cuda", dtype, with_bias)


def test_float64_stays_and_types_may_differ() -> None:
    hidden, weight, bias = make(torch.float64)
    assert torch.equal(float32_logits(weight, bias, hidden)(hidden), exact(hidden, weight, bias))
    mixed = float32_logits(weight.float(), None, hidden.bfloat16())(hidden.bfloat16())
    torch.testing.assert_close(
        mixed.double(), exact(hidden.bfloat16(), weight.float(), None), atol=1e-4, rtol=0
    )


def test_logprobs_of_a_bfloat16_learner_are_those_of_unrounded_logits() -> None:
    hidden, weight, _ = make(torch.bfloat16)
    targets = torch.arange(N)
    expected = exact(hidden, weight, None).log_softmax(-1)[targets, targets]
    found = target_logprobs(hidden, weight, None, targets, 7)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    rounded = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)[targets, targets]
    assert float((rounded - expected).abs().mean()) > 0.01  # what it would be otherwise


def test_a_worker_follows_its_config(tmp_path: Path) -> None:
    path = str(tiny_dense(tmp_path / "model"))
    for head_dtype, expected in ((Dtype.float32, torch.float32), (None, torch.bfloat16)):
        cfg = TeacherWorkerConfig(dtype=Dtype.bfloat16, head_dtype=head_dtype, cores_per_worker=1)
        worker = TeacherWorker(cfg, ModelConfig())
        worker.set_teachers({"k": Teacher(key="teachers.d", path=path)})
        assert worker.backends["k"].head_dtype is expected  # type: ignore[attr-defined]


def test_a_bfloat16_teacher_rounds_its_logits_only_when_told(tmp_path: Path) -> None:
    """Against float64 logits of its own hidden states; the direct forward of the preflight is as exact."""
    path = str(tiny_dense(tmp_path / "model"))
    ids = np.random.default_rng(0).integers(0, 60, 50).astype(np.int32)
    gaps = {}
    for head_dtype in (Dtype.float32, Dtype.bfloat16, None):
        scorer = Scorer(path, ModelConfig(), Dtype.bfloat16, head_dtype=head_dtype)
        scorer.lm_head.weight.mul_(16)
        (scores,) = scorer.score([ids], 512, signal="full")
        hidden = torch.from_numpy(scores.hidden).view(torch.bfloat16).double()  # type: ignore[arg-type]
        logprobs = (hidden @ scorer.head().double().T).log_softmax(-1)[1:]
        chosen = logprobs.gather(1, torch.from_numpy(ids).long()[1:, None])[:, 0]
        gaps[head_dtype] = float(np.abs(chosen.numpy() - scores.logprobs[1:]).mean())
        direct = examine(scorer.model, [ids], [scores.logprobs])
        assert (direct.mean_abs < 1e-5) == (head_dtype is Dtype.float32)
    assert gaps[Dtype.float32] < 1e-5 < 1e-3 < gaps[Dtype.bfloat16] == gaps[None]
