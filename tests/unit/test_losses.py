"""Losses against numbers worked out by hand, finite differences in float64, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.config import Aggregation
from posttrain.learner.losses import LossInputs, LossOutput, compute
from posttrain.records import LossSettings
from posttrain.weighting import token_weights

OUTCOME_KINDS = ("ppo_clip", "gspo", "cispo", "reinforce")
KINDS = ("sft", "policy_gradient", *OUTCOME_KINDS)
N = 24
SEQUENCE_ENDS = (5, 12, 16, N)


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
    """Ratios well spread over all bands, none near an edge of one (where a finite difference means nothing). Four
    sequences; weights and outcome advantages are the same within each."""
    g = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return torch.randn(N, generator=g, dtype=torch.float64) * scale

    policy = -draw(1.0).abs() - 0.1
    sequence_ids = torch.bucketize(torch.arange(N), torch.tensor(SEQUENCE_ENDS), right=True)
    return inputs(
        policy.requires_grad_(),
        sequence_ids=sequence_ids,
        weights=(draw(1.0).abs() / N)[sequence_ids],
        rollout_logprobs=policy.detach() + draw(0.8),
        old_logprobs=policy.detach() + draw(0.2),
        teacher_logprobs=policy.detach() + draw(3.0),
        orm_advantages=draw(1.0)[sequence_ids],
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
    assert value(output, "math/loss") == pytest.approx(2.0)


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
    beta = 1.0 if kind == "policy_gradient" else 0.0
    settings = LossSettings(kind=kind, beta=beta, alpha=0.5, correction=correction)
    given = random_inputs()
    if kind == "gspo":  # one correction per sequence, for which the token form is the sequence form
        given.rollout_logprobs = given.old_logprobs - torch.log(f64(0.9, 6.0, 3.0, 1.2))[given.sequence_ids]  # type: ignore[operator, index]
    exact = gradient(given, settings)
    assert (exact != 0).any()
    if kind in ("policy_gradient", "cispo"):  # sg: the loss is linear in log pi, its factors do not move
        factors = exact.clone()
        numeric = torch.autograd.functional.jacobian(
            lambda p: (factors * p).sum(), given.policy_logprobs.detach()
        )
        assert compute(given, settings).loss.item() == pytest.approx(
            float((factors * given.policy_logprobs.detach()).sum())
        )
        torch.testing.assert_close(exact, numeric)
        return
    point = given.policy_logprobs.detach()
    for i in range(N):
        values = []
        for step in (1e-6, -1e-6):
            moved = point.clone()
            moved[i] += step
            given.policy_logprobs = moved
            values.append(compute(given, settings).loss.item())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(exact[i].item(), abs=1e-7)


def test_teacher_equal_to_student_gives_exactly_zero_gradient() -> None:
    given = random_inputs()
    given.teacher_logprobs = given.policy_logprobs.detach().clone()
    for kind in ("policy_gradient", *OUTCOME_KINDS):
        output = compute(given, LossSettings(kind=kind, beta=1.0, alpha=0.0))
        (grad,) = torch.autograd.grad(output.loss, given.policy_logprobs)
        assert (grad == 0).all()
        for name in ("teacher/k1", "teacher/k3", "teacher/mean_abs", "clip/teacher", "math/teacher_abs"):
            assert value(output, name) == 0


def test_equal_rewards_give_exactly_zero_gradient() -> None:
    given = random_inputs()
    given.orm_advantages = torch.zeros(N, dtype=torch.float64)
    for kind in OUTCOME_KINDS:
        assert (gradient(given, LossSettings(kind=kind)) == 0).all()


def test_the_three_clips_are_independent() -> None:
    """Each token is beyond one band only; each clip moves its own number and its own token. pi/mu is 10, 1, 2."""
    base = f64(-2.0, -2.0, -2.0)
    given = inputs(
        base.clone().requires_grad_(),
        rollout_logprobs=base - f64(math.log(10), 0.0, 0.0) - f64(0.0, 0.0, math.log(2)),  # pi_old/mu below
        old_logprobs=base - f64(0.0, 0.0, math.log(2)),
        teacher_logprobs=base + f64(1.0, 8.0, 1.0),
        orm_advantages=f64(1.0, 1.0, 1.0),
    )
    wide = {"ratio_low": 1e-9, "ratio_high": 1e9, "teacher_clip": 1e9, "clip_low": 1 - 1e-9, "clip_high": 1e9}
    settings: dict[str, Any] = {"kind": "ppo_clip", "beta": 1.0, "alpha": 1.0}
    free = gradient(given, LossSettings(**settings, **wide))
    torch.testing.assert_close(free, -f64(10 * 1.0 + 10 * 1.0, 8.0 + 1.0, 2 * 1.0 + 2 * 1.0))
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
    for kind in ("policy_gradient", *OUTCOME_KINDS):
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
    for cut in (slice(0, 5), slice(5, 5), slice(5, N)):  # between sequences; one without any loss token
        streams = {n: getattr(given, n)[cut] for n in names}
        parts.append(compute(LossInputs(domains=given.domains, **streams), settings))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    assert all(p.loss.requires_grad for p in parts)
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name][0] for p in parts), total)
        torch.testing.assert_close(sum(p.metrics[name][1] for p in parts), count)
    for name, largest in whole.maxima.items():
        assert max(p.maxima[name] for p in parts) == largest


@pytest.mark.parametrize("kind", KINDS)
def test_padding_tokens_of_weight_zero_change_nothing(kind: str) -> None:
    given = random_inputs()
    settings = LossSettings(kind=kind, beta=1.0)
    before = compute(given, settings)
    for name in [n for n in LossInputs.__dataclass_fields__ if isinstance(getattr(given, n), Tensor)]:
        tensor = getattr(given, name)
        setattr(given, name, torch.cat([tensor, tensor.flip(0)]))
    given.weights[N:] = 0
    after = compute(given, settings)
    torch.testing.assert_close(after.loss, before.loss)
    for name, (total, count) in before.metrics.items():
        torch.testing.assert_close(after.metrics[name][0], total)
        torch.testing.assert_close(after.metrics[name][1], count)


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
    with pytest.raises(AssertionError, match="sequence_ids"):
        streams = {"rollout_logprobs": policy, "old_logprobs": policy, "orm_advantages": policy}
        compute(inputs(policy, **streams), LossSettings(kind="gspo"))
    with pytest.raises(ValueError, match="choose sft, policy_gradient, ppo_clip, gspo, cispo, reinforce"):
        compute(inputs(policy), LossSettings(kind="grpo"))
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


# Teacher and outcome ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OUTCOME_KINDS)
def test_the_teacher_term_stands_beside_the_outcome_loss(kind: str) -> None:
    """Mixed = teacher alone, which is the plain policy gradient to the bit, plus outcome alone."""
    given, beta, alpha = random_inputs(), 0.7, 1.3
    both = compute(given, LossSettings(kind=kind, beta=beta, alpha=alpha))
    outcome = compute(given, LossSettings(kind=kind, beta=0.0, alpha=alpha))
    plain = LossSettings(kind="policy_gradient", beta=beta, alpha=0.0)
    torch.testing.assert_close(both.loss, compute(given, plain).loss + outcome.loss)
    teacher_alone = gradient(given, LossSettings(kind=kind, beta=beta, alpha=0.0))
    assert torch.equal(teacher_alone, gradient(given, plain))
    mixed = gradient(given, LossSettings(kind=kind, beta=beta, alpha=alpha))
    torch.testing.assert_close(
        mixed, teacher_alone + gradient(given, LossSettings(kind=kind, beta=0.0, alpha=alpha))
    )
    if "clip/ppo" in both.metrics:
        assert value(both, "clip/ppo") == value(outcome, "clip/ppo")


def test_outcome_alone_is_the_clipped_surrogate_to_the_bit() -> None:
    """What ppo_clip gave before the teacher's term stood beside it, in float32."""
    given = random_inputs()
    for name in ("policy_logprobs", "old_logprobs", "rollout_logprobs", "orm_advantages", "weights"):
        setattr(given, name, getattr(given, name).detach().float())
    given.policy_logprobs.requires_grad_()
    settings = LossSettings(kind="ppo_clip", alpha=0.5)
    ratio = (given.policy_logprobs - given.old_logprobs).exp()
    engines = (given.old_logprobs - given.rollout_logprobs).exp()  # type: ignore[operator]
    engines = torch.where((engines < 0.5) | (engines > 5.0), 0.0, engines)
    advantages = 0.5 * given.orm_advantages  # type: ignore[operator]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    expected = -(given.weights * engines * surrogate).sum()
    assert compute(given, settings).loss.item() == expected.item()
    assert torch.equal(gradient(given, settings), torch.autograd.grad(expected, given.policy_logprobs)[0])


@pytest.mark.parametrize("kind", OUTCOME_KINDS)
def test_on_the_first_update_all_outcome_losses_pull_alike(kind: str) -> None:
    given = random_inputs()
    given.old_logprobs = given.policy_logprobs.detach().clone()
    torch.testing.assert_close(
        gradient(given, LossSettings(kind=kind)), gradient(given, LossSettings(kind="policy_gradient"))
    )


def test_gspo_clips_whole_sequences_by_their_length_normalised_ratio() -> None:
    """Ratios 1.001 and 1 / 1.001: each token is outside the clip, the answer inside. The second answer is outside."""
    old = f64(-1.0, -2.0, -1.0, -1.0)
    moves = f64(1.001, 1 / 1.001, 1.001, 1.001).log()
    given = inputs(
        (old + moves).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=old,
        orm_advantages=f64(1.0, 1.0, 1.0, 1.0),
        sequence_ids=torch.tensor([7, 7, 9, 9]),
    )
    settings = LossSettings(kind="gspo", clip_low=3e-4, clip_high=4e-4)
    torch.testing.assert_close(gradient(given, settings), -f64(1.0, 1.0, 0.0, 0.0))
    assert value(compute(given, settings), "clip/ppo") == 0.5


def test_a_token_that_the_correction_drops_stays_in_the_ratio_of_its_sequence() -> None:
    old = f64(-1.0, -1.0)
    given = inputs(
        (old + f64(4.0, 1.0).log()).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=old - f64(10.0, 1.0).log(),
        orm_advantages=f64(1.0, 1.0),
        sequence_ids=torch.tensor([0, 0]),
    )
    settings = LossSettings(kind="gspo", clip_low=0.9, clip_high=9.0)
    torch.testing.assert_close(gradient(given, settings), -f64(0.0, 2.0))


# Balance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy_gradient", *OUTCOME_KINDS])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_share_of_the_gradient_is_that_of_the_gradient(kind: str, beta: float) -> None:
    given, settings = random_inputs(), LossSettings(kind=kind, beta=beta, alpha=0.5)
    output, sizes = compute(given, settings), gradient(given, settings).abs()
    for index, domain in enumerate(given.domains):
        own = given.domain_ids == index
        expected = sizes[own].sum() / sizes.sum()
        assert value(output, f"share/gradient/{domain}") == pytest.approx(float(expected))
        weight = given.weights[own].sum() / given.weights.sum()
        assert value(output, f"share/weight/{domain}") == pytest.approx(float(weight))


def test_mean_advantage_by_hand() -> None:
    policy = f64(-1.0, -1.0, -1.0)
    given = inputs(
        policy,
        rollout_logprobs=policy,
        teacher_logprobs=policy + f64(1.0, -9.0, 2.0),
        orm_advantages=f64(1.0, 1.0, -4.0),
        domain_ids=torch.tensor([0, 0, 1]),
        domains=["math", "code"],
    )
    output = compute(given, LossSettings(kind="policy_gradient", beta=1.0, alpha=0.5))
    assert value(output, "math/advantage_abs") == pytest.approx((1.5 + 4.5) / 2)
    assert value(output, "code/advantage_abs") == 0  # 2 - 0.5 * 4
    assert value(output, "advantage/mean_abs") == pytest.approx(2.0)
    assert value(output, "math/clip_teacher") == 0.5
    assert value(output, "code/clip_ratio_dropped") == 0
    assert value(output, "math/teacher_k3") == pytest.approx(
        sum(math.exp(d) - 1 - d for d in (1.0, -9.0)) / 2
    )


@pytest.mark.parametrize("targets", [{"math": 0.5, "instruct": 0.5}, {"math": 0.2, "instruct": 0.8}])
def test_balanced_weights_reach_the_loss_as_the_target_shares(targets: dict[str, float]) -> None:
    """Open-MOPD's case: 1 % of the tokens, and a target far above it; equal to 1 %, float32 weights as in a run."""
    counts, domains = [400, 590, 6, 4], ["math", "math", "instruct", "instruct"]
    weighting = token_weights(counts, domains, Aggregation.token_mean_balanced, targets)
    weights = np.repeat(weighting.weights, counts).astype(np.float32)
    policy = -torch.rand(sum(counts), generator=torch.Generator().manual_seed(0))
    ids = torch.from_numpy(np.repeat([0, 0, 1, 1], counts))
    given = inputs(
        policy,
        weights=torch.from_numpy(weights),
        rollout_logprobs=policy,
        orm_advantages=torch.ones_like(policy),
        domain_ids=ids,
        domains=["math", "instruct"],
    )
    output = compute(given, LossSettings(kind="policy_gradient"))
    assert weighting.token_shares["instruct"] == 0.01
    for domain, target in targets.items():
        assert value(output, f"share/weight/{domain}") == pytest.approx(target, rel=0.01)
        assert value(output, f"share/gradient/{domain}") == pytest.approx(target, rel=0.01)
        assert weighting.target_shares[domain] == pytest.approx(target)
