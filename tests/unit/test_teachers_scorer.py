"""Scores of a frozen model: equal to the plain forward of each sequence alone, whatever the batch."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain import logits as logits_module
from posttrain.config import Dtype, ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus, Turn
from teachers import scorer as scorer_module
from teachers.check import key_of
from teachers.scorer import CALL_TOKENS, Scorer, TeacherScoreError, plan_batches
from teachers.teacher import Teacher
from teachers.worker import ScoringTask, TeacherWorker
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe

LENGTHS = [3, 77, 1, 2, 120, 40, 77, 11]


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sinks and expert bias away from their initial values, so that both matter."""
    path = tiny_mimo(tmp_path_factory.mktemp("mimo"), seed=3)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in weights:
        if "sink" in name or "e_score_correction_bias" in name:
            weights[name] = torch.randn(weights[name].shape, generator=generator)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"), seed=3)


def sequences(lengths: list[int], vocab_size: int = 90) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths]


def reference(path: Path, token_ids: np.ndarray) -> np.ndarray:
    """One sequence alone through the model's own forward, eager experts, full float64 softmax."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(token_ids).long()[None], use_cache=False).logits[0].double()
    logprobs = logits[:-1].log_softmax(-1).gather(1, torch.from_numpy(token_ids[1:]).long()[:, None])[:, 0]
    return np.concatenate([[0.0], logprobs.numpy()])


@pytest.mark.parametrize("family", ["mimo", "qwen3_moe"])
@pytest.mark.parametrize("max_tokens", [1, 256, 10_000])
def test_batched_scores_equal_each_sequence_alone(
    family: str, max_tokens: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    token_ids = sequences(LENGTHS)
    scores = Scorer(str(path), ModelConfig(path=str(path)), Dtype.float32).score(token_ids, max_tokens)
    for ids, score in zip(token_ids, scores, strict=True):
        logprobs = score.logprobs
        assert logprobs.dtype == np.float32 and logprobs.shape == ids.shape and logprobs[0] == 0.0
        assert score.topk_ids is None and score.topk_logprobs is None and score.hidden is None
        np.testing.assert_allclose(logprobs, reference(path, ids), atol=2e-5)


def all_logits(path: Path, token_ids: np.ndarray) -> torch.Tensor:
    """[T, V] float64: entry t predicts token t; entry 0 is 0."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(token_ids).long()[None], use_cache=False).logits[0].double()
    return torch.cat([torch.zeros_like(logits[:1]), logits[:-1]])


@pytest.mark.parametrize("max_tokens", [1, 200])
def test_signals_speak_of_the_token_they_stand_at(
    mimo: Path, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top k and hidden states against the model's own logits; rows outside the mask are 0, chunks change nothing."""
    scorer = Scorer(str(mimo), ModelConfig(), Dtype.float32)
    monkeypatch.setattr(scorer_module, "SOFTMAX_CHUNK_ELEMENTS", 9 * scorer.vocab_size)
    token_ids = sequences([3, 40, 1, 17])
    rng = np.random.default_rng(1)
    masks = [(rng.random(len(ids)) < 0.4) & (np.arange(len(ids)) > 0) for ids in token_ids]
    masks[3][:] = False
    sampled = scorer.score(token_ids, max_tokens)
    top = scorer.score(token_ids, max_tokens, signal="top_k", top_k=6, masks=masks)
    whole = scorer.score(token_ids, max_tokens, signal="top_k_renorm", top_k=6)
    full = scorer.score(token_ids, max_tokens, signal="full", masks=masks)
    for i, (ids, mask) in enumerate(zip(token_ids, masks, strict=True)):
        logits = all_logits(mimo, ids)
        expected = logits.log_softmax(-1).topk(6)
        for scores, rows in ((top[i], mask), (whole[i], np.arange(len(ids)) > 0)):
            np.testing.assert_array_equal(scores.logprobs, sampled[i].logprobs)
            assert scores.topk_ids.dtype == np.int32 and scores.topk_logprobs.dtype == np.float32
            assert scores.topk_ids.shape == scores.topk_logprobs.shape == (len(ids), 6)
            np.testing.assert_array_equal(scores.topk_ids[rows], expected.indices[rows])
            np.testing.assert_allclose(scores.topk_logprobs[rows], expected.values[rows], atol=2e-5)
            assert not scores.topk_ids[~rows].any() and not scores.topk_logprobs[~rows].any()
        hidden = torch.from_numpy(full[i].hidden)
        assert hidden.dtype == torch.float32 and full[i].topk_ids is None
        torch.testing.assert_close((hidden @ scorer.head().T)[mask].double(), logits[mask], atol=2e-5, rtol=0)
        assert not hidden[~mask].any()


def test_hidden_states_keep_the_type_and_the_bias_of_the_head(tmp_path: Path) -> None:
    """bfloat16 travels as its bits; a head with a bias is one with a column more."""
    scorer = Scorer(str(tiny_dense(tmp_path / "model")), ModelConfig(), Dtype.bfloat16)
    bias = torch.linspace(-1, 1, scorer.vocab_size).bfloat16()
    scorer.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    (scores,) = scorer.score(sequences([12]), 512, signal="full")
    assert scores.hidden.dtype == np.uint16
    hidden, head = torch.from_numpy(scores.hidden).view(torch.bfloat16), scorer.head()
    assert head.dtype == torch.bfloat16 and head.shape == (scorer.vocab_size, hidden.shape[1])
    logits = (hidden @ head.T).float().log_softmax(-1)
    chosen = logits.gather(1, torch.from_numpy(sequences([12])[0]).long()[:, None])[1:, 0]
    np.testing.assert_allclose(chosen, scores.logprobs[1:], atol=0.05)


def test_chunks_of_the_softmax_change_nothing(qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(str(qwen3_moe), ModelConfig(), Dtype.float32)
    whole = scorer.score(sequences(LENGTHS), 512)
    monkeypatch.setattr(scorer_module, "SOFTMAX_CHUNK_ELEMENTS", 7 * scorer.vocab_size)
    for one, other in zip(whole, scorer.score(sequences(LENGTHS), 512), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)


def test_softmax_never_holds_more_logits_than_the_chunk(
    qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(str(qwen3_moe), ModelConfig(), Dtype.float32)
    monkeypatch.setattr(scorer_module, "SOFTMAX_CHUNK_ELEMENTS", 5 * scorer.vocab_size)
    rows: list[int] = []
    product = torch.nn.functional.linear

    def count(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        if len(weight) == scorer.vocab_size:
            rows.append(len(hidden))
        return product(hidden, weight, *bias)

    monkeypatch.setattr(logits_module.F, "linear", count)
    scorer.score(sequences([64, 64]), 512)
    assert max(rows) == 5 and sum(rows) == 2 * 63


@pytest.mark.parametrize("build", [tiny_mimo, tiny_dense])
def test_types_and_dense_models(build: Callable[..., Path], tmp_path: Path) -> None:
    """bfloat16 scores are near float32 ones but not equal; a dense model loads with the default experts option. On some
    processors rounding sends a token to another expert, which moves that one by more."""
    path = str(build(tmp_path / "model"))
    full, half = (
        Scorer(path, ModelConfig(), dtype).score(sequences([60]), 512)[0].logprobs for dtype in Dtype
    )
    assert half.dtype == np.float32
    gap = np.abs(full - half)
    assert 0 < np.median(gap) < 0.02 and gap.max() < 0.5


def test_experts_implementation_follows_the_config(qwen3_moe: Path) -> None:
    for name in ("grouped_mm", "eager"):
        scorer = Scorer(str(qwen3_moe), ModelConfig(experts_implementation=name), Dtype.float32)
        assert scorer.model.config._experts_implementation == name


def test_nothing_can_hand_over_routes() -> None:
    for function in (Scorer.score, TeacherWorker.score):
        assert not [
            name for name in inspect.signature(function).parameters if "rout" in name or "expert" in name
        ]


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    path = tiny_qwen3_moe(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys \['model\.norm\.weight'\]"):
        Scorer(str(path), ModelConfig(), Dtype.float32)


def test_nan_score_stops_with_the_name_of_the_sequence(tmp_path: Path) -> None:
    path = tiny_qwen3_moe(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    scorer = Scorer(str(path), ModelConfig(), Dtype.float32)
    clean = scorer.score([np.array([1, 2, 3], np.int32)], 512)
    assert np.isfinite(clean[0].logprobs).all()
    with pytest.raises(TeacherScoreError, match=r"gave nan for token [1-3] of second \(4 tokens\)"):
        scorer.score([np.array([1, 2], np.int32), np.array([1, 2, 7, 3], np.int32)], 512, ["first", "second"])


def test_token_id_outside_the_vocabulary(qwen3_moe: Path) -> None:
    with pytest.raises(TeacherScoreError, match="was asked for 5000"):
        Scorer(str(qwen3_moe), ModelConfig(), Dtype.float32).score([np.array([1, 5000], np.int32)], 512)


def test_logits_changed_after_the_head_are_refused(qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

    plain = Qwen3MoeForCausalLM.forward

    def capped(self: Qwen3MoeForCausalLM, **kwargs: object) -> object:
        output = plain(self, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(Qwen3MoeForCausalLM, "forward", capped)
    with pytest.raises(UserError, match="changes logits after its head"):
        Scorer(str(qwen3_moe), ModelConfig(), Dtype.float32)


def test_layers_that_the_config_leaves_out_are_refused(qwen3_moe: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3_moe, tmp_path / "teacher"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1})
    )
    with pytest.raises(UserError, match=r"its config\.json has fewer layers"):
        Scorer(str(folder), ModelConfig(), Dtype.float32)
    tensors = load_file(qwen3_moe / "model.safetensors")
    save_file(
        tensors | {"value_head.weight": torch.zeros(1, 8)}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    Scorer(str(folder), ModelConfig(), Dtype.float32)  # the head of another task is none of its layers


def test_batches_hold_like_lengths_within_the_limit() -> None:
    lengths = [5, 90, 7, 88, 6, 300]
    batches = plan_batches(lengths, max_tokens=200)
    assert batches == [[5], [1, 3], [2, 4, 0]]
    assert plan_batches([], 10) == []
    assert plan_batches([0, 3, 0], max_tokens=9) == [[1, 0, 2]]


def test_batches_are_cut_where_padding_costs_more_than_a_call() -> None:
    assert plan_batches([1000, 10, 10], max_tokens=8192) == [[0], [1, 2]]
    assert plan_batches([300, 290, 280], max_tokens=8192) == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_costs_fewer_tokens(seed: int) -> None:
    """Against every way to cut the sorted sequences."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 600, 9).tolist()
    max_tokens = int(rng.integers(300, 3000))

    def cost(batches: list[list[int]]) -> float:
        sizes = [(len(batch), max(lengths[i] for i in batch)) for batch in batches]
        over = any(rows > 1 and rows * longest > max_tokens for rows, longest in sizes)
        return np.inf if over else sum(CALL_TOKENS + rows * max(longest, 1) for rows, longest in sizes)

    order = sorted(range(9), key=lambda i: -lengths[i])
    every = []
    for cuts in itertools.product((False, True), repeat=8):
        batches = [[order[0]]]
        for index, cut in zip(order[1:], cuts, strict=True):
            batches.append([index]) if cut else batches[-1].append(index)
        every.append(cost(batches))
    found = plan_batches(lengths, max_tokens)
    assert sorted(i for batch in found for i in batch) == list(range(9))
    assert cost(found) == min(every)


def make_group(token_ids: list[np.ndarray], statuses: list[RolloutStatus]) -> RolloutGroup:
    prompt = Prompt(prompt_id="p", source="s", domain="math", messages=[], token_ids=token_ids[0][:1])
    rollouts = [
        Rollout(
            group_id="g",
            rollout_id=f"g-{i}",
            prompt=prompt,
            turns=[
                Turn(
                    author="prompt",
                    token_ids=part,
                    loss_mask=np.zeros(len(part), bool),
                    rollout_logprobs=np.zeros(len(part), np.float32),
                    policy_versions=np.full(len(part), -1, np.int32),
                )
                for part in (ids[:2], ids[2:])
            ],
            messages=[],
            routed_experts=np.zeros((len(ids) - 1, 3, 2), np.uint8),
            finish_reason="stop",
            status=status,
        )
        for i, (ids, status) in enumerate(zip(token_ids, statuses, strict=True))
    ]
    return RolloutGroup(group_id="g", prompt=prompt, rollouts=rollouts)


def task(teacher: Teacher, groups: list[RolloutGroup], head_id: int | None = None) -> ScoringTask:
    return ScoringTask(key="key", teacher=teacher, name="t", group_refs=groups, head_id=head_id)


def test_worker_keeps_order_and_marks_failed_rollouts(
    qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(qwen3_moe)
    ids = sequences([9, 30, 12, 20])
    groups = [
        make_group(ids[:2], [RolloutStatus.completed, RolloutStatus.truncated]),
        make_group(ids[2:], [RolloutStatus.engine_error, RolloutStatus.completed]),
    ]
    monkeypatch.setattr("teachers.worker.ray.get", lambda refs: refs)
    worker = TeacherWorker(TeacherWorkerConfig(max_tokens_per_batch=64, cores_per_worker=1), ModelConfig())
    scores = worker.score(task(Teacher(key="teachers.d", path=path), groups))
    expected = Scorer(path, ModelConfig(), Dtype.float32).score(ids, 64)
    assert [score.teacher for score in scores] == ["t"] * 4
    for i in (0, 1, 3):
        np.testing.assert_allclose(scores[i].logprobs, expected[i].logprobs, atol=1e-5)
    assert scores[2].logprobs.shape == (12,) and np.isnan(scores[2].logprobs).all()


def test_worker_sends_rows_of_loss_tokens_alone(qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(key="teachers.d", path=str(qwen3_moe))
    group = make_group(sequences([9, 30]), [RolloutStatus.completed, RolloutStatus.reward_error])
    for turn in (rollout.turns[1] for rollout in group.rollouts):
        turn.loss_mask[::2] = True
    monkeypatch.setattr("teachers.worker.ray.get", lambda refs: refs)
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())
    ids, mask = group.rollouts[0].token_ids, group.rollouts[0].loss_mask
    assert mask.sum() == 4

    scores = worker.score(task(teacher, [group]), "top_k", 5)
    logits = all_logits(qwen3_moe, ids)
    expected = logits.log_softmax(-1).topk(5)
    np.testing.assert_array_equal(scores[0].topk_ids, expected.indices[mask])
    np.testing.assert_allclose(scores[0].topk_logprobs, expected.values[mask], atol=2e-5)
    assert scores[1].topk_ids is None and np.isnan(scores[1].logprobs).all()

    row = worker.set_teachers({"key": teacher}, "full")
    assert row["heads"].keys() == {"key"} and "heads" not in worker.set_teachers({"key": teacher})
    head = torch.from_numpy(worker.head("key", teacher))
    scores = worker.score(task(teacher, [group], head_id=3), "full")
    assert scores[0].head_id == 3 and scores[0].hidden.shape == (4, head.shape[1])
    states = torch.from_numpy(scores[0].hidden)
    torch.testing.assert_close((states @ head.T).double(), logits[mask], atol=2e-5, rtol=0)


def test_a_back_end_without_a_head_refuses_full() -> None:
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())

    class Headless:
        path, vocab_size = "remote", 100

        def head(self) -> None:
            return None

    worker.backends["key"] = Headless()  # type: ignore[assignment]
    teacher = Teacher(key="teachers.d", path="remote", backend=TeacherBackend.vllm)
    assert worker.set_teachers({"key": teacher}, "top_k")["paths"] == ["remote"]
    expected = r"^algorithm\.signal='full': teachers\.d\.backend=vllm gives no hidden states"
    with pytest.raises(UserError, match=expected):
        worker.set_teachers({"key": teacher}, "full")


def test_a_restarted_worker_refuses_files_that_changed_in_place(tmp_path):
    first = tiny_dense(tmp_path / "teacher")
    teacher = Teacher(key="teachers.d", path=str(first))
    key = key_of(teacher)
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())
    worker.was_restarted = True
    assert worker.set_teachers({key: teacher})["paths"] == [str(first)]
    shutil.rmtree(first)
    tiny_dense(tmp_path / "teacher", seed=1)
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())
    worker.was_restarted = True
    with pytest.raises(UserError, match=r"^teachers\.d\.path=.* changed in place"):
        worker.set_teachers({key: teacher})
    assert worker.backends == {}
