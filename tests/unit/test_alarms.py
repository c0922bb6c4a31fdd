"""An alarm sounds when its number leaves the band, once."""

from __future__ import annotations

import math

from posttrain.alarms import REPLAY_BANDS, Alarms, Band

BAND = Band(name="high", metric="x", limit=1.0, hint="lower it")


def test_once_per_excursion() -> None:
    alarms = Alarms((BAND,))
    assert alarms.check({"x": 1.0}) == []
    assert alarms.check({"x": 1.5}) == [("high", "x is 1.5, above 1: lower it")]
    assert alarms.check({"x": 2.0}) == []
    assert alarms.check({"x": 0.5}) == []
    assert [name for name, _ in alarms.check({"x": 3.0})] == ["high"]


def test_nan_sounds_and_an_absent_number_does_not() -> None:
    assert Alarms((BAND,)).check({}) == []
    assert [name for name, _ in Alarms((BAND,)).check({"x": math.nan})] == ["high"]


def test_a_healthy_step_of_the_tiny_pipeline_is_silent() -> None:
    healthy = {
        "replay/route_mismatch": 0.011,
        "mismatch/k3": 3e-5,
        "mismatch/f2": 0.0,
        "replay/rejected": 0.0,
    }
    assert Alarms().check(healthy) == []
    broken = {band.metric: band.limit + 1 for band in REPLAY_BANDS}
    assert len(Alarms().check(broken)) == len(REPLAY_BANDS)
