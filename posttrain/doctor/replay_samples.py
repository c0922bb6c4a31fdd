"""What `posttrain doctor replay` samples: prompts, a first round of rollouts in up to two turns, and continuations.

Owns where the rollouts' segments begin, because that is where routes get lost or shifted: in a prefix that other
samples share, after a turn, and at the end of another rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.config import DoctorRun, RolloutConfig, UserError
from posttrain.doctor.findings import Finding
from posttrain.records import Prompt, Rollout, RolloutStatus, SamplingSettings
from rollout.environment import EnvironmentReply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout.pool import RolloutPool

GROUP_SIZE = 4  # rollouts that share a prompt, and so its blocks of the prefix cache
CONTINUED_SHARE = 4  # every so many-th rollout continues another one
MAX_TURNS = 2
PROMPT_TOKENS = (33, 96)  # shortest and longest random prompt: at least one block of the cache
LONG_PROMPT_TOKENS = 320  # every third prompt: sliding windows make cached prefixes shorter
GIVEN_TOKENS = 4  # random tokens between a rollout and its continuation
REPLY = "go on"
USABLE = (RolloutStatus.completed, RolloutStatus.truncated)


class GoOn:
    """The environment of the check: asks for another turn, until there is none left."""

    def respond(self, prompt: Prompt, messages: list[dict[str, Any]]) -> EnvironmentReply:
        return EnvironmentReply(messages=[{"role": "user", "content": REPLY}])


def make_prompts(cfg: DoctorRun, tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig) -> list[Prompt]:
    """One prompt for every group of the first round: from ``data``, or of random tokens without any mark."""
    num_first = cfg.replay.num_rollouts - cfg.replay.num_rollouts // CONTINUED_SHARE
    count = -(-num_first // GROUP_SIZE)
    room = rollout.max_model_len - rollout.max_new_tokens
    if cfg.data.path is not None or cfg.data.sources:
        from posttrain.data.sources import load_prompts

        found = load_prompts(cfg.data, tokenizer, room - 1)
        return [found[i * len(found) // count] for i in range(count)]
    plain = plain_tokens(tokenizer)
    rng = np.random.default_rng(cfg.seed)
    lengths = rng.integers(*PROMPT_TOKENS, count, endpoint=True)
    lengths[::3] = LONG_PROMPT_TOKENS
    return [
        Prompt(
            prompt_id=f"random-{i}",
            source="random",
            domain="random",
            messages=[{"role": "user", "content": REPLY}],
            token_ids=rng.choice(plain, min(int(length), room - 1)).astype(np.int32),
        )
        for i, length in enumerate(lengths)
    ]


def plain_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of the vocabulary without special and added tokens."""
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return np.array(sorted(set(tokenizer.get_vocab().values()) - marks), dtype=np.int32)


def answers_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template lets a user answer the assistant, as episodes of several turns need it."""
    from posttrain.data.chat import encode_reply

    before = [{"role": "user", "content": REPLY}, {"role": "assistant", "content": REPLY}]
    try:  # a template of someone else
        return len(encode_reply(tokenizer, before, [{"role": "user", "content": REPLY}])) > 0
    except UserError:
        return False


def sample_rollouts(
    cfg: DoctorRun, pool: RolloutPool, prompts: list[Prompt], plain: np.ndarray, rollout: RolloutConfig
) -> tuple[list[Rollout], Finding]:
    """Groups of ``prompts`` in up to two turns, then continuations of some of them by a few random tokens: their
    segments begin in the prefix cache, where routes are lost or shifted first."""
    num_continued = cfg.replay.num_rollouts // CONTINUED_SHARE
    left = cfg.replay.num_rollouts - num_continued
    requests = []
    for index, prompt in enumerate(prompts):
        settings = SamplingSettings(
            group_size=min(GROUP_SIZE, left - index * GROUP_SIZE),
            max_new_tokens=rollout.max_new_tokens,
            max_turns=rollout.max_turns,  # no seed: vLLM 0.30 on CPUs dies of a seeded request in a partial prefill
        )
        requests.append((prompt, settings))
    found = _sample(pool, requests, "first")
    single = SamplingSettings(max_new_tokens=rollout.max_new_tokens)
    following = _continuations(found.rollouts, num_continued, plain, cfg.seed, pool.info.max_model_len)
    more = _sample(pool, [(prompt, single) for prompt in following], "next")
    rollouts, problems = found.rollouts + more.rollouts, found.problems + more.problems
    problems += [f"{worker} died and was started again: {reason}" for worker, reason in pool.pop_restarts()]
    num_turns = sum(any(turn.author == "environment" for turn in r.turns) for r in rollouts)
    value = f"{len(rollouts)} rollouts; {num_turns} in several turns, {len(more.rollouts)} go on from another's end"
    if found.left_out:
        value += f"; {len(found.left_out)} left out, whose turns could not go on ({found.left_out[0]})"
    finding = Finding(name="sampling", value=value)
    if problems or not rollouts:
        reason = problems[0] if problems else "no rollout came back"
        finding.way_out = f"{len(problems)} rollouts are unusable; first: {reason}"
    return rollouts, finding


@dataclass(kw_only=True, slots=True)
class _Sampled:
    """What came back, in the order of submission."""

    rollouts: list[Rollout]  # usable ones
    problems: list[str]  # of the engine
    left_out: list[str]  # the chat template or the tokenizer refused the reply


def _sample(pool: RolloutPool, requests: Sequence[tuple[Prompt, SamplingSettings]], name: str) -> _Sampled:
    import ray

    num_before = len(pool.quarantined)
    for index, (prompt, settings) in enumerate(requests):
        pool.submit(prompt, settings, f"{name}-{index:04d}")
    groups = ray.get([ref for ref, _ in pool.drain()])
    rollouts = [r for group in sorted(groups, key=lambda g: g.group_id) for r in group.rollouts]
    problems = [f"{prompt_id}: {reason}" for prompt_id, reason in pool.quarantined[num_before:]]
    problems += [f"{r.rollout_id}: {r.error}" for r in rollouts if r.status is RolloutStatus.engine_error]
    return _Sampled(
        rollouts=[r for r in rollouts if r.status in USABLE],
        problems=problems,
        left_out=[str(r.error) for r in rollouts if r.status is RolloutStatus.environment_error],
    )


def _continuations(
    rollouts: list[Rollout], count: int, plain: np.ndarray, seed: int, max_model_len: int
) -> list[Prompt]:
    """Prompts that are rollouts plus a few random tokens; fewer than ``count`` where the context is full."""
    rng = np.random.default_rng(seed + 1)
    short = [r for r in rollouts if len(r.token_ids) + GIVEN_TOKENS < max_model_len]
    chosen = [short[i * len(short) // count] for i in range(min(count, len(short)))] if short else []
    return [
        Prompt(
            prompt_id=f"{r.rollout_id} continued",
            source=r.prompt.source,
            domain="",  # no environment answers
            messages=r.prompt.messages,
            token_ids=np.concatenate([r.token_ids, rng.choice(plain, GIVEN_TOKENS)]).astype(np.int32),
            metadata={"continued_at": len(r.token_ids)},
        )
        for r in chosen
    ]
