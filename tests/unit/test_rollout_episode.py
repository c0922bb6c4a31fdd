"""Episodes against a scripted engine: tokens, masks, routes, versions and statuses, single and multi turn."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np

from posttrain.records import Prompt, Rollout, RolloutStatus, SamplingSettings
from rollout.environment import Environment, EnvironmentReply
from rollout.episode import EpisodeTools, run_episode
from rollout.segment import Segment, SegmentResult, routes_problem

END = 0
LAYERS, TOP_K = 2, 2


def route_of(position: int) -> np.ndarray:
    """A route that names the absolute position of its token, so that gaps and repeats show."""
    return np.full((LAYERS, TOP_K), position, dtype=np.uint8)


class ScriptedEngine:
    """Answers each segment with the next completion; routes as the real engine returns them."""

    def __init__(self, completions: list[list[int]], error: str | None = None) -> None:
        self.completions = iter(completions)
        self.error = error
        self.segments: list[Segment] = []

    async def sample(self, segment: Segment) -> SegmentResult:
        self.segments.append(segment)
        sampled = next(self.completions)[: segment.max_tokens]
        total = len(segment.token_ids) + len(sampled)
        return SegmentResult(
            request_id=segment.request_id,
            token_ids=np.array(sampled, dtype=np.int32),
            logprobs=-np.arange(1, len(sampled) + 1, dtype=np.float32),
            policy_versions=np.full(len(sampled), len(self.segments), dtype=np.int32),
            routed_experts=np.stack([route_of(t) for t in range(segment.routes_start, total - 1)]),
            finish_reason="stop" if sampled[-1] == END else "length",
            error=self.error,
        )


class Scripted:
    """An environment with a list of replies; an exception in it is raised."""

    def __init__(self, *replies: EnvironmentReply | Exception) -> None:
        self.replies = iter(replies)
        self.seen: list[list[dict[str, Any]]] = []

    def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
        self.seen.append(messages)
        reply = next(self.replies)
        if isinstance(reply, Exception):
            raise reply
        return reply


TOOL = EnvironmentReply(messages=[{"role": "tool", "content": "42"}])
DONE = EnvironmentReply(done=True)


def run(
    engine: ScriptedEngine,
    environment: Environment | None = None,
    *,
    max_turns: int = 4,
    max_model_len: int = 100,
    timeout_s: float | None = None,
) -> Rollout:
    prompt = Prompt(
        prompt_id="p",
        source="s",
        domain="tool",
        messages=[{"role": "user", "content": "?"}],
        token_ids=np.array([50, 51, 52], dtype=np.int32),
    )
    ids = itertools.count()

    async def episode() -> Rollout:
        tools = EpisodeTools(
            sample=engine.sample,
            decode=lambda token_ids: " ".join(map(str, token_ids.tolist())),
            encode_reply=lambda before, reply, tools, options: np.array(
                [90 + len(reply), 91], dtype=np.int32
            ),
            max_model_len=max_model_len,
            environment=environment,
            calls=asyncio.Semaphore(2),
            next_request_id=lambda: str(next(ids)),
            environment_timeout_s=timeout_s,
        )
        settings = SamplingSettings(max_new_tokens=5, max_turns=max_turns, seed=7)
        return await run_episode(prompt, settings, "g", 1, tools)

    return asyncio.run(episode())


class Waits:
    def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
        time.sleep(1.0)
        return DONE


def test_an_environment_that_hangs_costs_its_rollout_alone() -> None:
    rollout = run(ScriptedEngine([[5, END]]), Waits(), timeout_s=0.05)
    assert rollout.status is RolloutStatus.environment_error
    assert rollout.error == "environment of tool: no reply within rollout.environment_timeout_s=0.05"
    own = run(ScriptedEngine([[5, END]]), Scripted(TimeoutError("gateway")), timeout_s=5.0)
    assert own.error == "environment of tool: TimeoutError: gateway"


def test_single_turn_that_ends_by_itself() -> None:
    rollout = run(ScriptedEngine([[5, 6, END]]))
    assert rollout.status is RolloutStatus.completed and rollout.finish_reason == "stop"
    assert rollout.token_ids.tolist() == [50, 51, 52, 5, 6, END]
    assert rollout.loss_mask.tolist() == [False] * 3 + [True] * 3
    assert rollout.rollout_logprobs.tolist() == [0, 0, 0, -1, -2, -3]
    assert rollout.policy_versions.tolist() == [-1, -1, -1, 1, 1, 1]
    assert rollout.messages == [{"role": "assistant", "content": "5 6"}], "the end mark is not text"
    assert rollout.routed_experts is not None and rollout.routed_experts[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert rollout.rollout_id == "g/1"


def test_length_is_truncated_and_keeps_all_text() -> None:
    rollout = run(ScriptedEngine([[5, 6, 7, 8, 9, 10]]))
    assert rollout.status is RolloutStatus.truncated and rollout.finish_reason == "length"
    assert rollout.completion == "5 6 7 8 9"


def test_tool_turns_are_masked_and_routes_join_without_gap() -> None:
    engine, environment = ScriptedEngine([[5, END], [6, 7, END]]), Scripted(TOOL, DONE)
    rollout = run(engine, environment)
    assert rollout.status is RolloutStatus.completed and rollout.finish_reason == "environment"
    assert rollout.token_ids.tolist() == [50, 51, 52, 5, END, 91, 91, 6, 7, END]
    assert rollout.loss_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 3
    assert rollout.policy_versions.tolist() == [-1, -1, -1, 1, 1, -1, -1, 2, 2, 2]
    assert [turn.author for turn in rollout.turns] == ["prompt", "policy", "environment", "policy"]
    assert [message["role"] for message in rollout.messages] == ["assistant", "tool", "assistant"]
    assert rollout.routed_experts is not None
    assert rollout.routed_experts[:, 1, 1].tolist() == list(range(9))
    assert engine.segments[1].token_ids == rollout.token_ids[:7].tolist(), (
        "ids go on, nothing is tokenised again"
    )
    assert engine.segments[1].routes_start == 4
    assert [len(messages) for messages in environment.seen] == [1, 3]
    assert engine.segments[0].seed != engine.segments[1].seed, "turns draw from different streams"


def test_turns_and_context_run_out() -> None:
    by_turns = run(ScriptedEngine([[5, END], [6, END]]), Scripted(TOOL, TOOL), max_turns=2)
    assert by_turns.status is RolloutStatus.truncated and by_turns.turns[-1].author == "policy"
    by_context = run(ScriptedEngine([[5, END]]), Scripted(TOOL), max_model_len=7)
    assert by_context.status is RolloutStatus.truncated and len(by_context.token_ids) == 5
    shortened = ScriptedEngine([[5, END], [6, 7, 8]])
    assert run(shortened, Scripted(TOOL), max_model_len=9).finish_reason == "length"
    assert shortened.segments[1].max_tokens == 2, "the last turn gets what the context leaves"


def test_an_environment_that_fails_is_an_error_of_this_rollout() -> None:
    for bad in (RuntimeError("tool is down"), EnvironmentReply(), "a string"):
        rollout = run(ScriptedEngine([[5, END]]), Scripted(bad))  # type: ignore[arg-type]
        assert rollout.status is RolloutStatus.environment_error and rollout.finish_reason == "error"
        assert rollout.error is not None and rollout.error.startswith("environment of tool:")


def test_a_request_that_the_engine_aborted_is_no_truncation() -> None:
    class Aborts(ScriptedEngine):
        async def sample(self, segment: Segment) -> SegmentResult:
            result = await super().sample(segment)
            result.finish_reason = "abort"
            return result

    rollout = run(Aborts([[5, 6]]))
    assert rollout.status is RolloutStatus.engine_error and rollout.finish_reason == "error"
    assert rollout.error == "the engine ended the request by 'abort'"


def test_unusable_output_of_the_engine_is_an_error_of_this_rollout() -> None:
    rollout = run(ScriptedEngine([[5, END]], error="short"), Scripted(DONE))
    assert rollout.status is RolloutStatus.engine_error and rollout.error == "short"
    assert rollout.routed_experts is None


def test_a_slow_environment_delays_nobody() -> None:
    class Slow:
        def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
            time.sleep(0.3)
            return DONE

    async def both() -> list[float]:
        started, ends = time.monotonic(), []
        ids = itertools.count()
        calls = asyncio.Semaphore(2)

        async def one(environment: Environment | None) -> None:
            tools = EpisodeTools(
                sample=ScriptedEngine([[5, END]]).sample,
                decode=str,
                encode_reply=lambda *_: np.zeros(1, dtype=np.int32),
                max_model_len=100,
                environment=environment,
                calls=calls,
                next_request_id=lambda: str(next(ids)),
            )
            prompt = Prompt(
                prompt_id="p",
                source="s",
                domain="d",
                messages=[],
                token_ids=np.array([1], dtype=np.int32),
            )
            await run_episode(prompt, SamplingSettings(), "g", 0, tools)
            ends.append(time.monotonic() - started)

        await asyncio.gather(one(Slow()), one(None))
        return ends

    first, last = asyncio.run(both())
    assert first < 0.15 and last >= 0.3


def test_routes_that_cannot_be_used_are_named() -> None:
    good = np.array([[[0, 1], [3, 2]], [[1, 2], [0, 3]]], dtype=np.uint8)
    assert routes_problem(good, 2, 4) is None
    assert "no routes" in str(routes_problem(None, 2, 4))
    assert "of 2 tokens, 3" in str(routes_problem(good, 3, 4))
    assert "expert 3 of 3" in str(routes_problem(good, 2, 3))
    unrecorded = good.copy()
    unrecorded[1, 0] = 0
    assert "not recorded" in str(routes_problem(unrecorded, 2, 4))
