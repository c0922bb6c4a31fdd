"""A gradient that is not finite never reaches the weights: every ZeRO stage, both types, offloaded too, on one and two
ranks.

The learner trains on a batch, then on ones with a planted NaN or infinity, then on the second
batch. All it holds is bit-identical before and after a bad one, and in the end that of a learner that never saw them.
Offload changes neither losses nor weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.integration

OPTIMIZER, PARAMETERS = ("offload_optimizer",), ("offload_optimizer", "offload_param")
# ZeRO stage, type, what lies on the CPU; a cell with offload comes after the same without
CELLS: dict[int, tuple[tuple[int, str, tuple[str, ...]], ...]] = {
    1: (
        (0, "float32", ()),
        (1, "float32", ()),
        (1, "float32", OPTIMIZER),
        (2, "float32", ()),
        (2, "float32", OPTIMIZER),
        (2, "bfloat16", ()),
        (2, "bfloat16", OPTIMIZER),
        (3, "float32", ()),
        (3, "float32", OPTIMIZER),
        (3, "bfloat16", ()),
        (3, "bfloat16", PARAMETERS),
    ),
    2: (
        (0, "float32", ()),
        (2, "bfloat16", ()),
        (2, "bfloat16", OPTIMIZER),
        (3, "float32", ()),
        (3, "float32", OPTIMIZER),
    ),
}
BIAS_RATE = 1e-2


def batch(rank: int, seed: int, weight: float) -> Any:
    """Two conversations of this rank; rank 0's first has ``weight``."""
    from posttrain.learner.batching import RankBatch
    from posttrain.records import SampleRef, TrainingSample

    rng = np.random.default_rng(10 * seed + rank)
    samples = [
        TrainingSample(
            token_ids=rng.integers(0, 90, 16).astype(np.int32),
            loss_mask=np.arange(16) > 4,
            weights=np.ones(16, np.float32),
        )
        for _ in range(2)
    ]
    refs = {
        i: SampleRef(
            source_ref=samples,
            index=i,
            num_tokens=16,
            weight=weight if rank == i == 0 else 1 / 40,
            domain="d",
        )
        for i in range(2)
    }
    micro_batches: Any = [[[0]], [[1]]]
    return RankBatch(
        refs=refs, micro_batches=micro_batches, domains=["d"], num_samples=2 * dist.get_world_size()
    )


def fingerprint(worker: Any) -> str:
    """Everything that a step changes: parameters as held here, master weights, Adam's state, buffers (the bias)."""
    held = [getattr(p, "ds_tensor", p.data) for p in worker.engine.module.parameters()]
    held += list(worker.engine.module.buffers())
    for group in worker.engine.basic_optimizer.param_groups:
        for parameter in group["params"]:
            held.append(parameter.data)
            state = worker.engine.basic_optimizer.state.get(parameter, {})
            held += [state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    digest = hashlib.sha256()
    for tensor in held:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_offload(plain: dict[str, Any], offloaded: dict[str, Any], grad_clip: float, cell: Any) -> None:
    """The same numbers. The norm that clips is summed in another order: then up to 1e-4 of a step of 1e-2, or to a bit of
    bfloat16."""
    for name in ("loss", "grad_norm", "num_zeros/total"):
        assert offloaded["metrics"][name] == pytest.approx(plain["metrics"][name], rel=1e-6), (cell, name)
    for one, other in zip(plain["weights"], offloaded["weights"], strict=True):
        if grad_clip == 0:
            assert torch.equal(one, other), cell
        torch.testing.assert_close(one, other, rtol=1e-2 if cell[1] == "bfloat16" else 1e-6, atol=1e-6)


def weights(worker: Any) -> list[torch.Tensor]:
    """What this rank holds."""
    return [getattr(p, "ds_tensor", p.data).detach().clone() for p in worker.engine.module.parameters()]


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    from posttrain.config import Dtype, LearnerConfig, ModelConfig, Schedule
    from posttrain.learner import engine as engines
    from posttrain.learner.worker import LearnerWorker
    from posttrain.records import LossSettings

    engines.init_distributed("gloo", dist.FileStore(f"{folder}/store", num_ranks), rank, num_ranks)
    worker = LearnerWorker(rank, num_ranks, 1)
    plain_cells: dict[Any, dict[str, Any]] = {}
    for cell in CELLS[num_ranks]:
        stage, dtype, offload = cell
        zero: dict[str, Any] = {name: {"device": "cpu"} for name in offload}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        grad_clip = 0.0 if dtype == "float32" and stage != 2 else 1.0
        learner = LearnerConfig(
            zero_stage=stage,
            num_ranks=num_ranks,
            dtype=Dtype(dtype),
            lr=1e-2,
            grad_clip=grad_clip,
            schedule=Schedule.linear,
            warmup_steps=0,
            expert_bias_rate=BIAS_RATE,
            deepspeed={"zero_optimization": zero},
        )
        model = ModelConfig(path=f"{folder}/model")

        def train(seed: int, step: int, weight: float = 1 / 40, max_loss: float = float("inf")) -> Any:
            loss = LossSettings(kind="sft", max_loss=max_loss)
            return worker.train_step(batch(rank, seed, weight), loss, step, 1)

        worker.reset(learner, model, 10, 0)
        start = fingerprint(worker)
        train(1, 1)
        plain_first = fingerprint(worker)
        plain = train(2, 2)
        plain_last = fingerprint(worker)
        assert len({start, plain_first, plain_last}) == 3
        trained = {"metrics": plain, "weights": weights(worker)}
        check_offload(plain_cells.setdefault((stage, dtype), trained), trained, grad_clip, cell)

        worker.reset(learner, model, 10, 0)
        assert train(1, 1)["skipped"] == 0.0
        first = fingerprint(worker)
        assert first == plain_first, "two runs are equal bit by bit"
        for step, weight in ((2, float("nan")), (3, float("inf")), (4, float("-inf"))):
            bad = train(step, step, weight)
            assert bad["skipped"] == 1.0 and not np.isfinite(bad["grad_norm"]), (cell, bad)
            assert fingerprint(worker) == first, (cell, weight)
        spike = train(9, 5, max_loss=0.0)
        assert spike["skipped"] == 1.0 and np.isfinite(spike["grad_norm"]) and spike["loss"] > 0
        assert fingerprint(worker) == first, (cell, "spike")

        checkpoint = Path(folder) / "-".join([str(stage), dtype, *offload])
        worker.save_checkpoint(checkpoint)
        later = train(2, 6)
        assert later["lr"] == plain["lr"] < 1e-2, "the schedule stands still meanwhile"
        assert (
            later["grad_norm"] == plain["grad_norm"] and later["num_zeros/total"] == plain["num_zeros/total"]
        )
        assert fingerprint(worker) == plain_last, (cell, "nothing of a bad batch stays behind")
        worker.load_checkpoint(checkpoint)
        assert train(2, 6)["lr"] == plain["lr"], "a resume knows what was skipped"
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nothing_changes(num_ranks: int, tmp_path: Any) -> None:
    from tests.tiny_models import tiny_mimo

    tiny_mimo(tmp_path / "model", num_layers=2)
    mp.spawn(run_rank, args=(num_ranks, str(tmp_path)), nprocs=num_ranks, join=True)  # type: ignore[attr-defined]
