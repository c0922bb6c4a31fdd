"""Routes that went wrong between a real engine and a real learner: each is named, and none reaches the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import ray

from posttrain import cluster
from posttrain.config import Dtype, LearnerConfig, ModelConfig, RayConfig, RolloutConfig
from posttrain.data.chat import encode_prompt
from posttrain.data.tokenizer import load_tokenizer
from posttrain.learner.errors import RecordError
from posttrain.learner.group import LearnerGroup
from posttrain.records import LossSettings, Prompt, Rollout, RolloutGroup, SampleRef, SamplingSettings
from rollout.pool import RolloutPool
from tests.tiny_models import tiny_qwen3_moe

pytestmark = pytest.mark.integration

NUM_ROLLOUTS = 24
LOSS = LossSettings(kind="policy_gradient", beta=0.0, alpha=1.0)
SAMPLING = SamplingSettings(max_new_tokens=40)
Step = tuple[dict[str, float], dict[str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny_qwen3_moe(folder / name, seed=seed)) for seed, name in enumerate(("present", "other"))]


@pytest.fixture(scope="module")
def engines(models: list[str]) -> Iterator[tuple[RolloutPool, LearnerGroup]]:
    cluster.start(RayConfig(object_store_gb=0.3))
    model = ModelConfig(path=models[0])
    frozen = LearnerConfig(lr=1e-12, warmup_steps=0)
    learner = LearnerGroup.start(frozen, model, total_steps=100, seed=0)
    cfg = RolloutConfig(
        dtype=Dtype.float32, max_model_len=96, max_new_tokens=40, vllm={"kv_cache_memory_bytes": 1 << 26}
    )
    yield RolloutPool.start(cfg, model, environments={}, seed=0), learner
    cluster.stop()


def submit(pool: RolloutPool, model: str, name: str) -> None:
    tokenizer = load_tokenizer(model)
    for number in range(NUM_ROLLOUTS):
        messages = [{"role": "user", "content": f"what is {number} + {number}"}]
        prompt = Prompt(
            prompt_id=f"{name}-{number}",
            source="test",
            domain="math",
            messages=messages,
            token_ids=encode_prompt(tokenizer, messages, None),
        )
        pool.submit(prompt, SAMPLING, f"{name}-{number:02d}")


def drain(pool: RolloutPool) -> list[Rollout]:
    groups: list[RolloutGroup] = ray.get([ref for ref, _ in pool.drain()])
    return sorted((group.rollouts[0] for group in groups), key=lambda r: r.rollout_id)


@pytest.fixture(scope="module")
def rollouts(engines: tuple[RolloutPool, LearnerGroup], models: list[str]) -> list[Rollout]:
    submit(engines[0], models[0], "a")
    return drain(engines[0])


@pytest.fixture(scope="module")
def foreign(
    engines: tuple[RolloutPool, LearnerGroup], models: list[str], rollouts: list[Rollout]
) -> list[np.ndarray]:
    """What the engine records for the same tokens under other weights."""
    pool = engines[0]
    pool.load_checkpoint(models[1], policy_version=1)
    routes = pool.score([r.token_ids for r in rollouts])[1]
    pool.load_checkpoint(models[0], policy_version=2)
    return routes


def train(learner: LearnerGroup, rollouts: list[Rollout]) -> Step:
    """Metrics of one step and what it rejected. The advantage of a rollout hangs on its tokens alone."""
    refs = [
        SampleRef(
            source_ref=ray.put(RolloutGroup(group_id=r.group_id, prompt=r.prompt, rollouts=[r])),
            index=0,
            num_tokens=len(r.token_ids),
            weight=1e-3,
            orm_advantage=float(np.cos(r.token_ids.sum())),
            domain=r.domain,
        )
        for r in rollouts
    ]
    return learner.train_step(refs, LOSS, 1), learner.rejected()


def remove_a_row(rollout: Rollout, _: np.ndarray) -> None:
    assert rollout.routed_experts is not None
    rollout.routed_experts = np.delete(rollout.routed_experts, 3, axis=0)


def remove_a_row_and_fill_up(rollout: Rollout, _: np.ndarray) -> None:
    assert rollout.routed_experts is not None
    rollout.routed_experts = np.delete(rollout.routed_experts, 0, axis=0)
    rollout.routed_experts = np.concatenate([rollout.routed_experts, rollout.routed_experts[-1:]])


def swap_two_layers(rollout: Rollout, _: np.ndarray) -> None:
    assert rollout.routed_experts is not None
    rollout.routed_experts[:, :2] = rollout.routed_experts[:, 1::-1].copy()


def take_those_of_other_weights(rollout: Rollout, foreign: np.ndarray) -> None:
    rollout.routed_experts = foreign


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (remove_a_row, "routed_experts has shape"),
        (remove_a_row_and_fill_up, "learner.max_route_distance=0.5"),
        (swap_two_layers, "learner.max_route_distance=0.5"),
        (take_those_of_other_weights, "learner.max_route_distance=0.5"),
    ],
)
def test_a_fault_is_named_and_stays_out_of_the_loss(
    engines: tuple[RolloutPool, LearnerGroup],
    rollouts: list[Rollout],
    foreign: list[np.ndarray],
    fault: Callable[[Rollout, np.ndarray], None],
    reason: str,
) -> None:
    learner, victim = engines[1], int(np.argmax([len(r.token_ids) for r in rollouts]))
    healthy, none = train(learner, rollouts)
    assert none == {} and healthy["replay/coverage"] == 1.0 and healthy["replay/route_mismatch"] < 0.01
    damaged = deepcopy(rollouts)
    fault(damaged[victim], foreign[victim])
    metrics, rejected = train(learner, damaged)
    assert list(rejected) == [f"rollout {rollouts[victim].rollout_id}"]
    assert reason in rejected[f"rollout {rollouts[victim].rollout_id}"]
    assert metrics["replay/rejected"] == 1.0
    without, _ = train(learner, rollouts[:victim] + rollouts[victim + 1 :])
    assert abs(healthy["loss"] - without["loss"]) > 1e-4
    assert metrics["loss"] == pytest.approx(without["loss"], abs=1e-6)


def test_a_batch_of_other_weights_stops_the_step(
    engines: tuple[RolloutPool, LearnerGroup], rollouts: list[Rollout], foreign: list[np.ndarray]
) -> None:
    damaged = deepcopy(rollouts)
    for rollout, routes in zip(damaged, foreign, strict=True):
        rollout.routed_experts = routes
    with pytest.raises(
        RecordError, match=rf"{NUM_ROLLOUTS} of {NUM_ROLLOUTS} rollouts have routes that.*weights were not"
    ):
        train(engines[1], damaged)


def test_a_worker_that_dies_in_the_middle_leaves_no_half_routes(
    engines: tuple[RolloutPool, LearnerGroup], models: list[str]
) -> None:
    pool, learner = engines
    submit(pool, models[0], "b")
    assert len(pool.wait(timeout_s=0.05)) < NUM_ROLLOUTS
    restarts = pool.num_restarts
    ray.kill(pool._workers[0].actor)
    rollouts = drain(pool)
    assert len(rollouts) == NUM_ROLLOUTS and pool.num_restarts == restarts + 1
    metrics, rejected = train(learner, rollouts)
    assert rejected == {} and metrics["replay/coverage"] == 1.0 and metrics["replay/route_mismatch"] < 0.01
    for rollout, routes in zip(rollouts, pool.score([r.token_ids for r in rollouts])[1], strict=True):
        np.testing.assert_array_equal(rollout.routed_experts, routes)


def test_the_checkpoints_differ(models: list[str]) -> None:
    """Or routes of other weights would be those of the present ones."""
    first, second = (Path(m, "model.safetensors").read_bytes() for m in models)
    assert first != second
