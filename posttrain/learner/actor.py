"""The Ray actor of a rank: forwards to `worker.LearnerWorker`, which it imports in its own process only.

The driver never imports torch or DeepSpeed for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import Dtype, LearnerConfig, ModelConfig
from posttrain.learner.batching import MicroBatchRows, RankBatch
from posttrain.records import LossSettings, PolicyInfo, TrainingSample, WeightBundle


class LearnerActor:
    """Same methods as `worker.LearnerWorker`, where they are documented."""

    def __init__(self, rank: int, num_ranks: int, num_threads: int | None) -> None:
        from posttrain.learner.worker import LearnerWorker

        self._worker = LearnerWorker(rank, num_ranks, num_threads)

    def open_store(self) -> tuple[str, int]:
        return self._worker.open_store()

    def setup(
        self,
        address: tuple[str, int],
        learner: LearnerConfig,
        model: ModelConfig,
        total_steps: int,
        seed: int,
    ) -> PolicyInfo:
        return self._worker.setup(address, learner, model, total_steps, seed)

    def reset(self, learner: LearnerConfig, model: ModelConfig, total_steps: int, seed: int) -> PolicyInfo:
        return self._worker.reset(learner, model, total_steps, seed)

    def set_heads(self, heads: dict[int, Any]) -> None:
        self._worker.set_heads(heads)

    def train_step(self, batch: RankBatch, loss: LossSettings, step: int, updates: int) -> dict[str, float]:
        return self._worker.train_step(batch, loss, step, updates)

    def rejected(self) -> dict[str, str]:
        return self._worker.rejected()

    def expert_load(self) -> dict[str, Any]:
        return self._worker.expert_load()

    def mismatch(self, batch: RankBatch) -> dict[str, float]:
        return self._worker.mismatch(batch)

    def validate(self, batch: RankBatch) -> dict[str, float]:
        return self._worker.validate(batch)

    def logprobs(
        self, samples: dict[int, TrainingSample], micro_batches: list[MicroBatchRows], replayed: bool
    ) -> dict[int, np.ndarray]:
        return self._worker.logprobs(samples, micro_batches, replayed)

    def export_weights(self, policy_version: int, dtype: Dtype) -> WeightBundle | None:
        return self._worker.export_weights(policy_version, dtype)

    def save_model(self, folder: Path) -> None:
        self._worker.save_model(folder)

    def save_checkpoint(self, folder: Path) -> None:
        self._worker.save_checkpoint(folder)

    def load_checkpoint(self, folder: Path) -> None:
        self._worker.load_checkpoint(folder)


def actor_class(num_gpus: float, num_threads: int | None) -> Any:
    """The class to start, with its environment: it must be there before torch is imported."""
    import ray

    variables = {"TOKENIZERS_PARALLELISM": "false"}
    if num_gpus == 0:
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(num_threads)}
        variables |= {"CUDA_VISIBLE_DEVICES": ""}  # GPUs that are there belong to others
    # Ranks without a GPU take no CPU slot: their threads are set here, and Ray must never keep them waiting for one.
    return ray.remote(LearnerActor).options(
        num_cpus=0, num_gpus=num_gpus, runtime_env={"env_vars": variables}
    )
