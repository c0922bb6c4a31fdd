"""Planted trouble is named within 20 steps of its start; healthy noisy runs of many shapes are silent.

Most trouble is written into the metrics: what is tested is the bands. Experts that die do so in simulated loads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from posttrain.alarms import QUIET_STEPS, Alarms
from posttrain.early_warning import WARM_UP, EarlyWarning, Trouble
from posttrain.learner.monitors.silent_experts import SilentExperts

START = 60  # step at which the trouble begins
Step = dict[str, float | None]
N = 1e6  # elements
LAYERS = (1, 2, 3, 4)


def healthy(seed: int, num_steps: int = 150, validate_every: int = 4) -> list[Step]:
    """A run of one of five shapes: the loss decays, jumps down, is flat, is that of RL (around 0), or overshoots the
    start; zeros drift, experts die now and then for one step."""
    rng = np.random.default_rng(seed)
    by_layer = np.random.default_rng(1000 + seed)
    shape, steps = seed % 5, []
    drift = rng.uniform(-0.1, 0.1)  # of the zeros, over the whole run
    for i in range(num_steps):
        t = i / num_steps
        mean = [
            0.2 + 3.5 * math.exp(-6 * t),
            3.0 if t < 0.3 else 1.0,
            1.2,
            -0.5 * math.exp(-8 * t),
            2.5 - t,
        ][shape]
        scale = 0.01 if shape == 3 else 0.08 * mean
        loss = mean + float(rng.normal(0, scale))
        dead = float(rng.random() < 0.08)
        zeros = {
            "routed_expert": 0.02 * N * dead + 0.05 * N * (1 + drift * t) + rng.normal(0, 400),
            "embedding": 0.25 * N * (1 + drift * t) + rng.normal(0, 8000),
            "attention": float(rng.random() < 0.1),
        }
        total = sum(zeros.values())
        step: Step = {
            "loss": loss,
            "grad_norm": (0.3 + 2 * math.exp(-3 * t)) * float(rng.lognormal(0, 0.4)),
            "skipped": 0.0,
            "balance/max_vio": max(0.05, 0.3 + 0.3 * t * (seed % 3 - 1) + float(rng.normal(0, 0.05))),
            "num_zeros/total": float(total),
            "num_zeros/share": float(total / N),
            "num_zeros/dead_experts": dead,
            **{f"num_zeros/{name}": float(count) for name, count in zeros.items()},
        }
        for layer in LAYERS:
            step[f"balance/max_vio/layer_{layer}"] = max(0.05, 0.3 + float(by_layer.normal(0, 0.1)))
            step[f"num_zeros/dead_experts/layer_{layer}"] = dead if i % len(LAYERS) == layer - 1 else 0.0
            step[f"num_zeros/layer_{layer}"] = total / 5
        if i % validate_every == 0 and shape != 3:
            step["validation/loss/all"] = mean * 1.05 + float(rng.normal(0, 0.01 * mean))
        steps.append(step)
    return steps


def change(step: Step, **factors: float) -> None:
    """Multiplies zeros of classes, and keeps the sum right."""
    for name, more in factors.items():
        step[f"num_zeros/{name}"] = (step[f"num_zeros/{name}"] or 0.0) + more * N
        step["num_zeros/total"] = (step["num_zeros/total"] or 0.0) + more * N
    step["num_zeros/share"] = (step["num_zeros/total"] or 0.0) / N


def imbalance_by_load(step: Step, age: int) -> None:
    step["balance/max_vio"] = (step["balance/max_vio"] or 0) + 0.1 * age


def imbalance_of_a_layer(step: Step, age: int) -> None:
    step["balance/max_vio"] = (step["balance/max_vio"] or 0) + 0.1 * age / len(LAYERS)
    step["balance/max_vio/layer_3"] = (step["balance/max_vio/layer_3"] or 0) + 0.1 * age
    step["balance/max_vio/layer_2"] = (step["balance/max_vio/layer_2"] or 0) + 0.05 * age


def imbalance_by_zeros(step: Step, age: int) -> None:
    change(step, routed_expert=min(0.01 * age, 0.3))


def dead_experts_of_a_layer(step: Step, age: int) -> None:
    step["experts/silent"] = 0.0 if age < 0 else 1.0
    for layer in LAYERS:
        step[f"experts/silent/layer_{layer}"] = 1.0 if layer == 4 and age >= 0 else 0.0


def starving(step: Step, age: int) -> None:
    step["experts/starving"] = 0.0 if age < 0 else 5.0


def overfitting_by_zeros(step: Step, age: int) -> None:
    change(step, embedding=-min(0.01 * age, 0.2))


def overfitting_by_validation(step: Step, age: int) -> None:
    if "validation/loss/all" in step:
        step["validation/loss/all"] = (step["validation/loss/all"] or 0) + 0.08 * age


def underflow_of_zeros(step: Step, age: int) -> None:
    change(step, attention=0.1)


def underflow_of_the_norm(step: Step, age: int) -> None:
    step["grad_norm"] = 1e-7


def spike(step: Step, age: int) -> None:
    if age == 3:
        step["loss"] = (step["loss"] or 0) + 5.0


def nan_in_the_gradient(step: Step, age: int) -> None:
    if age == 3:
        step |= {"grad_norm": math.nan, "skipped": 1.0}


PLANTED: list[tuple[str, Callable[[Step, int], None], bool]] = [
    ("imbalance", imbalance_by_load, False),
    ("imbalance", imbalance_of_a_layer, False),
    ("imbalance", imbalance_by_zeros, False),
    ("dead_experts", dead_experts_of_a_layer, True),
    ("dead_experts", starving, True),
    ("overfitting", overfitting_by_zeros, False),
    ("overfitting", overfitting_by_validation, False),
    ("gradient_underflow", underflow_of_zeros, False),
    ("gradient_underflow", underflow_of_the_norm, False),
    ("loss_spike", spike, False),
    ("nan", nan_in_the_gradient, False),
]


LAYER_OF = {"imbalance_of_a_layer": 3, "dead_experts_of_a_layer": 4}


def heard(steps: list[Step]) -> list[tuple[int, Trouble]]:
    alarms = Alarms()
    return [(i, trouble) for i, step in enumerate(steps) for trouble in alarms.check(step)]


@pytest.mark.parametrize("seed", [0, 5, 10])  # the shape whose training loss falls fast
@pytest.mark.parametrize(("name", "plant", "always"), PLANTED, ids=[p.__name__ for _, p, _ in PLANTED])
def test_planted_trouble_is_named(
    name: str, plant: Callable[[Step, int], None], always: bool, seed: int
) -> None:
    steps = healthy(seed)
    for i, step in enumerate(steps):
        if always or i >= START:
            plant(step, i - START)
    found = heard(steps)
    assert found, "nothing was heard"
    first, trouble = found[0]
    assert trouble.name == name and START <= first <= START + 20
    assert {t.name for _, t in found} == {name}, "and nothing else"
    assert trouble.layer == LAYER_OF.get(plant.__name__)
    assert trouble.metric in trouble.message and trouble.hint in trouble.message
    assert not trouble.low <= trouble.value <= trouble.high


@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_are_silent(seed: int) -> None:
    assert heard(healthy(seed)) == []


def loads(
    seed: int,
    layers: int,
    experts: int,
    assignments: int,
    spread: float,
    num_steps: int,
    plant: Callable[[np.ndarray, int], None] = lambda chance, i: None,
    evenness: float = 10.0,
) -> list[Step]:
    """Numbers of loads that do not drift: popularity of the experts log-normal with ``spread``, half as strong a taste for
    one of four domains, whose shares of a batch are Dirichlet (``evenness`` 10: all in every batch, 0.1: mostly one), and
    batches that differ. ``plant`` changes the chances [layers, experts] of a step."""
    rng = np.random.default_rng(seed)
    popularity = rng.lognormal(0, spread, (layers, experts, 1))
    popularity = popularity * rng.lognormal(0, spread / 2, (layers, experts, 4))
    silent, history, steps = SilentExperts(), [], []
    for i in range(num_steps):
        chance = popularity @ rng.dirichlet([evenness] * 4) * rng.lognormal(0, 0.3, (layers, experts))
        plant(chance, i)
        load = rng.multinomial(assignments, chance / chance.sum(1, keepdims=True))
        history = [*history, load][-20:]
        window = np.sum(history, 0)
        vio = load.max(1) / load.mean(1) - 1
        step: Step = {
            "balance/max_vio": float(vio.mean()),
            "balance/max_vio/window": float((window.max(1) / window.mean(1) - 1).mean()),
            "experts/starving": float((window < 0.1 * window.mean(1, keepdims=True)).sum()),
        }
        step |= {f"balance/max_vio/layer_{layer}": float(v) for layer, v in enumerate(vio)}
        numbers = silent.observe(torch.from_numpy(load)).sum(1)
        step |= {f"experts/silent/layer_{layer}": float(n) for layer, n in enumerate(numbers)}
        step["experts/silent"] = float(numbers.sum())
        steps.append(step)
    return steps


SHAPES = [(48, 128, 65_536), (48, 128, 16_384), (26, 64, 65_536), (3, 8, 4_000)]  # layers, experts, choices


@pytest.mark.parametrize("spread", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(("layers", "experts", "assignments"), SHAPES)
def test_loads_of_many_experts_that_do_not_drift_are_silent(
    layers: int, experts: int, assignments: int, spread: float
) -> None:
    for seed in range(3):
        assert heard(loads(seed, layers, experts, assignments, spread, 100)) == []


@pytest.mark.parametrize("evenness", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("layers", "experts", "assignments"), SHAPES)
def test_domains_that_come_in_bursts_do_not_kill_experts(
    layers: int, experts: int, assignments: int, evenness: float
) -> None:
    for seed in range(3):
        steps = loads(seed, layers, experts, assignments, 2.0, 150, evenness=evenness)
        assert [t for _, t in heard(steps) if t.name == "dead_experts"] == []


@pytest.mark.parametrize(("kept", "half_life"), [(0.0, 0.0), (0.02, 0.0), (0.0, 3.0), (0.0, 10.0)])
@pytest.mark.parametrize(("layers", "experts", "assignments"), [SHAPES[0], SHAPES[3]])
def test_an_expert_that_dies_is_named_with_its_layer(
    layers: int, experts: int, assignments: int, kept: float, half_life: float
) -> None:
    """At once or slowly, with or without a token now and then: nine steps after its load fell below 5 %, or a few more where
    batches scatter around that. It is one of average popularity, and sounds once."""

    def plant(chance: np.ndarray, i: int) -> None:
        chance[layers - 1, 3] = chance[layers - 1].mean()
        if i >= START:
            chance[layers - 1, 3] *= max(kept, 0.5 ** ((i - START) / half_life) if half_life else 0.0)

    found = heard(loads(1, layers, experts, assignments, 1.0, 130, plant))
    ((at, trouble),) = [(i, t) for i, t in found if t.name == "dead_experts"]
    assert trouble.layer == layers - 1 and trouble.value == 1
    falls_for = half_life * math.log2(1 / 0.05)
    assert 8 <= at - START - falls_for <= 14


def test_four_experts_that_come_and_go_at_the_limit_of_starving_are_no_alarm() -> None:
    steps = healthy(2)
    for i, step in enumerate(steps):
        step["experts/starving"] = 0.0 if i < START else 4.0
    assert heard(steps) == []


def test_a_hard_domain_in_every_fifth_batch_is_no_spike_and_a_spike_still_is() -> None:
    steps: list[Step] = [
        {"loss": 1.4 + 0.02 * (i % 3) if i % 5 == 0 else 0.6 + 0.01 * (i % 4)} for i in range(60)
    ]
    assert heard(steps) == []
    steps += [{"loss": 2.2}, *steps[1:4], {"loss": 2.2}]
    assert [(i, t.name) for i, t in heard(steps)] == [(60, "loss_spike")], "and quiet for 20 steps after it"
    assert EarlyWarning().max_loss == math.inf


def test_validation_that_rises_while_training_does_not_fall_is_no_overfitting() -> None:
    steps = healthy(2)  # flat
    for i, step in enumerate(steps):
        step["loss"] = 1.2 + 0.001 * i
        if i >= START:
            overfitting_by_validation(step, i - START)
    assert heard(steps) == []


def test_the_layer_is_named() -> None:
    steps: list[Step] = [{"balance/max_vio/layer_7": 0.3 + 0.01 * (i % 3)} for i in range(40)]
    steps += [{"balance/max_vio/layer_7": 2.0}] * 5
    ((_, trouble),) = heard(steps)
    assert (trouble.name, trouble.layer) == ("imbalance", 7)
    assert trouble.message.startswith(
        "balance/max_vio/layer_7 is 2, above 0.81: 5 steps in a row; the first 20 had 0.31;"
    )


def test_a_number_of_all_layers_names_the_one_that_moved_most() -> None:
    def step(total: float, third: float) -> Step:
        return {"num_zeros/total": total * N, "num_zeros/share": total, "num_zeros/attention": total * N} | {
            f"num_zeros/not_experts/layer_{layer}": third * N if layer == 3 else 0.001 * N * layer
            for layer in range(6)
        }

    steps = [*[step(0.0, 0.001)] * 40, *[step(0.1, 0.1)] * 5]
    ((at, trouble),) = heard(steps)
    assert (at, trouble.name, trouble.layer) == (44, "gradient_underflow", 3)
    assert trouble.message.startswith("num_zeros/attention (most in layer 3) is 0.1, above 0.01: ")


def test_many_numbers_that_show_one_thing_are_one_alarm_and_quiet_for_a_while() -> None:
    def step(value: float) -> Step:
        return {f"balance/max_vio/layer_{layer}": value for layer in range(8)}

    found = heard([*[step(0.3)] * 30, *[step(3.0)] * 100])
    assert [t.layer for _, t in found] == [0, 1, 2, 3, 4], "one number every 20 steps"
    assert np.diff([i for i, _ in found]).tolist() == [QUIET_STEPS] * 4
    waves = [step(3.0 if i % 12 < 6 else 0.3) for i in range(60)]
    found = heard([*[step(0.3)] * 30, *waves])
    assert min(np.diff([i for i, _ in found])) >= QUIET_STEPS


def test_a_restart_hears_the_same() -> None:
    """A NaN is null on disk; steps of the former attempt make the band."""
    steps = healthy(0)
    for i, step in enumerate(steps):
        if i >= START:
            imbalance_by_load(step, i - START)
    nan_in_the_gradient(steps[30], 3)
    whole = heard(steps)
    assert [t.name for _, t in whole][:2] == ["nan", "imbalance"]
    for stop in (10, 31, 45, START + 5):
        resumed = Alarms()
        on_disk = [{k: v if v is None or math.isfinite(v) else None for k, v in s.items()} for s in steps]
        for step in on_disk[:stop]:
            resumed.check(step)
        later = [(i + stop, t.name) for i, s in enumerate(steps[stop:]) for t in resumed.check(s)]
        assert later == [(i, t.name) for i, t in whole if i >= stop]


def test_a_batch_that_was_left_out_makes_no_band() -> None:
    early = EarlyWarning()
    for i in range(WARM_UP):
        list(early.check({"loss": 1.0, "grad_norm": 1.0, "balance/max_vio": 0.3}))
        if i % 2:
            list(early.check({"loss": None, "grad_norm": None, "balance/max_vio": 5.0, "skipped": 1.0}))
    assert early.max_loss == 1.5
    found = [t for _ in range(5) for _, t in early.check({"balance/max_vio": 2.0}) if t is not None]
    assert found and found[0].high == pytest.approx(0.8)
