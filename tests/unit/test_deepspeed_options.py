"""What of `learner.deepspeed` is refused, by name and before any engine starts, and that offload to the CPU is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from posttrain.config import Dtype, LearnerConfig, UserError, check_deepspeed
from posttrain.learner import engine


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
    (
        {"zero_stage": 3, "deepspeed": offload("optimizer", "cpu", ratio=0.5)},
        "offload_optimizer.ratio=0.5: the whole optimizer goes to the CPU, or nothing",
    ),
    (
        {"zero_stage": 3, "deepspeed": {"zero_optimization": {"offload_optimizer": "cpu"}}},
        "offload_optimizer='cpu': give its options by name: "
        "learner.deepspeed.zero_optimization.offload_optimizer.device=cpu",
    ),
    (
        {"zero_stage": 3, "deepspeed": {"zero_optimization": {"offload_param": False}}},
        "offload_param=False: give its options by name: "
        "learner.deepspeed.zero_optimization.offload_param.device=cpu",
    ),
    ({"zero_stage": 3, "deepspeed": {"zero_optimization": True}}, "zero_optimization=True: give its options"),
    ({"deepspeed": {"zero_optimization": [1]}}, "zero_optimization=[1]: give its options"),
    *(
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization": {former: True}}},
            f"zero_optimization.{former}=True: use learner.deepspeed.zero_optimization.offload_",
        )
        for former in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
    ),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_options_that_cannot_work_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        check_deepspeed(LearnerConfig(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"ofload_optimizer": {"device": "cpu"}},
            "ofload_optimizer={'device': 'cpu'}: DeepSpeed has no such",
        ),
        ({"offload_optimizer": {"devise": "cpu"}}, "offload_optimizer.devise='cpu': DeepSpeed has no such"),
        ({"reduce_bucket_size": "large"}, "reduce_bucket_size='large': Input should be a valid integer"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(options: dict[str, Any], problem: str) -> None:
    learner = LearnerConfig(zero_stage=2, deepspeed={"zero_optimization": options})
    check_deepspeed(learner)
    with pytest.raises(UserError) as error:
        engine.build(nn.Linear(2, 2), learner)
    assert str(error.value).startswith(f"learner.deepspeed.zero_optimization.{problem}"), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_offload_to_the_cpu_is_accepted(stage: int) -> None:
    check_deepspeed(LearnerConfig(zero_stage=stage, deepspeed=offload("optimizer", "cpu")))


def test_other_offload_that_works_is_accepted() -> None:
    check_deepspeed(LearnerConfig(zero_stage=3, deepspeed=offload("param", "cpu")))
    check_deepspeed(LearnerConfig(zero_stage=0, deepspeed=offload("optimizer", "none")))
    known = {"offload_optimizer": None, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    for block in (None, known):
        engine.check_options(LearnerConfig(zero_stage=3, deepspeed={"zero_optimization": block}))


def test_the_key_is_that_of_the_stage() -> None:
    learner = LearnerConfig(zero_stage=0, deepspeed=offload("optimizer", "cpu"))
    with pytest.raises(
        UserError, match=r"^sft\.learner\.deepspeed\.zero_optimization\.offload_optimizer\.device="
    ):
        check_deepspeed(learner, "sft.learner")
