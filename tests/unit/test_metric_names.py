"""docs/metrics.md names every metric that losses can make; the runs' own are checked where runs are made."""

from __future__ import annotations

import pytest

from posttrain.config import ALARMS, Loss
from posttrain.learner.losses import compute
from posttrain.learner.monitors.num_zeros import CLASSES
from posttrain.records import LossSettings
from tests.metric_names import PAGE, undocumented
from tests.unit.test_losses import random_inputs


def test_the_reader_knows_a_stranger() -> None:
    assert undocumented(["reward/math", "math/entropy", "replay_check/f1.1_without"]) == set()
    strangers = {"reward", "reward/math/x", "math/mood", "mismatch/f1x1"}
    assert undocumented(strangers) == strangers


@pytest.mark.parametrize("kind", ["sft", *(loss.value for loss in Loss)])
def test_every_metric_of_a_loss_is_documented(kind: str) -> None:
    output = compute(random_inputs(), LossSettings(kind=kind, beta=1.0))
    assert undocumented([*output.metrics, *output.maxima]) == set()


def test_every_class_and_alarm_is_documented() -> None:
    text = PAGE.read_text()
    assert all(name in text for name in CLASSES)
    assert all(f"`{name}`" in text for name in ALARMS)
