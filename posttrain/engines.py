"""The living processes of a run: learner ranks, rollout workers, teachers, rewards.

Owns their start, their reuse from stage to stage, and their end. A stage asks for what it needs; what is already
alive with the same shape is reset instead of started, so that a pipeline pays for start-up once.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import posttrain.cluster as cluster
from posttrain.config import (
    LearnerConfig,
    ModelConfig,
    RayConfig,
    RewardWorkerConfig,
    RolloutConfig,
    RunConfig,
    TeacherWorkerConfig,
)

if TYPE_CHECKING:
    from posttrain.learner.group import LearnerGroup
    from rewards.pool import RewardPool
    from rollout.pool import RolloutPool
    from teachers.pool import TeacherPool
    from teachers.teacher import Teacher

# What a learner process cannot change while it lives; everything else is set anew by `reset`.
_LEARNER_SHAPE = (
    "num_ranks",
    "zero_stage",
    "dtype",
    "cores_per_rank",
    "num_gpus_per_rank",
    "deepspeed",
    "gradient_checkpointing",
)


class Engines:
    """Starts Ray on first use and hands out engines. Use as a context manager: leaving it ends every process."""

    def __init__(self, ray: RayConfig) -> None:
        cluster.start(ray)
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="engines")
        self._learner: LearnerGroup | None = None
        self._learner_key: Any = None
        self._rollouts: RolloutPool | None = None
        self._rollouts_key: Any = None
        self._rewards: RewardPool | None = None
        self._rewards_key: Any = None
        self._teachers: TeacherPool | None = None
        self._teachers_key: Any = None

    @classmethod
    def of(cls, cfg: RunConfig) -> Engines:
        """Those of a run of its own, which says what it starts: imports take a while, and no step shows meanwhile."""
        if cfg.tracking.console:
            from posttrain.plan import processes

            names = ", ".join(f"{row.name} x{row.count}" for row in processes(cfg, None))
            print(f"{cfg.name}: starting Ray, {names} ...", flush=True)
        return cls(cfg.ray)

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.shutdown()

    def in_background(self, start: Any, *args: Any) -> Future[Any]:
        """Run one of the methods below in a thread, so that several engines start at the same time."""
        return self._threads.submit(start, *args)

    def learner(
        self, learner: LearnerConfig, model: ModelConfig, total_steps: int, seed: int
    ) -> LearnerGroup:
        """A learner that holds ``model.path`` with a fresh optimizer."""
        from posttrain.learner.group import LearnerGroup

        key = (
            _architecture(model.path),
            _without_path(model),
            {k: getattr(learner, k) for k in _LEARNER_SHAPE},
        )
        if self._learner is not None and self._learner_key == key:
            self._learner.reset(learner, model, total_steps, seed)
            return self._learner
        if self._learner is not None:
            self._learner.shutdown()
        self._learner = LearnerGroup.start(learner, model, total_steps, seed)
        self._learner_key = key
        return self._learner

    def rollouts(
        self, cfg: RolloutConfig, model: ModelConfig, environments: dict[str, Any], seed: int
    ) -> RolloutPool:
        """Rollout workers for models of this shape, whose random numbers begin at ``seed`` whether or not they were used
        before. Whoever asked pushes the weights before generating."""
        from rollout.pool import RolloutPool

        key = (_architecture(model.path), _without_path(model), asdict(cfg), environments)
        if self._rollouts is None or self._rollouts_key != key:
            if self._rollouts is not None:
                self._rollouts.shutdown()
            self._rollouts = RolloutPool.start(cfg, model, environments, seed)
            self._rollouts_key = key
        self._rollouts.reseed(seed)
        return self._rollouts

    def rewards(self, cfg: dict[str, Any], workers: RewardWorkerConfig, domains: list[str]) -> RewardPool:
        """Reward workers for these domains."""
        from rewards.pool import RewardPool

        key = (cfg, asdict(workers))
        if self._rewards is not None and self._rewards_key[0] == key and set(domains) <= self._rewards_key[1]:
            return self._rewards
        if self._rewards is not None:
            self._rewards.shutdown()
        self._rewards = RewardPool.start(cfg, domains, workers)
        self._rewards_key = (key, set(domains))
        return self._rewards

    def teachers(
        self,
        cfg: TeacherWorkerConfig,
        model: ModelConfig,
        teachers: dict[str, Teacher],
        signal: str = "sampled",
        top_k: int = 64,
    ) -> TeacherPool:
        """Teacher workers that hold the teacher of every domain; ``teachers`` may be empty to start them early."""
        from teachers.pool import TeacherPool

        key = (_without_path(model), asdict(cfg))
        if self._teachers is not None and self._teachers_key != key:
            self._teachers.shutdown()
            self._teachers = None
        if self._teachers is None:
            self._teachers = TeacherPool(cfg, model) if teachers else TeacherPool.start(cfg, model)
            self._teachers_key = key
        if teachers:
            self._teachers.set_teachers(teachers, signal, top_k)
        return self._teachers

    def shutdown(self) -> None:
        """End every process, Ray last."""
        self._threads.shutdown(wait=True)
        for engine in (self._rollouts, self._learner, self._teachers, self._rewards):
            if engine is not None:
                engine.shutdown()
        self._rollouts = self._learner = self._teachers = self._rewards = None
        cluster.stop()


def _architecture(path: str) -> str:
    """The content of config.json but for its dtype: models that share it have the same shape."""
    config = Path(path) / "config.json"
    if not config.exists():
        return path
    content = json.loads(config.read_text())
    return json.dumps({k: v for k, v in content.items() if k not in ("dtype", "torch_dtype")}, sort_keys=True)


def _without_path(model: ModelConfig) -> dict[str, Any]:
    return {k: v for k, v in asdict(model).items() if k not in ("path", "revision")}
