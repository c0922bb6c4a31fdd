"""All three stages: SFT, one teacher per domain, MOPD, then the table that shows what the student took over.

Every stage is an ordinary run in a folder of its own below the pipeline's, so a pipeline that was killed skips what
is finished and resumes what is not. The processes live from the first stage to the last. With ``rounds`` above 1 the
student starts the next round's teachers, and is their student (co-evolution).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config import (
    MOPDRun,
    PipelineRun,
    RLRun,
    RunConfig,
    SFTRun,
    TeacherConfig,
    TeacherTraining,
    UserError,
)
from posttrain.data.sources import load_prompts
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.lineage import ancestry
from posttrain.merge import average
from posttrain.records import Prompt
from posttrain.report.picture import draw_summary
from posttrain.report.summary import (
    AVERAGE,
    MOPD,
    SFT,
    EvalScores,
    build_summary,
    domain_of_teacher,
    standard_errors,
    teacher_name,
    write_summary,
)
from posttrain.report.table import print_summary
from posttrain.run_folder import RunFolder
from posttrain.runs import evaluate, mopd, rl, sft
from posttrain.stages import in_round
from posttrain.tracking.jsonl import read_jsonl
from teachers.checkpoint import locate
from teachers.fingerprint import fingerprint
from teachers.teacher import DEFAULT, owners


def run(cfg: PipelineRun) -> None:
    """Run every stage that is not finished, evaluate every model, print the table, write summary.json and .png."""
    folder = RunFolder.open(cfg)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    held_out = evaluate.held_out(
        load_prompts(cfg.data, tokenizer, evaluate.room(cfg.rollout), eval=True), cfg.eval.num_prompts
    )
    cfg = replace(cfg, teachers=teacher_of_each_domain(cfg, tokenizer))
    domains = sorted(cfg.teachers)
    stopwatch = Stopwatch(folder)

    with Engines.of(cfg) as engines:
        with stopwatch("start"):
            warm_up(engines, cfg, domains)
        with stopwatch("sft"):
            student = sft.run(sft_config(cfg), engines)
        models = {SFT: student}
        for number in range(1, cfg.rounds + 1):
            teachers: dict[str, str] = {}
            for domain in domains:
                with stopwatch(in_round(number, f"teacher_{domain}")):
                    teachers[domain] = teacher_model(cfg, domain, student, engines, number)
            with stopwatch(in_round(number, "mopd")):
                student = mopd.run(mopd_config(cfg, student, teachers, number), engines)
            models[in_round(number, MOPD)] = student
            if number == 1:
                with stopwatch("average_merge"):
                    merged = average_merge(folder, [teachers[d] for d in domains])
                models |= {AVERAGE: merged} if merged else {}
            models |= {in_round(number, teacher_name(d)): path for d, path in teachers.items()}
        with stopwatch("evaluate"):
            scores = evaluate_all(cfg, engines, folder, held_out, models)

    table = {name: as_cells(model) for name, model in scores.items()}
    summary = build_summary(table, stopwatch.seconds, folder.read_json("mopd/replay.json"), cfg.seed)
    summary["lineage"] = ancestry(student, fingerprint(student), folder.path)
    write_summary(folder.path / "summary.json", summary)
    steps = read_jsonl(folder.path / "mopd" / "metrics.jsonl")
    draw_summary(folder.path / "summary.png", summary, steps, standard_errors(table))
    print_summary(summary)
    print(
        f"summary: {folder.path / 'summary.json'}   picture: {folder.path / 'summary.png'}   student: {student}"
    )
    folder.finish()


def teacher_of_each_domain(cfg: PipelineRun, tokenizer: PreTrainedTokenizerBase) -> dict[str, TeacherConfig]:
    """`teachers` with teachers.default written out for every domain of the prompts that has none of its own."""
    if DEFAULT not in cfg.teachers:
        return cfg.teachers
    prompts = load_prompts(cfg.data, tokenizer, evaluate.room(cfg.rollout))
    return {
        domain: cfg.teachers[name]
        for domain, name in owners(cfg.teachers, {p.domain for p in prompts}).items()
    }


class Stopwatch:
    """Wall seconds of each stage, added up over every process that worked on the run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.seconds: dict[str, float] = folder.read_json("wall_s.json") or {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
            self.seconds["total"] = sum(v for k, v in self.seconds.items() if k != "total")
            self._folder.write_json("wall_s.json", self.seconds)


def warm_up(engines: Engines, cfg: PipelineRun, domains: list[str]) -> None:
    """Start every process at once: imports are most of the start, and they overlap."""
    starting = [
        engines.in_background(engines.rollouts, cfg.rollout, cfg.model, cfg.environments, cfg.seed),
        engines.in_background(engines.teachers, cfg.teacher_workers, cfg.model, {}),
        engines.in_background(engines.rewards, cfg.rewards, cfg.reward_workers, domains),
        engines.in_background(engines.learner, cfg.sft.learner, cfg.model, cfg.sft.algorithm.steps, cfg.seed),
    ]
    for engine in starting:
        engine.result()


def teacher_model(cfg: PipelineRun, domain: str, start: str, engines: Engines, number: int = 1) -> str:
    """The teacher of one domain in round ``number``: given, trained here from the model ``start``, or that itself."""
    teacher = cfg.teachers[domain]
    if teacher.path is not None:
        return str(locate(teacher.path, f"teachers.{domain}.path", teacher.revision))
    if teacher.train is TeacherTraining.none:
        return start
    if teacher.train is TeacherTraining.sft:
        return sft.run(teacher_sft_config(cfg, domain, start, number), engines)
    return rl.run(rl_config(cfg, domain, start, number), engines)


def shared(cfg: PipelineRun, stage: str, model_path: str) -> dict[str, Any]:
    """What every stage takes over from the pipeline, in a run folder below the pipeline's."""
    common = {f: getattr(cfg, f) for f in RunConfig.__dataclass_fields__}
    return common | {
        "name": f"{cfg.name}/{stage}",
        "model": replace(cfg.model, path=model_path),
        "fresh": False,
    }


def sft_config(cfg: PipelineRun) -> SFTRun:
    return SFTRun(
        **shared(cfg, "sft", cfg.model.path) | {"data": cfg.sft_data},
        algorithm=cfg.sft.algorithm,
        learner=cfg.sft.learner,
    )


def teacher_sft_config(cfg: PipelineRun, domain: str, start: str, number: int = 1) -> SFTRun:
    config = replace(
        sft_config(cfg), domain=domain, name=f"{cfg.name}/{in_round(number, f'teachers/{domain}')}"
    )
    algorithm = replace(config.algorithm, steps=cfg.teachers[domain].steps or config.algorithm.steps)
    return replace(config, model=replace(cfg.model, path=start), algorithm=algorithm)


def rl_config(cfg: PipelineRun, domain: str, start: str, number: int = 1) -> RLRun:
    return RLRun(
        **shared(cfg, in_round(number, f"teachers/{domain}"), start),
        domain=domain,
        algorithm=replace(cfg.rl.algorithm, steps=cfg.teachers[domain].steps or cfg.rl.algorithm.steps),
        learner=cfg.rl.learner,
        eval=cfg.rl.eval,
        rollout=cfg.rollout,
        rewards=cfg.rewards,
        reward_workers=cfg.reward_workers,
        environments=cfg.environments,
    )


def mopd_config(cfg: PipelineRun, start: str, teachers: dict[str, str], number: int = 1) -> MOPDRun:
    return MOPDRun(
        **shared(cfg, in_round(number, "mopd"), start),
        algorithm=cfg.mopd.algorithm,
        learner=cfg.mopd.learner,
        eval=cfg.mopd.eval,
        rollout=cfg.rollout,
        rewards=cfg.rewards,
        reward_workers=cfg.reward_workers,
        environments=cfg.environments,
        teachers={d: given_teacher(d, cfg.teachers[d], path, start) for d, path in teachers.items()},
        teacher_workers=cfg.teacher_workers,
    )


def given_teacher(domain: str, teacher: TeacherConfig, path: str, start: str) -> TeacherConfig:
    """A teacher for MOPD. The student itself is meant where nothing was to be trained; where training moved nothing, the
    domain is named and the others go on."""
    if teacher.path is not None:
        return teacher
    is_student = fingerprint(path) == fingerprint(start)
    if is_student and teacher.train is not TeacherTraining.none:
        print(
            f"teachers.{domain}: training changed no weight (were all rewards equal?); it teaches nothing",
            flush=True,
        )
    return replace(teacher, path=path, self=teacher.self or is_student)


def average_merge(folder: RunFolder, teachers: list[str]) -> str | None:
    """The parameter average of the teachers, made anew when a teacher changed; None where they have none (other shapes,
    other settings, quantized): teachers that were given need not be of one kind, and the run has its student."""
    merged = folder.path / "average_merge"
    inputs = [fingerprint(path, "teachers") for path in teachers]
    if folder.read_json("average_merge.json") != inputs:
        shutil.rmtree(merged, ignore_errors=True)
        try:
            average(teachers, str(merged))
        except UserError as error:
            print(f"average_merge: left out, because the teachers have no average ({error})", flush=True)
            return None
        folder.write_json("average_merge.json", inputs)
    return str(merged)


def evaluate_all(
    cfg: PipelineRun,
    engines: Engines,
    folder: RunFolder,
    held_out: dict[str, list[Prompt]],
    models: dict[str, str],
) -> dict[str, evaluate.Scores]:
    """Scores of every model, each kept on disk with what it was measured on, so that a changed model, prompt, reward
    or setting is measured again.

    SFT, students and merge see every held-out prompt; a teacher sees all of its own domain and
    ``eval.cross_num_prompts`` of the others.
    """
    rewards = engines.rewards(cfg.rewards, cfg.reward_workers, sorted(cfg.teachers))
    sampled, greedy = evaluate.eval_settings(cfg)
    scores = {}
    for version, (name, path) in enumerate(models.items()):
        prompts = {
            d: p if domain_of_teacher(name) in (None, d) else p[: cfg.eval.cross_num_prompts]
            for d, p in held_out.items()
        }
        measured_on = {
            "model": fingerprint(path, name),
            "settings": [asdict(sampled), asdict(greedy) if greedy else None],
            "prompts": hashlib.sha256(
                json.dumps([[q.prompt_id for q in p] for p in prompts.values()]).encode()
            ).hexdigest(),
            "rewards": cfg.rewards,
            "environments": cfg.environments,
        }
        file = f"eval/{name.replace('/', '_')}.json"
        former = folder.read_json(file)
        if former is None or former["measured_on"] != measured_on:
            print(f"evaluating {name} on {sum(map(len, prompts.values())):,} held-out prompts", flush=True)
            # A teacher of another shape gets engines of its own; all others share the living ones.
            rollouts = engines.rollouts(
                cfg.rollout, replace(cfg.model, path=path), cfg.environments, cfg.seed
            )
            rollouts.load_checkpoint(path, version)
            result = evaluate.evaluate(rollouts, rewards, prompts, sampled, greedy)
            folder.write_json(file, {"measured_on": measured_on} | result.to_json())
        scores[name] = evaluate.Scores.read(folder.path / file)
    return scores


def as_cells(scores: evaluate.Scores) -> dict[str, EvalScores]:
    """Scores of one model in the form of the report, domain by domain."""
    greedy = scores.greedy or {}
    return {d: EvalScores(sampled=rewards, greedy=greedy.get(d)) for d, rewards in scores.sampled.items()}
