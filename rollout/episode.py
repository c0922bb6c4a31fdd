"""One episode: the policy speaks, its domain's environment answers, until one of them ends it.

Token ids are the truth: every turn continues the exact ids of the former one, text is only decoded for environments
and rewards. Owns the statuses of a rollout: whatever goes wrong with one sample becomes its status and its error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.records import Prompt, Rollout, RolloutStatus, SamplingSettings, Turn
from rollout.environment import Environment, EnvironmentReply
from rollout.segment import Segment, SegmentResult

SEED_STRIDE = 1_000_003  # turns of one sample draw from different streams


@dataclass(kw_only=True, slots=True)
class EpisodeTools:
    """What an episode needs of its worker."""

    sample: Callable[[Segment], Awaitable[SegmentResult]]
    decode: Callable[[np.ndarray], str]  # sampled tokens without their end mark -> text
    encode_reply: Callable[[list[dict[str, Any]], list[dict[str, Any]], Any, Any], np.ndarray]
    max_model_len: int
    environment: Environment | None
    calls: asyncio.Semaphore  # environments that run at once
    next_request_id: Callable[[], str]
    environment_timeout_s: float | None = None


def _given_turn(author: str, token_ids: np.ndarray) -> Turn:
    """Tokens that the policy did not sample."""
    count = len(token_ids)
    return Turn(
        author=author,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        loss_mask=np.zeros(count, dtype=bool),
        rollout_logprobs=np.zeros(count, dtype=np.float32),
        policy_versions=np.full(count, -1, dtype=np.int32),
    )


def _policy_turn(result: SegmentResult) -> Turn:
    return Turn(
        author="policy",
        token_ids=result.token_ids,
        loss_mask=np.ones(len(result.token_ids), dtype=bool),
        rollout_logprobs=result.logprobs,
        policy_versions=result.policy_versions,
    )


async def run_episode(
    prompt: Prompt, settings: SamplingSettings, group_id: str, index: int, tools: EpisodeTools
) -> Rollout:
    """Sample number ``index`` of ``prompt``'s group. The environment has the last word after every finished turn;
    an episode that it would let go on without turns or context left is `truncated`."""
    rollout = Rollout(
        group_id=group_id,
        rollout_id=f"{group_id}/{index}",
        prompt=prompt,
        turns=[_given_turn("prompt", prompt.token_ids)],
        messages=[],
        routed_experts=None,
        finish_reason="error",
        status=RolloutStatus.engine_error,
    )
    token_ids: list[int] = prompt.token_ids.tolist()
    routes: list[np.ndarray] = []
    for turn in range(settings.max_turns):
        num_before = len(token_ids)
        result = await tools.sample(
            Segment(
                request_id=tools.next_request_id(),
                token_ids=list(token_ids),
                max_tokens=min(settings.max_new_tokens, tools.max_model_len - num_before),
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=None if settings.seed is None else settings.seed + index + SEED_STRIDE * turn,
                routes_start=sum(map(len, routes)),  # everything but the last token sampled before
            )
        )
        rollout.turns.append(_policy_turn(result))
        if result.error is not None:
            rollout.error = result.error
            return rollout
        token_ids += result.token_ids.tolist()
        if result.routed_experts is not None:
            routes.append(result.routed_experts)
        text = tools.decode(result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids)
        rollout.messages.append({"role": "assistant", "content": text})
        rollout.finish_reason = result.finish_reason
        if result.finish_reason == "length":
            return _close(rollout, routes, RolloutStatus.truncated)
        if result.finish_reason != "stop":
            rollout.error = f"the engine ended the request by {result.finish_reason!r}"
            rollout.finish_reason = "error"
            return rollout
        if tools.environment is None:
            return _close(rollout, routes, RolloutStatus.completed)
        reply = await _ask(tools, prompt, rollout)
        if reply is None:
            return _close(rollout, routes, RolloutStatus.environment_error)
        messages_before = prompt.messages + rollout.messages
        rollout.messages = rollout.messages + reply.messages
        if reply.done:
            rollout.finish_reason = "environment"
            return _close(rollout, routes, RolloutStatus.completed)
        rollout.finish_reason = "length"
        if turn + 1 == settings.max_turns:
            break
        reply_ids = _encode(tools, prompt, rollout, messages_before, reply)
        if reply_ids is None:
            return _close(rollout, routes, RolloutStatus.environment_error)
        if len(token_ids) + len(reply_ids) >= tools.max_model_len:
            break
        rollout.turns.append(_given_turn("environment", reply_ids))
        token_ids += reply_ids.tolist()
    return _close(rollout, routes, RolloutStatus.truncated)


def in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Result of ``function`` in a thread of its own: code of a user that hangs keeps nobody else from running."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:  # whatever it raises belongs to the caller
            outcome: tuple[Any, Any] = (future.set_result, function(*arguments))
        except Exception as error:
            outcome = (future.set_exception, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="environment", daemon=True).start()
    return future


async def _ask(tools: EpisodeTools, prompt: Prompt, rollout: Rollout) -> EnvironmentReply | None:
    """The environment's answer, or None with ``rollout.error`` set. User code is the other side: whatever it raises
    costs this one rollout."""
    assert tools.environment is not None
    messages = [dict(message) for message in rollout.messages]
    limit = tools.environment_timeout_s
    try:
        async with tools.calls:  # the clock starts with the call; one that was given up frees its place
            asked = in_thread(tools.environment.respond, prompt, messages)
            reply = await asyncio.wait_for(asked, limit)
        if not isinstance(reply, EnvironmentReply):
            raise TypeError(f"respond() returned {type(reply).__name__}, an EnvironmentReply is needed")
        if not reply.done and not reply.messages:
            raise ValueError("respond() returned no message and did not end the episode")
        return reply
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if asked.cancelled():  # by the time limit
            reason = f"no reply within rollout.environment_timeout_s={limit:g}"
        rollout.error = f"environment of {prompt.domain}: {reason}"
        return None


def _encode(
    tools: EpisodeTools,
    prompt: Prompt,
    rollout: Rollout,
    before: list[dict[str, Any]],
    reply: EnvironmentReply,
) -> np.ndarray | None:
    """[n] tokens of the reply and of the next generation prompt, or None with ``rollout.error`` set: messages of an
    environment may break a template or hold text that the tokenizer does not know."""
    try:
        options = prompt.metadata.get("chat_template_kwargs")
        return tools.encode_reply(before, reply.messages, prompt.tools, options)
    except Exception as error:
        rollout.error = f"reply of the environment of {prompt.domain}: {type(error).__name__}: {error}"
        return None


def _close(rollout: Rollout, routes: list[np.ndarray], status: RolloutStatus) -> Rollout:
    """Set the status and the routes [T-1, L_moe, K] of a rollout whose last turn is the policy's."""
    rollout.status = status
    if status is RolloutStatus.environment_error:
        rollout.finish_reason = "error"
    if routes:
        rollout.routed_experts = np.concatenate(routes) if len(routes) > 1 else routes[0]
        num_tokens = sum(len(turn.token_ids) for turn in rollout.turns)
        assert len(rollout.routed_experts) == num_tokens - 1, (
            "segments of routes do not add up to the sequence"
        )
    return rollout
