"""The expert bias over 100 optimizer steps on two ranks, its save, resume and export; expert health at every ZeRO stage.

The real worker without Ray: two processes, each a `LearnerWorker` on a tiny MiMo-V2-Flash model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

pytestmark = pytest.mark.integration

STEPS, RATE = 100, 1e-3
NUM_SAMPLES, LENGTH, LAYERS = 6, 11, 2


def samples(step: int) -> list[Any]:
    """Of the global batch; of unequal lengths, so that there is padding."""
    from posttrain.records import TrainingSample

    rng = np.random.default_rng(step)
    batch = []
    for index in range(NUM_SAMPLES):
        length = LENGTH - index
        mask = np.arange(length) > 2
        routes = np.stack([rng.permutation(7)[:2] for _ in range((length - 1) * LAYERS)])  # none to the last
        batch.append(
            TrainingSample(
                token_ids=rng.integers(0, 90, length).astype(np.int32),
                loss_mask=mask,
                weights=np.ones(length, np.float32),
                rollout_logprobs=np.where(mask, -4.0, 0.0).astype(np.float32),
                policy_versions=np.zeros(length, np.int32),
                orm_advantages=np.ones(length, np.float32),
                routed_experts=routes.reshape(length - 1, LAYERS, 2).astype(np.uint8),
                domain="d",
            )
        )
    return batch


def rank_batch(step: int, rank: int, num_ranks: int) -> Any:
    """Every ``num_ranks``-th sample, two micro-batches."""
    from posttrain.learner.batching import RankBatch
    from posttrain.records import SampleRef

    batch = samples(step)
    own = list(range(rank, NUM_SAMPLES, num_ranks))
    refs = {
        i: SampleRef(source_ref=batch, index=i, num_tokens=len(batch[i].token_ids), weight=1 / 40, domain="d")
        for i in own
    }
    return RankBatch(
        refs=refs,
        micro_batches=[[[i] for i in own[:2]], [[i] for i in own[2:]]],
        domains=["d"],
        num_samples=NUM_SAMPLES,
    )


def worker_of(rank: int, num_ranks: int, path: str, **options: Any) -> Any:
    from posttrain.config import LearnerConfig, ModelConfig
    from posttrain.learner.worker import LearnerWorker

    if options.get("zero_stage") == 3:
        options["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    learner = LearnerConfig(
        **{"num_ranks": num_ranks, "lr": 1e-3, "warmup_steps": 0, "max_route_distance": None, **options}
    )
    worker = LearnerWorker(rank, num_ranks, 1)
    worker.reset(learner, ModelConfig(path=path), STEPS, 0)
    return worker


def biases(worker: Any) -> Tensor:
    return torch.stack([router.correction_bias() for router in worker.replay.routers])


def of_rank_0(value: Tensor) -> Tensor:
    shared = value.clone()
    dist.broadcast(shared, 0)
    return shared


def check_bias(rank: int, path: str, folder: Path) -> None:
    from safetensors.torch import load_file

    from posttrain.records import LossSettings

    sft = LossSettings(kind="sft")
    worker = worker_of(rank, 2, path, expert_bias_rate=RATE, zero_stage=2, expert_window=STEPS)
    expected = biases(worker).clone()
    for step in range(1, STEPS + 1):
        metrics = worker.train_step(rank_batch(step, rank, 2), sft, step, 1)
        assert metrics["skipped"] == 0
    after = biases(worker)
    assert torch.equal(after, of_rank_0(after))
    for live in worker.health.state()[:, 0]:  # tokens per expert of the global batch
        assert live.sum(-1).tolist() == [2.0 * sum(range(LENGTH, LENGTH - NUM_SAMPLES, -1))] * LAYERS
        expected += RATE * torch.sign(live.mean(-1, keepdim=True) - live).float()
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert (after - after[:, :1]).abs().max() > 10 * RATE  # it moved

    worker.save_model(folder / "model")
    exported = load_file(folder / "model" / "model.safetensors")
    for router, bias in zip(worker.replay.routers, after, strict=True):
        assert torch.equal(exported[f"{router.name}.gate.e_score_correction_bias"], bias)

    worker.save_checkpoint(folder / "state")
    following = worker.train_step(rank_batch(STEPS + 1, rank, 2), sft, STEPS, 1)
    later = biases(worker).clone()
    assert not torch.equal(after, later)
    worker.load_checkpoint(folder / "state")
    resumed = biases(worker)
    assert torch.equal(resumed, after)
    assert worker.train_step(rank_batch(STEPS + 1, rank, 2), sft, STEPS, 1) == following
    assert torch.equal(biases(worker), later)


def check_health(rank: int, num_ranks: int, path: str) -> None:
    """Two updates on one batch with replay: the same numbers at every stage, and those of whole weights."""
    from posttrain.records import LossSettings

    rl = LossSettings(kind="policy_gradient", beta=0.0, alpha=1.0, correction="off")
    expected: dict[str, float] = {}
    for stage, recompute in ((0, False), (1, False), (2, True), (3, False), (3, True)):
        worker = worker_of(rank, num_ranks, path, zero_stage=stage, gradient_checkpointing=recompute)
        if stage == 0:
            spreads = []
            for router in worker.replay.routers:
                weights = [p.detach().double().flatten(1) for p in router.block.experts.parameters()]
                norms = sum((w.square().sum(1) for w in weights), torch.zeros(8).double()).sqrt()
                spreads.append(float(norms.std(correction=0) / norms.mean()))
            spread = max(spreads)
        metrics = worker.train_step(rank_batch(1, rank, num_ranks), rl, 1, 1)
        load = worker.expert_load()
        routed = np.zeros((LAYERS, 8), int)
        for sample in samples(1):
            for layer in range(LAYERS):
                np.add.at(routed[layer], sample.routed_experts[:, layer].ravel().astype(int), 1)
        assert load["replayed"] == routed.tolist(), stage
        assert load["live"] != load["replayed"]
        assert metrics["experts/dying/replayed"] == LAYERS  # no route to the last expert
        assert metrics["experts/norm_spread"] == pytest.approx(spread, rel=1e-4), stage
        health = {k: v for k, v in metrics.items() if k.startswith(("experts/", "balance/"))}
        expected = expected or health
        assert health == pytest.approx(expected, rel=1e-4), stage
        worker.train_step(rank_batch(2, rank, num_ranks), rl, 2, 2)
        from posttrain.learner import engine as engines

        engines.destroy(worker.engine)


def run_rank(rank: int, num_ranks: int, path: str, folder: str, what: str) -> None:
    torch.set_num_threads(1)
    from posttrain.learner import engine as engines

    store = dist.FileStore(f"{folder}/store", num_ranks)
    engines.init_distributed("gloo", store, rank, num_ranks)
    if what == "bias":
        check_bias(rank, path, Path(folder))
    else:
        check_health(rank, num_ranks, path)
    dist.destroy_process_group()


@pytest.mark.parametrize(("what", "num_ranks"), [("bias", 2), ("health", 1), ("health", 2)])
def test_two_processes(what: str, num_ranks: int, tmp_path: Path) -> None:
    from tests.tiny_models import tiny_mimo

    path = tiny_mimo(tmp_path / "mimo", hidden=64, num_layers=LAYERS + 1, moe_width=36)
    mp.spawn(  # type: ignore[attr-defined]
        run_rank, args=(num_ranks, str(path), str(tmp_path), what), nprocs=num_ranks, join=True
    )
