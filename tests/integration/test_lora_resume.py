"""Resume of the learner with adapters where memory or settings differ between two starts, and expert biases that
Transformers keeps as parameters, under ZeRO 0, 2 and 3.

The real worker without Ray: two processes on tiny models, whose frozen weights do not divide by the number of ranks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.unit.moe_families import FAMILIES

pytestmark = pytest.mark.integration

RATE, LENGTH, NUM_RANKS = 1e-2, 9, 2


def worker_of(rank: int, path: str, rate: float, stage: int, lora_rank: int) -> Any:
    from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
    from posttrain.learner.worker import LearnerWorker

    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    learner = LearnerConfig(
        num_ranks=NUM_RANKS,
        zero_stage=stage,
        lr=1e-3,
        warmup_steps=0,
        weight_decay=0.5,
        expert_bias_rate=rate,
        deepspeed=whole,
        lora=LoraConfig(rank=lora_rank),
    )
    worker = LearnerWorker(rank, NUM_RANKS, 1)
    model = ModelConfig(path=path, experts_implementation="batched_mm")  # for odd widths
    worker.reset(learner, model, 10, 0)
    return worker


def train(worker: Any, step: int) -> None:
    from posttrain.learner.batching import RankBatch
    from posttrain.records import LossSettings, SampleRef, TrainingSample

    sample = TrainingSample(
        token_ids=np.random.default_rng(2 * step + worker.rank).integers(3, 60, LENGTH).astype(np.int32),
        loss_mask=np.arange(LENGTH) > 0,
        weights=np.ones(LENGTH, np.float32),
    )
    ref = SampleRef(source_ref=[sample], index=0, num_tokens=LENGTH, weight=1 / 16, domain="d")
    micro_batches: Any = [[[0]]]
    batch = RankBatch(refs={0: ref}, micro_batches=micro_batches, domains=["d"], num_samples=NUM_RANKS)
    assert worker.train_step(batch, LossSettings(kind="sft"), step, 1)["skipped"] == 0


def biases(worker: Any) -> Tensor:
    return torch.stack([router.correction_bias().flatten().clone() for router in worker.replay.routers])


def check_biases(rank: int, folder: Path, family: str, stage: int) -> None:
    """Only the rule moves the bias, which is also exported."""
    from posttrain.config import Dtype

    worker = worker_of(rank, str(folder / family), RATE, stage, 0)
    expected = biases(worker)
    for step in (1, 2):
        train(worker, step)
        live = worker.health.window[-1][0]
        expected += RATE * torch.sign(live.mean(-1, keepdim=True) - live).float()
    torch.testing.assert_close(biases(worker), expected, rtol=0, atol=1e-6)
    bundle = worker.export_weights(1, Dtype.bfloat16)
    if rank == 0:
        written = [
            bundle.tensors[name].view(np.float32) for name in sorted(bundle.tensors) if "_bias" in name
        ]
        assert np.array_equal(np.stack(written), biases(worker).numpy())
    worker.engine.destroy()


def check_resume(rank: int, folder: Path, family: str, stage: int) -> None:
    """Adapters with a moving bias go on with another rate, and back; a second start has other memory under the padding."""
    from posttrain.learner import checkpoint

    path, state = str(folder / family), folder / f"{family}-{stage}"
    worker = worker_of(rank, path, RATE, stage, 2)
    train(worker, 1)
    for number, rate in enumerate((0.0, RATE)):
        worker.save_checkpoint(state / str(number))
        before, digest = biases(worker), worker.base
        worker.engine.destroy()
        worker = worker_of(rank, path, rate, stage, 2)
        if stage == 3:
            soil_padding(worker)
        assert checkpoint.frozen_digest(worker.policy) == digest
        worker.load_checkpoint(state / str(number))
        assert torch.equal(biases(worker), before)
        train(worker, 2)
        assert torch.equal(biases(worker), before) == (rate == 0)
    worker.engine.destroy()


def soil_padding(worker: Any) -> None:
    """Writes into what ZeRO-3 leaves as it finds it."""
    frozen: list[Any] = [p for p in worker.policy.parameters() if not p.requires_grad]
    odd = [p for p in frozen if p.ds_numel % NUM_RANKS]
    assert odd, "a frozen weight that does not divide"
    for parameter in odd:
        if worker.rank == NUM_RANKS - 1:
            parameter.ds_tensor.data[-1] = 1e9


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    from posttrain.learner import engine as engines

    engines.init_distributed("gloo", dist.FileStore(f"{folder}/store", num_ranks), rank, num_ranks)
    for stage in (0, 2, 3):
        for family in ("afmoe", "ernie4_5_moe"):
            check_biases(rank, Path(folder), family, stage)
        check_resume(rank, Path(folder), "ernie4_5_moe", stage)
    dist.destroy_process_group()


def test_biases_and_resume_on_two_ranks(tmp_path: Path) -> None:
    for name in ("afmoe", "ernie4_5_moe"):
        family = replace(FAMILIES[name], config=FAMILIES[name].config | {"hidden_size": 33})
        family.build().save_pretrained(tmp_path / name)
    mp.spawn(run_rank, args=(NUM_RANKS, str(tmp_path)), nprocs=NUM_RANKS, join=True)  # type: ignore[attr-defined]
