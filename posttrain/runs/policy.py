"""What `rl` and `mopd` share: prompts, engines, the loop, the finished model."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.config import MOPDRun, PolicyAlgorithm, PolicyRun, RLRun
from posttrain.data.sources import load_prompts, source_weights
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.held_out import HeldOut
from posttrain.live_teachers import LiveTeachers, Record
from posttrain.loop import PolicyLoop
from posttrain.preflight import Preflight, as_json, remarks, table
from posttrain.records import LossSettings, Prompt, SamplingSettings
from posttrain.run_folder import RunFolder, plain
from posttrain.runs import evaluate
from posttrain.scheduler import Scheduler
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from posttrain.weighting import GapFollower
from rewards.pool import RewardPool
from rollout.pool import RolloutPool
from teachers.check import check_teachers
from teachers.checkpoint import locate
from teachers.fingerprint import fingerprint
from teachers.gates import GateRow
from teachers.teacher import Teacher, resolve

PROBE_PROMPTS = 4


def run_policy(cfg: RLRun | MOPDRun, engines: Engines | None, headline: list[str]) -> str:
    """Train a policy on its own samples, and return the folder of the finished model.

    Args:
        engines: living processes to use; None starts and ends its own.
        headline: metrics for the progress display.
    """
    folder = RunFolder.open(cfg)
    if folder.finished:
        print(f"{folder.path}: finished before; nothing to do")
        folder.close()
        return str(folder.model)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    prompts = training_prompts(cfg, tokenizer)
    domains = sorted({p.domain for p in prompts})
    held_out_prompts = evaluation_prompts(cfg, tokenizer)
    taught: dict[str, Teacher] = {}
    record: Record | None = None
    file_rows: list[GateRow] = []
    if isinstance(cfg, MOPDRun) and cfg.algorithm.beta != 0:
        taught = resolve(cfg.teachers, domains, cfg.model.path, cfg.domain)
        record = Record.read(folder, taught)
        file_rows = teacher_files(cfg, record.teachers)
    scheduler = Scheduler(
        by_source(prompts),
        source_weights(cfg.data),
        cfg.seed,
        identify=lambda p: p.prompt_id.encode() + p.token_ids.tobytes(),
    )

    with nullcontext(engines) if engines else Engines.of(cfg) as engines:
        # Engines start side by side; imports are most of it.
        starting = [
            engines.in_background(
                engines.learner, cfg.learner, cfg.model, total_updates(cfg.algorithm), cfg.seed
            ),
            engines.in_background(engines.rollouts, cfg.rollout, cfg.model, cfg.environments, cfg.seed),
        ]
        rewarded = sorted({*domains, *held_out_prompts})
        rewards = engines.rewards(cfg.rewards, cfg.reward_workers, rewarded) if cfg.rewards else None
        pool = None
        if isinstance(cfg, MOPDRun) and record is not None:
            engines.teachers(cfg.teacher_workers, cfg.model, {})
        learner, rollouts = (s.result() for s in starting)
        assert learner.info is not None  # it has its GPUs; the teachers get what is left
        if isinstance(cfg, MOPDRun) and record is not None:
            pool = engines.teachers(
                cfg.teacher_workers,
                cfg.model,
                record.teachers,
                cfg.algorithm.signal.value,
                cfg.algorithm.top_k,
            )

        # Where a former process of this run stopped.
        first_step, gaps = 1, GapFollower()
        if checkpoint := folder.latest():
            learner.load_checkpoint(checkpoint.folder)
            scheduler.load_state(checkpoint.state["scheduler"])
            gaps = GapFollower(checkpoint.state.get("gaps"))
            first_step = checkpoint.step + 1
        with Tracker(
            folder.path, cfg.tracking, cfg.name, plain(cfg), cfg.algorithm.steps, first_step - 1, headline
        ) as tracker:
            teachers = None
            if pool is not None and record is not None and isinstance(cfg, MOPDRun):
                checks = preflight(cfg, record.teachers, file_rows, folder, tracker)
                teachers = LiveTeachers(pool, record, cfg, folder, tracker, checks)
            loop = PolicyLoop(
                algorithm=cfg.algorithm,
                loss=loss_settings(cfg.algorithm),
                sampling=training_sampling(cfg),
                rollout_dtype=cfg.rollout.dtype,
                scheduler=scheduler,
                rollouts=rollouts,
                learner=learner,
                rewards=rewards,
                teachers=teachers,
                tracker=tracker,
                folder=folder,
                checkpoint_every=cfg.checkpoint.every_steps,
                probe_texts=probe_texts(prompts),
                probe_tolerance=cfg.rollout.probe_tolerance,
                decode=lambda token_ids: tokenizer.decode(token_ids.tolist(), skip_special_tokens=False),
                rollout_samples=cfg.tracking.rollout_samples,
                rollout_every_steps=cfg.tracking.rollout_every_steps,
                held_out=held_out(cfg, held_out_prompts, rollouts, rewards, folder, taught, tracker),
                gaps=gaps,
                alarms=cfg.tracking.alarms,
            )
            loop.run(first_step)
            folder.write_json("replay.json", replay_report(read_jsonl(folder.path / "metrics.jsonl")))
            learner.save_model(folder.model)
    folder.finish()
    return str(folder.model)


def teacher_files(cfg: MOPDRun, teachers: dict[str, Teacher]) -> list[GateRow]:
    """What can be told of the teachers before engines start; those of a pipeline exist only now. Raises `UserError` for
    a wrong one."""
    signal, top_k = cfg.algorithm.signal.value, cfg.algorithm.top_k
    return check_teachers(teachers, cfg.model, cfg.teacher_workers, cfg.rollout.max_model_len, signal, top_k)


def preflight(
    cfg: MOPDRun,
    teachers: dict[str, Teacher],
    file_rows: list[GateRow],
    folder: RunFolder,
    tracker: Tracker,
) -> Preflight:
    """The gates of the teachers, written to events.jsonl and preflight.json and shown as one table."""

    def record(new: list[GateRow], rows: list[GateRow]) -> None:
        for row in as_json(new):
            tracker.event("preflight", **row)
        folder.write_json("preflight.json", as_json(rows))
        tracker.show(table(rows))
        for line in remarks(new):
            tracker.show(line)

    return Preflight(file_rows, teachers, cfg.teacher_workers, record)


def replay_report(steps: list[dict[str, float]]) -> dict[str, float] | None:
    """What routing replay did in this run: the mean over the steps that measured it with and without, None without MoE.

    Coverage is the smallest of all steps, 0 where nothing was replayed.
    """
    prefix = "replay_check/"
    measured = [{k.removeprefix(prefix): v for k, v in s.items() if k.startswith(prefix)} for s in steps]
    measured = [m for m in measured if m]
    if not measured:
        return None
    report = {name: float(np.mean([m[name] for m in measured])) for name in measured[0]}
    report["coverage"] = min((s["replay/coverage"] for s in steps if "replay/coverage" in s), default=0.0)
    return report | {"num_batches": len(measured)}


def training_prompts(cfg: RLRun | MOPDRun, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Prompts of the run, of one domain where it names one."""
    return load_prompts(cfg.data, tokenizer, max_prompt_tokens(cfg), domain=cfg.domain)


def evaluation_prompts(cfg: RLRun | MOPDRun, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Prompt]]:
    """Held-out prompts by domain, of one domain where an RL run names one; empty when nothing is evaluated."""
    if not cfg.eval.every_steps:
        return {}
    domain = cfg.domain if isinstance(cfg, RLRun) else None
    prompts = load_prompts(cfg.data, tokenizer, max_prompt_tokens(cfg), eval=True, domain=domain)
    return evaluate.held_out(prompts, cfg.eval.num_prompts)


def held_out(
    cfg: RLRun | MOPDRun,
    prompts: dict[str, list[Prompt]],
    rollouts: RolloutPool,
    rewards: RewardPool | None,
    folder: RunFolder,
    taught: dict[str, Teacher],
    tracker: Tracker,
) -> HeldOut | None:
    """What evaluates the policy while it trains; None when nothing does."""
    if not prompts:
        return None
    assert rewards is not None, "posttrain.validate refuses an evaluation without rewards"
    settings = SamplingSettings(
        group_size=cfg.eval.num_samples,
        max_new_tokens=cfg.rollout.max_new_tokens,
        max_turns=cfg.rollout.max_turns,
        temperature=cfg.eval.temperature,
        seed=cfg.seed,
    )
    measured_on = {
        "model": fingerprint(cfg.model.path, "model.path", cfg.model.revision),
        "rewards": cfg.rewards,
        "environments": cfg.environments,
    }
    teachers = (
        {d: str(locate(t.path, f"{t.key}.path", t.revision)) for d, t in taught.items()}
        if cfg.eval.teachers
        else {}
    )
    return HeldOut(
        cfg.eval, prompts, settings, rollouts, rewards, folder, measured_on, teachers, tracker.event
    )


def max_prompt_tokens(cfg: PolicyRun) -> int:
    """Longest prompt that leaves room for one completion in the engine's context."""
    return cfg.rollout.max_model_len - cfg.rollout.max_new_tokens


def by_source(prompts: list[Prompt]) -> dict[str, list[Prompt]]:
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.source].append(prompt)
    return dict(groups)


def training_sampling(cfg: PolicyRun) -> SamplingSettings:
    return SamplingSettings(
        group_size=cfg.algorithm.group_size,
        max_new_tokens=cfg.rollout.max_new_tokens,
        max_turns=cfg.rollout.max_turns,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
    )


def loss_settings(algorithm: PolicyAlgorithm) -> LossSettings:
    return LossSettings(
        kind=algorithm.loss.value,
        beta=algorithm.beta,
        signal=algorithm.signal.value,
        top_k=algorithm.top_k,
        alpha=algorithm.alpha,
        correction=algorithm.correction.value,
        ratio_low=algorithm.ratio_low,
        ratio_high=algorithm.ratio_high,
        ratio_truncate=algorithm.ratio_truncate,
        teacher_clip=algorithm.teacher_clip,
        clip_low=algorithm.clip_low or 0.0,  # None where the loss has no PPO clip
        clip_high=algorithm.clip_high or 0.0,
    )


def total_updates(algorithm: PolicyAlgorithm) -> int:
    """Optimizer steps of the whole run, which the learning-rate schedule spans."""
    return algorithm.steps * algorithm.updates_per_batch


def probe_texts(prompts: list[Prompt]) -> list[np.ndarray]:
    """Fixed texts on which engine and learner must agree after every update: a few of the prompts themselves."""
    stride = max(1, len(prompts) // PROBE_PROMPTS)
    return [p.token_ids for p in prompts[::stride][:PROBE_PROMPTS]]
