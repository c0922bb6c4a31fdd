"""Losses against numbers worked out by hand, finite differences in float64, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.learner.losses import LossInputs, LossOutput, compute
from posttrain.records import LossSettings

KINDS = ("sft", "policy_gradient", "ppo_clip")
N = 24


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs(policy: Tensor, **streams: Any) -> LossInputs:
    n = len(policy)
    given: dict[str, Any] = {
        "weights": torch.ones(n, dtype=policy.dtype),
        "domain_ids": torch.zeros(n, dtype=torch.int64),
        "domains": ["math"],
    }
    return LossInputs(policy_logprobs=policy, **(given | streams))


def random_inputs(seed: int = 0) -> LossInputs:
    """Ratios well spread over all bands, none near an edge of one (where a finite difference means nothing)."""
    g = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return torch.randn(N, generator=g, dtype=torch.float64) * scale

    policy = -draw(1.0).abs() - 0.1
    return inputs(
        policy.requires_grad_(),
        weights=draw(1.0).abs() / N,
        rollout_logprobs=policy.detach() + draw(0.8),
        old_logprobs=policy.detach() + draw(0.2),
        teacher_logprobs=policy.detach() + draw(3.0),
        orm_advantages=draw(1.0),
        domain_ids=torch.arange(N) % 3,
        domains=["math", "code", "tool"],
    )


def value(output: LossOutput, name: str) -> float:
    total, count = output.metrics[name]
    return float(total / count)


def gradient(given: LossInputs, settings: LossSettings) -> Tensor:
    return torch.autograd.grad(compute(given, settings).loss, given.policy_logprobs)[0]


def test_sft_by_hand() -> None:
    policy = f64(-1.0, -2.0, -3.0).requires_grad_()
    output = compute(inputs(policy, weights=f64(0.5, 0.25, 0.25)), LossSettings(kind="sft"))
    assert output.loss.item() == pytest.approx(0.5 + 0.5 + 0.75)
    assert value(output, "entropy") == pytest.approx(2.0)


def test_policy_gradient_by_hand() -> None:
    """pi/mu = 2, 1, 6, 0.4 under icepop [0.5, 5]: the last two are dropped, not clamped."""
    policy = f64(-1.0, -2.0, -0.5, -1.5).requires_grad_()
    given = inputs(
        policy,
        weights=f64(0.1, 0.2, 0.3, 0.4),
        rollout_logprobs=policy.detach() - f64(math.log(2), 0.0, math.log(6), math.log(0.4)),
        teacher_logprobs=policy.detach() + f64(0.5, -9.0, 1.0, 1.0),
        orm_advantages=f64(1.0, 1.0, 1.0, 1.0),
    )
    settings = LossSettings(kind="policy_gradient", beta=1.0, alpha=0.5)
    # A = clip(0.5) + 0.5 = 1, clip(-9, 5) + 0.5 = -4.5
    output = compute(given, settings)
    assert output.loss.item() == pytest.approx(-(0.1 * 2 * 1.0 * -1.0 + 0.2 * 1 * -4.5 * -2.0))
    expected = -f64(0.1 * 2 * 1.0, 0.2 * 1 * -4.5, 0, 0)
    torch.testing.assert_close(gradient(given, settings), expected)
    assert value(output, "clip/ratio_dropped") == 0.5
    assert value(output, "clip/teacher") == 0.25
    assert value(output, "teacher/k1") == pytest.approx(-(0.5 - 9 + 1 + 1) / 4)
    assert value(output, "teacher/mean_abs") == pytest.approx(11.5 / 4)
    k3 = [math.exp(d) - 1 - d for d in (0.5, -9.0, 1.0, 1.0)]
    assert value(output, "teacher/k3") == pytest.approx(sum(k3) / 4)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [("icepop", [2.0, 0.0, 0.0]), ("tis", [2.0, 2.0, 0.1]), ("off", [1.0, 1.0, 1.0])],
)
def test_corrections(correction: str, expected: list[float]) -> None:
    policy = f64(-1.0, -1.0, -1.0).requires_grad_()
    given = inputs(
        policy,
        rollout_logprobs=policy.detach() - f64(2.0, 8.0, 0.1).log(),
        orm_advantages=f64(1.0, 1.0, 1.0),
    )
    settings = LossSettings(kind="policy_gradient", correction=correction)
    torch.testing.assert_close(gradient(given, settings), -f64(*expected))


def test_both_ends_of_the_band_are_inside() -> None:
    policy = f64(0.0, 0.0).requires_grad_()
    given = inputs(policy, rollout_logprobs=f64(0.0, -math.log(4.0)), orm_advantages=f64(1.0, 1.0))
    settings = LossSettings(kind="policy_gradient", ratio_low=1.0 - 1e-12, ratio_high=4.0 + 1e-12)
    assert (gradient(given, settings) != 0).all()


def test_ppo_clip_by_hand() -> None:
    """pi/pi_old = 1.5 and 0.5 with advantages of both signs, clip 0.2 below and 0.28 above, pi_old/mu = 2."""
    old = f64(-2.0, -2.0, -2.0, -2.0)
    policy = (old + f64(1.5, 1.5, 0.5, 0.5).log()).requires_grad_()
    given = inputs(
        policy, rollout_logprobs=old - math.log(2), old_logprobs=old, orm_advantages=f64(1.0, -1.0, 1.0, -1.0)
    )
    settings = LossSettings(kind="ppo_clip")
    output = compute(given, settings)
    assert output.loss.item() == pytest.approx(-2 * (1.28 - 1.5 + 0.5 - 0.8))
    torch.testing.assert_close(gradient(given, settings), -2 * f64(0.0, -1.5, 0.5, 0.0))
    assert value(output, "clip/ppo") == 0.5
    assert value(output, "clip/ratio_dropped") == 0.0


def test_ppo_first_update_is_the_plain_policy_gradient() -> None:
    given = random_inputs()
    given.old_logprobs = given.policy_logprobs.detach().clone()
    ppo = gradient(given, LossSettings(kind="ppo_clip", beta=0.7, alpha=1.3))
    plain = gradient(given, LossSettings(kind="policy_gradient", beta=0.7, alpha=1.3))
    torch.testing.assert_close(ppo, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", ["icepop", "tis", "off"])
def test_gradient_against_finite_differences(kind: str, correction: str) -> None:
    """Factors under sg[] are held fixed, as the equations say: they are frozen at the point of expansion."""
    settings = LossSettings(kind=kind, beta=1.0, alpha=0.5, correction=correction)
    given = random_inputs()
    exact = gradient(given, settings)
    if kind == "policy_gradient":  # sg: the loss is linear in log pi, its factors do not move
        factors = exact.clone()
        numeric = torch.autograd.functional.jacobian(
            lambda p: (factors * p).sum(), given.policy_logprobs.detach()
        )
        assert compute(given, settings).loss.item() == pytest.approx(
            float((factors * given.policy_logprobs).sum())
        )
        torch.testing.assert_close(exact, numeric)
        return
    point = given.policy_logprobs.detach()
    teacher_gap = given.teacher_logprobs - point  # type: ignore[operator]
    for i in range(N):
        values = []
        for step in (1e-6, -1e-6):
            moved = point.clone()
            moved[i] += step
            given.policy_logprobs = moved
            given.teacher_logprobs = moved + teacher_gap  # sg[teacher - policy]
            values.append(compute(given, settings).loss.item())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(exact[i].item(), abs=1e-7)


def test_teacher_equal_to_student_gives_exactly_zero_gradient() -> None:
    given = random_inputs()
    given.teacher_logprobs = given.policy_logprobs.detach().clone()
    for kind in ("policy_gradient", "ppo_clip"):
        output = compute(given, LossSettings(kind=kind, beta=1.0, alpha=0.0))
        (grad,) = torch.autograd.grad(output.loss, given.policy_logprobs)
        assert (grad == 0).all()
        for name in ("teacher/k1", "teacher/k3", "teacher/mean_abs", "clip/teacher", "math/teacher_abs"):
            assert value(output, name) == 0


def test_equal_rewards_give_exactly_zero_gradient() -> None:
    given = random_inputs()
    given.orm_advantages = torch.zeros(N, dtype=torch.float64)
    assert (gradient(given, LossSettings(kind="ppo_clip")) == 0).all()


def test_the_three_clips_are_independent() -> None:
    """Each token is beyond one band only; each clip moves its own number and its own token."""
    base = f64(-2.0, -2.0, -2.0)
    given = inputs(
        base.clone().requires_grad_(),
        rollout_logprobs=base - f64(math.log(10), 0.0, 0.0) - f64(0.0, 0.0, math.log(2)),  # pi_old/mu below
        old_logprobs=base - f64(0.0, 0.0, math.log(2)),
        teacher_logprobs=base + f64(1.0, 8.0, 1.0),
    )
    wide = {"ratio_low": 1e-9, "ratio_high": 1e9, "teacher_clip": 1e9, "clip_low": 1 - 1e-9, "clip_high": 1e9}
    settings: dict[str, Any] = {"kind": "ppo_clip", "beta": 1.0, "alpha": 0.0}
    free = gradient(given, LossSettings(**settings, **wide))
    torch.testing.assert_close(free, -f64(10 * 1.0, 8.0, 2 * 1.0))
    names = ("clip/ratio_dropped", "clip/teacher", "clip/ppo")
    for index, tight in enumerate(({"ratio_high": 5.0}, {"teacher_clip": 5.0}, {"clip_high": 0.28})):
        own = LossSettings(**settings, **(wide | tight))
        changed = gradient(given, own) != free
        assert changed.tolist() == [i == index for i in range(3)]
        output = compute(given, own)
        assert [value(output, name) for name in names] == [1 / 3 if i == index else 0.0 for i in range(3)]


def test_nothing_but_log_pi_carries_a_gradient() -> None:
    given = random_inputs()
    streams = ("rollout_logprobs", "old_logprobs", "teacher_logprobs", "orm_advantages", "weights")
    for name in streams:
        setattr(given, name, getattr(given, name).detach().requires_grad_())
    for kind in ("policy_gradient", "ppo_clip"):
        output = compute(given, LossSettings(kind=kind, beta=1.0))
        tensors = [getattr(given, name) for name in streams if name != "weights"]
        grads = torch.autograd.grad(output.loss, tensors, allow_unused=True)
        assert all(g is None or (g == 0).all() for g in grads[:3])
        assert all(not t.requires_grad for pair in output.metrics.values() for t in pair)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_metrics_do_not_depend_on_micro_batches(kind: str) -> None:
    settings = LossSettings(kind=kind, beta=1.0, alpha=0.5)
    given = random_inputs()
    whole = compute(given, settings)
    names = [n for n in LossInputs.__dataclass_fields__ if isinstance(getattr(given, n), Tensor)]
    parts = []
    for cut in (slice(0, 5), slice(5, 5), slice(5, N)):  # one without any loss token
        streams = {n: getattr(given, n)[cut] for n in names}
        parts.append(compute(LossInputs(domains=given.domains, **streams), settings))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    assert all(p.loss.requires_grad for p in parts)
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name][0] for p in parts), total)
        assert sum(p.metrics[name][1] for p in parts) == count
    for name, largest in whole.maxima.items():
        assert max(p.maxima[name] for p in parts) == largest


def test_padding_tokens_of_weight_zero_change_nothing() -> None:
    given = random_inputs()
    settings = LossSettings(kind="policy_gradient", beta=1.0)
    before = compute(given, settings)
    for name in [n for n in LossInputs.__dataclass_fields__ if isinstance(getattr(given, n), Tensor)]:
        tensor = getattr(given, name)
        setattr(given, name, torch.cat([tensor, tensor.flip(0)]))
    given.weights[N:] = 0
    after = compute(given, settings)
    torch.testing.assert_close(after.loss, before.loss)
    for name, (total, count) in before.metrics.items():
        torch.testing.assert_close(after.metrics[name][0], total)
        assert after.metrics[name][1] == count


def test_mismatch_by_hand() -> None:
    policy = f64(-1.0, -1.0, -1.0, -1.0)
    log_ratio = f64(0.0, math.log(1.2), -math.log(1.5), math.log(3.0))
    output = compute(
        inputs(
            policy, rollout_logprobs=policy - log_ratio, orm_advantages=torch.zeros(4, dtype=torch.float64)
        ),
        LossSettings(kind="policy_gradient"),
    )
    ratios = [1.0, 1.2, 1 / 1.5, 3.0]
    assert value(output, "mismatch/k3") == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4)
    assert [value(output, f"mismatch/{f}") for f in ("f1.1", "f1.25", "f2")] == [0.75, 0.5, 0.25]
    assert output.maxima["mismatch/max_abs"].item() == pytest.approx(math.log(3))


def test_domains_are_told_apart_and_absent_ones_have_count_zero() -> None:
    policy = f64(-1.0, -2.0, -3.0)
    output = compute(
        inputs(
            policy,
            rollout_logprobs=policy,
            teacher_logprobs=policy + f64(1.0, -1.0, 3.0),
            domain_ids=torch.tensor([0, 0, 2]),
            domains=["math", "code", "tool"],
        ),
        LossSettings(kind="policy_gradient", beta=1.0, alpha=0.0),
    )
    assert value(output, "math/teacher_k1") == 0
    assert value(output, "math/teacher_abs") == 1
    assert value(output, "tool/teacher_k1") == -3
    assert value(output, "math/entropy") == 1.5
    assert output.metrics["code/teacher_abs"][1] == 0


def test_missing_streams_and_unknown_kinds_are_named() -> None:
    policy = f64(-1.0)
    with pytest.raises(AssertionError, match="teacher_logprobs"):
        compute(inputs(policy, rollout_logprobs=policy), LossSettings(kind="policy_gradient", beta=1.0))
    with pytest.raises(AssertionError, match="rollout_logprobs"):
        compute(inputs(policy), LossSettings(kind="policy_gradient"))
    with pytest.raises(AssertionError, match="old_logprobs"):
        compute(inputs(policy, rollout_logprobs=policy), LossSettings(kind="ppo_clip"))
    with pytest.raises(ValueError, match="gspo"):
        compute(inputs(policy), LossSettings(kind="gspo"))
    with pytest.raises(ValueError, match="clamp"):
        compute(
            inputs(policy, rollout_logprobs=policy, orm_advantages=policy),
            LossSettings(kind="policy_gradient", correction="clamp"),
        )


def test_extreme_ratios_stay_finite() -> None:
    policy = torch.tensor([-0.1, -200.0], requires_grad=True)
    given = inputs(policy, rollout_logprobs=torch.tensor([-200.0, -0.1]), orm_advantages=torch.ones(2))
    for correction in ("icepop", "tis", "off"):
        assert gradient(given, LossSettings(kind="policy_gradient", correction=correction)).isfinite().all()
