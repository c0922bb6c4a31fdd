"""The reward pool on real Ray actors: order, errors, a verifier that ends its process."""

from __future__ import annotations

import os

import numpy as np
import pytest
import ray

from posttrain.config import RewardWorkerConfig, UserError
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus
from rewards.pool import RewardPool

pytestmark = pytest.mark.integration

MODULE = """
import os, pathlib, time

class Broken:
    def score(self, rollout):
        raise RuntimeError("no verdict")

class DiesOnce:
    def __init__(self, marker):
        self.marker = pathlib.Path(marker)

    def score(self, rollout):
        if not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return 0.25, {}

class Deadly:
    def score(self, rollout):
        if rollout.completion == "deadly":
            os._exit(1)
        return 0.75, {}

class Hangs:
    def score(self, rollout):
        while rollout.completion == "hang":
            try:
                time.sleep(0.01)
            except Exception:
                pass
        return 0.5, {}

class Unbuildable:
    def __init__(self):
        raise OSError("no dictionary")

    def score(self, rollout):
        return 0.0, {}
"""


@pytest.fixture(scope="module")
def ray_local():
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "verifiers_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "verifiers_of_a_user"


def group(name: str, domain: str, texts: list[str], status=RolloutStatus.completed) -> RolloutGroup:
    prompt = Prompt(
        prompt_id=name, source="s", domain=domain, messages=[], token_ids=np.zeros(2, np.int32), answer="42"
    )
    rollouts = [
        Rollout(
            group_id=name,
            rollout_id=f"{name}/{index}",
            prompt=prompt,
            turns=[],
            messages=[{"role": "assistant", "content": text}],
            routed_experts=None,
            finish_reason="stop",
            status=status,
        )
        for index, text in enumerate(texts)
    ]
    return RolloutGroup(group_id=name, prompt=prompt, rollouts=rollouts)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pool_scores_groups_in_order(ray_local, user_module, num_workers):
    exact = {"_target_": "rewards.exact_match.ExactMatch"}
    pool = RewardPool.start(
        {"math": exact, "code": {"_target_": f"{user_module}.Broken"}},
        ["math", "code"],
        RewardWorkerConfig(num_workers=num_workers),
    )
    groups = [
        group("a", "math", ["42", "41"]),
        group("b", "code", ["42"]),
        group("c", "math", ["42"], RolloutStatus.engine_error),
    ]
    refs = [ray.put(g) for g in groups]
    pending = [pool.score(refs), pool.score(refs[:1])]  # two calls under way at once
    (first, second, third), (again,) = ray.get(pending)
    assert [r.reward for r in first] == [1.0, 0.0] == [r.reward for r in again]
    assert second[0].error is not None and "no verdict" in second[0].error
    assert third[0].error == "engine_error"
    pool.shutdown()


def test_a_verifier_that_ends_its_process_is_started_again(ray_local, user_module, tmp_path):
    entry = {"_target_": f"{user_module}.DiesOnce", "marker": str(tmp_path / "died")}
    pool = RewardPool.start(entry, ["math"])
    (results,) = ray.get(pool.score([ray.put(group("a", "math", ["x", "y"]))]))
    assert os.path.exists(tmp_path / "died") and [r.reward for r in results] == [0.25, 0.25]
    pool.shutdown()


def test_a_verifier_that_hangs_is_an_error_of_its_rollout(ray_local, user_module):
    entry = {"_target_": f"{user_module}.Hangs"}
    pool = RewardPool.start(entry, ["math"], RewardWorkerConfig(timeout_s=0.2))
    ((hung, fine),) = ray.get(pool.score([ray.put(group("a", "math", ["hang", "fine"]))]))
    assert hung.error == "the reward took longer than reward_workers.timeout_s=0.2"
    assert (fine.reward, fine.error) == (0.5, None)
    pool.shutdown()


def test_a_rollout_that_kills_its_verifier_costs_its_group_alone(ray_local, user_module):
    pool = RewardPool.start(
        {"_target_": f"{user_module}.Deadly"}, ["math"], RewardWorkerConfig(num_workers=2)
    )
    groups = [group(f"g{i}", "math", ["fine", "deadly" if i == 3 else "fine"]) for i in range(20)]
    results = pool.score_all([(ray.put(g), 2) for g in groups])
    assert [r.reward for i, found in enumerate(results) for r in found if i != 3] == [0.75] * 38
    assert all(r.error is not None and "died" in r.error for r in results[3]) and len(results[3]) == 2
    pool.shutdown()


def test_an_unbuildable_reward_is_a_user_error(ray_local, user_module):
    with pytest.raises(UserError, match=r"rewards\.math\._target_=.*no dictionary"):
        RewardPool.start({"math": {"_target_": f"{user_module}.Unbuildable"}}, ["math"])
