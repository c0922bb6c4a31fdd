"""One engine: after an update every tensor equals that of an engine freshly loaded from the same checkpoint, tokens
carry the version that sampled them, and a later turn costs and ships its own tokens only.

All engines live in one Ray actor, so that vLLM is imported once and its memory goes with the actor.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from posttrain import cluster
from posttrain.config import Dtype, ModelConfig, OnUpdate, RayConfig, RolloutConfig, UserError
from rollout import process
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe

pytestmark = pytest.mark.integration
PROMPT = list(range(5, 35))
BLOCK = 32  # the smallest that the CPU back end has


class Host:
    """Runs functions on one thread of a process of its own."""

    def __init__(self) -> None:
        process.prepare(0, 1)
        self.thread = ThreadPoolExecutor(1)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.thread.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    cluster.start(RayConfig(object_store_gb=0.2))
    host = ray.remote(Host).options(num_cpus=0).remote()
    yield lambda function, *arguments: ray.get(host.run.remote(function, *arguments))
    cluster.stop()


def perturbed(source: Path, out: Path, seed: int) -> str:
    """``source`` with noise on every tensor, sinks, experts and expert bias included."""
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def make_engine(path: str, dtype: Dtype, on_update: OnUpdate = OnUpdate.recompute, **options: Any) -> Any:
    from rollout.engine import Engine

    options |= {"kv_cache_memory_bytes": 1 << 25}
    cfg = RolloutConfig(max_model_len=256, dtype=dtype, on_update=on_update, vllm=options)
    return Engine(cfg, ModelConfig(path=path), seed=0)


def add(
    engine: Any, request_id: str, max_tokens: int, token_ids: list[int] | None = None, **more: Any
) -> None:
    from rollout.segment import Segment

    ids = PROMPT if token_ids is None else token_ids
    engine.add_request(Segment(request_id=request_id, token_ids=ids, max_tokens=max_tokens, **more))


def finish(engine: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    while engine.num_running:
        results |= {result.request_id: result for result in engine.step()}
    return results


def differences_after_updates(
    start: str, others: list[str], dtype: Dtype, in_flight: bool
) -> list[list[str]]:
    """Names of the tensors that differ from a fresh engine's, after each update."""
    from rollout.checkpoint import read_checkpoint

    engine, differing = make_engine(start, dtype), []
    for version, path in enumerate(others, start=1):
        fresh = make_engine(path, dtype).tensors()
        for request in range(4 if in_flight else 0):
            add(engine, f"{version}.{request}", max_tokens=100)
            engine.step()
        engine.update_weights(read_checkpoint(path, version))
        updated = engine.tensors()
        assert updated.keys() == fresh.keys()
        differing.append([name for name in fresh if not np.array_equal(fresh[name], updated[name])])
    errors = [result.error for result in finish(engine).values()]
    assert errors == [None] * len(errors)
    return differing


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize(
    ("build", "dtype", "shape"),
    [
        (tiny_mimo, Dtype.bfloat16, {}),
        (tiny_mimo, Dtype.bfloat16, {"moe_width": 48}),  # the CPU kernel pads the experts
        (tiny_qwen3_moe, Dtype.float32, {}),
        (tiny_dense, Dtype.float32, {}),
    ],
)
def test_updated_engine_equals_a_fresh_one(
    run: Callable[..., Any],
    tmp_path: Path,
    build: Callable[..., Path],
    dtype: Dtype,
    shape: dict[str, int],
    in_flight: bool,
) -> None:
    start = build(tmp_path / "start", **shape)
    others = [perturbed(start, tmp_path / f"other{seed}", seed) for seed in range(2)]
    updates = [others[0], others[1], others[0]]
    assert run(differences_after_updates, str(start), updates, dtype, in_flight) == [[], [], []]


def differences_after_plain_reload(start: str, other: str) -> list[str]:
    from rollout.checkpoint import read_checkpoint
    from rollout.weights import bundle_tensors

    fresh, engine = make_engine(other, Dtype.bfloat16).tensors(), make_engine(start, Dtype.bfloat16)
    tensors = list(bundle_tensors(read_checkpoint(other, 1)))
    engine.vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    plain = engine.tensors()
    return [name for name in fresh if not np.array_equal(fresh[name], plain[name])]


def test_the_proof_finds_the_experts_that_vllm_leaves_unpacked(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    start = tiny_mimo(tmp_path / "start")
    other = perturbed(start, tmp_path / "other", 0)
    differing = run(differences_after_plain_reload, str(start), other)
    assert any(name.endswith("w13_weight") for name in differing)


def refuse_and_compare(start: str, other: str) -> tuple[str, bool, int]:
    from rollout.checkpoint import read_checkpoint
    from rollout.weights import WeightMismatch

    engine = make_engine(start, Dtype.float32)
    before = engine.tensors()
    bundle = read_checkpoint(other, 1)
    bundle.tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    message = ""
    try:
        engine.update_weights(bundle)
    except WeightMismatch as error:
        message = str(error)
    after = engine.tensors()
    return message, all(np.array_equal(before[name], after[name]) for name in before), engine.policy_version


def test_a_bundle_that_does_not_fit_changes_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    start = tiny_qwen3_moe(tmp_path / "start")
    other = perturbed(start, tmp_path / "other", 0)
    message, unchanged, version = run(refuse_and_compare, str(start), other)
    assert "experts.3.up_proj" in message and unchanged and version == 0


def generate_across_an_update(start: str, other: str, on_update: OnUpdate) -> dict[str, Any]:
    """One request in flight over an update after 8 tokens, then one of the same prompt under the new weights."""
    from rollout.checkpoint import read_checkpoint

    engine = make_engine(start, Dtype.float32, on_update)
    add(engine, "crossing", max_tokens=40, seed=1)
    for _ in range(8):
        engine.step()
    engine.update_weights(read_checkpoint(other, 5))
    add(engine, "later", max_tokens=10, seed=2)
    results = finish(engine)
    for name in ("crossing", "later"):
        text = PROMPT + results[name].token_ids.tolist()
        add(engine, f"{name} scored", 1, text, score=True)
    return results | finish(engine)


@pytest.mark.parametrize("on_update", list(OnUpdate))
def test_requests_meet_an_update_by_rule(
    run: Callable[..., Any], tmp_path: Path, on_update: OnUpdate
) -> None:
    start = tiny_qwen3_moe(tmp_path / "start")
    other = perturbed(start, tmp_path / "other", 0)
    results = run(generate_across_an_update, str(start), other, on_update)
    crossing, later = results["crossing"], results["later"]
    assert crossing.policy_versions.tolist() == [0] * 8 + [5] * (len(crossing.token_ids) - 8)
    assert set(later.policy_versions.tolist()) == {5}
    assert len(crossing.routed_experts) == len(PROMPT) + len(crossing.token_ids) - 1
    new = results["crossing scored"].logprobs[len(PROMPT) :]
    gap = np.abs(crossing.logprobs - new)
    assert gap[:8].max() > 1e-3, "tokens before the update were sampled from the old weights"
    if on_update is OnUpdate.recompute:
        assert gap[8:].max() < 1e-4, "later tokens come from the new weights alone"
    else:
        assert gap[8:].max() > 1e-3, "the old KV stays under tokens in flight"
    fresh = np.abs(later.logprobs - results["later scored"].logprobs[len(PROMPT) :])
    assert fresh.max() < 1e-4, "a new request sees nothing of the old KV"


def four_turns(path: str, dtype: Dtype) -> tuple[Any, Any, list[dict[str, int]]]:
    """Routes of a rollout of four turns as its turns shipped them, those of one prefill, and what each turn cost."""
    engine = make_engine(path, dtype, block_size=BLOCK)
    cached: list[int] = []
    step = engine.vllm.step

    def noting_step() -> Any:
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    engine.vllm.step = noting_step
    token_ids, routes, costs = list(PROMPT), [], []
    for turn in range(4):
        shipped = sum(map(len, routes))
        add(engine, str(turn), max_tokens=20, token_ids=token_ids, routes_start=shipped)
        (result,) = finish(engine).values()
        assert result.error is None
        routes.append(result.routed_experts)
        costs.append(
            {
                "given": len(token_ids),
                "cached": cached[-1],
                "before": shipped,
                "rows": len(result.routed_experts),
            }
        )
        token_ids += [*result.token_ids.tolist(), *range(40, 47)]
    whole = token_ids[: sum(map(len, routes)) + 1]
    add(engine, "whole", max_tokens=1, token_ids=whole, score=True)
    return np.concatenate(routes), finish(engine)["whole"].routed_experts, costs


def test_later_turns_compute_and_ship_their_own_tokens_only(run: Callable[..., Any], tmp_path: Path) -> None:
    turns, prefill, costs = run(four_turns, str(tiny_qwen3_moe(tmp_path / "model")), Dtype.float32)
    assert costs[0]["cached"] == 0
    for former, cost in itertools.pairwise(costs):
        assert cost["before"] == former["before"] + former["rows"], "no row is shipped twice"
        # Only whole blocks are cached, so the last one of the former turn may be computed again.
        assert cost["before"] - BLOCK < cost["cached"] <= cost["before"]
    assert costs[-1]["cached"] > 0
    np.testing.assert_array_equal(turns, prefill)


def test_later_turns_of_a_hybrid_model_ship_their_own_tokens_only(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Sliding windows cache in larger units, and bfloat16 rounds decoding and prefill differently."""
    turns, prefill, costs = run(four_turns, str(tiny_mimo(tmp_path / "model")), Dtype.bfloat16)
    assert all(b["before"] == a["before"] + a["rows"] for a, b in itertools.pairwise(costs))
    assert turns.shape == prefill.shape
    same = (np.sort(turns, axis=-1) == np.sort(prefill, axis=-1)).all(-1)
    assert same.mean() > 0.9


def samples_around_an_evaluation(path: str, keep: bool) -> list[list[int]]:
    """Tokens sampled without a seed, each time after the same number of draws but for an evaluation in between: none, a
    seeded one, and a seeded one again whose draws are taken back where ``keep``."""
    engine, taken = make_engine(path, Dtype.float32), []
    start = engine.random_state()
    for between in (False, True):
        engine.set_random_state(start)
        state = engine.random_state()
        for i in range(4 if between else 0):
            add(engine, f"eval {i}", max_tokens=12, token_ids=[9, 8, 7 + i], seed=100 + i)
        seeded = {name: result.token_ids.tolist() for name, result in finish(engine).items()}
        if between and keep:
            engine.set_random_state(state)
        for i in range(4):
            add(engine, f"train {i}", max_tokens=12, token_ids=[5, 6, 7 + i])
        taken.append([r.token_ids.tolist() for _, r in sorted(finish(engine).items())])
        taken.append([seeded[name] for name in sorted(seeded)])
    return taken


def samples_after_reseeding(path: str, seeds: list[int]) -> list[list[list[int]]]:
    engine, taken = make_engine(path, Dtype.float32), []
    for seed in seeds:
        engine.reseed(seed)
        for i in range(4):
            add(engine, f"train {i}", max_tokens=12, token_ids=[5, 6, 7 + i])
        taken.append([r.token_ids.tolist() for _, r in sorted(finish(engine).items())])
    return taken


def test_a_used_engine_samples_as_a_fresh_one_after_reseeding(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    path = str(tiny_qwen3_moe(tmp_path / "model"))
    first, other, again = run(samples_after_reseeding, path, [3, 4, 3])
    assert first == again != other
    assert run(samples_after_reseeding, path, [3]) == [first]


def test_an_evaluation_leaves_the_random_numbers_of_training_alone(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Without taking them back the CPU sampler draws from the shared generator for seeded requests too: the control."""
    path = str(tiny_qwen3_moe(tmp_path / "model"))
    undisturbed, _, after, seeded = run(samples_around_an_evaluation, path, True)
    assert after == undisturbed and len(undisturbed) == 4
    disturbed, _, shifted, seeded_again = run(samples_around_an_evaluation, path, False)
    assert shifted != disturbed
    assert seeded == seeded_again and len({tuple(s) for s in seeded}) == 4


def seeded_prompts_beyond_one_batch(path: str) -> list[int]:
    """Tokens of each of 60 seeded requests whose prompts fill the prefill budget several times."""
    engine = make_engine(path, Dtype.bfloat16, max_num_batched_tokens=256)
    for i in range(60):
        add(engine, f"{i:02}", max_tokens=4, token_ids=[5 + (i + t) % 40 for t in range(50 + i)], seed=i)
    return [len(result.token_ids) for _, result in sorted(finish(engine).items())]


def test_seeded_requests_outlive_a_full_prefill_budget(run: Callable[..., Any], tmp_path: Path) -> None:
    """With chunked prefill vLLM's CPU engine dies of the first seeded prompt that it cuts."""
    lengths = run(seeded_prompts_beyond_one_batch, str(tiny_mimo(tmp_path / "model")))
    assert len(lengths) == 60 and all(1 <= length <= 4 for length in lengths)


def options_error(option: dict[str, Any]) -> str:
    from rollout.engine import engine_options

    try:
        engine_options(RolloutConfig(vllm=option), ModelConfig(path="x"), 0)
    except ValueError as error:
        return str(error)
    return ""


def value_error(path: str, option: dict[str, Any]) -> str:
    from rollout.engine import Engine

    try:
        Engine(RolloutConfig(vllm=option, max_new_tokens=8, max_model_len=64), ModelConfig(path=path), 0)
    except UserError as error:
        return str(error)
    return ""


def test_values_that_vllm_refuses_are_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tiny_mimo(tmp_path / "model"))
    found = run(value_error, path, {"max_num_seqs": -1})
    assert found.startswith("rollout.vllm={'max_num_seqs': -1}: vLLM does not start (") and "\n" not in found
    assert "max_num_seqs" in found.partition("(")[2] and "mend what it names" in found


def test_engine_options_are_checked(run: Callable[..., Any]) -> None:
    assert run(options_error, {"max_num_seqs": 4}) == ""
    assert "rollout.vllm.max_num_seq=4" in run(options_error, {"max_num_seq": 4})
    assert "set rollout.dtype instead" in run(options_error, {"dtype": "float16"})
    assert "async_scheduling" in run(options_error, {"async_scheduling": True})
    assert "rollout.vllm.enable_eplb=True" in run(options_error, {"enable_eplb": True})
