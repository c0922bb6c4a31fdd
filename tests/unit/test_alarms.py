"""An alarm sounds when its number leaves the band, once; a run's first steps make the band of what nobody knows beforehand."""

from __future__ import annotations

import math

import pytest

from posttrain.alarms import (
    FIRST_STEPS,
    HEALTH_DRIFTS,
    RECENT_STEPS,
    REPLAY_BANDS,
    ROLLOUT_BANDS,
    STARVING_STEPS,
    Alarms,
    Band,
)
from posttrain.config import ALARMS
from posttrain.early_warning import WATCHES, Trouble

BAND = Band(name="x", metric="x", low=0.5, high=1.0, hint="mind it")
HEALTHY = {
    "replay/route_mismatch": 0.011,
    "mismatch/k3": 3e-5,
    "mismatch/f2": 0.0,
    "replay/rejected": 0.0,
}
STEP = {"truncated/math": 0.02, "repeated/math": 0.0, "math/entropy": 0.4, "length/math": 30.0}


def said(found: list[Trouble]) -> list[tuple[str, str]]:
    return [(trouble.name, trouble.message) for trouble in found]


def test_once_per_excursion_on_both_sides() -> None:
    alarms = Alarms((BAND,), ())
    assert alarms.check({"x": 1.0}) == alarms.check({"x": 0.5}) == []
    assert said(alarms.check({"x": 1.5})) == [("x", "x is 1.5, above 1: mind it")]
    assert alarms.check({"x": 2.0}) == []
    assert alarms.check({"x": 0.7}) == []
    assert said(alarms.check({"x": 0.25})) == [("x", "x is 0.25, below 0.5: mind it")]


def test_nan_sounds_and_an_absent_number_does_not() -> None:
    assert Alarms((BAND,), ()).check({}) == Alarms((BAND,), ()).check({"x": None}) == []
    assert [t.name for t in Alarms((BAND,), ()).check({"x": math.nan})] == ["x"]


def test_a_healthy_step_of_the_tiny_pipeline_is_silent() -> None:
    assert Alarms().check(HEALTHY) == []
    broken = {band.metric: band.high + 1 for band in REPLAY_BANDS}
    assert len(Alarms().check(broken)) == len(REPLAY_BANDS)


def sounded(steps: list[dict[str, float]]) -> list[tuple[int, str, str]]:
    alarms = Alarms()
    return [(i, name, text) for i, step in enumerate(steps) for name, text in said(alarms.check(step))]


@pytest.mark.parametrize(
    ("metric", "value", "name"),
    [
        ("truncated/math", 0.2, "truncation"),
        ("repeated/math", 0.1, "repetition"),
        ("math/entropy", 0.05, "entropy"),
        ("length/math", 70.0, "length"),
        ("length/math", 10.0, "length"),
    ],
)
def test_a_number_that_leaves_the_band_of_the_first_steps(metric: str, value: float, name: str) -> None:
    found = sounded([STEP] * FIRST_STEPS + [STEP | {metric: value}] * 8)
    assert [(i, n) for i, n, _ in found] == [(FIRST_STEPS + RECENT_STEPS - 1, name)]
    hint = next(drift.hint for drift in HEALTH_DRIFTS if drift.name == name)
    assert metric in found[0][2] and found[0][2].endswith(hint) and "the first 10 steps had" in found[0][2]


def test_one_odd_step_and_what_was_so_from_the_start_are_no_drift() -> None:
    odd = STEP | {"truncated/math": 0.3}
    assert sounded([STEP] * FIRST_STEPS + [odd, *[STEP] * 5]) == []
    always = STEP | {"truncated/math": 0.9, "repeated/math": 0.5}
    assert sounded([always] * 30) == []
    assert sounded([STEP] * FIRST_STEPS + [{"truncated/all": 1.0, "entropy": 0.0}] * 9) == []


def test_a_number_that_goes_and_comes_again_sounds_again() -> None:
    far = STEP | {"length/math": 100.0}
    found = sounded([*[STEP] * FIRST_STEPS, *[far] * 4, *[STEP] * 6, *[far] * 4])
    assert [name for _, name, _ in found] == ["length", "length"]


def test_bands_and_silences_survive_a_restart() -> None:
    steps = [STEP] * FIRST_STEPS + [STEP | {"length/math": 100.0}] * 20
    resumed = Alarms()
    before = [t.name for step in steps[:20] for t in resumed.check(step)]  # as read from metrics.jsonl
    assert before == ["length"]
    assert [alarm for step in steps[20:] for alarm in resumed.check(step)] == []


def shares(got: float, prompts: float = 0.2, **more: float) -> dict[str, float]:
    rest = {"share/prompts/code": 1 - prompts, "share/gradient/code": 1 - got}
    return rest | {"share/prompts/math": prompts, "share/gradient/math": got} | more


def test_a_starving_domain() -> None:
    """Open-MOPD: 20 % of the prompts, 1 % of the gradient."""
    found = sounded([shares(0.01)] * (STARVING_STEPS + 3))
    assert [(i, name) for i, name, _ in found] == [(STARVING_STEPS - 1, "starving_domain")]
    assert "share/gradient/math is 0.01, below 0.05: it should be near 0.2" in found[0][2]
    assert "token_mean_balanced" in found[0][2]


def test_who_does_not_starve() -> None:
    assert sounded([shares(0.06)] * 10) == []
    assert sounded([*[shares(0.01)] * (STARVING_STEPS - 1), shares(0.2)] * 3) == []
    assert sounded([{"share/prompts/math": 1.0}] * 10) == [], "no gradient at all is another trouble"


def taught(gap: float, share: float = 0.01, **more: float) -> dict[str, float]:
    return shares(share, **{"math/teacher_abs": gap, "math/advantage_abs": gap} | more)


def test_a_domain_that_has_reached_its_teacher_does_not_starve() -> None:
    """Little is left to move there. A gap that stays, or comes again, starves."""
    fed = [taught(0.4, share=0.2)] * FIRST_STEPS
    assert sounded([*fed, *[taught(0.03)] * 10]) == []
    for gap in (0.4, 0.2):
        found = sounded([*fed, *[taught(0.03)] * 10, *[taught(gap)] * 10])
        assert [(i, name) for i, name, _ in found] == [(FIRST_STEPS + 9 + STARVING_STEPS, "starving_domain")]
    assert [i for i, _, _ in sounded([taught(0.4)] * 10)] == [STARVING_STEPS - 1], "hungry from the start"


def test_a_domain_that_starts_at_its_teacher_does_not_starve() -> None:
    assert sounded([taught(0.0)] * 30) == sounded([taught(0.002)] * 30) == []
    assert sounded([taught(0.4 / 3**i) for i in range(30)]) == [], "gone before the first steps are over"


def test_a_closed_gap_does_not_feed_the_outcome_and_says_nothing_of_the_next_teacher() -> None:
    fed = [taught(0.4, share=0.2, **{"teacher/version": 1.0})] * FIRST_STEPS
    outcome = [taught(0.001, **{"math/advantage_abs": 0.5})] * 6
    assert [name for _, name, _ in sounded([*fed, *outcome])] == ["starving_domain"]
    swapped = [taught(0.035, **{"teacher/version": 2.0})] * 6
    assert [name for _, name, _ in sounded([*fed, *swapped])] == ["starving_domain"]


def test_a_target_share_counts_instead_of_the_prompts() -> None:
    assert sounded([shares(0.01, **{"share/target/math": 0.02})] * 10) == []
    found = sounded([shares(0.1, **{"share/target/math": 0.5})] * 10)
    assert [name for _, name, _ in found] == ["starving_domain"]


def test_a_domain_that_never_reaches_the_loss_starves() -> None:
    step = {"share/prompts/math": 0.5, "share/prompts/code": 0.5, "share/gradient/code": 1.0}
    assert [name for _, name, _ in sounded([step] * 6)] == ["starving_domain"]


def test_the_configuration_knows_every_alarm() -> None:
    tables = (*REPLAY_BANDS, *ROLLOUT_BANDS, *HEALTH_DRIFTS, *WATCHES)
    names = {entry.name for entry in tables} | {"nan", "loss_spike", "starving_domain"}
    assert names == set(ALARMS)
