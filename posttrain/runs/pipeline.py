"""All three stages: SFT, one teacher per domain, MOPD, then the table that shows what the student took over.

Every stage is an ordinary run in a folder of its own below the pipeline's, so a pipeline that was killed skips what
is finished and resumes what is not. The processes live from the first stage to the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.config import MOPDRun, PipelineRun, RLRun, RunConfig, SFTRun, TeacherTraining
from posttrain.data.sources import load_prompts
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.merge import average
from posttrain.records import Prompt
from posttrain.report.picture import draw_summary
from posttrain.report.summary import EvalScores, build_summary, standard_errors, teacher_name, write_summary
from posttrain.report.table import print_summary
from posttrain.run_folder import RunFolder
from posttrain.runs import evaluate, mopd, rl, sft
from posttrain.tracking.jsonl import read_jsonl


def run(cfg: PipelineRun) -> None:
    """Run every stage that is not finished, evaluate every model, print the table, write summary.json and .png."""
    folder = RunFolder.open(cfg)
    tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
    held_out = evaluate.held_out(
        load_prompts(cfg.data, tokenizer, evaluate.room(cfg.rollout), eval=True), cfg.eval.num_prompts
    )
    domains = sorted(cfg.teachers)
    stopwatch = Stopwatch(folder)

    with Engines(cfg.ray) as engines:
        with stopwatch("start"):
            warm_up(engines, cfg, domains)
        with stopwatch("sft"):
            sft_model = sft.run(sft_config(cfg), engines)
        teachers: dict[str, str] = {}
        for domain in domains:
            with stopwatch(f"teacher_{domain}"):
                teachers[domain] = teacher_model(cfg, domain, sft_model, engines)
        with stopwatch("mopd"):
            student = mopd.run(mopd_config(cfg, sft_model, teachers), engines)
        with stopwatch("average_merge"):
            merged = str(folder.path / "average_merge")
            if not (Path(merged) / "config.json").exists():
                average([teachers[d] for d in domains], merged)
        with stopwatch("evaluate"):
            models = {"sft": sft_model, "mopd": student, "average_merge": merged}
            models |= {teacher_name(d): path for d, path in teachers.items()}
            scores = evaluate_all(cfg, engines, folder, held_out, models)

    table = {name: as_cells(model) for name, model in scores.items()}
    summary = build_summary(table, stopwatch.seconds, folder.read_json("mopd/replay.json"), cfg.seed)
    write_summary(folder.path / "summary.json", summary)
    steps = read_jsonl(folder.path / "mopd" / "metrics.jsonl")
    draw_summary(folder.path / "summary.png", summary, steps, standard_errors(table))
    print_summary(summary)
    print(
        f"summary: {folder.path / 'summary.json'}   picture: {folder.path / 'summary.png'}   student: {student}"
    )
    folder.finish()


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
        engines.in_background(engines.rewards, cfg.rewards, domains),
        engines.in_background(engines.learner, cfg.sft.learner, cfg.model, cfg.sft.algorithm.steps, cfg.seed),
    ]
    for engine in starting:
        engine.result()


def teacher_model(cfg: PipelineRun, domain: str, sft_model: str, engines: Engines) -> str:
    """The teacher of one domain: given, trained here, or the SFT model itself."""
    teacher = cfg.teachers[domain]
    if teacher.path is not None:
        return teacher.path
    if teacher.train is TeacherTraining.none:
        return sft_model
    if teacher.train is TeacherTraining.sft:
        return sft.run(teacher_sft_config(cfg, domain, sft_model), engines)
    return rl.run(rl_config(cfg, domain, sft_model), engines)


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


def teacher_sft_config(cfg: PipelineRun, domain: str, sft_model: str) -> SFTRun:
    config = replace(sft_config(cfg), domain=domain, name=f"{cfg.name}/teachers/{domain}")
    algorithm = replace(config.algorithm, steps=cfg.teachers[domain].steps or config.algorithm.steps)
    return replace(config, model=replace(cfg.model, path=sft_model), algorithm=algorithm)


def rl_config(cfg: PipelineRun, domain: str, sft_model: str) -> RLRun:
    return RLRun(
        **shared(cfg, f"teachers/{domain}", sft_model),
        domain=domain,
        algorithm=replace(cfg.rl.algorithm, steps=cfg.teachers[domain].steps or cfg.rl.algorithm.steps),
        learner=cfg.rl.learner,
        rollout=cfg.rollout,
        rewards=cfg.rewards,
        environments=cfg.environments,
        eval=cfg.eval,
    )


def mopd_config(cfg: PipelineRun, sft_model: str, teachers: dict[str, str]) -> MOPDRun:
    return MOPDRun(
        **shared(cfg, "mopd", sft_model),
        algorithm=cfg.mopd.algorithm,
        learner=cfg.mopd.learner,
        rollout=cfg.rollout,
        rewards=cfg.rewards,
        environments=cfg.environments,
        eval=cfg.eval,
        teachers={d: replace(cfg.teachers[d], path=path) for d, path in teachers.items()},
        teacher_workers=cfg.teacher_workers,
    )


def evaluate_all(
    cfg: PipelineRun,
    engines: Engines,
    folder: RunFolder,
    held_out: dict[str, list[Prompt]],
    models: dict[str, str],
) -> dict[str, evaluate.Scores]:
    """Scores of every model, each kept on disk as soon as it is there.

    SFT, student and merge see every held-out prompt; a teacher sees all of its own domain and
    ``eval.cross_num_prompts`` of the others.
    """
    rollouts = engines.rollouts(cfg.rollout, cfg.model, cfg.environments, cfg.seed)
    rewards = engines.rewards(cfg.rewards, sorted(cfg.teachers))
    sampled, greedy = evaluate.eval_settings(cfg)
    scores = {}
    for version, (name, path) in enumerate(models.items()):
        file = f"eval/{name.replace('/', '_')}.json"
        if folder.read_json(file) is None:
            prompts = {
                d: p[: cfg.eval.cross_num_prompts]
                if name.startswith("teacher") and name != teacher_name(d)
                else p
                for d, p in held_out.items()
            }
            print(f"evaluating {name} on {sum(map(len, prompts.values())):,} held-out prompts", flush=True)
            rollouts.load_checkpoint(path, version)
            folder.write_json(file, evaluate.evaluate(rollouts, rewards, prompts, sampled, greedy).to_json())
        scores[name] = evaluate.Scores.read(folder.path / file)
    return scores


def as_cells(scores: evaluate.Scores) -> dict[str, EvalScores]:
    """Scores of one model in the form of the report, domain by domain."""
    greedy = scores.greedy or {}
    return {d: EvalScores(sampled=rewards, greedy=greedy.get(d)) for d, rewards in scores.sampled.items()}
