"""From references to checked samples. A rank fetches its own rows only, each object once.

Nothing is padded with a guess: a record that lacks what training needs is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.learner.errors import RecordError, RouteError
from posttrain.records import RolloutGroup, SampleRef, TeacherScores, TrainingSample


@dataclass(kw_only=True, slots=True)
class Expected:
    """What every sample of a step must have."""

    vocab_size: int
    routes_shape: tuple[int, int] | None  # (L, K) when routes are replayed
    num_experts: int
    rollout_logprobs: bool  # every loss but SFT
    teacher_logprobs: bool
    signal: str = "sampled"  # what the teachers' term is formed from
    top_k: int = 0
    heads: dict[int, int] = field(default_factory=dict)  # hidden size of the teachers' LM heads by number


def fetch(
    refs: dict[int, SampleRef],
    get: Callable[[list[Any]], list[Any]],
    expected: Expected,
    rejected: dict[str, str] | None = None,
) -> dict[int, TrainingSample]:
    """Samples by their index in the batch. ``get`` resolves a list of object references (``ray.get``).

    Raises `RecordError` for a record that does not hold what ``expected`` asks for. With ``rejected`` a record that
    lacks nothing but right routes is left out instead, and noted there: name -> reason.
    """
    sources = _get_once([ref.source_ref for ref in refs.values()], get)
    teachers = _get_once([ref.teacher_ref for ref in refs.values() if ref.teacher_ref is not None], get)
    samples: dict[int, TrainingSample] = {}
    for index, ref in refs.items():
        scores = None if ref.teacher_ref is None else teachers[_key(ref.teacher_ref)][ref.teacher_index]
        sample = _resolve(index, ref, sources[_key(ref.source_ref)], scores)
        try:  # records come from other processes
            check(sample, ref.num_tokens, expected)
        except RouteError as error:
            if rejected is None:
                raise
            rejected[sample.name] = str(error).removeprefix(f"{sample.name}: ")
            continue
        samples[index] = sample
    return samples


def _get_once(references: list[Any], get: Callable[[list[Any]], list[Any]]) -> dict[Any, Any]:
    unique = {_key(reference): reference for reference in references}
    return dict(zip(unique, get(list(unique.values())), strict=True))


def _key(reference: Any) -> Any:
    """Object references are equal when their objects are; plain values, as tests hand in, are themselves only."""
    return reference if isinstance(reference, Hashable) else id(reference)


def _resolve(
    index: int, ref: SampleRef, source: RolloutGroup | list[TrainingSample], scores: TeacherScores | None
) -> TrainingSample:
    """One sample, named. The weight and the outcome advantage are the reference's."""
    teacher_logprobs = None if scores is None else scores.logprobs
    if isinstance(source, RolloutGroup):
        rollout = source.rollouts[ref.index]
        num_tokens = len(rollout.token_ids)
        return TrainingSample(
            name=f"rollout {rollout.rollout_id}",
            token_ids=rollout.token_ids,
            loss_mask=rollout.loss_mask,
            weights=np.full(num_tokens, ref.weight, np.float32),
            rollout_logprobs=rollout.rollout_logprobs,
            policy_versions=rollout.policy_versions,
            teacher_logprobs=teacher_logprobs,
            teacher_scores=scores,
            orm_advantages=np.full(num_tokens, ref.orm_advantage, np.float32),
            routed_experts=rollout.routed_experts,
            domain=ref.domain or rollout.domain,
        )
    sample = source[ref.index]
    num_tokens = len(sample.token_ids)
    return TrainingSample(
        name=f"sample {index} ({ref.domain or sample.domain})",
        token_ids=sample.token_ids,
        loss_mask=sample.loss_mask,
        weights=np.full(num_tokens, ref.weight, np.float32),
        rollout_logprobs=sample.rollout_logprobs,
        policy_versions=sample.policy_versions,
        teacher_logprobs=teacher_logprobs if teacher_logprobs is not None else sample.teacher_logprobs,
        teacher_scores=scores if scores is not None else sample.teacher_scores,
        orm_advantages=(
            sample.orm_advantages
            if sample.orm_advantages is not None
            else np.full(num_tokens, ref.orm_advantage, np.float32)
        ),
        routed_experts=sample.routed_experts,
        domain=ref.domain or sample.domain,
    )


def check(sample: TrainingSample, num_tokens: int, expected: Expected) -> None:
    """Raises `RecordError` naming the sample and the field; `RouteError` where only routes are wrong."""
    name, token_ids = sample.name, sample.token_ids
    length = len(token_ids)
    if length == 0 or length != num_tokens:
        raise RecordError(f"{name}: token_ids has {length} tokens, its reference says {num_tokens}")
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= expected.vocab_size:
        wrong = low if low < 0 else high
        raise RecordError(f"{name}: token id {wrong} is outside the vocabulary of {expected.vocab_size}")
    if sample.loss_mask.shape != (length,) or bool(sample.loss_mask[0]):
        raise RecordError(f"{name}: loss_mask must have {length} entries, the first of them False")
    _check_stream(
        name, "rollout_logprobs", sample.rollout_logprobs, sample.loss_mask, expected.rollout_logprobs
    )
    _check_stream(
        name, "teacher_logprobs", sample.teacher_logprobs, sample.loss_mask, expected.teacher_logprobs
    )
    _check_stream(name, "orm_advantages", sample.orm_advantages, sample.loss_mask, False)
    if expected.signal in ("top_k", "top_k_renorm"):
        _check_topk(name, sample.teacher_scores, (int(sample.loss_mask.sum()), expected.top_k))
    elif expected.signal == "full":
        _check_hidden(name, sample.teacher_scores, int(sample.loss_mask.sum()), expected.heads)
    if expected.routes_shape is not None:
        _check_routes(name, sample.routed_experts, (length - 1, *expected.routes_shape), expected.num_experts)


def _check_stream(name: str, field: str, stream: np.ndarray | None, mask: np.ndarray, needed: bool) -> None:
    if stream is None:
        if needed:
            raise RecordError(f"{name}: {field} is missing, and the loss needs it")
        return
    if stream.shape != mask.shape:
        raise RecordError(f"{name}: {field} has shape {stream.shape}, its tokens {mask.shape}")
    if not bool(np.isfinite(stream[mask]).all()):
        raise RecordError(f"{name}: {field} holds NaN or infinity at a loss token")


def _check_topk(name: str, scores: TeacherScores | None, shape: tuple[int, int]) -> None:
    for field_name in ("topk_ids", "topk_logprobs"):
        rows = None if scores is None else getattr(scores, field_name)
        found = None if rows is None else rows.shape
        if found != shape:
            raise RecordError(
                f"{name}: {field_name} of its teacher has shape {found}, the loss needs {shape}"
            )
    assert scores is not None and scores.topk_ids is not None and scores.topk_logprobs is not None
    if scores.topk_ids.size and int(scores.topk_ids.min()) < 0:
        raise RecordError(f"{name}: topk_ids names token {int(scores.topk_ids.min())}")
    if not bool(np.isfinite(scores.topk_logprobs).all()):
        raise RecordError(f"{name}: topk_logprobs holds NaN or infinity")


def _check_hidden(name: str, scores: TeacherScores | None, num_tokens: int, heads: dict[int, int]) -> None:
    if scores is None or scores.hidden is None or scores.head_id not in heads:
        raise RecordError(
            f"{name}: hidden states of its teacher, or the LM head that turns them into logits, are missing, and the"
            " loss needs them"
        )
    shape = (num_tokens, heads[scores.head_id])
    if scores.hidden.shape != shape:
        raise RecordError(
            f"{name}: hidden states of its teacher have shape {scores.hidden.shape}, the loss needs {shape}"
        )


def _check_routes(name: str, routes: np.ndarray | None, shape: tuple[int, ...], num_experts: int) -> None:
    if routes is None:
        raise RouteError(
            f"{name}: routed_experts is missing; record routes (rollout.record_routes=auto) "
            "or set learner.routing_replay=off"
        )
    if routes.shape != shape:
        raise RouteError(f"{name}: routed_experts has shape {routes.shape}, expected {shape}")
    if routes.dtype not in (np.uint8, np.uint16):
        raise RouteError(f"{name}: routed_experts has type {routes.dtype}, expected uint8 or uint16")
    if routes.size and int(routes.max()) >= num_experts:
        raise RouteError(f"{name}: routed_experts names expert {int(routes.max())} of {num_experts}")
