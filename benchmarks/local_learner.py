"""The learner of the runs as rank 0 of 1 in this very process: no Ray, no engine, every metric of a step.

Import it before anything that imports DeepSpeed: it chooses the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor

from posttrain.config import LearnerConfig, ModelConfig
from posttrain.learner.batching import RankBatch, plan
from posttrain.learner.worker import LearnerWorker
from posttrain.records import LossSettings, SampleRef, TrainingSample


class LocalLearner:
    """SFT steps and validations of one policy; `reset` starts the next one."""

    def __init__(self, num_threads: int) -> None:
        self.worker = LearnerWorker(0, 1, num_threads)
        self._is_set_up = False

    def reset(self, learner: LearnerConfig, model: Path, total_steps: int, seed: int) -> None:
        """A fresh optimizer around the weights in ``model``."""
        settings = learner, ModelConfig(path=str(model)), total_steps, seed
        if self._is_set_up:
            self.worker.reset(*settings)
        else:
            self.worker.setup(self.worker.open_store(), *settings)
            self._is_set_up = True

    def train_step(self, samples: list[TrainingSample], step: int) -> dict[str, float]:
        """One SFT step with every loss token of the batch weighing the same; ``num_empty_experts`` beside the metrics."""
        metrics = self.worker.train_step(self.batch(samples), LossSettings(kind="sft"), step, 1)
        assert self.worker.health is not None, "a dense model"
        loads_LE = self.worker.health.window[-1][0]
        return metrics | {"num_empty_experts": float((loads_LE == 0).sum())}

    def validate(self, samples: list[TrainingSample]) -> dict[str, float]:
        """Mean cross-entropy by domain and over ``all``."""
        return self.worker.validate(self.batch(samples))

    def batch(self, samples: list[TrainingSample]) -> RankBatch:
        """As `posttrain.runs.sft.batch`, with the samples themselves for a reference."""
        num_loss_tokens = sum(int(s.loss_mask.sum()) for s in samples)
        lengths = [len(s.token_ids) for s in samples]
        refs = {
            i: SampleRef(
                source_ref=samples, index=i, num_tokens=n, weight=1 / num_loss_tokens, domain=s.domain
            )
            for i, (s, n) in enumerate(zip(samples, lengths, strict=True))
        }
        learner = self.worker.learner
        return RankBatch(
            refs=refs,
            micro_batches=plan(lengths, 1, learner.max_tokens_per_micro_batch, learner.pack_tokens)[0],
            domains=sorted({s.domain for s in samples}),
            num_samples=len(samples),
        )

    def second_moments(self) -> Tensor:
        """sqrt(v) of AdamW [elements] after bias correction: what epsilon is added to."""
        optimizer = self.worker.engine.basic_optimizer
        roots = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                roots.append(corrected.sqrt().flatten().float())
        return torch.cat(roots)
