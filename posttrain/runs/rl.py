"""Outcome-reward RL: one specialist, the teacher of its domain."""

from __future__ import annotations

from posttrain.config import RLRun
from posttrain.engines import Engines
from posttrain.runs.policy import run_policy


def run(cfg: RLRun, engines: Engines | None = None) -> str:
    """Train, and return the folder of the finished model. Resumes where the run folder stands."""
    return run_policy(cfg, engines, headline=["reward/all", "length/all", "truncated/all"])
