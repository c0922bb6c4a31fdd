"""The on-policy loop that `rl` and `mopd` share.

Each step, in the order of the algorithm: sample, reward, teacher score, advantage, batch, train, update weights, log.
RL and MOPD differ in `LossSettings` (alpha, beta) and in whether there are teachers.

Prompts are submitted in *waves*: one wave per step. With ``max_off_policy_steps = k``, waves ``s .. s + k`` are in
flight while step ``s`` trains, and step ``s`` trains on wave ``s`` exactly, after its last rollout has finished. So
a rollout is at most ``k`` policy versions old when its wave was drawn, no rollout is dropped for being late, and
short answers get no advantage over long ones.

The driver holds object references and scalars; tokens, routes and scores go from worker to learner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from posttrain.advantages import group_advantages, overlong_penalties
from posttrain.clock import Clock
from posttrain.config import AlarmAction, Dtype, Overlong, PolicyAlgorithm, UserError
from posttrain.held_out import HeldOut
from posttrain.learner.group import LearnerGroup, is_window_end
from posttrain.live_teachers import LiveTeachers
from posttrain.monitor import Monitor
from posttrain.preflight import NUM_TEXTS
from posttrain.records import (
    GroupSummary,
    LossSettings,
    Prompt,
    RolloutGroup,
    RolloutStatus,
    SampleRef,
    SamplingSettings,
)
from posttrain.report.rollouts import ScoredRollout, write_rollouts
from posttrain.run_folder import RunFolder
from posttrain.scheduler import Scheduler
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from posttrain.waves import TRAINABLE, Collected, Wave, by_domain, rollout_metrics
from posttrain.weighting import GapFollower, token_weights
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

# Engine and learner may differ by this many times what they differed by at the first update, or by the floor, nat.
PROBE_FACTOR = 5
PROBE_FLOOR = 1e-3


class PolicyLoop:
    """Runs the steps. Everything it drives is started and stopped by its caller.

    Args:
        algorithm: batch size, group size, aggregation, staleness.
        loss: weights and clips of the per-token objective.
        sampling: how training prompts are sampled.
        rewards: None when no reward is configured (MOPD with alpha 0).
        teachers: None in RL.
        probe_texts: token ids whose logprobs engine and learner must agree on after every update.
        probe_tolerance: largest mean |difference| allowed there, nat.
        decode: token ids to text with special tokens, for the written samples.
        held_out: evaluates the policy now and then; None: never.
        gaps: what the domains' mean |advantage| was so far, see `state`.
        alarms: what is done about an alarm, by name.
    """

    def __init__(
        self,
        *,
        algorithm: PolicyAlgorithm,
        loss: LossSettings,
        sampling: SamplingSettings,
        rollout_dtype: Dtype,
        scheduler: Scheduler[Prompt],
        rollouts: RolloutPool,
        learner: LearnerGroup,
        rewards: RewardPool | None,
        teachers: LiveTeachers | None,
        tracker: Tracker,
        folder: RunFolder,
        checkpoint_every: int,
        probe_texts: list[np.ndarray],
        probe_tolerance: float,
        decode: Callable[[np.ndarray], str],
        rollout_samples: int,
        rollout_every_steps: int,
        held_out: HeldOut | None = None,
        gaps: GapFollower | None = None,
        alarms: Mapping[str, AlarmAction] | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.loss = loss
        self.sampling = sampling
        self.rollout_dtype = rollout_dtype
        self.scheduler = scheduler
        self.rollouts = rollouts
        self.learner = learner
        self.rewards = rewards
        self.teachers = teachers
        self.heads: dict[int, ray.ObjectRef] = {}  # as the learner has them
        self.tracker = tracker
        self.folder = folder
        self.checkpoint_every = checkpoint_every
        self.probe_texts = probe_texts
        self.probe_tolerance = probe_tolerance
        self.decode = decode
        self.rollout_samples = rollout_samples
        self.rollout_every_steps = rollout_every_steps
        self.held_out = held_out
        self.gaps = gaps or GapFollower()
        self.waves: dict[int, Wave] = {}
        self.wave_of: dict[str, int] = {}
        self.num_quarantined = len(rollouts.quarantined)  # of former stages on the same workers
        self.num_restarts = rollouts.num_restarts
        self.probe_limit: float | None = None  # set by the first push
        self.alarms = alarms or {}

    def run(self, first_step: int) -> None:
        """Train steps ``first_step .. algorithm.steps`` (1-indexed, inclusive)."""
        last_step = self.algorithm.steps
        self.update_weights(policy_version=first_step - 1)
        monitor = Monitor(self.alarms, self.tracker, read_jsonl(self.folder.path / "metrics.jsonl"))
        if self.held_out is not None and first_step == 1:
            self.tracker.log(0, self.held_out.measure_start(lambda: self.update_weights(0), self.sort_in))
        for step in range(first_step, last_step + 1):
            clock = Clock()
            if self.teachers is not None:
                self.teachers.read_file(step)
            with clock("generate"):
                for ahead in range(step, min(step + self.algorithm.max_off_policy_steps, last_step) + 1):
                    self.submit_wave(ahead)
                wave = self.collect(step, clock)
            if self.teachers is not None:
                if self.teachers.unchecked:
                    with clock("preflight"):
                        try:  # its workers are other processes
                            self.check_teachers(wave, self.teachers)
                        except RayError:
                            self.teachers.check_alive()
                            raise
                self.teachers.check_alive()  # a new teacher whose worker died is gone by now
                self.set_heads(self.teachers.heads)
            samples, metrics = self.batch(wave, step)
            if self.teachers is not None:
                metrics["teacher/version"] = self.teachers.version
            is_sampled_step = step % self.rollout_every_steps == 0 or step == last_step
            if is_sampled_step and self.rollouts.info.records_routes:
                with clock("mismatch"):  # before the update: this policy sampled this batch
                    mismatch = self.learner.mismatch(samples)
                metrics |= {f"replay_check/{name}": value for name, value in mismatch.items()}
            with clock("train"):
                loss = replace(self.loss, max_loss=monitor.max_loss)
                metrics |= self.learner.train_step(samples, loss, step, self.algorithm.updates_per_batch)
            if metrics.get("replay/rejected"):
                for name, reason in self.learner.rejected().items():
                    self.tracker.event(
                        "rollout_rejected", step=step, rollout=name, message=f"{name}: {reason}"
                    )
            with clock("update_weights"):
                metrics |= self.update_weights(policy_version=step)
            self.scheduler.trained(c.summary.group_id for c in wave.done)
            self.gaps.observe(by_domain(metrics, "advantage_abs"))
            if self.held_out is not None and self.held_out.is_due(step, last_step):
                with clock("eval"):
                    metrics |= self.held_out.metrics(step, self.sort_in)
            if self.rollout_samples and is_sampled_step:
                self.write_samples(wave, step)
            if is_window_end(self.learner, step, last_step, metrics):
                self.tracker.expert_load(step, self.learner.expert_load())
            save_now = monitor.check(step, metrics)
            # Logged before it is saved: a crash in between repeats the step, and its line is cut back.
            metrics["rollout/restarts"] = float(self.rollouts.num_restarts - self.num_restarts)
            self.tracker.log(step, metrics | clock.metrics(num_tokens=metrics["tokens/all"]))
            if step % self.checkpoint_every == 0 or step == last_step or save_now:
                self.folder.save(step, self.learner.save_checkpoint, self.state())
            monitor.end()

    def state(self) -> dict[str, Any]:
        """The driver's part of a checkpoint, JSON-able."""
        return {"scheduler": self.scheduler.state(), "gaps": self.gaps.state()}

    # Sample ---------------------------------------------------------------------------------------------------

    def submit_wave(self, step: int) -> None:
        """Draw and submit the prompts of one step, once."""
        if step not in self.waves:
            self.waves[step] = Wave(step=step, waiting=set())
            self.submit(self.waves[step], self.algorithm.prompts_per_step)

    def submit(self, wave: Wave, num_prompts: int) -> None:
        for drawn in self.scheduler.draw(num_prompts):
            wave.waiting.add(drawn.group_id)
            self.wave_of[drawn.group_id] = wave.step
            self.rollouts.submit(drawn.item, self.sampling, drawn.group_id)

    def collect(self, step: int, clock: Clock) -> Wave:
        """Wait for the wave of ``step``, rewards and teacher scores included.

        Consumes finished groups of any wave; unblocked by the last group of this one. With ``drop_equal_groups``
        a group whose rewards are all equal is replaced by another prompt, at most twice the batch per step.
        """
        wave = self.waves[step]
        spare = 2 * self.algorithm.prompts_per_step if self.algorithm.drop_equal_groups else 0
        while True:
            while wave.waiting:
                self.sort_in(self.rollouts.wait(timeout_s=5.0), self.rollouts.pop_lost())
            with clock("reward"):
                self.score_rewards(wave)
            equal = [c for c in wave.done if self.is_equal(c)] if spare > 0 else []
            equal = equal[:spare]
            if not equal:
                break
            spare -= len(equal)
            self.scheduler.trained(c.summary.group_id for c in equal)
            wave.dropped += equal
            wave.done = [c for c in wave.done if c not in equal]
            self.submit(wave, len(equal))
        del self.waves[step]
        # Finished groups come in the order of their luck; the order of drawing makes a batch reproducible.
        wave.done.sort(key=lambda c: c.summary.group_id)
        with clock("teacher"):
            self.score_teachers(wave.done)
        return wave

    def sort_in(self, arrived: list[tuple[Any, GroupSummary]], lost: list[str]) -> None:
        """Put finished groups, and ids of lost ones, where they belong: into the waves in flight."""
        for ref, summary in arrived:
            wave = self.waves[self.wave_of.pop(summary.group_id)]
            wave.waiting.discard(summary.group_id)
            wave.done.append(Collected(ref=ref, summary=summary))
            for error in sorted({error for error in summary.errors if error}):
                self.tracker.event("rollout_dropped", group_id=summary.group_id, error=error)
        for prompt_id, reason in self.rollouts.quarantined[self.num_quarantined :]:
            self.num_quarantined += 1
            self.tracker.event("prompt_quarantined", prompt_id=prompt_id, reason=reason)
        for worker, reason in self.rollouts.pop_restarts():
            self.tracker.event("worker_restarted", worker=worker, reason=reason)
        for group_id in lost:
            self.waves[self.wave_of.pop(group_id)].waiting.discard(group_id)
            self.scheduler.trained([group_id])

    # Reward, teacher score ------------------------------------------------------------------------------------

    def score_rewards(self, wave: Wave) -> None:
        todo = [c for c in wave.done if c.rewards is None]
        if self.rewards is None or not todo:
            return
        scored = self.rewards.score_all([(c.ref, len(c.summary.statuses)) for c in todo])
        for collected, results in zip(todo, scored, strict=True):
            collected.rewards = results
            sampled = zip(results, collected.summary.statuses, strict=True)
            for error in sorted({r.error for r, status in sampled if r.error and status in TRAINABLE}):
                self.tracker.event("reward_error", group_id=collected.summary.group_id, error=error)

    def score_teachers(self, groups: list[Collected]) -> None:
        """All domains at once, results stay with their teacher; waits, so that CPU teachers leave the learner alone."""
        if self.teachers is None:
            return
        by_domain: dict[str, list[Collected]] = defaultdict(list)
        for collected in groups:
            by_domain[collected.summary.domain].append(collected)
        scores = self.teachers.score_all({d: [c.ref for c in members] for d, members in by_domain.items()})
        for domain, members in by_domain.items():
            offset = 0
            for collected in members:
                collected.teacher_ref, collected.teacher_offset = scores[domain], offset
                offset += len(collected.summary.statuses)
        ready, _ = ray.wait(list(scores.values()), num_returns=len(scores), fetch_local=False)
        assert len(ready) == len(scores)
        for worker, reason in self.teachers.pop_restarts():
            self.tracker.event("worker_restarted", worker=worker, reason=reason)

    def check_teachers(self, wave: Wave, teachers: LiveTeachers) -> None:
        """Before a domain's first update by a teacher: the gates that it passes on the student's own samples. A teacher
        that came during the run and fails goes, and the former one scores the wave again.

        Raises:
            UserError: one of the first teachers is wrong, and `teacher_workers.accept` does not name the gate.
        """
        by_domain: dict[str, list[tuple[int, Any, int]]] = defaultdict(list)
        for collected in wave.done:
            summary = collected.summary
            if summary.domain in teachers.unchecked:
                usable = [
                    i
                    for i, status in enumerate(summary.statuses)
                    if status in TRAINABLE and summary.num_loss_tokens[i] > 0
                ]
                by_domain[summary.domain] += [(n, collected.ref, i) for n, i in enumerate(usable)]
        samples = {}
        for domain, found in by_domain.items():  # of as many prompts as there are, then more of each
            chosen = sorted(found, key=lambda entry: entry[0])[:NUM_TEXTS]
            groups = ray.get([ref for _, ref, _ in chosen])
            samples[domain] = [group.rollouts[i] for group, (_, _, i) in zip(groups, chosen, strict=True)]
        scores = {c.summary.domain: c.teacher_ref for c in wave.done}
        for domain in teachers.check(samples, wave.step, scores):
            self.score_teachers([c for c in wave.done if c.summary.domain == domain])

    def set_heads(self, heads: dict[int, ray.ObjectRef]) -> None:
        """Give the learner the LM heads of the teachers in use, when they are others than before."""
        if heads != self.heads:
            self.learner.set_heads(heads)
            self.heads = heads

    def is_equal(self, collected: Collected) -> bool:
        """True when the outcome advantage of every member is zero, so that the group teaches nothing."""
        if self.loss.beta != 0:
            return False
        rewards, valid = self.outcomes(collected)
        return bool(len(set(rewards[valid].tolist())) <= 1)

    def outcomes(self, collected: Collected) -> tuple[np.ndarray, np.ndarray]:
        """Rewards [G] and the mask [G] of rollouts that may be trained on and compared."""
        summary = collected.summary
        valid = np.array(
            [s in TRAINABLE and n > 0 for s, n in zip(summary.statuses, summary.num_loss_tokens, strict=True)]
        )
        if self.algorithm.overlong is Overlong.mask:
            valid &= np.array([s is not RolloutStatus.truncated for s in summary.statuses])
        if collected.rewards is None:
            return np.zeros(len(valid), np.float32), valid
        valid &= np.array([r.error is None for r in collected.rewards])
        return np.array([r.reward for r in collected.rewards], np.float32), valid

    # Advantage, batch -----------------------------------------------------------------------------------------

    def batch(self, wave: Wave, step: int) -> tuple[list[SampleRef], dict[str, float]]:
        """The samples of a step with their advantages and weights, and the metrics of the rollouts."""
        samples: list[SampleRef] = []
        loss_tokens: list[int] = []
        penalties: list[float] = []
        num_mixed = 0
        for collected in wave.done:
            summary = collected.summary
            rewards, valid = self.outcomes(collected)
            advantages = np.zeros(len(rewards), np.float32)
            if self.loss.alpha != 0:
                if self.algorithm.overlong is Overlong.shape:
                    penalty = self.overlong_penalties(summary)
                    penalties += penalty[valid].tolist()
                    rewards = rewards - penalty
                advantages = group_advantages(rewards, valid, self.algorithm.advantage)
                num_mixed += bool(np.any(advantages[valid] != 0))
            for index in np.flatnonzero(valid).tolist():
                loss_tokens.append(summary.num_loss_tokens[index])
                samples.append(
                    SampleRef(
                        source_ref=collected.ref,
                        index=index,
                        num_tokens=summary.num_tokens[index],
                        weight=0.0,
                        teacher_ref=collected.teacher_ref,
                        teacher_index=collected.teacher_offset + index,
                        orm_advantage=float(advantages[index]),
                        domain=summary.domain,
                    )
                )
        if not samples:
            reasons = sorted({e for c in wave.done for e in c.summary.errors if e} | self.reward_errors(wave))
            raise UserError(
                f"step {step}: no rollout of the batch can be trained on: {'; '.join(reasons)[:500] or 'all truncated; raise rollout.max_new_tokens or set algorithm.overlong=keep'}"
            )
        weighting = token_weights(
            loss_tokens,
            [s.domain for s in samples],
            self.algorithm.aggregation,
            self.algorithm.target_shares,
            self.gaps.factors() if self.algorithm.gap_following else None,
            self.algorithm.length_norm,
        )
        for sample, weight in zip(samples, weighting.weights.tolist(), strict=True):
            sample.weight = weight
        metrics = rollout_metrics(wave, step)
        metrics |= {f"share/tokens/{domain}": share for domain, share in weighting.token_shares.items()}
        metrics |= {f"share/target/{domain}": share for domain, share in weighting.target_shares.items()}
        if penalties:
            metrics["reward/overlong_penalty"] = float(np.mean(penalties))
        if self.loss.alpha != 0:
            metrics["reward/mixed_groups"] = num_mixed / len(wave.done)
        return samples, metrics

    def overlong_penalties(self, summary: GroupSummary) -> np.ndarray:
        """[G] what the rewards of a group lose for their length (overlong=shape)."""
        assert self.algorithm.overlong_buffer is not None
        return overlong_penalties(
            np.array(summary.num_loss_tokens),
            np.array([status is RolloutStatus.truncated for status in summary.statuses]),
            self.sampling.max_new_tokens * self.sampling.max_turns,
            self.algorithm.overlong_buffer,
            self.algorithm.overlong_penalty,
        )

    def reward_errors(self, wave: Wave) -> set[str]:
        return {r.error for c in wave.done for r in c.rewards or [] if r.error}

    # Update weights -------------------------------------------------------------------------------------------

    def update_weights(self, policy_version: int) -> dict[str, float]:
        """Push the learner's weights to every rollout worker, and compare each engine with the learner on the probe texts.

        Raises:
            RuntimeError: engine and learner disagree on the probe texts by more than the tolerance.
        """
        bundle = self.learner.export_weights(policy_version, self.rollout_dtype)
        self.rollouts.update_weights(bundle, policy_version)
        texts, engine, routes = [], [], []
        for worker in range(self.rollouts.num_workers):
            logprobs, routed_experts = self.rollouts.score(self.probe_texts, worker)
            texts += self.probe_texts
            engine += logprobs
            routes += routed_experts
        policy = self.learner.logprobs(texts, routes)
        gaps = [np.abs(a - b)[1:] for a, b in zip(engine, policy, strict=True)]
        by_worker = np.array_split(np.array([g.mean() for g in gaps]), self.rollouts.num_workers)
        worst = max(float(part.mean()) for part in by_worker)
        gap = np.concatenate(gaps)
        limit = self.probe_tolerance if self.probe_limit is None else self.probe_limit
        if not all(part.mean() <= limit for part in by_worker):  # also true for NaN
            raise RuntimeError(
                f"policy version {policy_version}: an engine and the learner disagree by {worst:.4f} nat per token on the "
                f"probe texts, above {limit:.4f} (rollout.probe_tolerance={self.probe_tolerance}, and {PROBE_FACTOR} times "
                "the rounding of the first update); the engine does not hold the learner's weights"
            )
        if self.probe_limit is None:
            self.probe_limit = min(self.probe_tolerance, max(PROBE_FACTOR * worst, PROBE_FLOOR))
        return {"probe/mean_abs": float(gap.mean()), "probe/max_abs": float(gap.max())}

    def write_samples(self, wave: Wave, step: int) -> None:
        chosen = wave.done[:: max(1, len(wave.done) // self.rollout_samples)][: self.rollout_samples]
        groups: list[RolloutGroup] = ray.get([c.ref for c in chosen])
        rows = []
        for collected, group in zip(chosen, groups, strict=True):
            rows.append(
                ScoredRollout(
                    rollout=group.rollouts[0],
                    reward=collected.rewards[0] if collected.rewards else None,
                    teacher=ray.get(collected.teacher_ref)[collected.teacher_offset]
                    if collected.teacher_ref
                    else None,
                )
            )
        write_rollouts(self.folder.path, step, rows, self.decode)
