"""Expert bias, sequence auxiliary loss, MaxVio and frozen routers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.config import LearnerConfig, UserError
from posttrain.learner.batching import collate
from posttrain.learner.moe.balance import (
    DEFAULT_BIAS_RATE,
    freeze_routers,
    max_violation,
    require_expert_bias,
    resolve_bias_rate,
    sequence_auxiliary_loss,
    update_expert_bias,
)
from posttrain.learner.moe.replay import LiveRouting, RouterReplay
from posttrain.learner.moe.routers import BIAS_NAME
from posttrain.learner.worker import LearnerWorker
from posttrain.records import LossSettings, TrainingSample
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, TOP_K
from tests.unit.moe_passes import Handed


def attach(name: str) -> tuple[torch.nn.Module, RouterReplay]:
    model = FAMILIES[name].build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    return model, replay


def live(scores: list[Tensor], indices: list[Tensor]) -> LiveRouting:
    zero = torch.zeros(())
    return LiveRouting(
        counts_LE=zero,
        mismatched_L=zero,
        replayed_L=zero,
        num_tokens=zero,
        num_expected=zero,
        outside_LN=zero,
        scores=[*scores],
        indices=[*indices],
    )


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.has_bias])
def test_bias_moves_towards_the_idle_experts(name: str) -> None:
    _, replay = attach(name)
    learned = [router for router in replay.routers if not router.is_table]  # a table has no bias
    before = [router.correction_bias().clone().flatten() for router in learned]  # type: ignore[union-attr]
    even = [4.0] * (replay.num_experts - NUM_EXPERTS)
    counts = torch.tensor([9.0, 1, 4, 4, 4, 4, 2, 4, *even]).expand(replay.num_layers, -1).double()
    update_expert_bias(replay, counts, 0.01)
    step = torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0.01, 0, *(0.0 for _ in even)])
    for router, old in zip(learned, before, strict=True):
        bias = router.correction_bias()
        assert bias is not None
        torch.testing.assert_close(bias.flatten(), old + step, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["afmoe", "ernie4_5_moe", "laguna"])  # parameters, which train once loaded
def test_a_loaded_bias_is_no_parameter(name: str, tmp_path: Path) -> None:
    built = FAMILIES[name].build()
    built.save_pretrained(tmp_path)
    model = type(built).from_pretrained(tmp_path)
    assert any(BIAS_NAME.search(n) and p.requires_grad for n, p in model.named_parameters())
    replay = RouterReplay.attach(model)
    assert resolve_bias_rate(replay, None, frozen=False) == DEFAULT_BIAS_RATE
    assert not any(BIAS_NAME.search(n) for n, _ in model.named_parameters())
    state, expected = model.state_dict(), built.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)


def test_a_small_rate_is_not_lost_in_a_bfloat16_model() -> None:
    model, replay = attach("mimo_v2_flash")
    model.bfloat16()
    bias = replay.routers[0].correction_bias()
    assert bias is not None
    bias.fill_(0.5)
    for _ in range(10):
        update_expert_bias(replay, torch.arange(NUM_EXPERTS).double().expand(replay.num_layers, -1), 1e-4)
    assert float(bias[0]) == pytest.approx(0.501, abs=1e-6)


def test_bias_changes_the_selection_not_the_gates() -> None:
    model, replay = attach("mimo_v2_flash")
    for router in replay.routers:
        router.correction_bias()[3] = 100.0  # type: ignore[index]
    with replay.routes(None):
        model(torch.randint(3, 64, (1, 9)))
    assert replay.last is not None
    assert (replay.last.counts_LE[:, 3] == 9).all()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_model_without_expert_bias_is_refused(name: str) -> None:
    _, replay = attach(name)
    with pytest.raises(UserError, match=r"learner\.expert_bias_rate=0\.001"):
        update_expert_bias(replay, torch.ones(replay.num_layers, NUM_EXPERTS), 0.001)
    with pytest.raises(UserError, match=r"learner\.expert_bias_rate"):
        require_expert_bias(None, 0.001)
    require_expert_bias(replay, 0.0)


def test_auxiliary_loss_by_hand() -> None:
    """Two sequences packed in one row, three experts, top-1, one padding token."""
    scores = torch.tensor(
        [[0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [1.0, 0.5, 0.5], [9.0, 9.0, 9.0]], requires_grad=True
    )
    indices = torch.tensor([[0], [1], [0], [2]])
    ids = torch.tensor([[0, 0, 1, -1]])
    # sequence 0: f = 3/(1*2) * [1, 1, 0], P = [.4, .45, .15]; sequence 1: f = 3 * [1, 0, 0], P = [.5, .25, .25]
    expected = 0.1 / 2 * (1.5 * 0.4 + 1.5 * 0.45 + 3 * 0.5)
    loss = sequence_auxiliary_loss(live([scores], [indices]), ids, num_sequences=2, coefficient=0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert scores.grad is not None
    assert (scores.grad[3] == 0).all()
    assert (scores.grad[:3] != 0).any()


def formula(shares: Tensor, indices: Tensor, lengths: list[int]) -> float:
    """Equations 17 to 20 of the DeepSeek-V3 report, one sequence and expert at a time; the shares [N, E] of a token add to 1."""
    total, first = 0.0, 0
    for length in lengths:
        rows = range(first, first + length)
        for expert in range(NUM_EXPERTS):
            chosen = sum(expert in indices[row].tolist() for row in rows)
            mean = sum(float(shares[row, expert]) for row in rows) / length
            total += NUM_EXPERTS / (TOP_K * length) * chosen * mean
        first += length
    return total


def test_auxiliary_loss_against_finite_differences() -> None:
    """In float64; which experts a token selects stays what it was, as the formula has no gradient there."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, NUM_EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    indices = logits.detach().topk(TOP_K).indices
    ids = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2])

    def loss(values: Tensor, by_sigmoid: bool) -> Tensor:
        scores = values.sigmoid() if by_sigmoid else values.softmax(-1)
        return sequence_auxiliary_loss(live([scores], [indices]), ids, 2, 0.7)

    for by_sigmoid in (False, True):
        assert torch.autograd.gradcheck(lambda v, s=by_sigmoid: loss(v, s), logits, eps=1e-6, atol=1e-9)
        scores = logits.detach().sigmoid() if by_sigmoid else logits.detach().softmax(-1)
        expected = 0.35 * formula(scores / scores.sum(-1, keepdim=True), indices, [4, 3])
        assert loss(logits, by_sigmoid).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["qwen3_moe", "mimo_v2_flash"])
def test_auxiliary_loss_of_a_softmax_and_of_a_sigmoid_router(name: str) -> None:
    """Of the whole model: a bias takes part in the selection, and in nothing else."""
    model, replay = attach(name)
    ids = torch.tensor([[0] * 5 + [-1] * 2, [1] * 7])
    real = (ids >= 0).flatten()
    with Handed(replay) as handed, replay.routes(None, token_mask_BT=ids >= 0, keep_scores=True):
        model(torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1)), use_cache=False)
        assert replay.last is not None
        loss = sequence_auxiliary_loss(replay.last, ids, 2, 1.0).item()
    expected = 0.0
    for layer, router in enumerate(replay.routers):
        (weight,) = router.parameters()
        logits = handed.hidden[layer].detach().double() @ weight.detach().double().T
        scores = logits.softmax(-1) if name == "qwen3_moe" else logits.sigmoid()
        bias = router.correction_bias()
        assert (bias is None) == (name == "qwen3_moe")
        chosen = (scores if bias is None else scores + bias).topk(TOP_K).indices
        shares = scores / scores.sum(-1, keepdim=True)
        expected += formula(shares[real], chosen[real], [5, 7]) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_auxiliary_loss_is_the_same_packed_or_apart() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(10, NUM_EXPERTS, generator=generator).requires_grad_()
    indices = scores.topk(TOP_K).indices
    packed = sequence_auxiliary_loss(live([scores], [indices]), torch.tensor([[0] * 4 + [1] * 6]), 2, 0.3)
    apart = sum(
        sequence_auxiliary_loss(
            live([scores[part]], [indices[part]]), torch.zeros(1, n, dtype=torch.int64), 2, 0.3
        )
        for part, n in ((slice(0, 4), 4), (slice(4, 10), 6))
    )
    torch.testing.assert_close(packed, apart)


def test_auxiliary_loss_refuses_scores_that_are_no_shares() -> None:
    model, replay = attach("deepseek_v4")
    with replay.routes(None, keep_scores=True):
        model(torch.arange(3, 17).view(2, 7))
        assert replay.last is not None
        with pytest.raises(UserError, match="neither by softmax nor by sigmoid"):
            sequence_auxiliary_loss(replay.last, torch.zeros(2, 7, dtype=torch.int64), 1, 1.0)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "deepseek_v4"])
def test_auxiliary_loss_reaches_every_router(name: str) -> None:
    model, replay = attach(name)
    ids = torch.tensor([[0] * 5 + [-1] * 2, [1] * 7])
    with replay.routes(None, token_mask_BT=ids >= 0, keep_scores=True):
        model(torch.randint(3, 64, (2, 7)))
        assert replay.last is not None
        loss = sequence_auxiliary_loss(replay.last, ids, 2, 1.0)
        loss.backward()
    # A perfectly even router gives 1 per sequence and layer; no distribution gives less than 0 or more than E.
    assert 0 < loss.item() < NUM_EXPERTS * replay.num_layers
    for router in replay.routers:
        assert any(p.grad is not None and (p.grad != 0).any() for p in router.parameters())
    assert replay.last.scores == []  # nothing keeps the graph alive


def test_auxiliary_loss_under_non_reentrant_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model, replay = attach("mimo_v2_flash")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with replay.routes(None, keep_scores=True):
            model(torch.arange(3, 17).view(2, 7), use_cache=False)
            assert replay.last is not None
            sequence_auxiliary_loss(replay.last, torch.tensor([[0] * 7, [1] * 7]), 2, 1.0).backward()
        grads.append([p.grad for p in replay.routers[0].parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_auxiliary_loss_refuses_reentrant_checkpointing() -> None:
    model, replay = attach("mimo_v2_flash")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with replay.routes(None, keep_scores=True):
        model(torch.arange(3, 17).view(2, 7), use_cache=False)
        assert replay.last is not None
        with pytest.raises(UserError, match="reentrant"):
            sequence_auxiliary_loss(replay.last, torch.zeros(2, 7, dtype=torch.int64), 1, 1.0)


def test_max_violation() -> None:
    counts = torch.tensor([[4.0, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [6, 4, 4, 2]])
    assert max_violation(counts).tolist() == [0.0, 3.0, 0.0, 0.5]


@pytest.mark.parametrize("name", ["mimo_v2_flash", "gpt_oss", "jamba"])
def test_frozen_routers_get_no_gradient_and_experts_do(name: str) -> None:
    model, replay = attach(name)
    freeze_routers(replay)
    model(torch.randint(3, 64, (2, 7))).logits.square().mean().backward()
    for router in replay.routers:
        assert all(p.grad is None for p in router.parameters())
        assert all(p.grad is not None for p in router.block.experts.parameters())


def test_an_automatic_bias_rate_needs_a_bias_that_may_move() -> None:
    with_bias, without = attach("mimo_v2_flash")[1], attach("qwen3_moe")[1]
    assert resolve_bias_rate(with_bias, None, False) == 1e-4
    assert resolve_bias_rate(with_bias, None, True) == 0.0
    assert resolve_bias_rate(without, None, False) == resolve_bias_rate(None, None, False) == 0.0
    assert resolve_bias_rate(with_bias, 1e-3, True) == 1e-3
    with pytest.raises(UserError, match=r"learner\.expert_bias_rate=0\.001: this model's routers have no"):
        resolve_bias_rate(without, 1e-3, False)


def test_an_automatic_balance_loss_leaves_routers_without_scores_alone() -> None:
    nothing = live([], [torch.zeros(2, 1, dtype=torch.int64)])
    nothing.scores.append(None)
    worker = LearnerWorker(0, 1, None)
    worker.replay = SimpleNamespace(last=nothing)  # type: ignore[assignment]
    batch = collate({0: sample()}, [[0]], [""])
    sft = LossSettings(kind="sft")
    for coefficient, expected in ((None, 1e-6), (0.0, 0.0), (0.1, 0.1)):
        worker.learner = LearnerConfig(aux_loss_coef=coefficient)
        assert worker._aux_coef(sft) == expected
        assert worker._aux_coef(LossSettings(kind="policy_gradient")) == 0.0
    with pytest.raises(
        UserError, match=r"learner\.aux_loss_coef=0\.1: the routers of this model score neither"
    ):
        worker._auxiliary_loss(batch, 1, sft)
    worker.learner = LearnerConfig(aux_loss_coef=None)
    assert worker._auxiliary_loss(batch, 1, sft) is None
    worker.frozen_routers = True
    worker.learner = LearnerConfig(aux_loss_coef=None, freeze_router=True)
    assert worker._aux_coef(sft) == 0.0


def sample() -> TrainingSample:
    mask = np.array([False, True])
    return TrainingSample(
        token_ids=np.array([1, 2], np.int32), loss_mask=mask, weights=np.ones(2, np.float32)
    )
