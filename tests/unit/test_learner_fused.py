"""Liger's kernel against our own chunks on a GPU, and where it is used at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain import gpus
from posttrain.config import FusedLoss, LearnerConfig, ModelConfig, SFTRun, UserError
from posttrain.learner import fused, policy
from posttrain.learner import model as loading
from posttrain.learner.logprobs import target_logprobs
from posttrain.learner.policy import Policy
from tests.tiny_models import tiny_qwen3_moe

N, HIDDEN, VOCAB = 300, 64, 1000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_gives_the_logprobs_and_gradients_of_our_chunks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cuda")
    hidden = torch.randn(N, HIDDEN, generator=generator).to(device, dtype)
    weight = (0.3 * torch.randn(VOCAB, HIDDEN, generator=generator)).to(device, dtype)
    targets = torch.randint(0, VOCAB, (N,), generator=generator).to(device)
    upstream = torch.randn(N, generator=generator).to(device)

    def both(make: object) -> tuple[Tensor, ...]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logprobs = make(*leaves)  # type: ignore[operator]
        (logprobs * upstream).sum().backward()
        return logprobs.detach(), leaves[0].grad, leaves[1].grad  # type: ignore[return-value]

    fused.require(device)  # the GPU list holds liger-kernel
    own = both(lambda h, w: target_logprobs(h, w, None, targets, 64))
    other = both(lambda h, w: fused.fused_logprobs(h, w, targets))
    assert other[0].dtype == torch.float32
    for mine, theirs in zip(own, other, strict=True):
        gap = (mine.double() - theirs.double()).norm() / mine.double().norm()
        assert gap < (1e-5 if dtype == torch.float32 else 2e-2)


def test_it_is_for_gpus_alone() -> None:
    with pytest.raises(UserError, match=r"learner\.fused_loss='liger': needs a GPU"):
        fused.require(torch.device("cpu"))


def test_a_run_without_a_gpu_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "num_gpus", lambda: 0)
    run = SFTRun(model=ModelConfig(path="m"), learner=LearnerConfig(fused_loss=FusedLoss.liger))
    with pytest.raises(UserError, match=r"^learner\.fused_loss='liger': the learner has no GPU here"):
        gpus.check_gpus(run, [])


def test_it_serves_heads_without_bias_that_have_tokens() -> None:
    hidden, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    assert fused.serves(hidden, None, targets)
    assert not fused.serves(hidden, torch.zeros(9), targets)
    assert not fused.serves(hidden, None, targets[:, None].expand(3, 2))
    assert not fused.serves(hidden[:0], None, targets[:0])
    assert not fused.serves(hidden.double(), None, targets)


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_policy_uses_it_when_told(
    is_fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def stand_in(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        calls.append(len(target_ids))
        return target_logprobs(hidden, weight, None, target_ids, 8)

    monkeypatch.setattr(policy, "fused_logprobs", stand_in)
    path = tiny_qwen3_moe(tmp_path / "model", num_layers=2)
    made = Policy(
        loading.load(ModelConfig(path=str(path)), path, torch.float32), 16, use_fused_kernel=is_fused
    )
    ids = torch.arange(6)[None]
    positions = torch.arange(5)
    one = made(ids, torch.arange(6)[None], positions, ids[0, 1:])
    two = made(ids, torch.arange(6)[None], positions, ids[0, 1:, None].expand(5, 2))
    assert calls == ([5] if is_fused else [])
    assert torch.allclose(one, two[:, 0], atol=1e-5)
