"""Checks of teachers before any engine starts: who teaches what, what evaluation on the way needs, and the gates that
read files alone. A part of `posttrain.validate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.config import (
    DoctorRun,
    MOPDRun,
    PipelineRun,
    PolicyRun,
    RLRun,
    RunConfig,
    TeacherBackend,
    TeacherTraining,
    require,
)
from rollout.options import check_options
from teachers.check import check_teachers
from teachers.checkpoint import locate, read_config
from teachers.gates import GateRow
from teachers.options import FIXED_OPTIONS, OWNED_OPTIONS
from teachers.teacher import DEFAULT, build, owners, resolve

if TYPE_CHECKING:
    from posttrain.validate import Report


def check_step_eval(cfg: RunConfig, report: Report) -> None:
    """Evaluation while a policy trains: rewards to score with, and teachers that the student's engines can hold."""
    if isinstance(cfg, PipelineRun):
        policies = {"rl.eval": (cfg.rl.eval, cfg.rewards), "mopd.eval": (cfg.mopd.eval, cfg.rewards)}
    elif isinstance(cfg, PolicyRun):
        policies = {"eval": (cfg.eval, cfg.rewards)}
    else:
        return
    for key, (step_eval, rewards) in policies.items():
        require(
            not step_eval.every_steps or bool(rewards),
            f"{key}.every_steps",
            step_eval.every_steps,
            "an accuracy needs rewards; give rewards._target_=MODULE.CLASS, or 0",
        )
        require(
            not step_eval.teachers
            or (step_eval.every_steps > 0 and key != "rl.eval" and not isinstance(cfg, RLRun)),
            f"{key}.teachers",
            step_eval.teachers,
            "only MOPD with eval.every_steps > 0 has teachers to evaluate; leave it at false",
        )
    if isinstance(cfg, MOPDRun) and cfg.eval.teachers and cfg.algorithm.beta != 0:
        student = _architecture(cfg.model.path, "model.path", cfg.model.revision)
        for teacher in resolve(cfg.teachers, report.num_prompts, cfg.model.path, cfg.domain).values():
            require(
                teacher.backend is not TeacherBackend.server and teacher.adapter is None,
                "eval.teachers",
                True,
                f"{teacher.key} is no whole checkpoint, which the student's engines could load; set it to false",
            )
            require(
                _architecture(teacher.path, f"{teacher.key}.path", teacher.revision) == student,
                "eval.teachers",
                True,
                f"{teacher.key}.path has another shape than the student, whose engines evaluate it; set it to false",
            )


def _architecture(path: str, key: str, revision: str | None = None) -> dict[str, Any]:
    config = read_config(locate(path, key, revision), key)
    return {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}


def check_run_teachers(cfg: MOPDRun | PipelineRun, report: Report) -> list[GateRow]:
    """Every domain has its teacher and every teacher its prompts; then the gates that need no engine."""
    check_teacher_workers(cfg)
    max_tokens = cfg.rollout.max_model_len
    if isinstance(cfg, MOPDRun):
        if cfg.algorithm.beta == 0:
            return []
        return check_teachers(
            resolve(cfg.teachers, report.num_prompts, cfg.model.path, cfg.domain),
            cfg.model,
            cfg.teacher_workers,
            max_tokens,
            cfg.algorithm.signal.value,
            cfg.algorithm.top_k,
        )
    for domain in report.num_prompts:
        require(
            domain in cfg.teachers or DEFAULT in cfg.teachers,
            f"teachers.{domain}",
            None,
            f"prompts of domain {domain!r} have no teacher; give teachers.{domain}.train=rl (or path=DIR)",
        )
        require(
            domain in report.num_eval_prompts,
            "data.eval_sources",
            sorted(report.num_eval_prompts),
            f"no held-out prompts of domain {domain!r}; the table needs some of every domain",
        )
    for domain in report.num_eval_prompts:
        require(
            domain in report.num_prompts,
            "data.eval_sources",
            sorted(report.num_eval_prompts),
            f"held-out prompts of domain {domain!r}, which has neither training prompts nor a teacher; remove them, or"
            f" give it a source in data.sources and teachers.{domain}.train=rl",
        )
    owner = owners(cfg.teachers, report.num_prompts)
    for name, teacher in cfg.teachers.items():
        require(
            name in owner.values(),
            f"teachers.{name}",
            teacher.path,
            f"no prompt belongs to domain {name!r}; there are {', '.join(sorted(report.num_prompts))}"
            if name != DEFAULT
            else "every domain has a teacher of its own; remove it",
        )
        require(
            name != DEFAULT or teacher.path is not None or teacher.train is TeacherTraining.none,
            f"teachers.{name}.train",
            teacher.train.value,
            f"only a model that is there serves several domains; give teachers.{name}.path=DIR, or each domain its own",
        )
    for domain in report.num_prompts:
        name, teacher = owner[domain], cfg.teachers[owner[domain]]
        require(
            teacher.train is not TeacherTraining.sft
            or teacher.path is not None
            or domain in report.num_conversations,
            f"teachers.{name}.train",
            teacher.train.value,
            f"sft_data has no conversation of domain {domain!r}; use train=rl, or give teachers.{domain}.path=DIR",
        )
        require(
            teacher.train is not TeacherTraining.sft
            or teacher.path is not None
            or cfg.sft.algorithm.validate_every == 0
            or domain in report.num_eval_conversations,
            f"teachers.{name}.train",
            teacher.train.value,
            f"the held-out conversations of sft_data have none of domain {domain!r}; add some, or give"
            " sft.algorithm.validate_every=0",
        )
        # A teacher is evaluated there too, which needs a checkpoint of its own.
        require(
            teacher.adapter is None,
            f"teachers.{name}.adapter",
            teacher.adapter,
            "the pipeline takes whole checkpoints; merge it into one, or use `posttrain mopd`",
        )
        require(
            teacher.backend is not TeacherBackend.server,
            f"teachers.{name}.backend",
            teacher.backend.value,
            "the pipeline takes checkpoints; use `posttrain mopd`",
        )
    given = {
        d: build(name, cfg.teachers[name], None)
        for d, name in owner.items()
        if cfg.teachers[name].path is not None
    }
    if not given:
        return []
    # The student will be the SFT model, so the weights are compared when that is there.
    algorithm = cfg.mopd.algorithm
    signal, top_k = algorithm.signal.value, algorithm.top_k
    return check_teachers(given, cfg.model, cfg.teacher_workers, max_tokens, signal, top_k, weights=False)


def check_teacher_workers(cfg: MOPDRun | PipelineRun | DoctorRun) -> None:
    """Settings of a back end that no teacher has would silently do nothing, as would options that vLLM does not have."""
    check_options("teacher_workers.vllm", cfg.teacher_workers.vllm, OWNED_OPTIONS, FIXED_OPTIONS)
    used = {teacher.backend for teacher in cfg.teachers.values()}
    for name, backend in (("vllm", TeacherBackend.vllm), ("api_key_env", TeacherBackend.server)):
        value = getattr(cfg.teacher_workers, name)
        require(
            not value or backend in used,
            f"teacher_workers.{name}",
            value,
            f"no teacher has backend={backend.value}; remove it, or set teachers.DOMAIN.backend={backend.value}",
        )
