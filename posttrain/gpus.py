"""Which GPUs this machine has and which a run asks for. Imports no torch: it looks at the driver's device files."""

from __future__ import annotations

import glob
import os

from posttrain.config import (
    EvalRun,
    FusedLoss,
    LearnerConfig,
    MOPDRun,
    PipelineRun,
    PolicyRun,
    RunConfig,
    SampleRun,
    SFTRun,
    TeacherBackend,
    UserError,
)


def num_gpus() -> int:
    """NVIDIA GPUs that a process started here may use."""
    devices = glob.glob("/dev/nvidia[0-9]*")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(devices)
    return min(len(devices), len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"]))


def learners_of(cfg: RunConfig) -> list[tuple[str, LearnerConfig]]:
    """(key, section) of every learner that the run has."""
    if isinstance(cfg, PipelineRun):
        return [(f"{name}.learner", getattr(cfg, name).learner) for name in ("sft", "rl", "mopd")]
    return [("learner", cfg.learner)] if isinstance(cfg, SFTRun | PolicyRun) else []


def gpus_of(cfg: RunConfig, available: int) -> dict[str, float]:
    """GPUs by consumer, `{"learner": 2.0, ...}`, under the rules of the pools: what is not said is 1 where there are any."""
    some = 1.0 if available else 0.0
    use: dict[str, float] = {}
    if isinstance(cfg, SFTRun | PolicyRun):
        use["learner"] = _gpus_of_learner(cfg.learner, some)
    if isinstance(cfg, PipelineRun):
        use["learner"] = max(_gpus_of_learner(s.learner, some) for s in (cfg.sft, cfg.rl, cfg.mopd))
    if isinstance(cfg, PolicyRun | PipelineRun | EvalRun | SampleRun):
        each = cfg.rollout.num_gpus_per_worker
        default = some * int(cfg.rollout.vllm.get("tensor_parallel_size", 1))
        use["rollout"] = cfg.rollout.num_workers * (default if each is None else each)
    if isinstance(cfg, MOPDRun | PipelineRun):
        each, counts = cfg.teacher_workers.num_gpus_per_worker, teacher_processes(cfg)
        shared, engines = counts[TeacherBackend.transformers], counts[TeacherBackend.vllm]
        default = some * int(cfg.teacher_workers.vllm.get("tensor_parallel_size", 1))
        use["teacher_workers"] = engines * (default if each is None else each)
        spare = available - sum(use.values()) >= shared
        use["teacher_workers"] += shared * ((1.0 if spare else 0.0) if each is None else each)
    return use


def teacher_processes(cfg: MOPDRun | PipelineRun) -> dict[TeacherBackend, int]:
    """Worker processes by back end: Transformers shares ``num_workers``, a vLLM engine or a server has one of its own."""
    held: dict[TeacherBackend, set[str]] = {backend: set() for backend in TeacherBackend}
    for domain, teacher in cfg.teachers.items():
        held[teacher.backend].add(f"{teacher.path or domain}#{teacher.model}")
    counts = {backend: len(names) for backend, names in held.items()}
    used = held[TeacherBackend.transformers] or not cfg.teachers
    return counts | {TeacherBackend.transformers: cfg.teacher_workers.num_workers if used else 0}


def _gpus_of_learner(learner: LearnerConfig, default: float) -> float:
    each = learner.num_gpus_per_rank
    return learner.num_ranks * (default if each is None else each)


def check_gpus(cfg: RunConfig, notes: list[str]) -> None:
    """Refuse a run that asks for more GPUs than there are; on a cluster only Ray knows, so a note says so."""
    if cfg.ray.address is not None:
        notes.append(f"ray.address={cfg.ray.address}: the cluster's GPUs are not checked here")
        return
    available = num_gpus()
    use = gpus_of(cfg, available)
    for key, learner in learners_of(cfg):
        each = learner.num_gpus_per_rank
        if learner.fused_loss is FusedLoss.liger and (each == 0 or not available):
            raise UserError(
                f"{key}.fused_loss='liger': the learner has no GPU here, and Liger's kernel needs one; use 'off'"
            )
        if each and learner.num_ranks > available:
            raise UserError(
                f"{key}.num_gpus_per_rank={each:g}: each of the {learner.num_ranks} ranks needs a GPU of its own and this"
                f" machine has {available}; give {key}.num_gpus_per_rank=0 or join a cluster with ray.address"
            )
    for name in ("rollout", "teacher_workers"):
        each = getattr(getattr(cfg, name, None), "num_gpus_per_worker", None)
        if each and use[name] > available:
            workers = round(use[name] / each)
            raise UserError(
                f"{name}.num_gpus_per_worker={each:g}: {workers} workers need {use[name]:g} GPUs and this machine has"
                f" {available}; give {name}.num_gpus_per_worker=0 or join a cluster with ray.address"
            )
    if sum(use.values()) > available:
        parts = ", ".join(f"{name} {count:g}" for name, count in use.items() if count)
        raise UserError(
            f"rollout.num_gpus_per_worker=null: the run asks for {sum(use.values()):g} GPUs ({parts}) and this machine has"
            f" {available}; use fewer workers or ranks, or fractions such as rollout.num_gpus_per_worker=0.5 and"
            " learner.num_gpus_per_rank=0.5"
        )
