"""Multi-teacher on-policy distillation: all teachers into one student (MiMo-V2-Flash report, eq. 5-9)."""

from __future__ import annotations

from posttrain.config import MOPDRun, Signal
from posttrain.engines import Engines
from posttrain.runs.policy import run_policy


def run(cfg: MOPDRun, engines: Engines | None = None) -> str:
    """Train, and return the folder of the finished model. Resumes where the run folder stands."""
    gap = "teacher/kl" if cfg.algorithm.signal is not Signal.sampled else "teacher/mean_abs"
    return run_policy(cfg, engines, headline=[gap, "reward/all", "length/all"])
