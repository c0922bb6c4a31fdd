"""What the driver decides before a learner process starts: GPUs of a rank, and what a living learner cannot change."""

from __future__ import annotations

import pytest

from posttrain.config import LearnerConfig, ModelConfig, UserError
from posttrain.learner import group
from posttrain.learner.actor import LearnerActor
from posttrain.learner.group import LearnerGroup
from posttrain.learner.worker import LearnerWorker


@pytest.mark.parametrize(
    ("available", "num_ranks", "asked", "expected"),
    [(0, 2, None, 0), (2, 2, None, 1), (1, 1, 0.5, 0.5), (2, 2, 0.6, 0.6), (1, 4, 0, 0)],
)
def test_gpus_of_a_rank(
    available: int, num_ranks: int, asked: float | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        group.ray, "cluster_resources", lambda: {"GPU": float(available)} if available else {}
    )
    assert group._num_gpus(LearnerConfig(num_ranks=num_ranks, num_gpus_per_rank=asked)) == expected


@pytest.mark.parametrize(("available", "num_ranks", "asked"), [(1, 2, None), (2, 3, 0.6), (0, 1, 0.5)])
def test_ranks_without_a_gpu_of_their_own(
    available: int, num_ranks: int, asked: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        group.ray, "cluster_resources", lambda: {"GPU": float(available)} if available else {}
    )
    with pytest.raises(UserError, match=rf"^learner\.num_ranks={num_ranks}: .* Ray has {available};"):
        group._num_gpus(LearnerConfig(num_ranks=num_ranks, num_gpus_per_rank=asked))


def test_a_living_learner_keeps_its_ranks_and_gpus() -> None:
    living = LearnerGroup([None], [], LearnerConfig())
    for change in ({"num_ranks": 2}, {"num_gpus_per_rank": 0.5}):
        (name,) = change
        with pytest.raises(UserError, match=rf"^learner\.{name}="):
            living.reset(LearnerConfig(**change), ModelConfig(path="/m"), 1, 0)


def test_the_actor_forwards_every_method_of_the_worker() -> None:
    def public(owner: type) -> set[str]:
        return {name for name, value in vars(owner).items() if callable(value) and not name.startswith("_")}

    assert public(LearnerWorker) - {"info"} == public(LearnerActor)
