"""Teachers as Ray actors: domains, equal checkpoints, swapping, order, NaN, and the death of a worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError
from safetensors.torch import load_file, save_file

from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig, UserError
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus, Turn
from teachers.pool import TeacherPool, place
from teachers.scorer import Scorer, TeacherScoreError
from teachers.teacher import Teacher
from tests.tiny_models import tiny_mimo, tiny_qwen3_moe
from tests.unit.test_teachers_lora import ATTENTION, EXPERTS, make_adapter


def make_group(lengths: list[int], seed: int) -> RolloutGroup:
    rng = np.random.default_rng(seed)
    prompt = Prompt(prompt_id="p", source="s", domain="math", messages=[], token_ids=np.zeros(1, np.int32))
    rollouts = []
    for i, length in enumerate(lengths):
        turn = Turn(
            author="policy",
            token_ids=rng.integers(0, 60, length).astype(np.int32),
            loss_mask=np.ones(length, bool),
            rollout_logprobs=np.zeros(length, np.float32),
            policy_versions=np.zeros(length, np.int32),
        )
        rollouts.append(
            Rollout(
                group_id=f"g{seed}",
                rollout_id=f"g{seed}-{i}",
                prompt=prompt,
                turns=[turn],
                messages=[],
                routed_experts=rng.integers(0, 8, (length - 1, 3, 2)).astype(np.uint8),
                finish_reason="stop",
                status=RolloutStatus.completed,
            )
        )
    return RolloutGroup(group_id=f"g{seed}", prompt=prompt, rollouts=rollouts)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    paths = {"a": tiny_mimo(folder / "a", seed=1), "b": tiny_mimo(folder / "b", seed=2)}
    paths["a_again"] = tiny_mimo(folder / "a_again", seed=1)
    paths["a_tuned"] = tiny_mimo(folder / "a_tuned", seed=1)  # other weights, the same head
    weights = load_file(paths["a_tuned"] / "model.safetensors")
    weights["model.norm.weight"] *= 1.1
    save_file(weights, paths["a_tuned"] / "model.safetensors", metadata={"format": "pt"})
    paths["broken"] = tiny_mimo(folder / "broken", seed=1)
    weights = load_file(paths["broken"] / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, paths["broken"] / "model.safetensors", metadata={"format": "pt"})
    return {name: str(path) for name, path in paths.items()}


def expect(path: str, groups: list[RolloutGroup]) -> list[np.ndarray]:
    ids = [rollout.token_ids for group in groups for rollout in group.rollouts]
    scores = Scorer(path, ModelConfig(), Dtype.float32).score(ids, 100_000)
    return [score.logprobs for score in scores]


@pytest.mark.integration
def test_pool(local_ray: None, checkpoints: dict[str, str]) -> None:
    pool = TeacherPool.start(
        TeacherWorkerConfig(num_workers=1, max_tokens_per_batch=256, cores_per_worker=1), ModelConfig()
    )
    groups = [make_group([20, 3, 55], 1), make_group([31], 2)]
    refs = [ray.put(group) for group in groups]

    # Three domains, two checkpoints: the equal ones are held once.
    rows = pool.set_teachers(
        {"math": checkpoints["a"], "code": checkpoints["b"], "chat": checkpoints["a_again"]}
    )
    assert [sorted(Path(path).name for path in row["paths"]) for row in rows] == [["a", "b"]]
    assert pool.domains == ["math", "code", "chat"]
    for domain, name in {"math": "a", "code": "b", "chat": "a_again"}.items():
        scores = ray.get(pool.score(domain, refs))
        assert [score.teacher for score in scores] == [checkpoints[name]] * 4
        for score, reference in zip(scores, expect(checkpoints[name], groups), strict=True):
            np.testing.assert_allclose(score.logprobs, reference, atol=1e-5)
    with pytest.raises(UserError, match=r"^teachers\.law\.path=None: domain 'law' has no teacher"):
        pool.score("law", refs)

    # Same text, two teachers: the right one answered.
    assert np.abs(expect(checkpoints["a"], groups)[0] - expect(checkpoints["b"], groups)[0]).max() > 0.1

    # Signals: rows of loss tokens, each LM head once under its number.
    pool.set_teachers(
        {d: checkpoints[n] for d, n in (("math", "a"), ("code", "b"), ("chat", "a_tuned"))}, "full"
    )
    heads = {number: ray.get(ref) for number, ref in pool.heads.items()}
    assert sorted(heads) == [0, 1]
    numbers = {}
    for domain, name in (("math", "a"), ("code", "b"), ("chat", "a_tuned")):
        score = ray.get(pool.score(domain, refs))[1]
        numbers[domain] = score.head_id
        assert score.hidden.shape[0] == 3
        logits = torch.from_numpy(score.hidden[1:] @ heads[score.head_id].T)
        ids = torch.from_numpy(groups[0].rollouts[1].token_ids[1:]).long()[:, None]
        own = logits.log_softmax(-1).gather(1, ids)[:, 0]
        np.testing.assert_allclose(own, expect(checkpoints[name], groups)[1][1:], atol=2e-5)
    assert numbers["math"] == numbers["chat"] != numbers["code"]
    pool.set_teachers({"math": checkpoints["a"]}, "top_k", 7)
    assert pool.heads == {} and ray.get(pool.score("math", refs))[2].topk_ids.shape == (55, 7)
    rows = pool.set_teachers({"math": checkpoints["a"], "code": checkpoints["b"]})

    # A worker that dies is restarted and loads what it is asked for.
    os.kill(rows[0]["pid"], signal.SIGKILL)
    scores = ray.get(pool.score("code", refs), timeout=120)
    np.testing.assert_allclose(scores[2].logprobs, expect(checkpoints["b"], groups)[2], atol=1e-5)
    [(worker, reason)] = pool.pop_restarts()
    assert worker == "teachers-0" and f":{rows[0]['pid']} died" in reason and pool.pop_restarts() == []

    # Swapping frees the former ones; a teacher that gives NaN stops the run with its name.
    rows = pool.set_teachers({"math": checkpoints["broken"]})
    assert [Path(path).name for path in rows[0]["paths"]] == ["broken"]
    with pytest.raises(TeacherScoreError, match=r"broken.*gave nan .*rollout 'g1-\d' of domain 'math'"):
        ray.get(pool.score("math", refs))
    with pytest.raises(UserError, match=r"^teachers\.math\.path='/gone': no such directory"):
        pool.set_teachers({"math": "/gone"})

    # One that is dead for good ends the run with one line.
    pool.check_alive()
    ray.kill(pool._shared[0].actor)
    deadline = time.monotonic() + 60
    while pool._shared[0].death is None and time.monotonic() < deadline:  # the kill is on its way
        assert pool.pop_restarts() == []
    with pytest.raises(
        UserError, match=r"^teacher_workers\.num_workers=1: a teacher process died.* start the same"
    ):
        pool.check_alive()
    with pytest.raises(RayActorError):
        ray.get(pool.score("math", refs))
    pool.shutdown()


@pytest.mark.integration
def test_adapters_of_one_base_score_together(local_ray: None, tmp_path: Path) -> None:
    """One call a worker, every domain's scores under its own reference; with two workers each has some of the domains."""
    base = tiny_qwen3_moe(tmp_path / "base", seed=1)
    teachers = {"bare": Teacher(key="teachers.bare", path=str(base))}
    for seed, domain in enumerate("abc"):
        adapter, _ = make_adapter(base, tmp_path / domain, seed, **(ATTENTION if domain != "c" else EXPERTS))
        teachers[domain] = Teacher(key=f"teachers.{domain}", path=str(base), adapter=adapter)
    groups = [make_group([20, 3, 55], 1), make_group([31], 2)]
    refs = {domain: [ray.put(group) for group in groups[: 1 + (domain == "a")]] for domain in teachers}
    for num_workers in (1, 2):
        pool = TeacherPool.start(
            TeacherWorkerConfig(num_workers=num_workers, cores_per_worker=1), ModelConfig()
        )
        pool.set_teachers(teachers)
        found = pool.score_all(refs)
        assert found.keys() == refs.keys()
        firsts = [ray.get(ref)[0].logprobs for ref in found.values()]
        for i, first in enumerate(firsts):
            assert all(np.abs(first - other).max() > 0.05 for other in firsts[:i])
        for domain, ref in found.items():
            ours, alone = ray.get(ref), ray.get(pool.score(domain, refs[domain]))
            assert [s.teacher for s in ours] == [teachers[domain].name] * (4 if domain == "a" else 3)
            for one, other in zip(ours, alone, strict=True):
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert len({ref.task_id() for ref in found.values()}) == num_workers
        assert pool.score_all({}) == {}
        pool.shutdown()


def test_placement() -> None:
    assert place({"a": 1, "b": 1}, 1) == {"a": [0], "b": [0]}
    assert place({"a": 1, "b": 2}, 5) == {"b": [0, 2, 4], "a": [1, 3]}
    assert place({"a": 9, "b": 5, "c": 4, "d": 1}, 2) == {"a": [0], "b": [1], "c": [1], "d": [0]}
    assert place({}, 3) == {}
