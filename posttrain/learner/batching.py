"""Which sample goes to which rank, micro-batch and row, and the arrays of one micro-batch. Pure: numpy only.

Every rank gets the same number of micro-batches (an uneven count hangs ZeRO-3), filled up with empty ones that carry
no weight. Refuses a sample that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from posttrain.config import UserError
from posttrain.data.packing import pack
from posttrain.records import SampleRef, TeacherScores, TrainingSample

MicroBatchRows = list[list[int]]
"""Rows of one micro-batch, each a list of sample indices in order; empty: a filler without weight."""

FILLER_TOKENS = 2  # length of the one row that a filler runs through the model


@dataclass(kw_only=True, slots=True)
class RankBatch:
    """What one rank gets of a batch: references of its own samples by index, and its micro-batches in order."""

    refs: dict[int, SampleRef]
    micro_batches: list[MicroBatchRows]
    domains: list[str]  # of the whole batch, the same on every rank
    num_samples: int  # of the whole batch


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass needs. B rows of T tokens, N loss tokens over all of them; routes are of L MoE layers."""

    input_ids: np.ndarray  # [B, T] int64
    position_ids: (
        np.ndarray
    )  # [B, T] int64, from 0 in every document: they are what tells packed documents apart
    document_ids: np.ndarray  # [B, T] int64, numbers the documents of this micro-batch from 0; -1 in padding
    routes: np.ndarray | None  # [B, T, L, K] int64; -1 where the router selects live
    target_positions: np.ndarray  # [N] int64, flat index b * T + t of the token that predicts the target
    target_ids: np.ndarray  # [N] int64
    weights: np.ndarray  # [N] float32
    sequence_ids: np.ndarray  # [N] int64, index of the sample
    domain_ids: np.ndarray  # [N] int64
    rollout_logprobs: np.ndarray | None  # [N] float32
    teacher_logprobs: np.ndarray | None  # [N] float32
    orm_advantages: np.ndarray | None  # [N] float32
    policy_versions: np.ndarray | None  # [N] int64
    topk_ids: np.ndarray | None  # [N, k] int64
    topk_logprobs: np.ndarray | None  # [N, k] float32
    hidden: dict[int, tuple[np.ndarray, np.ndarray]]  # head_id -> indices [n] into N, teacher's states [n, H]
    names: list[str] = field(default_factory=list)  # of the documents, for messages

    @property
    def token_mask(self) -> np.ndarray:
        """[B, T] bool: real tokens."""
        return self.document_ids >= 0

    @property
    def expected_mask(self) -> np.ndarray:
        """[B, T] bool: tokens that must have a recorded route, which is all but the last of each document."""
        mask = self.token_mask
        mask[:, :-1] &= self.document_ids[:, 1:] == self.document_ids[:, :-1]
        mask[:, -1] = False
        return mask


def plan(
    num_tokens: Sequence[int], num_ranks: int, max_tokens: int, pack_tokens: int
) -> list[list[MicroBatchRows]]:
    """Micro-batches of every rank: ``[num_ranks][num_micro_batches]``, the same number for all ranks.

    ``num_tokens`` [S] are the sample lengths. B * T of a micro-batch never exceeds ``max_tokens``. With
    ``pack_tokens`` > 0 rows hold several samples up to that length. Raises `UserError` for a sample that is too long.
    """
    row_limit = min(pack_tokens, max_tokens) if pack_tokens > 0 else max_tokens
    key = "learner.pack_tokens" if 0 < pack_tokens < max_tokens else "learner.max_tokens_per_micro_batch"
    longest = max(num_tokens, default=0)
    if longest > row_limit:
        raise UserError(f"{key}={row_limit}: a sample has {longest} tokens; set it to {longest} or more")
    if pack_tokens > 0:
        rows = pack(list(num_tokens), row_limit)
    else:
        rows = [[index] for index in range(len(num_tokens))]
    lengths = [sum(num_tokens[i] for i in row) for row in rows]
    per_rank = [_cut(rows, lengths, share, max_tokens) for share in _balance(lengths, num_ranks)]
    most = max(1, *(len(batches) for batches in per_rank))
    return [batches + [[] for _ in range(most - len(batches))] for batches in per_rank]


def _balance(lengths: list[int], num_ranks: int) -> list[list[int]]:
    """Row indices of every rank, longest first: the next row goes to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    return shares


def _cut(
    rows: list[list[int]], lengths: list[int], share: list[int], max_tokens: int
) -> list[MicroBatchRows]:
    """Consecutive rows, which are sorted by length, as long as padding included they fit."""
    batches: list[MicroBatchRows] = []
    width = 0
    for row in share:
        if batches and (len(batches[-1]) + 1) * width <= max_tokens:
            batches[-1].append(rows[row])
        else:
            batches.append([rows[row]])
            width = lengths[row]
    return batches


def collate(
    samples: dict[int, TrainingSample],
    rows: MicroBatchRows,
    domains: Sequence[str],
    *,
    routes_shape: tuple[int, int] | None = None,
    packed: bool = False,
) -> MicroBatch:
    """Arrays of one micro-batch; ``samples`` by their index in the plan.

    Loss tokens come in the order of rows. ``routes_shape`` (L, K) asks for the recorded routes, which every sample
    must then have. Positions of padding go on from the last document when there is one document a row (causal
    attention never looks there, and no mask is needed), and start again at 0 when ``packed``.
    """
    if not rows:
        return _filler(routes_shape)
    width = max(sum(len(samples[i].token_ids) for i in row) for row in rows)
    shape = (len(rows), width)
    input_ids = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    document_ids = np.full(shape, -1, np.int64)
    routes = None if routes_shape is None else np.full((*shape, *routes_shape), -1, np.int64)
    targets: list[np.ndarray] = []
    order: list[int] = []
    for b, row in enumerate(rows):
        end = 0
        for index in row:
            sample = samples[index]
            start, end = end, end + len(sample.token_ids)
            input_ids[b, start:end] = sample.token_ids
            position_ids[b, start:end] = np.arange(end - start)
            document_ids[b, start:end] = len(order)
            if routes is not None:
                assert sample.routed_experts is not None, "replay is on and the sample has no routes"
                routes[b, start : end - 1] = sample.routed_experts
            targets.append(b * width + start + np.flatnonzero(sample.loss_mask) - 1)
            order.append(index)
        padding_from = 0 if packed else end
        position_ids[b, end:] = np.arange(padding_from, padding_from + width - end)
    masks = [samples[index].loss_mask for index in order]
    scores = [samples[index].teacher_scores for index in order]
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        document_ids=document_ids,
        routes=routes,
        target_positions=np.concatenate(targets).astype(np.int64),
        target_ids=_flat([samples[i].token_ids for i in order], masks, np.int64),
        weights=_flat([samples[i].weights for i in order], masks, np.float32),
        sequence_ids=np.repeat(np.array(order, np.int64), [int(mask.sum()) for mask in masks]),
        domain_ids=np.repeat(
            np.array([domains.index(samples[i].domain) for i in order], np.int64),
            [int(mask.sum()) for mask in masks],
        ),
        rollout_logprobs=_stream([samples[i].rollout_logprobs for i in order], masks, np.float32),
        teacher_logprobs=_stream([samples[i].teacher_logprobs for i in order], masks, np.float32),
        orm_advantages=_stream([samples[i].orm_advantages for i in order], masks, np.float32),
        policy_versions=_stream([samples[i].policy_versions for i in order], masks, np.int64),
        topk_ids=_rows([None if s is None else s.topk_ids for s in scores], np.int64),
        topk_logprobs=_rows([None if s is None else s.topk_logprobs for s in scores], np.float32),
        hidden=_hidden(scores, [int(mask.sum()) for mask in masks]),
        names=[samples[i].name for i in order],
    )


def _flat(arrays: list[np.ndarray], masks: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([a[mask] for a, mask in zip(arrays, masks, strict=True)]).astype(dtype)


def _stream(arrays: list[np.ndarray | None], masks: list[np.ndarray], dtype: type) -> np.ndarray | None:
    """Loss tokens of a stream that all samples have, or None when none has it."""
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    assert len(present) == len(arrays), "a stream is there for some samples of the batch only"
    return _flat(present, masks, dtype)


def _rows(arrays: list[np.ndarray | None], dtype: type) -> np.ndarray | None:
    """Rows of all samples, which hold loss tokens only, or None when none has them."""
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    assert len(present) == len(arrays), "rows are there for some samples of the batch only"
    return np.concatenate(present).astype(dtype)


def _hidden(
    scores: list[TeacherScores | None], num_tokens: list[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Teachers' hidden states by LM head, with the loss tokens that they belong to."""
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    start = 0
    for score, length in zip(scores, num_tokens, strict=True):
        if score is not None and score.hidden is not None and score.head_id is not None:
            parts.setdefault(score.head_id, []).append((np.arange(start, start + length), score.hidden))
        start += length
    return {
        head: (np.concatenate([rows for rows, _ in part]), np.concatenate([states for _, states in part]))
        for head, part in parts.items()
    }


def _filler(routes_shape: tuple[int, int] | None) -> MicroBatch:
    """A row without loss tokens: the rank runs the model as often as the others, and adds nothing."""
    shape = (1, FILLER_TOKENS)
    nothing = np.zeros(0, np.int64)
    streams = np.zeros(0, np.float32)
    return MicroBatch(
        input_ids=np.zeros(shape, np.int64),
        position_ids=np.arange(FILLER_TOKENS, dtype=np.int64)[None],
        document_ids=np.full(shape, -1, np.int64),
        routes=None if routes_shape is None else np.full((*shape, *routes_shape), -1, np.int64),
        target_positions=nothing,
        target_ids=nothing,
        weights=streams,
        sequence_ids=nothing,
        domain_ids=nothing,
        rollout_logprobs=streams,
        teacher_logprobs=streams,
        orm_advantages=streams,
        policy_versions=nothing,
        topk_ids=np.zeros((0, 0), np.int64),
        topk_logprobs=np.zeros((0, 0), np.float32),
        hidden={},
    )
