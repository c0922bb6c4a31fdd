"""Multi-teacher on-policy distillation: all teachers into one student (MiMo-V2-Flash report, eq. 5-9)."""

from __future__ import annotations

from posttrain.config import MOPDRun
from posttrain.engines import Engines
from posttrain.runs.policy import run_policy
from teachers.checkpoint import locate


def run(cfg: MOPDRun, engines: Engines | None = None) -> str:
    """Train, and return the folder of the finished model. Resumes where the run folder stands."""
    paths = {}
    if cfg.algorithm.beta != 0:  # a hub id becomes the folder of its revision
        paths = {
            d: str(locate(str(t.path), f"teachers.{d}.path", t.revision)) for d, t in cfg.teachers.items()
        }
    return run_policy(cfg, engines, paths, headline=["teacher/mean_abs", "reward/all", "length/all"])
