"""Accuracy of a checkpoint on held-out prompts: the `eval` run, and what the pipeline's table is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import EvalRun, PipelineRun, RolloutConfig, UserError
from posttrain.data.sources import load_prompts
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.records import GroupSummary, Prompt, SamplingSettings
from posttrain.run_folder import RunFolder
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

GROUPS_PER_CALL = 64  # groups that a reward worker gets at once

Others = Callable[[list[tuple[Any, GroupSummary]], list[str]], None]
"""Takes finished groups, and ids of lost ones, that the evaluation did not submit."""


@dataclass(kw_only=True, slots=True)
class Scores:
    """Rewards of one model: per domain [num_prompts, num_samples] sampled and [num_prompts] greedy (or None).

    Rows follow the order of the prompts, so the scores of two models on the same prompts are paired.
    """

    sampled: dict[str, np.ndarray]
    greedy: dict[str, np.ndarray] | None

    def to_json(self) -> dict[str, dict[str, list[float]] | None]:
        greedy = None if self.greedy is None else {d: a.tolist() for d, a in self.greedy.items()}
        return {"sampled": {d: a.tolist() for d, a in self.sampled.items()}, "greedy": greedy}

    @staticmethod
    def read(path: Path) -> Scores:
        data = json.loads(path.read_text())
        greedy = None if data["greedy"] is None else {d: np.array(a) for d, a in data["greedy"].items()}
        return Scores(sampled={d: np.array(a) for d, a in data["sampled"].items()}, greedy=greedy)


def run(cfg: EvalRun, engines: Engines | None = None) -> None:
    """Evaluate ``model.path`` on ``data.eval_*``; prints the accuracy per domain and writes summary.json."""
    folder = RunFolder.open(cfg)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    prompts = held_out(load_prompts(cfg.data, tokenizer, room(cfg.rollout), eval=True), cfg.eval.num_prompts)
    with Engines.of(cfg) as engines:
        starting = engines.in_background(engines.rollouts, cfg.rollout, cfg.model, cfg.environments, cfg.seed)
        rewards = engines.rewards(cfg.rewards, cfg.reward_workers, sorted(prompts))
        rollouts = starting.result()
        scores = evaluate(rollouts, rewards, prompts, *eval_settings(cfg))
    folder.write_json("scores.json", scores.to_json())
    accuracy = {d: float(a.mean()) for d, a in scores.sampled.items()}
    greedy = {d: float(a.mean()) for d, a in (scores.greedy or {}).items()}
    num_eval = {d: len(a) for d, a in scores.sampled.items()}
    folder.write_json("summary.json", {"num_eval": num_eval, "accuracy": accuracy, "accuracy_greedy": greedy})
    for domain, value in accuracy.items():
        text = f", greedy {100 * greedy[domain]:5.1f} %" if domain in greedy else ""
        print(f"{domain:>12}  {num_eval[domain]:5d} prompts  {100 * value:5.1f} %{text}")
    folder.finish()


def eval_settings(cfg: EvalRun | PipelineRun) -> tuple[SamplingSettings, SamplingSettings | None]:
    """Sampled and greedy settings of an evaluation."""
    base = {"max_new_tokens": cfg.rollout.max_new_tokens, "max_turns": cfg.rollout.max_turns}
    sampled = SamplingSettings(group_size=cfg.eval.num_samples, temperature=cfg.eval.temperature, **base)
    return sampled, SamplingSettings(group_size=1, temperature=0.0, **base) if cfg.eval.greedy else None


def room(rollout: RolloutConfig) -> int:
    """Longest prompt that leaves room for one completion."""
    return rollout.max_model_len - rollout.max_new_tokens


def held_out(prompts: list[Prompt], num_prompts: int | None) -> dict[str, list[Prompt]]:
    """The first ``num_prompts`` held-out prompts of every domain (None: all)."""
    domains: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        members = domains.setdefault(prompt.domain, [])
        if num_prompts is None or len(members) < num_prompts:
            members.append(prompt)
    return domains


def evaluate(
    rollouts: RolloutPool,
    rewards: RewardPool,
    prompts: dict[str, list[Prompt]],
    sampled: SamplingSettings,
    greedy: SamplingSettings | None,
    others: Others | None = None,
    failed: dict[str, str] | None = None,
) -> Scores:
    """Score the model that the rollout workers hold. A truncated answer keeps the reward its verifier gives it.
    ``others`` gets what finishes meanwhile and is not of this evaluation; with a seed in ``sampled`` every prompt samples
    from streams of its own.

    A rollout or a reward that fails makes the accuracy over the rest another number. With ``failed`` its domain is left
    out of the scores and named there with the reason, and nothing stays in flight.

    Raises:
        UserError: something failed, and ``failed`` is None.
    """
    return Scores(
        sampled=_scores(rollouts, rewards, prompts, sampled, others, failed),
        greedy=None
        if greedy is None
        else {d: a[:, 0] for d, a in _scores(rollouts, rewards, prompts, greedy, others, failed).items()},
    )


def _scores(
    rollouts: RolloutPool,
    rewards: RewardPool,
    prompts: dict[str, list[Prompt]],
    settings: SamplingSettings,
    others: Others | None,
    failed: dict[str, str] | None,
) -> dict[str, np.ndarray]:
    arrays = {d: np.full((len(p), settings.group_size), np.nan) for d, p in prompts.items()}
    cells: dict[str, tuple[str, int]] = {}
    for domain, members in prompts.items():
        for i, prompt in enumerate(members):
            cells[group_id := f"eval-{domain}-{i}"] = (domain, i)
            rollouts.submit(prompt, _with_own_seed(settings, group_id), group_id)
    scoring: list[tuple[list[tuple[Any, GroupSummary]], Any]] = []
    finished: list[tuple[Any, GroupSummary]] = []
    num_waiting = len(cells)
    while num_waiting:
        arrived, lost = rollouts.wait(timeout_s=5.0), rollouts.pop_lost()
        if others is not None:
            others(
                [(r, s) for r, s in arrived if s.group_id not in cells], [g for g in lost if g not in cells]
            )
            arrived = [(r, s) for r, s in arrived if s.group_id in cells]
            lost = [group_id for group_id in lost if group_id in cells]
        if lost:
            why = f"{len(lost)} prompts were given up: {rollouts.quarantined[-1]}"
            _fail([cells[group_id][0] for group_id in lost if group_id in cells], why, failed)
        finished += arrived
        num_waiting -= len(arrived) + len(lost)
        if finished and (len(finished) >= GROUPS_PER_CALL or not num_waiting):
            scoring.append((finished, rewards.score([ref for ref, _ in finished])))
            finished = []
    for groups, call in scoring:
        scored = rewards.results([(ref, settings.group_size) for ref, _ in groups], call)
        for (_, summary), results in zip(groups, scored, strict=True):
            for j, result in enumerate(results):
                domain, i = cells[summary.group_id]
                if result.error is not None:
                    _fail([domain], f"{summary.group_id}: {result.error}", failed)
                arrays[domain][i, j] = result.reward
    return {domain: array for domain, array in arrays.items() if domain not in (failed or {})}


def _fail(domains: list[str], why: str, failed: dict[str, str] | None) -> None:
    if failed is None:
        raise UserError(f"evaluation: {why}")
    for domain in domains:
        failed.setdefault(domain, why)


def _with_own_seed(settings: SamplingSettings, group_id: str) -> SamplingSettings:
    """Prompts that shared a seed would share their random numbers, and their scores would no longer be independent."""
    if settings.seed is None:
        return settings
    digest = hashlib.sha256(f"{settings.seed} {group_id}".encode()).digest()
    return replace(settings, seed=int.from_bytes(digest[:4], "little") >> 1)
