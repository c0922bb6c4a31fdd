"""Held-out evaluation while a policy trains: accuracy per domain with its interval, and how far it has come.

Owns the start model's and the teachers' accuracies, kept in ``eval_start.json`` of the run folder: they are measured once,
before the first step, and belong to what they were measured on. Training does not notice an evaluation: it draws nothing
from the scheduler, samples from seeds of its own, and the engines' random numbers go on where they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from posttrain.config import StepEvalConfig
from posttrain.records import Prompt, SamplingSettings
from posttrain.report.bootstrap import standard_error
from posttrain.run_folder import RunFolder
from posttrain.runs.evaluate import Others, evaluate
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

START_FILE = "eval_start.json"
Z = 1.96  # 95 %
MIN_GAIN = 0.02  # of a teacher over the start model; below it a share of the way means nothing


class HeldOut:
    """Evaluates the policy that the rollout workers hold.

    Args:
        prompts: held-out prompts of every domain.
        settings: how they are sampled, with a seed.
        measured_on: what else the accuracies at the start depend on: model, teachers, rewards, environments.
        teacher_paths: domain -> checkpoint of the teachers to measure; empty for none.
        event: notes what could not be measured; a domain with a failed rollout or reward has no accuracy at that step,
            and neither has the mean, but training goes on.
    """

    def __init__(
        self,
        cfg: StepEvalConfig,
        prompts: dict[str, list[Prompt]],
        settings: SamplingSettings,
        rollouts: RolloutPool,
        rewards: RewardPool,
        folder: RunFolder,
        measured_on: dict[str, Any],
        teacher_paths: dict[str, str],
        event: Callable[..., None],
    ) -> None:
        assert settings.seed is not None, "an evaluation samples from seeds of its own"
        self._every_steps = cfg.every_steps
        self._prompts = prompts
        self._settings = settings
        self._rollouts = rollouts
        self._rewards = rewards
        self._folder = folder
        self._event = event
        self._teacher_paths = {d: path for d, path in teacher_paths.items() if d in prompts}
        ids = json.dumps([[p.prompt_id for p in members] for members in prompts.values()])
        self._measured_on = measured_on | {
            "settings": asdict(settings),
            "prompts": hashlib.sha256(ids.encode()).hexdigest(),
            "teachers": self._teacher_paths,
        }
        former = folder.read_json(START_FILE)
        self._start = former if former and former["measured_on"] == self._measured_on else None

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether the policy is evaluated after ``step``."""
        return step % self._every_steps == 0 or step == last_step

    def measure_start(self, restore_weights: Callable[[], Any], others: Others) -> dict[str, float]:
        """Metrics of the model that training starts from, and of the teachers on their own domains. Measures what a
        former attempt at the first step has not. ``restore_weights`` puts the policy back after the teachers."""
        if self._start is None:
            start = self._evaluate(0, self._prompts, others)
            teachers: dict[str, dict[str, float]] = {}
            for domain, path in self._teacher_paths.items():
                self._rollouts.load_checkpoint(path, 0)
                teachers |= self._evaluate(0, {domain: self._prompts[domain]}, others)
            if teachers:
                restore_weights()
            self._start = {"measured_on": self._measured_on, "start": start, "teachers": teachers}
            self._folder.write_json(START_FILE, self._start)
        metrics = self._flat(self._start["start"])
        for domain, teacher in self._start["teachers"].items():
            metrics[f"eval/{domain}/teacher"] = teacher["accuracy"]
        return metrics

    def metrics(self, step: int, others: Others) -> dict[str, float]:
        """Accuracies of the present policy; where those of the start are known also eval/<domain>/gain, and
        eval/<domain>/headroom where the teacher's is."""
        now = self._evaluate(step, self._prompts, others)
        metrics = self._flat(now)
        known = self._start or {"start": {}, "teachers": {}}
        for domain, start in known["start"].items():
            if domain not in now:
                continue
            gain = now[domain]["accuracy"] - start["accuracy"]
            metrics[f"eval/{domain}/gain"] = gain
            teacher = known["teachers"].get(domain)
            if teacher and (way := teacher["accuracy"] - start["accuracy"]) >= MIN_GAIN:
                metrics[f"eval/{domain}/headroom"] = gain / way
        return metrics

    def _evaluate(
        self, step: int, prompts: dict[str, list[Prompt]], others: Others
    ) -> dict[str, dict[str, float]]:
        failed: dict[str, str] = {}
        with self._rollouts.keep_random_state():
            scores = evaluate(self._rollouts, self._rewards, prompts, self._settings, None, others, failed)
        for domain, why in failed.items():
            message = f"step {step}: no accuracy of {domain}: {why}"
            self._event("eval_incomplete", step=step, domain=domain, message=message)
        return {domain: accuracy(rewards) for domain, rewards in scores.sampled.items()}

    def _flat(self, accuracies: dict[str, dict[str, float]]) -> dict[str, float]:
        """eval/<domain>, eval/<domain>/low and /high, and eval/all, the mean over the domains, where none is missing."""
        metrics = {}
        if len(accuracies) == len(self._prompts):
            metrics["eval/all"] = float(np.mean([a["accuracy"] for a in accuracies.values()]))
        for domain, found in accuracies.items():
            metrics[f"eval/{domain}"] = found["accuracy"]
            metrics |= {f"eval/{domain}/{end}": found[end] for end in ("low", "high")}
        return metrics


def accuracy(rewards: np.ndarray) -> dict[str, float]:
    """accuracy, low and high of rewards [num_prompts, num_samples]: the mean and its 95 % interval.

    Rewards in [0, 1]: Wilson's score interval for as many independent answers as give the standard error over prompts,
    so that samples of one prompt are not counted as independent, and 0 of 20 is not "0 for certain". Others: mean and
    1.96 standard errors.
    """
    mean, error = float(rewards.mean()), standard_error(rewards)
    if rewards.min() < 0 or rewards.max() > 1:
        return {"accuracy": mean, "low": mean - Z * error, "high": mean + Z * error}
    num = mean * (1 - mean) / error**2 if error > 0 else float(len(rewards))
    centre = (mean + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * np.sqrt(mean * (1 - mean) / num + Z**2 / (4 * num**2))
    return {"accuracy": mean, "low": float(max(0.0, centre - half)), "high": float(min(1.0, centre + half))}
