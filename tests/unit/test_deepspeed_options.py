"""What of `learner.deepspeed` is refused, by name and before any engine starts, and that offload to the CPU is not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from posttrain.config import Dtype, LearnerConfig, UserError, check_deepspeed


def offload(what: str, device: str, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {f"offload_{what}": {"device": device, **more}}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"deepspeed": {"optimizer": {}}}, "learner.deepspeed.optimizer={}: the learner sets this itself"),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "zero_optimization.stage=2: use learner.zero_stage"),
    ({"dtype": Dtype.bfloat16, "zero_stage": 1}, "learner.zero_stage=1: with learner.dtype=bfloat16"),
    ({"zero_stage": 0, "deepspeed": offload("optimizer", "cpu")}, "zero_stage=0 has nothing to offload"),
    (
        {"zero_stage": 3, "deepspeed": offload("optimizer", "nvme")},
        "offload_optimizer.device='nvme': only cpu",
    ),
    ({"zero_stage": 3, "deepspeed": offload("param", "nvme")}, "offload_param.device='nvme': only cpu"),
    (
        {"zero_stage": 2, "deepspeed": offload("param", "cpu")},
        "only learner.zero_stage=3 offloads parameters",
    ),
    ({"zero_stage": 3, "deepspeed": offload("optimizer", "cpu", super_offload=True)}, "super_offload=True"),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_options_that_cannot_work_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        check_deepspeed(LearnerConfig(**settings))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_offload_to_the_cpu_is_accepted(stage: int) -> None:
    check_deepspeed(LearnerConfig(zero_stage=stage, deepspeed=offload("optimizer", "cpu")))


def test_other_offload_that_works_is_accepted() -> None:
    check_deepspeed(LearnerConfig(zero_stage=3, deepspeed=offload("param", "cpu")))
    check_deepspeed(LearnerConfig(zero_stage=0, deepspeed=offload("optimizer", "none")))


def test_the_key_is_that_of_the_stage() -> None:
    learner = LearnerConfig(zero_stage=0, deepspeed=offload("optimizer", "cpu"))
    with pytest.raises(
        UserError, match=r"^sft\.learner\.deepspeed\.zero_optimization\.offload_optimizer\.device="
    ):
        check_deepspeed(learner, "sft.learner")
