"""Answers of one checkpoint to prompts, as conversations for SFT: off-policy distillation, rejection sampling.

Owns `samples.jsonl`: rows in the public format plus what was sampled (``token_ids``, ``loss_mask``, ``text``) and how it
was judged (``reward``, ``status``). Rows come in the order of the prompts, and `progress.json` says up to which prompt
they are whole, so a run that was killed goes on from there. Failed rollouts are counted and named, never written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from posttrain.config import Replay, SampleConfig, SampleRun, UserError
from posttrain.data.sources import load_prompts
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.records import Prompt, RewardResult, Rollout, RolloutGroup, RolloutStatus, SamplingSettings
from posttrain.run_folder import RunFolder
from posttrain.runs.evaluate import held_out, room
from posttrain.tracking.jsonl import EventsFile
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

OUTPUT = "samples.jsonl"
GROUPS_PER_WRITE = 64
FATES = ("written", "truncated", "rejected", "failed")


def run(cfg: SampleRun, engines: Engines | None = None) -> str:
    """Sample, and return the path of samples.jsonl. Resumes where the run folder stands.

    Args:
        engines: living processes to use; None starts and ends its own.
    """
    folder = RunFolder.open(cfg)
    if folder.finished:
        print(f"{folder.path}: finished before; nothing to do")
        folder.close()
        return str(folder.path / OUTPUT)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    loaded = load_prompts(cfg.data, tokenizer, room(cfg.rollout), domain=cfg.domain)
    by_domain = held_out(loaded, cfg.sample.num_prompts)
    prompts = [prompt for members in by_domain.values() for prompt in members]
    samples = Samples(
        folder, cfg.sample, lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    )

    with nullcontext(engines) if engines else Engines.of(cfg) as processes:
        # Nobody replays these routes; living engines are taken as they are.
        rollout = cfg.rollout if engines else replace(cfg.rollout, record_routes=Replay.off)
        starting = processes.in_background(processes.rollouts, rollout, cfg.model, cfg.environments, cfg.seed)
        rewards = (
            processes.rewards(cfg.rewards, cfg.reward_workers, sorted(by_domain)) if cfg.rewards else None
        )
        rollouts = starting.result()
        if engines:
            rollouts.load_checkpoint(cfg.model.path, 1)  # they may hold another model
        sample_all(rollouts, rewards, prompts, cfg, samples)
    summary = samples.summary()
    folder.write_json("summary.json", summary)
    for domain, counts in summary["domains"].items():
        fates = ", ".join(f"{counts[fate]:,} {fate}" for fate in FATES)
        print(f"{domain:>12}  {counts['prompts']:7,} prompts  {counts['tokens']:9,} tokens  samples: {fates}")
    if not sum(counts["written"] for counts in summary["domains"].values()):
        raise UserError(
            f"sample.min_reward={cfg.sample.min_reward!r}: no sample was written; lower it, raise"
            " rollout.max_new_tokens if answers are truncated, or see events.jsonl for those that failed"
        )
    folder.finish()
    print(f"samples: {samples.path}")
    return str(samples.path)


def sample_all(
    rollouts: RolloutPool, rewards: RewardPool | None, prompts: list[Prompt], cfg: SampleRun, samples: Samples
) -> None:
    """Sample the prompts that ``samples`` does not hold yet; groups are written in the order of the prompts."""
    settings = SamplingSettings(
        group_size=cfg.sample.num_samples,
        max_new_tokens=cfg.rollout.max_new_tokens,
        max_turns=cfg.rollout.max_turns,
        temperature=cfg.sample.temperature,
    )
    index_of = {f"s{i:08d}": i for i in range(samples.num_prompts, len(prompts))}
    for group_id, index in index_of.items():
        rollouts.submit(prompts[index], settings, group_id)
    arrived: dict[int, Any] = {}
    while samples.num_prompts < len(prompts):
        for ref, group in rollouts.wait(timeout_s=5.0):
            arrived[index_of[group.group_id]] = ref
        if lost := rollouts.pop_lost():
            raise UserError(f"sampling: {len(lost)} prompts were given up: {rollouts.quarantined[-1]}")
        first = after = samples.num_prompts
        while after in arrived:
            after += 1
        if after == first or (after - first < GROUPS_PER_WRITE and after < len(prompts)):
            continue
        refs = [arrived.pop(index) for index in range(first, after)]
        results = (
            rewards.score_all([(ref, settings.group_size) for ref in refs]) if rewards else [None] * len(refs)
        )
        samples.write(ray.get(refs), results)


class Samples:
    """samples.jsonl of a run, whole up to prompt ``num_prompts``; what a killed process wrote after that is cut."""

    def __init__(
        self, folder: RunFolder, settings: SampleConfig, decode: Callable[[np.ndarray], str]
    ) -> None:
        self.path: Path = folder.path / OUTPUT
        self._folder = folder
        self._settings = settings
        self._decode = decode
        self._progress: dict[str, Any] = folder.read_json("progress.json") or {
            "num_prompts": 0,
            "num_bytes": 0,
            "domains": {},
        }
        self.path.touch()
        if self.path.stat().st_size < self._progress["num_bytes"]:
            raise UserError(
                f"{self.path}: shorter than when this run stopped; put it back, or start over with fresh=true"
            )
        os.truncate(self.path, self._progress["num_bytes"])
        if self.num_prompts:
            print(f"{folder.path}: resuming after prompt {self.num_prompts:,}", flush=True)

    @property
    def num_prompts(self) -> int:
        """Prompts whose samples are on the disk."""
        return int(self._progress["num_prompts"])

    def write(self, groups: Sequence[RolloutGroup], results: Sequence[list[RewardResult] | None]) -> None:
        """Append the samples of the next groups, then note that they are there."""
        lines, events = [], []
        for group, judged in zip(groups, results, strict=True):
            counts = self._progress["domains"].setdefault(
                group.prompt.domain, dict.fromkeys(("prompts", "tokens", *FATES), 0)
            )
            counts["prompts"] += 1
            for index, rollout in enumerate(group.rollouts):
                result = judged[index] if judged else None
                fate = judge(rollout, result, self._settings)
                counts[fate] += 1
                counts["tokens"] += int(rollout.loss_mask.sum())
                if fate == "written":
                    lines.append(json.dumps(to_row(rollout, result, index, self._decode), default=str) + "\n")
                elif fate == "failed":
                    error = rollout.error or (result.error if result else None)
                    events.append({"prompt_id": group.prompt.prompt_id, "error": error})
        content = "".join(lines).encode()
        with self.path.open("ab") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if events:
            log = EventsFile(self._folder.path / "events.jsonl")
            for event in events:
                log.write("sample_failed", event)
            log.close()
        self._progress["num_prompts"] += len(groups)
        self._progress["num_bytes"] += len(content)
        self._folder.write_json("progress.json", self._progress)

    def summary(self) -> dict[str, Any]:
        """Counts per domain, and sampled tokens in all (those of samples that were not written too)."""
        domains = self._progress["domains"]
        return {"num_tokens": sum(counts["tokens"] for counts in domains.values()), "domains": domains}


def judge(rollout: Rollout, result: RewardResult | None, settings: SampleConfig) -> str:
    """What becomes of a sample, one of `FATES`."""
    if rollout.status not in (RolloutStatus.completed, RolloutStatus.truncated):
        return "failed"
    if rollout.status is RolloutStatus.truncated and not settings.keep_truncated:
        return "truncated"
    if settings.min_reward is None:
        return "written"
    if result is None or result.error is not None:
        return "failed"
    return "written" if result.reward >= settings.min_reward else "rejected"


def to_row(
    rollout: Rollout, result: RewardResult | None, index: int, decode: Callable[[np.ndarray], str]
) -> dict[str, Any]:
    """The row of a sample: the prompt's own fields, the conversation, and its tokens."""
    prompt = rollout.prompt
    given = {"answer": prompt.answer, "tools": prompt.tools}
    return (
        prompt.metadata
        | {key: value for key, value in given.items() if value is not None}
        | {
            "id": f"{prompt.prompt_id}/{index}",
            "domain": prompt.domain,
            "messages": [*prompt.messages, *rollout.messages],
            "status": rollout.status.value,
            "reward": result.reward if result is not None and result.error is None else None,
            "text": decode(rollout.token_ids),
            "token_ids": rollout.token_ids.tolist(),
            "loss_mask": rollout.loss_mask.astype(int).tolist(),
        }
    )
