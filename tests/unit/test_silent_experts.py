"""Which experts fell silent, against rules written down here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.learner.monitors.silent_experts import CHANCE, USUAL_STEPS, SilentExperts, usual


def loads(*own: float, others: float = 100.0) -> Tensor:
    """One layer: these experts and as many that share ``others`` evenly."""
    return torch.tensor([[*own, *[others] * len(own)]])


def silent(experts: SilentExperts, step: Tensor, num_steps: int) -> list[int]:
    """How many are silent after each of so many equal steps."""
    return [int(experts.observe(step).sum()) for _ in range(num_steps)]


def after(*first: Tensor) -> SilentExperts:
    """Has seen these as its first steps, in turn."""
    experts = SilentExperts()
    for i in range(USUAL_STEPS):
        assert not experts.observe(first[i % len(first)]).any()
    return experts


def test_a_tenth_is_not_quiet_and_a_fiftieth_is() -> None:
    assert silent(after(loads(100)), loads(10), 9) == [0] * 9
    assert silent(after(loads(100)), loads(2), 9) == [0] * 4 + [1] * 5


def test_a_slow_death_sounds_like_a_sudden_one() -> None:
    experts, own = after(loads(100)), 100.0
    for _ in range(60):
        own *= 0.5 ** (1 / 10)
        found = experts.observe(loads(own))
    assert int(found.sum()) == 1 and own < 2


def test_it_stays_silent_and_is_back_with_its_first_tokens() -> None:
    experts = after(loads(100))
    assert silent(experts, loads(0), 200)[4:] == [1] * 196
    assert silent(experts, loads(60), 1) == [0]


@pytest.mark.parametrize("period", [2, 4, 5])
def test_what_comes_in_every_nth_batch_has_to_be_quiet_for_longer(period: int) -> None:
    """Quiet in q of 20 steps: the chance of n more in a row is ((q + 1) / 22)^n."""
    rare, none = loads(200), loads(0)
    experts = after(*[none] * (period - 1), rare)
    often = (USUAL_STEPS * (period - 1) // period + 1) / (USUAL_STEPS + 2)
    needed = math.ceil(math.log(CHANCE) / math.log(often))
    assert needed > 15
    assert silent(experts, none, needed + 2) == [0] * (needed - 1) + [1] * 3


def test_short_batches_say_nothing_and_shares_count_not_tokens() -> None:
    experts = after(loads(100))
    assert silent(experts, loads(0, others=40), 50) == [0] * 50
    assert silent(experts, loads(100, others=1000), 9) == [0] * 9
    assert silent(experts, loads(20, others=1000), 9) == [0] * 4 + [1] * 5  # below 5 % of a half


def test_rare_experts_are_left_alone() -> None:
    needed = usual(loads(3.9, 4.1, 0).expand(20, 1, -1).double())[1]
    assert needed[0, :3].tolist() == [math.inf, 5, math.inf]
    assert silent(after(loads(3.9, 4.1, 0)), loads(0, 0, 0), 6) == [0] * 4 + [1] * 2


def test_a_restart_changes_nothing() -> None:
    steps = [loads(100)] * 30 + [loads(0)] * 8
    whole = SilentExperts()
    found = [int(whole.observe(step).sum()) for step in steps]
    for stop in (0, 7, 20, 33):
        first = SilentExperts()
        for step in steps[:stop]:
            first.observe(step)
        second = SilentExperts()
        second.load_state(first.state())
        assert [int(second.observe(step).sum()) for step in steps[stop:]] == found[stop:]
