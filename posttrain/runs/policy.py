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
from posttrain.loop import PolicyLoop
from posttrain.preflight import Preflight, as_json, remarks, table
from posttrain.records import LossSettings, Prompt, SamplingSettings
from posttrain.run_folder import RunFolder, plain
from posttrain.scheduler import Scheduler
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from teachers.gates import GateRow
from teachers.preflight import check_files

PROBE_PROMPTS = 4


def run_policy(
    cfg: RLRun | MOPDRun, engines: Engines | None, teacher_paths: dict[str, str], headline: list[str]
) -> str:
    """Train a policy on its own samples, and return the folder of the finished model.

    Args:
        engines: living processes to use; None starts and ends its own.
        teacher_paths: domain -> checkpoint; empty in RL.
        headline: metrics for the progress display.
    """
    folder = RunFolder.open(cfg)
    if folder.finished:
        print(f"{folder.path}: finished before; nothing to do")
        return str(folder.model)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    prompts = training_prompts(cfg, tokenizer)
    domains = sorted({p.domain for p in prompts})
    scheduler = Scheduler(
        by_source(prompts),
        source_weights(cfg.data),
        cfg.seed,
        identify=lambda p: p.prompt_id.encode() + p.token_ids.tobytes(),
    )
    file_rows = teacher_files(cfg)

    with nullcontext(engines) if engines else Engines(cfg.ray) as engines:
        # Engines start side by side; imports are most of it.
        starting = [
            engines.in_background(
                engines.learner, cfg.learner, cfg.model, total_updates(cfg.algorithm), cfg.seed
            ),
            engines.in_background(engines.rollouts, cfg.rollout, cfg.model, cfg.environments, cfg.seed),
        ]
        rewards = engines.rewards(cfg.rewards, cfg.reward_workers, domains) if cfg.rewards else None
        teachers = None
        needs_teachers = isinstance(cfg, MOPDRun) and cfg.algorithm.beta != 0
        if isinstance(cfg, MOPDRun) and needs_teachers:
            engines.teachers(cfg.teacher_workers, cfg.model, {})
        learner, rollouts = (s.result() for s in starting)
        assert learner.info is not None  # it has its GPUs; the teachers get what is left
        if isinstance(cfg, MOPDRun) and needs_teachers:
            teachers = engines.teachers(
                cfg.teacher_workers, cfg.model, {d: teacher_paths[d] for d in domains}
            )

        # Where a former process of this run stopped.
        first_step = 1
        if checkpoint := folder.latest():
            learner.load_checkpoint(checkpoint.folder)
            scheduler.load_state(checkpoint.state["scheduler"])
            first_step = checkpoint.step + 1
        with Tracker(
            folder.path, cfg.tracking, cfg.name, plain(cfg), cfg.algorithm.steps, first_step - 1, headline
        ) as tracker:
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
                preflight=preflight(cfg, file_rows, folder, tracker),
                rollout_samples=cfg.tracking.rollout_samples,
                rollout_every_steps=cfg.tracking.rollout_every_steps,
            )
            loop.run(first_step)
            folder.write_json("replay.json", replay_report(read_jsonl(folder.path / "metrics.jsonl")))
            learner.save_model(folder.model)
    folder.finish()
    return str(folder.model)


def teacher_files(cfg: RLRun | MOPDRun) -> list[GateRow]:
    """What the files tell of the teachers; in a pipeline they exist only now. Raises `UserError` for a wrong one."""
    if not isinstance(cfg, MOPDRun) or cfg.algorithm.beta == 0:
        return []
    accept = cfg.teacher_workers.accept
    return check_files(cfg.model.path, cfg.teachers, cfg.teachers, cfg.model.revision, accept)


def preflight(
    cfg: RLRun | MOPDRun, file_rows: list[GateRow], folder: RunFolder, tracker: Tracker
) -> Preflight | None:
    """The gates of the teachers, written to events.jsonl and preflight.json and shown as one table."""
    if not isinstance(cfg, MOPDRun) or cfg.algorithm.beta == 0:
        return None

    def record(new: list[GateRow], rows: list[GateRow]) -> None:
        for row in as_json(new):
            tracker.event("preflight", **row)
        folder.write_json("preflight.json", as_json(rows))
        tracker.show(table(rows))
        for line in remarks(new):
            tracker.show(line)

    return Preflight(file_rows, cfg.teachers, cfg.teacher_workers, record)


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
    """Prompts of the run, of one domain where an RL run names one."""
    domain = cfg.domain if isinstance(cfg, RLRun) else None
    return load_prompts(cfg.data, tokenizer, max_prompt_tokens(cfg), domain=domain)


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
        alpha=algorithm.alpha,
        correction=algorithm.correction.value,
        ratio_low=algorithm.ratio_low,
        ratio_high=algorithm.ratio_high,
        ratio_truncate=algorithm.ratio_truncate,
        teacher_clip=algorithm.teacher_clip,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
    )


def total_updates(algorithm: PolicyAlgorithm) -> int:
    """Optimizer steps of the whole run, which the learning-rate schedule spans."""
    return algorithm.steps * algorithm.updates_per_batch


def probe_texts(prompts: list[Prompt]) -> list[np.ndarray]:
    """Fixed texts on which engine and learner must agree after every update: a few of the prompts themselves."""
    stride = max(1, len(prompts) // PROBE_PROMPTS)
    return [p.token_ids for p in prompts[::stride][:PROBE_PROMPTS]]
