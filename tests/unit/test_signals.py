"""The teachers' signals: golden numbers worked out without torch, exact enumeration, finite differences, limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.learner.divergence import TeacherStates, gathered_logprobs, target_and_divergence
from posttrain.learner.logprobs import target_logprobs
from posttrain.learner.losses import LossInputs, LossOutput, compute
from posttrain.records import LossSettings
from tests.unit.golden import derive_signals

SIGNALS = ("top_k", "top_k_renorm", "full")
GOLDEN = json.loads(derive_signals.FILE.read_text())
F64 = torch.float64


def settings(signal: str, **changes: Any) -> LossSettings:
    base: dict[str, Any] = {"kind": "policy_gradient", "beta": 1.0, "alpha": 0.0, "teacher_clip": 1e9}
    return LossSettings(signal=signal, **(base | changes))


def loss_inputs(
    signal: str,
    hidden: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    k: int,
    chunk: int = 4,
    bias: Tensor | None = None,
    **streams: Any,
) -> LossInputs:
    """What the learner would hand to the loss: ``teacher_logits`` [N, V] are those of a teacher with H' = V."""
    n = len(hidden)
    teacher = teacher_logits.log_softmax(-1)
    given: dict[str, Any] = {
        "weights": torch.ones(n, dtype=hidden.dtype),
        "domain_ids": torch.zeros(n, dtype=torch.int64),
        "domains": ["math"],
        "teacher_logprobs": teacher.gather(1, targets[:, None])[:, 0],
    }
    if signal == "sampled":
        given["policy_logprobs"] = target_logprobs(hidden, weight, bias, targets, chunk)
    elif signal == "full":
        states: TeacherStates = [
            (torch.arange(n), teacher_logits, torch.eye(teacher.shape[1], dtype=teacher.dtype))
        ]
        both = target_and_divergence(hidden, weight, bias, targets, states, chunk)
        given["policy_logprobs"], given["teacher_kl"] = both[:, 0], both[:, 1]
    else:
        top = teacher.topk(k)
        all_ids = torch.cat([targets[:, None], top.indices], 1)
        columns = gathered_logprobs(hidden, weight, bias, all_ids, chunk)
        given["policy_logprobs"], given["policy_topk_logprobs"] = columns[:, 0], columns[:, 1:]
        given["teacher_topk_logprobs"] = top.values
    given["rollout_logprobs"] = given["policy_logprobs"].detach()
    return LossInputs(**(given | streams))


def mean_of(output: LossOutput, name: str) -> float:
    total, count = output.metrics[name]
    return float(total / count)


def logits_of(text: str) -> Tensor:
    return torch.tensor([[float(Fraction(p)) for p in text.split()]], dtype=F64).log()


# ---- golden numbers ----


def test_golden_file_is_what_its_derivation_gives() -> None:
    assert derive_signals.derive() == GOLDEN
    assert GOLDEN[0]["signals"]["top_k"]["value"].startswith("0.2982867951")  # 1/4 ln 2 + 1/8, by hand


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kind", ["policy_gradient", "ppo_clip"])
def test_golden(case: dict[str, Any], signal: str, kind: str) -> None:
    """Logits are the hidden states themselves (an identity head), so their gradient is that of the logits."""
    hidden = logits_of(case["policy"]).requires_grad_()
    given = loss_inputs(
        signal,
        hidden,
        torch.eye(5, dtype=F64),
        logits_of(case["teacher"]),
        torch.tensor([1]),
        len(case["top"]),
        old_logprobs=hidden.detach()[:, 1],
    )
    output = compute(given, settings(signal, kind=kind, beta=0.5))
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    expected = case["signals"][signal]
    assert 2 * output.loss.item() == pytest.approx(float(expected["value"]), rel=1e-12, abs=1e-14)
    assert mean_of(output, "teacher/kl") == mean_of(output, "math/teacher_kl") == 2 * output.loss.item()
    wanted = torch.tensor([[float(g) for g in expected["gradient"]]], dtype=F64)
    torch.testing.assert_close(2 * gradient, wanted, atol=1e-14, rtol=0)
    assert mean_of(output, "teacher/k1") == pytest.approx(-float(case["log_ratio"][1]), abs=1e-14)
    assert "clip/teacher" not in output.metrics
    if signal != "full":
        assert mean_of(output, "teacher/topk_mass") == pytest.approx(float(case["mass"]), abs=1e-14)


# ---- what the signals have to do with each other ----


def random_logits(n: int, vocab: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale


def test_sampled_gradient_in_expectation_is_that_of_full() -> None:
    """Exact enumeration: every token is sampled once, weighted by mu; mu differs from pi inside the band."""
    vocab = 7
    one, teacher = random_logits(1, vocab, 0), random_logits(1, vocab, 1)
    rollout = (one + random_logits(1, vocab, 2, 0.1)).log_softmax(-1)
    tokens = torch.arange(vocab)

    hidden = one.expand(vocab, vocab).clone().requires_grad_()
    sampled = loss_inputs(
        "sampled",
        hidden,
        torch.eye(vocab, dtype=F64),
        teacher.expand(vocab, vocab),
        tokens,
        0,
        weights=rollout[0].exp(),
        rollout_logprobs=rollout[0],
    )
    output = compute(sampled, settings("sampled"))
    assert mean_of(output, "clip/ratio_dropped") == 0
    expected = torch.autograd.grad(output.loss, hidden)[0].sum(0)

    hidden = one.clone().requires_grad_()
    full = loss_inputs("full", hidden, torch.eye(vocab, dtype=F64), teacher, tokens[:1], 0)
    gradient = torch.autograd.grad(compute(full, settings("full")).loss, hidden)[0][0]
    assert gradient.abs().max() > 0.05
    torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=1e-13)


def test_top_k_of_the_whole_vocabulary_is_full() -> None:
    hidden = random_logits(6, 9, 0).requires_grad_()
    results = []
    for signal in SIGNALS:
        given = loss_inputs(
            signal,
            hidden,
            torch.eye(9, dtype=F64),
            random_logits(6, 9, 1),
            torch.zeros(6, dtype=torch.int64),
            9,
        )
        loss = compute(given, settings(signal)).loss
        results.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def top_k_loss(logits: Tensor, teacher: Tensor, k: int) -> Tensor:
    n, vocab = logits.shape
    eye = torch.eye(vocab, dtype=F64)
    given = loss_inputs("top_k", logits, eye, teacher, torch.zeros(n, dtype=torch.int64), k)
    return compute(given, settings("top_k")).loss


def uncorrected(logits: Tensor, teacher: Tensor, k: int) -> Tensor:
    """sum over the top k of p_S log(p_S / p_T), without what corrects it."""
    top = teacher.log_softmax(-1).topk(k)
    logprobs = logits.log_softmax(-1).gather(1, top.indices)
    return (logprobs.exp() * (logprobs - top.values)).sum()


def test_top_k_has_its_minimum_at_the_teacher_and_the_uncorrected_sum_does_not() -> None:
    teacher, k = random_logits(1, 12, 3), 4
    at_teacher = teacher.clone().requires_grad_()
    corrected = top_k_loss(at_teacher, teacher, k)
    assert abs(corrected.item()) < 1e-14
    assert torch.autograd.grad(corrected, at_teacher)[0].abs().max() < 1e-14

    for seed in range(200):  # nowhere below, also when the mass moves out of the top k
        moved = teacher + random_logits(1, 12, seed, 10 ** (seed / 50 - 2))
        assert top_k_loss(moved, teacher, k).item() > 0

    plain = uncorrected(at_teacher, teacher, k)
    slope = torch.autograd.grad(plain, at_teacher)[0]
    assert abs(plain.item()) < 1e-14 and slope.abs().max() > 0.05
    assert uncorrected(teacher - 5 * slope, teacher, k).item() < -0.01

    logits = random_logits(
        1, 12, 4
    ).requires_grad_()  # downhill from elsewhere it arrives at the teacher's top k
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = top_k_loss(logits, teacher, k)
        loss.backward()
        return loss

    optimizer.step(closure)
    ids = teacher.topk(k).indices
    reached = logits.detach().softmax(-1).gather(1, ids)
    torch.testing.assert_close(reached, teacher.softmax(-1).gather(1, ids), atol=1e-5, rtol=0)


def test_variance_of_the_sampled_estimator() -> None:
    """Of one draw: mean = grad KL, total variance = sum_y p_S(y) A(y)^2 |onehot_y - p_S|^2 - |grad KL|^2."""
    num_draws, vocab = 100_000, 6
    one, teacher = random_logits(1, vocab, 5), random_logits(1, vocab, 6)
    policy = one.softmax(-1)[0]
    advantage = (teacher.log_softmax(-1) - one.log_softmax(-1))[0]
    scores = torch.eye(vocab, dtype=F64) - policy  # row y: d log p(y) / d logits
    exact = -(policy * advantage) @ scores
    variance = float((policy * advantage**2 * scores.square().sum(1)).sum() - exact.square().sum())

    draws = torch.multinomial(policy, num_draws, replacement=True, generator=torch.Generator().manual_seed(0))
    hidden = one.expand(num_draws, vocab).clone().requires_grad_()
    given = loss_inputs(
        "sampled", hidden, torch.eye(vocab, dtype=F64), teacher.expand(num_draws, vocab), draws, 0, 4096
    )
    (gradients,) = torch.autograd.grad(compute(given, settings("sampled")).loss, hidden)
    found = float((gradients - gradients.mean(0)).square().sum(1).mean())
    assert found == pytest.approx(variance, rel=0.02)
    error = float((gradients.mean(0) - exact).norm())
    assert error < 4 * (variance / num_draws) ** 0.5
    assert variance > float(exact.square().sum())  # what the exact signals save


# ---- band, outcome, domains ----


def test_band_outcome_and_weights() -> None:
    """Tokens outside the band are dropped, the ratio is not multiplied in, alpha adds its policy gradient."""
    n, vocab = 4, 8
    logits, teacher = random_logits(n, vocab, 7), random_logits(n, vocab, 8)
    ratios = torch.tensor([2.0, 0.4, 1.0, 6.0], dtype=F64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    eye = torch.eye(vocab, dtype=F64)

    def run(signal: str, chosen: list[int], **changes: Any) -> tuple[LossOutput, Tensor]:
        rows = torch.tensor(chosen)
        hidden = logits[rows].requires_grad_()
        given = loss_inputs(
            signal, hidden, eye, teacher[rows], rows, 3,
            weights=weights[rows], orm_advantages=torch.full((len(rows),), 1.5, dtype=F64),
            domain_ids=rows % 2, domains=["math", "code"],
        )  # fmt: skip
        given.rollout_logprobs = given.policy_logprobs.detach() - ratios[rows].log()
        output = compute(given, settings(signal, **changes))
        return output, torch.autograd.grad(output.loss, hidden)[0]

    for signal in SIGNALS:
        output, gradient = run(signal, [0, 1, 2, 3], alpha=0.5)
        alone = [run(signal, [t], correction="off") for t in range(n)]
        for t in range(n):
            outcome = -0.5 * 1.5 * ratios[t] * (eye[t] - logits[t].softmax(-1))
            expected = alone[t][1][0] + weights[t] * outcome
            torch.testing.assert_close(gradient[t], expected * (0 if t in (1, 3) else 1))
        assert output.loss.item() == pytest.approx(run(signal, [0, 2], alpha=0.5)[0].loss.item())
        every = sum(one.loss.item() for one, _ in alone)
        for correction in ("tis", "off"):
            assert run(signal, [0, 1, 2, 3], correction=correction)[0].loss.item() == pytest.approx(every)
        kls = [mean_of(one, "teacher/kl") for one, _ in alone]
        assert mean_of(output, "math/teacher_kl") == pytest.approx((kls[0] + kls[2]) / 2)
        assert mean_of(output, "code/teacher_kl") == pytest.approx((kls[1] + kls[3]) / 2)


def test_a_signal_without_its_stream_is_named() -> None:
    hidden = random_logits(2, 5, 0)
    given = loss_inputs("sampled", hidden, torch.eye(5, dtype=F64), hidden, torch.tensor([0, 1]), 0)
    for signal, stream in (("full", "teacher_kl"), ("top_k", "policy_topk_logprobs")):
        with pytest.raises(AssertionError, match=stream):
            compute(given, settings(signal))
    with pytest.raises(ValueError, match=r"algorithm\.signal='topk'"):
        compute(given, settings("topk"))
    assert compute(given, settings("full", beta=0.0)).loss.item() == 0  # asks for nothing of the teachers


@pytest.mark.parametrize("signal", ["top_k", "top_k_renorm"])
def test_ids_outside_the_vocabulary_take_no_part(signal: str) -> None:
    """A larger teacher's padding rows: as if its top k had been shorter."""
    hidden = random_logits(3, 6, 0).requires_grad_()
    eye, targets = torch.eye(6, dtype=F64), torch.zeros(3, dtype=torch.int64)
    given = loss_inputs(signal, hidden, eye, random_logits(3, 6, 1), targets, 4)
    short = compute(given, settings(signal))
    expected = torch.autograd.grad(short.loss, hidden, retain_graph=True)[0]
    padding = torch.full((3, 2), -torch.inf, dtype=F64)
    assert given.policy_topk_logprobs is not None and given.teacher_topk_logprobs is not None
    given.policy_topk_logprobs = torch.cat([given.policy_topk_logprobs, given.policy_topk_logprobs[:, :2]], 1)
    given.teacher_topk_logprobs = torch.cat([given.teacher_topk_logprobs, padding], 1)
    longer = compute(given, settings(signal))
    torch.testing.assert_close(longer.loss, short.loss)
    torch.testing.assert_close(torch.autograd.grad(longer.loss, hidden)[0], expected)
    assert mean_of(longer, "teacher/topk_mass") == pytest.approx(mean_of(short, "teacher/topk_mass"))


# ---- teacher = student ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signal", ["sampled", *SIGNALS])
def test_teacher_equal_to_student_gives_exactly_zero(signal: str, dtype: torch.dtype) -> None:
    """The teacher's side comes from the same states and head by the code that serves it."""
    n, width, vocab, chunk = 40, 16, 50, 8
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=g)
    with torch.no_grad():
        everything = gathered_logprobs(
            hidden, weight, None, torch.arange(vocab).expand(n, vocab).contiguous(), chunk
        )
    given: dict[str, Any] = {"teacher_logprobs": everything.gather(1, targets[:, None])[:, 0]}
    if signal == "full":
        states = [
            (torch.arange(n)[part], hidden.detach()[part], weight.detach())
            for part in (slice(0, 12), slice(12, n))
        ]
        both = target_and_divergence(hidden, weight, None, targets, states, chunk)
        given |= {"policy_logprobs": both[:, 0], "teacher_kl": both[:, 1]}
    else:
        top = everything.topk(10)
        columns = gathered_logprobs(
            hidden, weight, None, torch.cat([targets[:, None], top.indices], 1), chunk
        )
        given |= {"policy_logprobs": columns[:, 0], "policy_topk_logprobs": columns[:, 1:]}
        given |= {"teacher_topk_logprobs": top.values}
    output = compute(
        LossInputs(
            weights=torch.full((n,), 1 / n),
            domain_ids=torch.zeros(n, dtype=torch.int64),
            domains=["math"],
            rollout_logprobs=given["policy_logprobs"].detach(),
            **given,
        ),
        settings(signal),
    )
    output.loss.backward()
    assert output.loss.item() == 0
    assert hidden.grad is not None and weight.grad is not None
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    names = {"teacher/k1", "teacher/k3", "teacher/mean_abs"} | ({"teacher/kl"} & output.metrics.keys())
    assert all(mean_of(output, name) == 0 for name in names)


# ---- chunks, types, several heads ----


def make(n: int, dtype: torch.dtype = F64, vocab: int = 21) -> tuple[list[Tensor], Tensor, TeacherStates]:
    """hidden [n, 8], weight, bias; targets; states of two teachers with other hidden sizes, tokens interleaved."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    leaves = [draw(n, 8), draw(vocab, 8), draw(vocab)]
    rows = torch.randperm(n, generator=g)
    cut = n // 3
    teacher = [
        (rows[:cut], draw(cut, 5), draw(vocab, 5)),
        (rows[cut:], draw(n - cut, 11), draw(vocab, 11) / 2),
    ]
    return leaves, torch.randint(0, vocab, (n,), generator=g), teacher


def plain_divergence(leaves: list[Tensor], targets: Tensor, teacher: TeacherStates) -> Tensor:
    """The same by torch alone, all logits at once."""
    logprobs = torch.nn.functional.linear(*leaves).log_softmax(-1)
    other = torch.empty_like(logprobs)
    for rows, states, head in teacher:
        other[rows] = (states @ head.T).log_softmax(-1).to(other.dtype)
    kl = (logprobs.exp() * (logprobs - other)).sum(-1)
    return torch.stack([logprobs.gather(1, targets[:, None])[:, 0], kl], 1)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_equals_plain(chunk: int, with_bias: bool) -> None:
    n = 23
    ids = torch.randint(0, 21, (n, 4), generator=torch.Generator().manual_seed(2))
    ids[:, 3] = ids[:, 1]  # an id twice counts twice
    for part in ("divergence", "gathered"):
        results = []
        for chunked in (True, False):
            leaves, targets, teacher = make(n)
            leaves = [leaf.requires_grad_() for leaf in leaves[: 2 + with_bias]]
            bias = leaves[2] if with_bias else None
            if part == "divergence":
                output = (
                    target_and_divergence(leaves[0], leaves[1], bias, targets, teacher, chunk)
                    if chunked
                    else plain_divergence(leaves, targets, teacher)
                )
            elif chunked:
                output = gathered_logprobs(leaves[0], leaves[1], bias, ids, chunk)
            else:
                output = torch.nn.functional.linear(*leaves).log_softmax(-1).gather(1, ids)
            (output * torch.linspace(-1, 2, output.numel(), dtype=F64).reshape(output.shape)).sum().backward()
            results.append([output.detach(), *(leaf.grad for leaf in leaves)])
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("signal", SIGNALS)
def test_finite_differences(signal: str) -> None:
    """Of the whole way from hidden states, weight and bias through the loss; the mask is the same on both sides."""
    leaves, targets, _ = make(5, vocab=9)
    teacher = random_logits(5, 9, 9)
    rollout = torch.nn.functional.linear(*leaves).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    rollout[1] -= 3.0  # outside the band

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights = torch.linspace(0.1, 1, 5, dtype=F64)
        given = loss_inputs(
            signal, hidden, weight, teacher, targets, 4, 2, bias, weights=weights, rollout_logprobs=rollout
        )
        return compute(given, settings(signal)).loss

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_near_the_exact_numbers(dtype: torch.dtype) -> None:
    leaves, targets, teacher = make(64, dtype)
    exact_leaves = [leaf.double().requires_grad_() for leaf in leaves]
    exact = plain_divergence(
        exact_leaves, targets, [(rows, states.double(), head.double()) for rows, states, head in teacher]
    )
    exact[:, 1].sum().backward()
    ours = [leaf.requires_grad_() for leaf in leaves]
    output = target_and_divergence(ours[0], ours[1], ours[2], targets, teacher, 16)
    output[:, 1].sum().backward()
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), exact.detach(), atol=tolerance * 4, rtol=tolerance)
    for mine, reference in zip(ours, exact_leaves, strict=True):
        assert mine.grad is not None and reference.grad is not None and mine.grad.dtype == dtype
        assert (mine.grad.double() - reference.grad).norm() < tolerance * reference.grad.norm()


def test_no_tokens() -> None:
    leaves, targets, _ = make(0)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ids = torch.zeros(0, 3, dtype=torch.int64)
    for output in (target_and_divergence(*leaves, targets, [], 4), gathered_logprobs(*leaves, ids, 4)):
        for leaf in leaves:
            leaf.grad = None
        output.sum().backward()
        assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in leaves)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("chunk", [24, 32])
def test_never_more_logits_than_a_chunk(chunk: int) -> None:
    """Of policy and teacher together: each has half a chunk."""
    n, vocab = 512, 1000
    leaves, targets, teacher = make(n, torch.float32, vocab)
    hidden, weight = (leaf.requires_grad_() for leaf in leaves[:2])
    ids = targets[:, None].expand(n, 5)
    runs: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: target_and_divergence(hidden, weight, None, targets, teacher, chunk), chunk // 2),
        (lambda: gathered_logprobs(hidden, weight, None, ids, chunk), chunk),
    ]
    for run, rows in runs:
        with LargestTensor() as largest:
            run().sum().backward()
        assert largest.elements == rows * vocab > weight.numel()
