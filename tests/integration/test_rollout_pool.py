"""Two rollout workers on the real engine: groups, multi-turn episodes, updates in flight, workers that die."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from posttrain import cluster
from posttrain.config import Dtype, ModelConfig, RayConfig, RolloutConfig, UserError
from posttrain.data.chat import encode_prompt
from posttrain.data.tokenizer import load_tokenizer
from posttrain.records import GroupSummary, Prompt, RolloutGroup, RolloutStatus, SamplingSettings
from rollout.environment import EnvironmentReply
from rollout.pool import RolloutPool
from tests.tiny_models import tiny_qwen3_moe

pytestmark = pytest.mark.integration
MAX_MODEL_LEN = 256


class Tool:
    """Answers with a tool message until the policy has spoken three times; a poisoned prompt ends the process."""

    def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
        if prompt.metadata.get("poison"):
            os._exit(1)
        time.sleep(prompt.metadata.get("sleep_s", 0.0))
        turns = sum(message["role"] == "assistant" for message in messages)
        return EnvironmentReply(messages=[{"role": "tool", "content": f"{turns} 42"}], done=turns == 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that often ends its turns, and another one of the same shape."""
    folder = tmp_path_factory.mktemp("models")
    start = tiny_qwen3_moe(folder / "start")
    end = load_tokenizer(str(start)).eos_token_id
    for seed, name in enumerate(("talkative", "other")):
        shutil.copytree(start, folder / name)
        tensors = load_file(start / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in tensors.items():
            tensors[key] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        tensors["lm_head.weight"][end] *= 4.0  # a logit of wide spread wins often
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return str(folder / "talkative"), str(folder / "other")


@pytest.fixture(scope="module")
def pool(models: tuple[str, str]) -> Iterator[RolloutPool]:
    cluster.start(RayConfig(object_store_gb=0.3))
    cfg = RolloutConfig(
        num_workers=2,
        dtype=Dtype.float32,
        max_model_len=MAX_MODEL_LEN,
        max_retries=1,
        vllm={"kv_cache_memory_bytes": 1 << 26},
    )
    environments = {"tool": {"_target_": f"{Tool.__module__}.Tool"}}
    pool = RolloutPool.start(cfg, ModelConfig(path=models[0]), environments, seed=0)
    yield pool
    pool.shutdown()
    cluster.stop()


def make_prompt(models: tuple[str, str], number: int, domain: str = "math", **metadata: Any) -> Prompt:
    messages = [{"role": "user", "content": f"what is {number} + {number}"}]
    return Prompt(
        prompt_id=f"{domain}-{number}",
        source="test",
        domain=domain,
        messages=messages,
        token_ids=encode_prompt(load_tokenizer(models[0]), messages, None),
        metadata=metadata,
    )


def groups_of(finished: list[tuple[Any, GroupSummary]]) -> dict[str, tuple[RolloutGroup, GroupSummary]]:
    groups = {summary.group_id: (ray.get(ref), summary) for ref, summary in finished}
    assert len(groups) == len(finished), "a group came back twice"
    return groups


def test_groups_come_back_with_logprobs_and_routes(pool: RolloutPool, models: tuple[str, str]) -> None:
    info = pool.info
    assert (info.records_routes, info.num_moe_layers, info.num_experts, info.top_k) == (True, 3, 8, 2)
    settings = SamplingSettings(group_size=2, max_new_tokens=24, seed=3)
    for number in range(12):
        pool.submit(make_prompt(models, number), settings, f"g{number}")
    assert pool.num_in_flight == 12
    finished = pool.wait(timeout_s=0.0)
    assert [worker.num_samples for worker in pool._workers] == [12, 12], "the least loaded worker is next"
    groups = groups_of(finished + pool.drain())
    assert groups.keys() == {f"g{number}" for number in range(12)} and pool.num_in_flight == 0
    pairs = [[r.token_ids.tolist() for r in group.rollouts] for group, _ in groups.values()]
    assert any(first != second for first, second in pairs), "samples of a group have seeds of their own"
    texts, rollouts = [], []
    for group, summary in groups.values():
        assert [r.rollout_id for r in group.rollouts] == [f"{group.group_id}/0", f"{group.group_id}/1"]
        assert summary.num_tokens == [len(r.token_ids) for r in group.rollouts]
        assert summary.num_loss_tokens == [int(r.loss_mask.sum()) for r in group.rollouts]
        for rollout in group.rollouts:
            ended = rollout.finish_reason == "stop"
            assert rollout.status is (RolloutStatus.completed if ended else RolloutStatus.truncated)
            assert rollout.routed_experts is not None and rollout.routed_experts.dtype == np.uint8
            assert rollout.routed_experts.shape == (len(rollout.token_ids) - 1, 3, 2)
            texts.append(rollout.token_ids)
            rollouts.append(rollout)
    for worker in (0, 1):
        logprobs, routes = pool.score(texts, worker)
        for rollout, scored, scored_routes in zip(rollouts, logprobs, routes, strict=True):
            mask = rollout.loss_mask
            assert np.abs(scored[mask] - rollout.rollout_logprobs[mask]).max() < 1e-4
            assert scored[0] == 0.0 and (scored[1:] < 0).all()
            np.testing.assert_array_equal(scored_routes, rollout.routed_experts)


def test_multi_turn_routes_equal_those_of_one_prefill_without_cache(
    pool: RolloutPool, models: tuple[str, str]
) -> None:
    settings = SamplingSettings(group_size=16, max_new_tokens=40, max_turns=3)
    for number in range(4):
        pool.submit(make_prompt(models, number, "tool"), settings, f"t{number}")
    rollouts = [r for group, _ in groups_of(pool.drain()).values() for r in group.rollouts]
    long = [r for r in rollouts if len(r.turns) >= 4]
    assert len(long) >= 5 and any(r.finish_reason == "environment" for r in long)
    assert all(r.error is None for r in rollouts)
    tokenizer = load_tokenizer(models[0])
    logprobs, routes = pool.score([r.token_ids for r in long])
    for rollout, scored, scored_routes in zip(long, logprobs, routes, strict=True):
        np.testing.assert_array_equal(rollout.routed_experts, scored_routes)
        mask = rollout.loss_mask
        assert np.abs(scored - rollout.rollout_logprobs)[mask].max() < 1e-4
        assert ((rollout.policy_versions >= 0) == mask).all()
        given = [turn for turn in rollout.turns if turn.author == "environment"]
        assert given and not any(turn.loss_mask.any() for turn in given)
        assert "1 42" in tokenizer.decode(given[0].token_ids.tolist())
        assert all(t.token_ids[-1] == tokenizer.eos_token_id for t in rollout.turns[1:-1:2])


def test_an_update_in_flight_marks_tokens_and_reaches_every_worker(
    pool: RolloutPool, models: tuple[str, str]
) -> None:
    settings = SamplingSettings(group_size=8, max_new_tokens=200)
    for number in range(8):
        pool.submit(make_prompt(models, number), settings, f"u{number}")
    finished = pool.wait(timeout_s=60.0)
    report = pool.load_checkpoint(models[1], policy_version=4)
    assert report["num_requests_in_flight"] > 0
    groups = groups_of(finished + pool.drain())
    rollouts = [r for group, _ in groups.values() for r in group.rollouts]
    crossing = [r for r in rollouts if {0, 4} <= set(r.policy_versions.tolist())]
    assert crossing, "nothing was in flight when the weights changed"
    logprobs, _ = pool.score([r.token_ids for r in crossing], worker=1)
    for rollout, scored in zip(crossing, logprobs, strict=True):
        versions = rollout.policy_versions[rollout.loss_mask]
        assert (np.diff(versions) >= 0).all() and set(versions.tolist()) == {0, 4}
        new = rollout.policy_versions == 4
        assert np.abs(scored - rollout.rollout_logprobs)[new].max() < 1e-4
    summaries = [summary for _, summary in groups.values()]
    assert (
        max(s.max_policy_version for s in summaries) == 4
        and min(s.min_policy_version for s in summaries) == 0
    )


def test_a_prompt_that_fills_the_context_is_refused(pool: RolloutPool, models: tuple[str, str]) -> None:
    prompt = make_prompt(models, 1)
    prompt.token_ids = np.ones(MAX_MODEL_LEN, dtype=np.int32)
    pool.submit(prompt, SamplingSettings(), "long")
    with pytest.raises(UserError, match=r"rollout.max_model_len=256: prompt 'math-1' alone has 256 tokens"):
        pool.drain()
    assert pool.num_in_flight == 0


def test_a_poisoned_prompt_is_quarantined_and_its_neighbours_come_back(
    pool: RolloutPool, models: tuple[str, str]
) -> None:
    settings = SamplingSettings(group_size=2, max_new_tokens=60)
    pool.load_checkpoint(models[1], policy_version=6)
    deadly = SamplingSettings(group_size=16, max_new_tokens=100, max_turns=2)  # one ends its turn for sure
    pool.submit(make_prompt(models, 99, "tool", poison=True), deadly, "poisoned")
    for number in range(6):
        pool.submit(make_prompt(models, number), settings, f"n{number}")
    groups = groups_of(pool.drain())
    assert groups.keys() == {f"n{number}" for number in range(6)}
    assert pool.pop_lost() == ["poisoned"] and pool.pop_lost() == []
    ((prompt_id, reason),) = pool.quarantined
    assert prompt_id == "tool-99" and "died 2 times" in reason
    assert pool.num_restarts == 2
    assert {
        v for group, _ in groups.values() for r in group.rollouts for v in r.policy_versions.tolist()
    } == {-1, 6}
    first, second = pool.tensors(0), pool.tensors(1)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first), (
        "a new worker has the present weights"
    )


def test_a_slow_group_holds_up_neither_the_others_nor_the_backlog(
    pool: RolloutPool, models: tuple[str, str]
) -> None:
    pool.load_checkpoint(models[1], policy_version=7)  # waits for workers that are being started
    sizes = [worker.max_num_seqs for worker in pool._workers]
    for worker in pool._workers:
        worker.max_num_seqs = 8
    try:
        slow = make_prompt(models, 0, "tool", sleep_s=4.0)
        pool.submit(slow, SamplingSettings(group_size=8, max_new_tokens=100), "slow")
        for number in range(20):
            pool.submit(make_prompt(models, number), SamplingSettings(max_new_tokens=2), f"f{number}")
        assert len(pool._backlog) == 12, "what no engine has room for waits here"
        assert pool.num_in_flight == 21
        order: list[str] = []
        while pool.num_in_flight:
            order += [summary.group_id for _, summary in pool.wait(timeout_s=60.0)]
        assert sorted(order[:-1]) == sorted(f"f{number}" for number in range(20)) and order[-1] == "slow"
    finally:
        for worker, size in zip(pool._workers, sizes, strict=True):
            worker.max_num_seqs = size
