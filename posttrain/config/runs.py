"""Schemas of the runs, one per command, and the table of commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from posttrain.config.algorithms import (
    PolicyAlgorithm,
    SFTAlgorithm,
    mopd_algorithm,
    resolve_algorithm,
    rl_algorithm,
    sft_learner,
)
from posttrain.config.choices import MergeMethod
from posttrain.config.errors import require, require_at_least
from posttrain.config.learner import LearnerConfig
from posttrain.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RayConfig,
    RewardWorkerConfig,
    RolloutConfig,
    SampleConfig,
    StepEvalConfig,
    TeacherConfig,
    TeacherWorkerConfig,
    TrackingConfig,
)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What every run has."""

    name: str = MISSING
    """Folder of the run under runs_dir."""
    runs_dir: str = "runs"
    """Where run folders go."""
    seed: int = 0
    """Seed of data order, and of engines as they start; engines that serve several stages go on with their state."""
    fresh: bool = False
    """Start over: the folder's former content is moved to `<name>.old-<time>`. Default is to resume."""
    dry_run: bool = False
    """Resolve, validate, print what would be used, and start nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(kw_only=True, slots=True)
class SFTRun(RunConfig):
    """`posttrain sft`"""

    name: str = "sft"
    domain: str | None = None
    """Train on this domain's conversations only; null: all."""
    algorithm: SFTAlgorithm = field(default_factory=SFTAlgorithm)
    learner: LearnerConfig = field(default_factory=lambda: sft_learner())


@dataclass(kw_only=True, slots=True)
class PolicyRun(RunConfig):
    """What `rl` and `mopd` share."""

    algorithm: PolicyAlgorithm = field(default_factory=lambda: rl_algorithm())
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    eval: StepEvalConfig = field(default_factory=StepEvalConfig)

    def __post_init__(self) -> None:
        resolve_algorithm(self.algorithm, self.rollout)


@dataclass(kw_only=True, slots=True)
class RLRun(PolicyRun):
    """`posttrain rl`"""

    name: str = "rl"
    domain: str | None = None
    """Train on this domain's prompts only; null: all."""


@dataclass(kw_only=True, slots=True)
class MOPDRun(PolicyRun):
    """`posttrain mopd`"""

    name: str = "mopd"
    domain: str | None = None
    """Train on this domain's prompts only, with its teacher alone; null: all."""
    algorithm: PolicyAlgorithm = field(default_factory=mopd_algorithm)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teacher of each domain: `teachers.math.path=DIR`; `teachers.default` serves domains without one."""
    teacher_workers: TeacherWorkerConfig = field(default_factory=TeacherWorkerConfig)


@dataclass(kw_only=True, slots=True)
class SFTStage:
    algorithm: SFTAlgorithm = field(default_factory=SFTAlgorithm)
    learner: LearnerConfig = field(default_factory=lambda: sft_learner())


@dataclass(kw_only=True, slots=True)
class PolicyStage:
    algorithm: PolicyAlgorithm = field(default_factory=lambda: rl_algorithm())
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: StepEvalConfig = field(default_factory=StepEvalConfig)


@dataclass(kw_only=True, slots=True)
class PipelineRun(RunConfig):
    """`posttrain pipeline`: SFT, one teacher per domain, MOPD, evaluation, table."""

    name: str = "pipeline"
    rounds: int = 1
    """Rounds of teachers and MOPD. From the second on teachers and student start from the former round's student; their
    folders are round2/teachers/DOMAIN and round2/mopd."""
    sft: SFTStage = field(default_factory=SFTStage)
    rl: PolicyStage = field(default_factory=PolicyStage)
    mopd: PolicyStage = field(default_factory=lambda: PolicyStage(algorithm=mopd_algorithm()))
    sft_data: DataConfig = field(default_factory=DataConfig)
    """Demonstrations for the SFT stage; `data` holds the prompts of RL and MOPD."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    teacher_workers: TeacherWorkerConfig = field(default_factory=TeacherWorkerConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for stage in (self.rl, self.mopd):
            resolve_algorithm(stage.algorithm, self.rollout)
        require(self.rounds >= 1, "rounds", self.rounds, "give 1 or more")


@dataclass(kw_only=True, slots=True)
class EvalRun(RunConfig):
    """`posttrain eval`: accuracy of one checkpoint on held-out prompts."""

    name: str = "eval"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(kw_only=True, slots=True)
class SampleRun(RunConfig):
    """`posttrain sample`: rollouts of one checkpoint as rows for `posttrain sft`."""

    name: str = "sample"
    domain: str | None = None
    """Sample this domain's prompts only; null: all."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=dict)
    """`_target_` and arguments of one reward for every domain, or `<domain>: {_target_: ...}`."""
    reward_workers: RewardWorkerConfig = field(default_factory=RewardWorkerConfig)
    environments: dict[str, Any] = field(default_factory=dict)
    """`<domain>: {_target_: ...}`: what answers a turn of the policy in this domain."""
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(kw_only=True, slots=True)
class MergeRun(RunConfig):
    """`posttrain merge`: one model out of several of one shape, without training."""

    name: str = "merge"
    method: MergeMethod = MergeMethod.average
    """average: the mean of the models; task_arithmetic: base + coefficient * sum of (model - base) (arXiv:2212.04089)."""
    models: list[str] = field(default_factory=list)
    """Checkpoints of one architecture: `models=[runs/math/model,runs/code/model]`."""
    base: str | None = None
    """task_arithmetic: the checkpoint that the models were trained from."""
    coefficient: float = 0.5
    """task_arithmetic: weight of every difference."""
    coefficients: list[float] = field(default_factory=list)
    """task_arithmetic: one weight for each of `models`, in their order; empty: coefficient for all."""

    def __post_init__(self) -> None:
        arithmetic = self.method is MergeMethod.task_arithmetic
        require(
            not arithmetic or self.base is not None,
            "base",
            self.base,
            "task arithmetic needs the checkpoint that the models were trained from; give base=DIR",
        )
        require(
            arithmetic or self.base is None,
            "base",
            self.base,
            "only method=task_arithmetic has a base; remove it",
        )
        require(
            arithmetic or not self.coefficients,
            "coefficients",
            self.coefficients,
            "only method=task_arithmetic weighs the models; remove it",
        )
        require(
            not self.coefficients or len(self.coefficients) == len(self.models),
            "coefficients",
            self.coefficients,
            f"give one for each of the {len(self.models)} models, or coefficient=NUMBER for all",
        )

    def sources(self) -> dict[str, str]:
        """Config key -> checkpoint of everything that is read."""
        base = {} if self.base is None else {"base": self.base}
        return base | {f"models.{i}": path for i, path in enumerate(self.models)}

    def weights(self) -> list[float]:
        """Weight of every model's difference to the base."""
        return list(self.coefficients) or [self.coefficient] * len(self.models)


@dataclass(kw_only=True, slots=True)
class ReplayCheck:
    num_rollouts: int = 48
    """Rollouts to sample; a quarter of them go on from another one's end, through the prefix cache."""
    max_new_tokens: int = 64
    """Upper bound on sampled tokens per turn."""

    def __post_init__(self) -> None:
        require_at_least(4, "replay", self, "num_rollouts")
        require_at_least(1, "replay", self, "max_new_tokens")


@dataclass(kw_only=True, slots=True)
class TeacherCheck:
    num_samples: int = 32
    """Answers of the student to score, per domain."""
    max_new_tokens: int = 256
    """Upper bound on sampled tokens of each."""

    def __post_init__(self) -> None:
        require_at_least(1, "teacher_check", self, "num_samples", "max_new_tokens")


@dataclass(kw_only=True, slots=True)
class DoctorRun(RunConfig):
    """`posttrain doctor`: versions, devices, memory, and what is wrong; `doctor replay`: routing replay; `doctor
    teachers`: are these the right teachers?"""

    name: str = "doctor"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    replay: ReplayCheck = field(default_factory=ReplayCheck)
    domain: str | None = None
    """doctor teachers: look at this domain's prompts and teacher only; null: all."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teacher of each domain: `teachers.math.path=DIR`, as in `mopd`."""
    teacher_workers: TeacherWorkerConfig = field(default_factory=TeacherWorkerConfig)
    teacher_check: TeacherCheck = field(default_factory=TeacherCheck)


RUNS: dict[str, type[RunConfig]] = {
    "sft": SFTRun,
    "rl": RLRun,
    "mopd": MOPDRun,
    "pipeline": PipelineRun,
    "eval": EvalRun,
    "sample": SampleRun,
    "merge": MergeRun,
    "doctor": DoctorRun,
}
