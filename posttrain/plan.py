"""What a run would be made of, for `dry_run=true` and `doctor`: processes, cores, GPUs, rough memory, data counts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from posttrain.config import (
    DataConfig,
    Dtype,
    EvalRun,
    LearnerConfig,
    MOPDRun,
    PipelineRun,
    PolicyRun,
    RLRun,
    RolloutConfig,
    RunConfig,
    SampleRun,
    SFTRun,
    TeacherBackend,
)
from posttrain.data.sources import source_weights
from posttrain.gpus import gpus_of, learners_of, num_gpus, teacher_processes
from posttrain.run_folder import plain
from posttrain.validate import Report
from teachers.gates import GateRow, Verdict

BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}


@dataclass(kw_only=True, slots=True)
class Processes:
    """One kind of worker process. Memory is for weights, gradients and optimizer states; activations come on top."""

    name: str
    count: int
    cores: int  # of each, on a CPU
    gpus: float  # of all
    gib: float | None  # of all; None where the model is not known


def processes(cfg: RunConfig, num_parameters: int | None) -> list[Processes]:
    """Every kind of process that the run starts beside the driver and Ray's own."""
    use = gpus_of(cfg, num_gpus())
    found: list[Processes] = []
    if learner := _learner(cfg):
        cores = learner.cores_per_rank or max(1, len(os.sched_getaffinity(0)) // learner.num_ranks)
        # weights, gradients, and AdamW's two moments with the master weights in float32; the factors of adapters, a percent
        # or so, are left out
        each = 2 * BYTES[learner.dtype] + (8 if learner.dtype is Dtype.float32 else 12)
        each = each if learner.lora.rank == 0 else BYTES[learner.dtype]
        copies = 1 if learner.zero_stage == 3 else learner.num_ranks
        found.append(
            _row("learner", learner.num_ranks, cores, use.get("learner", 0), num_parameters, each * copies)
        )
    if isinstance(cfg, PolicyRun | PipelineRun | EvalRun | SampleRun):
        rollout: RolloutConfig = cfg.rollout
        each = BYTES[rollout.dtype] * rollout.num_workers
        found.append(
            _row(
                "rollout", rollout.num_workers, rollout.cores_per_worker, use["rollout"], num_parameters, each
            )
        )
        if cfg.rewards:
            count = cfg.reward_workers.num_workers
            found.append(Processes(name="rewards", count=count, cores=1, gpus=0, gib=0.3 * count))
    if isinstance(cfg, PipelineRun) or (isinstance(cfg, MOPDRun) and cfg.algorithm.beta != 0):
        teachers = cfg.teacher_workers
        cores = teachers.cores_per_worker or len(os.sched_getaffinity(0))
        count = sum(teacher_processes(cfg).values())
        bases = {(t.backend, t.path or (t.adapter and cfg.model.path) or d) for d, t in cfg.teachers.items()}
        local = [base for base in bases if base[0] is not TeacherBackend.server]
        each = BYTES[teachers.dtype] * (len(local) if bases else 1)
        found.append(_row("teachers", count, cores, use["teacher_workers"], num_parameters, each))
    return found


def process_table(cfg: RunConfig, num_parameters: int | None, title: str) -> Table:
    """`processes` as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("processes")
    for name in ("count", "cores each", "GPUs", "GiB of weights"):
        table.add_column(name, justify="right")
    for row in processes(cfg, num_parameters):
        memory = "?" if row.gib is None else f"{row.gib:.2f}"
        table.add_row(row.name, str(row.count), str(row.cores), f"{row.gpus:g}", memory)
    learner = _learner(cfg)
    if learner is not None and learner.lora.target_parameters:
        table.caption_justify = "left"
        table.caption = (
            "not in it: of the weights in learner.lora.target_parameters another whole copy, on every rank, from forward to"
            " backward; learner.gradient_checkpointing=true keeps the copies of one layer at a time"
        )
    return table


def closing_line(command: str, cfg: RunConfig) -> str:
    """The last line of a dry run, with what only the learner can check."""
    learners = [learner for _, learner in learners_of(cfg)]
    left = [
        *(["the targets of learner.lora"] if any(learner.lora.rank for learner in learners) else []),
        *(["the options in learner.deepspeed"] if any(learner.deepspeed for learner in learners) else []),
    ]
    but = f" but {' and '.join(left)}, which the learner checks as it loads" if left else ""
    sections = [
        name for name in ("rollout", "teacher_workers") if getattr(getattr(cfg, name, None), "vllm", None)
    ]
    if sections:
        values = " and ".join(f"{name}.vllm" for name in sections)
        but += f"{', and' if but else ' but'} the values in {values}, which vLLM checks as it starts"
    return f"dry run of `posttrain {command}`: everything checked{but}; nothing started"


def print_plan(command: str, cfg: RunConfig, report: Report, folder: str) -> None:
    """The resolved configuration, then what was checked and would run; ``folder`` says where it would start."""
    import yaml

    print(yaml.safe_dump(plain(cfg), sort_keys=False, width=100), end="")
    console = Console()
    console.print(f"\nfolder    {folder}", soft_wrap=True, highlight=False, markup=False)
    model = report.model
    kind = f"{model.num_experts} experts a layer" if model.num_experts else "dense"
    console.print(
        f"model     {model.path}: {model.architecture}, {model.num_parameters / 1e6:,.1f} M parameters, {kind}",
        soft_wrap=True,
        highlight=False,
    )
    for name, counts in (
        ("SFT rows", report.num_conversations),
        ("held out", report.num_eval_conversations),
        ("prompts", report.num_prompts),
        ("held out", report.num_eval_prompts),
    ):
        if counts:
            console.print(
                f"{name:<9} " + ", ".join(f"{domain} {n:,}" for domain, n in counts.items()), highlight=False
            )
    for key, data in _training_data(cfg):
        weights = source_weights(data)
        if len(weights) > 1:
            shares = ", ".join(f"{name} {w / sum(weights.values()):.1%}" for name, w in weights.items())
            console.print(f"mixture   {key}: {shares}", soft_wrap=True, highlight=False, markup=False)
    for domain, named in {row.domain: row for row in report.teachers}.items():
        words = "; ".join(_gates([row for row in report.teachers if row.domain == domain])) or "ok"
        text = f"teacher   {domain}: {named.path} ({named.backend}; {words})"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note      {note}", soft_wrap=True, highlight=False)
    if processes(cfg, None):
        console.print(process_table(cfg, model.num_parameters, "would start"))
    console.print(closing_line(command, cfg), soft_wrap=True, highlight=False)


def _training_data(cfg: RunConfig) -> list[tuple[str, DataConfig]]:
    """What is drawn from by weight, with its key. A domain alone has no mixture."""
    if isinstance(cfg, PipelineRun):
        return [("sft_data", cfg.sft_data), ("data", cfg.data)]
    if isinstance(cfg, SFTRun) or (isinstance(cfg, RLRun | MOPDRun) and cfg.domain is None):
        return [("data", cfg.data)]
    return []


def _gates(rows: list[GateRow]) -> list[str]:
    """What is not simply ok, in words."""
    found = [f"{row.gate} {row.verdict.value}: {row.problem}" for row in rows if row.problem]
    unmeasured = [row.gate for row in rows if row.verdict is Verdict.unmeasured]
    return found + ([f"not measured: {', '.join(unmeasured)}"] if unmeasured else [])


def _learner(cfg: RunConfig) -> LearnerConfig | None:
    if isinstance(cfg, PipelineRun):
        return cfg.mopd.learner
    return cfg.learner if isinstance(cfg, SFTRun | PolicyRun) else None


def _row(
    name: str, count: int, cores: int, gpus: float, num_parameters: int | None, bytes_per_parameter: float
) -> Processes:
    gib: Any = None if num_parameters is None else num_parameters * bytes_per_parameter / 2**30
    return Processes(name=name, count=count, cores=cores, gpus=gpus, gib=gib)
