"""Sampled rollouts as Parquet: text, tokens, and every per-token score beside them.

Owns the columns of ``rollouts/step_NNNNNN.parquet``. One row per rollout; per-token columns are lists of T. With
the routes in it, a file is enough to feed the learner again without engines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.records import RewardResult, Rollout, TeacherScores

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group_id", pa.string()),
        ("rollout_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("status", pa.string()),
        ("finish_reason", pa.string()),
        ("text", pa.string()),  # all tokens decoded, special ones too
        ("messages", pa.string()),  # JSON: the prompt's messages and what followed
        ("answer", pa.string()),  # JSON
        ("reward", pa.float64()),
        ("reward_breakdown", pa.string()),  # JSON
        ("error", pa.string()),
        ("teacher", pa.string()),
        ("turn_authors", pa.list_(pa.string())),
        ("turn_num_tokens", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("policy_versions", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("teacher_logprobs", pa.list_(pa.float32())),
        ("routed_experts", pa.binary()),  # [T-1, L_moe, K], C order
        ("routed_experts_shape", pa.list_(pa.int32())),
        ("routed_experts_dtype", pa.string()),
    ]
)


@dataclass(kw_only=True, slots=True)
class ScoredRollout:
    """A rollout with what others said of it."""

    rollout: Rollout
    reward: RewardResult | None = None
    teacher: TeacherScores | None = None


def write_rollouts(
    run_dir: Path | str, step: int, samples: Sequence[ScoredRollout], decode: Callable[[np.ndarray], str]
) -> Path:
    """Write ``run_dir``/rollouts/step_NNNNNN.parquet, whole or not at all, and return its path.

    ``decode`` turns token ids [T] into text with special tokens kept.
    """
    folder = Path(run_dir) / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.parquet"
    aside = path.with_name(path.name + ".tmp")
    rows = [_row(step, sample, decode) for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), aside, compression="zstd")
    os.replace(aside, path)
    return path


def _row(step: int, sample: ScoredRollout, decode: Callable[[np.ndarray], str]) -> dict[str, Any]:
    rollout, reward = sample.rollout, sample.reward
    token_ids = rollout.token_ids
    routes = rollout.routed_experts
    return {
        "step": step,
        "group_id": rollout.group_id,
        "rollout_id": rollout.rollout_id,
        "prompt_id": rollout.prompt.prompt_id,
        "source": rollout.prompt.source,
        "domain": rollout.domain,
        "status": rollout.status.value,
        "finish_reason": rollout.finish_reason,
        "text": decode(token_ids),
        "messages": json.dumps([*rollout.prompt.messages, *rollout.messages], default=str),
        "answer": json.dumps(rollout.prompt.answer, default=str),
        # A reward that failed is no reward: null, never 0.
        "reward": reward.reward if reward is not None and reward.error is None else None,
        "reward_breakdown": json.dumps(reward.breakdown if reward is not None else {}),
        "error": rollout.error or (reward.error if reward is not None else None),
        "teacher": sample.teacher.teacher if sample.teacher is not None else None,
        "turn_authors": [turn.author for turn in rollout.turns],
        "turn_num_tokens": [len(turn.token_ids) for turn in rollout.turns],
        "token_ids": token_ids.tolist(),
        "loss_mask": rollout.loss_mask.tolist(),
        "policy_versions": rollout.policy_versions.tolist(),
        "rollout_logprobs": rollout.rollout_logprobs.tolist(),
        "teacher_logprobs": sample.teacher.logprobs.tolist() if sample.teacher is not None else None,
        "routed_experts": routes.tobytes() if routes is not None else None,
        "routed_experts_shape": list(routes.shape) if routes is not None else None,
        "routed_experts_dtype": str(routes.dtype) if routes is not None else None,
    }
