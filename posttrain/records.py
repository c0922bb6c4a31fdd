"""Typed records that cross a boundary between rooms. Numpy only: no torch, ray or engine import here.

Conventions that every room relies on:

* A sequence has ``T`` tokens. Per-token arrays are aligned with the token itself: entry ``t`` speaks of
  ``token_ids[t]``. ``logprobs[t]`` is ``log p(token_ids[t] | token_ids[:t])`` at temperature 1 over the full
  vocabulary, so entry 0 is never defined and is stored as 0.0.
* ``loss_mask[t]`` is True exactly for tokens that the policy sampled and that are trained on.
* ``routed_experts[t]`` holds the experts that token ``t`` was routed to when it was *consumed*, which is when
  token ``t + 1`` was predicted. The last token is never consumed, hence ``T - 1`` rows. Dense layers are not in it.
* ``policy_versions[t]`` is the version of the weights that sampled token ``t``; -1 where nothing was sampled.
* numpy has no bfloat16: teachers' hidden states and LM heads of that type are held as its bits, in uint16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class RolloutStatus(StrEnum):
    """What became of a rollout. Everything but ``completed`` and ``truncated`` never reaches the loss."""

    completed = "completed"  # ended by itself: end mark, or the environment said so
    truncated = "truncated"  # hit max_new_tokens, max_turns or the context
    engine_error = "engine_error"  # the engine returned something unusable (short routes, NaN logprob)
    environment_error = "environment_error"
    reward_error = "reward_error"


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One task. Made by `posttrain.data`, consumed by the scheduler and the rollout workers."""

    prompt_id: str
    source: str
    domain: str
    messages: list[dict[str, Any]]
    token_ids: np.ndarray  # [P] int32: chat template applied, generation prompt added
    answer: Any = None
    tools: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # every other field of the row


@dataclass(kw_only=True, slots=True)
class SamplingSettings:
    """How one prompt is sampled. Training rollouts always have temperature 1 and top_p 1 (invariant 4)."""

    group_size: int = 1
    max_new_tokens: int = 256  # per turn
    max_turns: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None  # sample i of the group uses seed + i


@dataclass(kw_only=True, slots=True)
class Turn:
    """A run of tokens from one author: the prompt, the policy, or the environment. Arrays are [T_turn]."""

    author: str  # "prompt" | "policy" | "environment"
    token_ids: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    rollout_logprobs: np.ndarray  # float32, 0.0 where not sampled
    policy_versions: np.ndarray  # int32, -1 where not sampled


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One sampled episode. Made by `rollout`, read by rewards, teachers and the learner.

    ``messages`` is the conversation after the prompt as text, for rewards and the report only; training reads
    token ids (invariant 4).
    """

    group_id: str
    rollout_id: str
    prompt: Prompt  # with the answer, for verifiers; shared by the group
    turns: list[Turn]
    messages: list[dict[str, Any]]
    routed_experts: np.ndarray | None  # [T-1, L_moe, K] uint8 / uint16
    finish_reason: str  # "stop" | "length" | "environment" | "error"
    status: RolloutStatus
    reward: float | None = None
    reward_breakdown: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def domain(self) -> str:
        """Routing key of the prompt."""
        return self.prompt.domain

    @property
    def token_ids(self) -> np.ndarray:
        """[T] int32, all turns."""
        return np.concatenate([turn.token_ids for turn in self.turns])

    @property
    def loss_mask(self) -> np.ndarray:
        """[T] bool."""
        return np.concatenate([turn.loss_mask for turn in self.turns])

    @property
    def rollout_logprobs(self) -> np.ndarray:
        """[T] float32."""
        return np.concatenate([turn.rollout_logprobs for turn in self.turns])

    @property
    def policy_versions(self) -> np.ndarray:
        """[T] int32."""
        return np.concatenate([turn.policy_versions for turn in self.turns])

    @property
    def completion(self) -> str:
        """Text of the last assistant message, the thing most verifiers look at."""
        return next(
            (str(m.get("content") or "") for m in reversed(self.messages) if m["role"] == "assistant"), ""
        )


@dataclass(kw_only=True, slots=True)
class RolloutGroup:
    """The G rollouts of one prompt: what a rollout worker returns, one object per group."""

    group_id: str
    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(kw_only=True, slots=True)
class GroupSummary:
    """The scalars of a group that the driver keeps while the group itself stays in shared memory. Lists are [G]."""

    group_id: str
    prompt_id: str
    domain: str
    source: str
    statuses: list[RolloutStatus]
    num_tokens: list[int]  # prompt + everything after it
    num_loss_tokens: list[int]
    min_policy_version: int
    max_policy_version: int
    engine_s: float  # wall seconds between submission and the last token
    errors: list[str | None]
    repeated: list[bool]  # the last answer ends in a loop, see `rollout.repetition`


@dataclass(kw_only=True, slots=True)
class RewardResult:
    """Reward of one rollout. ``error`` set means that no reward exists: the rollout leaves loss and baseline."""

    reward: float
    breakdown: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(kw_only=True, slots=True)
class TeacherScores:
    """A teacher's view of one rollout. Made by `teachers`, read by the learner. Never holds routes (invariant 1).

    Everything but ``logprobs`` has one row for each of the N loss tokens, in their order: what a signal needs of the
    distribution that predicts this token. LM heads are numbered; equal ones have one number.
    """

    teacher: str
    logprobs: np.ndarray  # [T] float32, entry 0 is 0.0
    topk_ids: np.ndarray | None = None  # [N, k] int32, likeliest first
    topk_logprobs: np.ndarray | None = None  # [N, k] float32
    hidden: np.ndarray | None = None  # [N, H], float32 or bfloat16 as uint16
    head_id: int | None = None  # of the LM head that ``hidden`` belongs to


@dataclass(kw_only=True, slots=True)
class TrainingSample:
    """One sequence as the learner trains on it. All arrays [T], those of ``teacher_scores`` as they say.

    ``weights`` already holds every denominator (number of sequences, |y|, domain share), so the loss is a plain
    sum over tokens and cannot depend on how the batch was cut (invariant 5).
    """

    token_ids: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    weights: np.ndarray  # float32
    rollout_logprobs: np.ndarray | None = None
    policy_versions: np.ndarray | None = None
    teacher_logprobs: np.ndarray | None = None
    teacher_scores: TeacherScores | None = None  # what signals other than ``sampled`` need
    orm_advantages: np.ndarray | None = None
    routed_experts: np.ndarray | None = None  # [T-1, L_moe, K]
    domain: str = ""
    name: str = ""  # for messages


@dataclass(kw_only=True, slots=True)
class SampleRef:
    """Where a learner rank finds one sample: an object reference and the few scalars the driver adds.

    ``source_ref`` resolves to a `RolloutGroup` (RL, MOPD) or to a ``list[TrainingSample]`` (SFT);
    ``teacher_ref`` resolves to a ``list[TeacherScores]``.
    """

    source_ref: Any
    index: int
    num_tokens: int
    weight: float  # per loss token; overrides TrainingSample.weights
    teacher_ref: Any = None
    teacher_index: int = 0
    orm_advantage: float = 0.0
    domain: str = ""


@dataclass(kw_only=True, slots=True)
class LossSettings:
    """Everything a loss needs beside the streams. ``kind`` names a file in `posttrain.learner.losses`."""

    kind: str  # "sft" | "policy_gradient" | "ppo_clip" | "gspo" | "cispo" | "reinforce"
    beta: float = 0.0  # weight of the teacher's term
    signal: str = "sampled"  # "sampled" | "top_k" | "top_k_renorm" | "full"
    top_k: int = 64
    alpha: float = 1.0  # weight of the outcome advantage
    correction: str = "icepop"  # "icepop" | "tis" | "off", on pi/mu
    ratio_low: float = 0.5
    ratio_high: float = 5.0
    ratio_truncate: float = 2.0
    teacher_clip: float = 5.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    max_loss: float = float("inf")  # of a batch: above it no optimizer step is made


@dataclass(kw_only=True, slots=True)
class PolicyInfo:
    """What the learner says of the model it holds. The MoE numbers are 0 for a dense model."""

    vocab_size: int
    num_parameters: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    num_ranks: int


@dataclass(kw_only=True, slots=True)
class WeightBundle:
    """All weights of one policy version under Hugging Face checkpoint names, as raw bytes that Ray shares without
    copying. ``tensors[name]`` is a 1-D uint8 array; dtype is torch's name without the ``torch.`` prefix."""

    policy_version: int
    tensors: dict[str, np.ndarray]
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


@dataclass(kw_only=True, slots=True)
class EngineInfo:
    """What a rollout engine says of itself once it is up."""

    worker_id: str
    vocab_size: int
    max_model_len: int
    dtype: str
    records_routes: bool
    num_moe_layers: int
    num_experts: int
    top_k: int
    load_s: float
