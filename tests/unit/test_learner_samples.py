"""Records become samples, or an error that names the record and the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from posttrain.learner.errors import RecordError
from posttrain.learner.samples import Expected, fetch
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus, SampleRef, TeacherScores, Turn

LENGTH, LAYERS, TOP_K, EXPERTS, VOCAB = 6, 3, 2, 8, 50


def make_group() -> RolloutGroup:
    prompt = Prompt(
        prompt_id="p", source="s", domain="math", messages=[], token_ids=np.arange(2, dtype=np.int32)
    )
    turns = [
        Turn(
            author=author,
            token_ids=np.arange(length, dtype=np.int32),
            loss_mask=np.full(length, author == "policy"),
            rollout_logprobs=np.full(length, -1.0 if author == "policy" else 0.0, np.float32),
            policy_versions=np.full(length, 3 if author == "policy" else -1, np.int32),
        )
        for author, length in (("prompt", 2), ("policy", 2), ("environment", 1), ("policy", 1))
    ]
    rollout = Rollout(
        group_id="g",
        rollout_id="r0",
        prompt=prompt,
        turns=turns,
        messages=[],
        routed_experts=np.zeros((LENGTH - 1, LAYERS, TOP_K), np.uint8),
        finish_reason="stop",
        status=RolloutStatus.completed,
    )
    return RolloutGroup(group_id="g", prompt=prompt, rollouts=[rollout])


def expected(**changes: Any) -> Expected:
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "routes_shape": (LAYERS, TOP_K),
        "num_experts": EXPERTS,
        "rollout_logprobs": True,
        "teacher_logprobs": True,
    }
    return Expected(**{**base, **changes})


def reference(group: RolloutGroup, scores: list[TeacherScores] | None) -> dict[int, SampleRef]:
    ref = SampleRef(
        source_ref=group, index=0, num_tokens=LENGTH, weight=0.25, teacher_ref=scores, orm_advantage=-2.0
    )
    return {5: ref}


def test_streams_of_a_multi_turn_rollout() -> None:
    scores = [TeacherScores(teacher="t", logprobs=np.linspace(-2, -1, LENGTH, dtype=np.float32))]
    calls: list[int] = []

    def get(references: list[Any]) -> list[Any]:
        calls.append(len(references))
        return references

    group = make_group()
    refs = reference(group, scores)
    refs[6] = refs[5]
    sample = fetch(refs, get, expected())[5]
    assert calls == [1, 1], "each object is fetched once"
    assert sample.loss_mask.tolist() == [False, False, True, True, False, True]
    assert (sample.weights == 0.25).all() and (sample.orm_advantages == -2.0).all()
    assert sample.teacher_logprobs is scores[0].logprobs and sample.domain == "math"
    assert sample.policy_versions is not None and sample.policy_versions.tolist() == [-1, -1, 3, 3, -1, 3]


def _short_routes(group: RolloutGroup) -> None:
    routes = group.rollouts[0].routed_experts
    assert routes is not None
    group.rollouts[0].routed_experts = routes[:-1]


def _wrong_expert(group: RolloutGroup) -> None:
    group.rollouts[0].routed_experts[2, 1, 0] = EXPERTS  # type: ignore[index]


def _no_routes(group: RolloutGroup) -> None:
    group.rollouts[0].routed_experts = None


def _nan_logprob(group: RolloutGroup) -> None:
    group.rollouts[0].turns[1].rollout_logprobs[0] = np.nan


def _foreign_token(group: RolloutGroup) -> None:
    group.rollouts[0].turns[0].token_ids[0] = VOCAB


def _trained_prompt(group: RolloutGroup) -> None:
    group.rollouts[0].turns[0].loss_mask[0] = True


def _longer(group: RolloutGroup) -> None:
    turns = group.rollouts[0].turns
    turns.append(turns[-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_short_routes, r"routed_experts has shape \(4, 3, 2\), expected \(5, 3, 2\)"),
        (_wrong_expert, "routed_experts names expert 8 of 8"),
        (_no_routes, "routed_experts is missing.*learner.routing_replay=off"),
        (_nan_logprob, "rollout_logprobs holds NaN"),
        (_foreign_token, "token id 50 is outside the vocabulary of 50"),
        (_trained_prompt, "loss_mask must have 6 entries, the first of them False"),
        (_longer, "token_ids has 7 tokens, its reference says 6"),
    ],
)
def test_bad_records(spoil: Callable[[RolloutGroup], None], message: str) -> None:
    group = make_group()
    spoil(group)
    with pytest.raises(RecordError, match=rf"^rollout r0: .*{message}"):
        fetch(reference(group, None), list, expected(teacher_logprobs=False))


def test_missing_or_nan_teacher() -> None:
    with pytest.raises(RecordError, match="teacher_logprobs is missing"):
        fetch(reference(make_group(), None), list, expected())
    bad = [TeacherScores(teacher="t", logprobs=np.full(LENGTH, np.nan, np.float32))]
    with pytest.raises(RecordError, match="teacher_logprobs holds NaN"):
        fetch(reference(make_group(), bad), list, expected())


def test_routes_are_not_asked_for_without_replay() -> None:
    group = make_group()
    _no_routes(group)
    refs = reference(group, None)
    assert fetch(refs, list, expected(routes_shape=None, teacher_logprobs=False))[5].routed_experts is None


def scores_with(**columns: Any) -> list[TeacherScores]:
    return [TeacherScores(teacher="t", logprobs=np.full(LENGTH, -1.0, np.float32), **columns)]


def topk(num_tokens: int = 3, k: int = 2, token: int = 4, logprob: float = -1.0) -> dict[str, np.ndarray]:
    return {
        "topk_ids": np.full((num_tokens, k), token, np.int32),
        "topk_logprobs": np.full((num_tokens, k), logprob, np.float32),
    }


@pytest.mark.parametrize("signal", ["top_k", "top_k_renorm", "full"])
def test_signals_reach_the_sample(signal: str) -> None:
    scores = scores_with(**topk(), hidden=np.zeros((3, 5), np.uint16), head_id=1)
    sample = fetch(reference(make_group(), scores), list, expected(signal=signal, top_k=2, heads={1: 5}))[5]
    assert sample.teacher_scores is scores[0]


@pytest.mark.parametrize(
    ("signal", "columns", "message"),
    [
        ("top_k", {}, r"topk_ids of its teacher has shape None, the loss needs \(3, 2\)"),
        ("top_k", topk(num_tokens=6), r"topk_ids of its teacher has shape \(6, 2\), the loss needs \(3, 2\)"),
        ("top_k_renorm", topk(k=3), r"topk_ids of its teacher has shape \(3, 3\)"),
        ("top_k", topk(token=-1), "topk_ids names token -1"),
        ("top_k", topk(logprob=np.nan), "topk_logprobs holds NaN"),
        ("full", topk(), "hidden states of its teacher, or the LM head"),
        ("full", {"hidden": np.zeros((3, 5), np.float32), "head_id": 2}, "hidden states of its teacher, or"),
        ("full", {"hidden": np.zeros((3, 4), np.float32), "head_id": 1}, r"hidden states of its teacher have shape \(3, 4\), the loss needs \(3, 5\)"),
    ],
)  # fmt: skip
def test_bad_signals(signal: str, columns: dict[str, Any], message: str) -> None:
    refs = reference(make_group(), scores_with(**columns))
    with pytest.raises(RecordError, match=rf"^rollout r0: {message}"):
        fetch(refs, list, expected(signal=signal, top_k=2, heads={1: 5}))
