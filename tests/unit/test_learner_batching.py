"""Who trains what, in which row; and the arrays of a micro-batch."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.config import UserError
from posttrain.learner.batching import collate, plan
from posttrain.records import TeacherScores, TrainingSample

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(3, 60, 41)]


def make(length: int, seed: int, routes: tuple[int, int] | None = None) -> TrainingSample:
    rng = np.random.default_rng(seed)
    mask = np.zeros(length, bool)
    mask[length // 2 :] = True
    return TrainingSample(
        token_ids=rng.integers(0, 90, length).astype(np.int32),
        loss_mask=mask,
        weights=rng.random(length).astype(np.float32),
        rollout_logprobs=-rng.random(length).astype(np.float32),
        routed_experts=None if routes is None else rng.integers(0, 8, (length - 1, *routes)).astype(np.uint8),
        domain="b" if seed % 2 else "a",
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("pack_tokens", [0, 64])
@pytest.mark.parametrize("max_tokens", [64, 200, 10_000])
def test_plan(num_ranks: int, pack_tokens: int, max_tokens: int) -> None:
    shares = plan(LENGTHS, num_ranks, max_tokens, pack_tokens)
    assert len(shares) == num_ranks
    assert len({len(batches) for batches in shares}) == 1, "every rank runs the same number of micro-batches"
    seen = sorted(i for batches in shares for rows in batches for row in rows for i in row)
    assert seen == list(range(len(LENGTHS)))
    for batches in shares:
        for rows in batches:
            widths = [sum(LENGTHS[i] for i in row) for row in rows]
            assert len(rows) * max(widths, default=0) <= max_tokens
            assert pack_tokens > 0 or all(len(row) == 1 for row in rows)
            assert pack_tokens == 0 or max(widths, default=0) <= pack_tokens
    loads = [sum(LENGTHS[i] for rows in batches for row in rows for i in row) for batches in shares]
    assert max(loads) - min(loads) <= 2 * max(LENGTHS)


def test_plan_with_fewer_samples_than_ranks() -> None:
    assert plan([5], 3, 100, 0) == [[[[0]]], [[]], [[]]]


@pytest.mark.parametrize(
    ("max_tokens", "pack_tokens", "key"),
    [(32, 0, "learner.max_tokens_per_micro_batch=32"), (100, 32, "learner.pack_tokens=32")],
)
def test_a_sample_that_does_not_fit(max_tokens: int, pack_tokens: int, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: a sample has 33 tokens; set it to 33 or more$"):
        plan([4, 33], 1, max_tokens, pack_tokens)


@pytest.mark.parametrize("packed", [True, False])
def test_collate(packed: bool) -> None:
    routes = (3, 2)
    samples = {i: make(length, i, routes) for i, length in ((4, 6), (7, 9), (9, 3))}
    rows = [[7], [4, 9]] if packed else [[7], [4], [9]]
    batch = collate(samples, rows, ["a", "b"], routes_shape=routes, packed=packed)
    width = 9
    assert batch.input_ids.shape == (len(rows), width)
    assert batch.routes is not None and batch.rollout_logprobs is not None
    targets = 0
    for b, row in enumerate(rows):
        start = 0
        for index in row:
            sample, length = samples[index], len(samples[index].token_ids)
            part = slice(start, start + length)
            assert (batch.input_ids[b, part] == sample.token_ids).all()
            assert (batch.position_ids[b, part] == np.arange(length)).all()
            assert (batch.routes[b, start : start + length - 1] == sample.routed_experts).all()
            assert (batch.routes[b, start + length - 1] == -1).all(), "the last token selects live"
            assert batch.expected_mask[b, part].tolist() == [True] * (length - 1) + [False]
            for t in np.flatnonzero(sample.loss_mask):
                assert batch.target_positions[targets] == b * width + start + t - 1
                assert batch.target_ids[targets] == sample.token_ids[t]
                assert batch.weights[targets] == sample.weights[t]
                assert batch.rollout_logprobs[targets] == sample.rollout_logprobs[t]
                assert batch.sequence_ids[targets] == index and batch.domain_ids[targets] == index % 2
                targets += 1
            start += length
        assert (batch.routes[b, start:] == -1).all() and not batch.token_mask[b, start:].any()
        if packed and start < width:
            assert batch.position_ids[b, start] == 0, "padding is a document of its own"
    assert targets == len(batch.target_ids) == sum(int(s.loss_mask.sum()) for s in samples.values())
    assert batch.teacher_logprobs is None


def test_filler_has_no_loss_token_and_every_stream() -> None:
    batch = collate({}, [], ["a"], routes_shape=(3, 2))
    assert batch.input_ids.shape == (1, 2) and batch.routes is not None and (batch.routes == -1).all()
    assert len(batch.target_ids) == 0 and not batch.token_mask.any()
    assert batch.rollout_logprobs is not None and batch.teacher_logprobs is not None
    assert batch.topk_ids is not None and batch.topk_ids.shape == (0, 0) and batch.hidden == {}


def test_a_stream_of_some_samples_only_is_refused() -> None:
    samples = {0: make(4, 0), 1: make(4, 1)}
    samples[1].rollout_logprobs = None
    with pytest.raises(AssertionError, match="some samples"):
        collate(samples, [[0], [1]], ["a", "b"])


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_the_teachers_follow_their_tokens(packed: bool) -> None:
    """Two LM heads of other hidden sizes in one micro-batch: every row finds the token it was made for."""
    samples = {i: make(length, i) for i, length in ((4, 6), (7, 9), (9, 3))}
    for index, sample in samples.items():
        where = np.flatnonzero(sample.loss_mask)
        marks = (100 * index + where)[:, None]
        sample.teacher_scores = TeacherScores(
            teacher="t",
            logprobs=np.zeros(len(sample.token_ids), np.float32),
            topk_ids=(marks + np.arange(2)).astype(np.int32),
            topk_logprobs=-(marks + np.arange(2)).astype(np.float32),
            hidden=np.repeat(marks, 5 if index == 9 else 2, axis=1).astype(np.float32),
            head_id=1 if index == 9 else 0,
        )
    rows = [[7], [9, 4]] if packed else [[7], [9], [4]]
    batch = collate(samples, rows, ["a", "b"], packed=packed)
    expected = [100 * i + t for row in rows for i in row for t in np.flatnonzero(samples[i].loss_mask)]
    assert batch.topk_ids is not None and batch.topk_logprobs is not None
    assert batch.topk_ids.dtype == np.int64 and batch.topk_ids[:, 0].tolist() == expected
    assert (batch.topk_logprobs == -batch.topk_ids).all()
    assert sorted(batch.hidden) == [0, 1]
    tokens = np.concatenate([tokens for tokens, _ in batch.hidden.values()])
    assert sorted(tokens) == list(range(len(expected))), "every token once"
    for head, (tokens, states) in batch.hidden.items():
        assert states.shape == (len(tokens), 5 if head == 1 else 2)
        assert states[:, 0].tolist() == [expected[i] for i in tokens]
    samples[9].teacher_scores.topk_ids = None
    with pytest.raises(AssertionError, match="some samples"):
        collate(samples, rows, ["a", "b"], packed=packed)
