"""Scores of a frozen model: equal to the plain forward of each sequence alone, whatever the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig, UserError
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus, Turn
from teachers import scorer as scorer_module
from teachers.scorer import Scorer, TeacherScoreError, plan_batches
from teachers.teacher import Teacher
from teachers.worker import TeacherWorker
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
    found = Scorer(str(path), ModelConfig(path=str(path)), Dtype.float32).score(token_ids, max_tokens)
    for ids, score in zip(token_ids, [s.logprobs for s in found], strict=True):
        assert score.dtype == np.float32 and score.shape == ids.shape and score[0] == 0.0
        np.testing.assert_allclose(score, reference(path, ids), atol=2e-5)


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
    head = scorer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    scorer.score(sequences([64, 64]), 512)
    assert max(rows) == 5 and sum(rows) == 2 * 63


@pytest.mark.parametrize("build", [tiny_mimo, tiny_dense])
def test_types_and_dense_models(build: Callable[..., Path], tmp_path: Path) -> None:
    """bfloat16 scores are near float32 ones but not equal; a dense model loads with the default experts option."""
    path = str(build(tmp_path / "model"))
    scorers = [Scorer(path, ModelConfig(), dtype) for dtype in Dtype]
    full, half = (scorer.score(sequences([60]), 512)[0].logprobs for scorer in scorers)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.1


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


def test_batches_hold_like_lengths_within_the_limit() -> None:
    lengths = [5, 90, 7, 88, 6, 300]
    batches = plan_batches(lengths, max_tokens=200)
    assert batches == [[5], [1, 3], [2, 4, 0]]
    assert plan_batches([], 10) == []


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
    scores = worker.score("fingerprint", Teacher(key="teachers.d", path=path), "runs/teacher", groups)
    expected = Scorer(path, ModelConfig(), Dtype.float32).score(ids, 64)
    assert [score.teacher for score in scores] == ["runs/teacher"] * 4
    for i in (0, 1, 3):
        np.testing.assert_allclose(scores[i].logprobs, expected[i].logprobs, atol=1e-5)
    assert scores[2].logprobs.shape == (12,) and np.isnan(scores[2].logprobs).all()
