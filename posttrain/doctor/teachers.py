"""`posttrain doctor teachers`: are these the right teachers for this student? The preflight of a MOPD run without the run:
what the files tell, then one engine with the student and the teachers' own workers, and the table of all gates.

Owns what is started and sampled. Writes `preflight.json` and events.jsonl to the run folder (`runs/doctor`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console

from posttrain.config import DoctorRun, MOPDRun, RolloutConfig, RunConfig, UserError, require
from posttrain.gpus import check_gpus
from posttrain.preflight import as_json, origins, remarks, score_gates, table, write
from posttrain.records import Prompt, Rollout, RolloutStatus, SamplingSettings
from posttrain.tracking.jsonl import EventsFile
from posttrain.validate import check_engine, check_model
from posttrain.validate_teachers import check_teacher_workers
from teachers.check import teacher_gates
from teachers.gates import UNLOADABLE, GateRow, Verdict, judge
from teachers.teacher import Teacher, resolve

if TYPE_CHECKING:
    from rollout.pool import RolloutPool

UNSCORABLE = (*UNLOADABLE, "vocabulary", "tensors", "weights")  # red here: nothing to score with
USABLE = (RolloutStatus.completed, RolloutStatus.truncated)


def run(cfg: RunConfig) -> int:
    """Print the table; returns 1 if a red line is not accepted, else 0. Raises `UserError` for bad input before engines
    start."""
    cfg = cast(DoctorRun, cfg)
    console = Console()
    rollout = check_input(cfg)
    from posttrain.data.sources import load_prompts
    from posttrain.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    room = rollout.max_model_len - rollout.max_new_tokens
    prompts = load_prompts(cfg.data, tokenizer, room, domain=cfg.domain)
    domains = {prompt.domain for prompt in prompts}
    accept = cfg.teacher_workers.accept
    teachers = resolve(cfg.teachers, domains, cfg.model.path, cfg.domain)
    rows = judge(teacher_gates(teachers, cfg.model, cfg.teacher_workers, rollout.max_model_len), accept)
    unloadable = [row for row in rows if row.verdict is Verdict.red and row.gate in UNSCORABLE]
    if not cfg.dry_run and not unloadable:
        console.print("starting an engine with the student, and the teachers ...", highlight=False)
        rows = judge([*rows, *_measure(cfg, teachers, rollout, prompts, rows)], accept)
    return report(cfg, console, rows, scored=not cfg.dry_run and not unloadable)


def check_input(cfg: DoctorRun) -> RolloutConfig:
    """The engine as configured, but alone, with short answers and within the model's context. Raises `UserError`."""
    require(bool(cfg.model.path), "model.path", cfg.model.path, "give the student: model.path=DIR")
    require(bool(cfg.teachers), "teachers", {}, "give a teacher for each domain: teachers.DOMAIN.path=DIR")
    model = check_model(cfg.model.path, revision=cfg.model.revision)
    check_teacher_workers(cfg)
    as_run = MOPDRun(
        model=cfg.model,
        ray=cfg.ray,
        rollout=cfg.rollout,
        teachers=cfg.teachers,
        teacher_workers=cfg.teacher_workers,
    )
    as_run.learner.num_gpus_per_rank = 0
    check_gpus(as_run, [])
    max_model_len = min(cfg.rollout.max_model_len, model.context or cfg.rollout.max_model_len)
    num_tokens = {
        "teacher_check.max_new_tokens": cfg.teacher_check.max_new_tokens,
        "rollout.max_new_tokens": cfg.rollout.max_new_tokens,
    }
    key = min(num_tokens, key=lambda name: num_tokens[name])
    problem = f"leaves no room for a prompt in rollout.max_model_len={max_model_len}; lower it or raise that"
    require(num_tokens[key] < max_model_len, key, num_tokens[key], problem)
    rollout = replace(cfg.rollout, num_workers=1, max_new_tokens=num_tokens[key], max_model_len=max_model_len)
    check_engine(rollout, model)
    return rollout


def report(cfg: DoctorRun, console: Console, rows: list[GateRow], scored: bool) -> int:
    """Table, what to do, verdict; and the same in the folder."""
    console.print(table(rows))
    for line in remarks(rows):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    folder = Path(cfg.runs_dir) / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, rows)
    events = EventsFile(folder / "events.jsonl")
    for row in as_json(rows):
        events.write("preflight", row)
    events.close()
    if not scored:
        reason = "dry run" if cfg.dry_run else "mend what is red, or accept it by name, first"
        console.print(f"the gates that need scores were not measured: {reason}", highlight=False)
    red = [row for row in rows if row.verdict is Verdict.red]
    num_warned = sum(row.verdict is Verdict.warn for row in rows)
    text = f"{len(rows)} gates, {len(red)} red, {num_warned} warn; {folder / 'preflight.json'}"
    console.print(text, style="red" if red else "green", soft_wrap=True, highlight=False)
    return 1 if red else 0


def _measure(
    cfg: DoctorRun,
    teachers: dict[str, Teacher],
    rollout: RolloutConfig,
    prompts: list[Prompt],
    rows: list[GateRow],
) -> list[GateRow]:
    from posttrain.engines import Engines

    with Engines(cfg.ray) as engines:
        starting = engines.in_background(engines.rollouts, rollout, cfg.model, {}, cfg.seed)
        engines.teachers(cfg.teacher_workers, cfg.model, {})
        samples = sample(
            cfg, starting.result(), prompts, rollout
        )  # it has its GPU; the teachers get the rest
        pool = engines.teachers(cfg.teacher_workers, cfg.model, teachers)
        return score_gates(pool, samples, teachers, cfg.teacher_workers, origins(rows))


def sample(
    cfg: DoctorRun, pool: RolloutPool, prompts: list[Prompt], rollout: RolloutConfig
) -> dict[str, list[Rollout]]:
    """One answer of the student to ``teacher_check.num_samples`` prompts of every domain, spread over the data."""
    import ray

    for domain in sorted({prompt.domain for prompt in prompts}):
        own = [prompt for prompt in prompts if prompt.domain == domain]
        count = min(cfg.teacher_check.num_samples, len(own))
        for i in range(count):
            settings = SamplingSettings(max_new_tokens=rollout.max_new_tokens, seed=cfg.seed + i)
            pool.submit(own[i * len(own) // count], settings, f"{domain}-{i:04d}")
    groups = sorted(ray.get([ref for ref, _ in pool.drain()]), key=lambda group: group.group_id)
    samples: dict[str, list[Rollout]] = {}
    for group in groups:
        found = group.rollouts[0]
        if found.status in USABLE and found.loss_mask.any():
            samples.setdefault(found.domain, []).append(found)
    for domain in sorted({prompt.domain for prompt in prompts}):
        if domain not in samples:
            errors = [g.rollouts[0].error for g in groups if g.prompt.domain == domain]
            raise UserError(f"data: the student gave no usable answer in domain {domain!r} ({errors[:1]})")
    return samples
