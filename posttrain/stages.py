"""Which stages of a pipeline may still train longer. Reads their run folders, changes nothing.

Later stages are made from the models of earlier ones. Once a later stage has begun, an earlier one that trained on
would overwrite the model under it, so other steps for it are refused at the start, before anything is written.
MOPD of the last round is the last stage and may always go on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.config import PipelineRun, TeacherTraining, UserError
from posttrain.first_step import has_only_begun


@dataclass(kw_only=True, slots=True, frozen=True)
class Stage:
    """A stage that trains a model."""

    folder: str  # below the pipeline's
    key: str  # that gives its steps
    steps: int


def in_round(number: int, name: str) -> str:
    """Name of a folder, a model or a time in round ``number`` (1-indexed): that of the first round is the plain one."""
    return name if number == 1 else f"round{number}/{name}"


def stages(cfg: PipelineRun) -> list[list[Stage]]:
    """Stages in the order in which they run; those of one inner list do not depend on each other."""
    sft = Stage(folder="sft", key="sft.algorithm.steps", steps=cfg.sft.algorithm.steps)
    teachers = []
    for domain, teacher in sorted(cfg.teachers.items()):
        if teacher.path is not None or teacher.train is TeacherTraining.none:
            continue
        stage = "sft" if teacher.train is TeacherTraining.sft else "rl"
        key, steps = f"{stage}.algorithm.steps", getattr(cfg, stage).algorithm.steps
        if teacher.steps is not None:
            key, steps = f"teachers.{domain}.steps", teacher.steps
        teachers.append(Stage(folder=f"teachers/{domain}", key=key, steps=steps))
    mopd = Stage(folder="mopd", key="mopd.algorithm.steps", steps=cfg.mopd.algorithm.steps)
    groups = [[sft]]
    for number in range(1, cfg.rounds + 1):
        groups += [[replace(s, folder=in_round(number, s.folder)) for s in g] for g in (teachers, [mopd])]
    return groups


def _has_made_steps(stage: Path) -> bool:
    return (stage / "config.yaml").exists() and not has_only_begun(stage)


def check_steps(path: Path, cfg: PipelineRun) -> None:
    """Refuse other steps for a finished stage of the pipeline in ``path`` when a later one has begun.

    Raises:
        UserError: naming the key of the steps, the old and the new value.
    """
    groups = stages(cfg)
    for index, group in enumerate(groups):
        later = [s for following in groups[index + 1 :] for s in following]
        begun = next((s.folder for s in later if _has_made_steps(path / s.folder)), None)
        for stage in group:
            record = path / stage.folder / "finished.json"
            if begun is None or not record.exists():
                continue
            former = json.loads(record.read_text())["steps"]
            if former != stage.steps:
                raise UserError(
                    f"{stage.key}={stage.steps}: {path / stage.folder} finished with {former} steps and {begun} was"
                    f" trained from its model; give {stage.key}={former} again, choose another name= than"
                    f" {cfg.name!r}, or start over with fresh=true"
                )
