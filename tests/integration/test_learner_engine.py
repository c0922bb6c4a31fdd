"""A parameter that gets no gradient in one step, or in one micro-batch, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
import torch
from torch import Tensor, nn

from posttrain import cluster
from posttrain.config import LearnerConfig, RayConfig

pytestmark = pytest.mark.integration

# For every step the micro-batches, each with whether it uses the second layer.
STEPS = ([True, True], [False, False], [False, True], [True, False], [False, False])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, rows: Tensor, both: bool) -> Tensor:
        hidden = self.first(rows)
        return (self.second(hidden) if both else hidden).square().mean()


def rows(step: int, index: int) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * step + index))


def plain() -> dict[str, Tensor]:
    """AdamW on whole gradients, zero where there is none."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    for step, micro_batches in enumerate(STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for index, both in enumerate(micro_batches):
            net(rows(step, index), both).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.state_dict()


def train(zero_stage: int) -> dict[str, Tensor]:
    """The same through `posttrain.learner.engine`."""
    import deepspeed

    from posttrain.learner import engine

    if not torch.distributed.is_initialized():
        store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
        engine.init_distributed("gloo", store, 0, 1)
    learner = LearnerConfig(
        zero_stage=zero_stage,
        lr=1e-2,
        eps=1e-4,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {},
    )
    built = engine.build(Net(), learner)
    for step, micro_batches in enumerate(STEPS):
        for index, both in enumerate(micro_batches):
            built.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            built.backward(built(rows(step, index), both))
        assert engine.gradient_norm(built) > 0
        built.step()
        engine.clear_gradients(built)
    parameters = dict(built.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero_stage == 3):
        return {name: p.detach().clone() for name, p in parameters.items()}


@ray.remote(num_cpus=0, runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}})
class Trainer:
    def run(self, zero_stage: int) -> dict[str, Tensor]:
        return train(zero_stage)


@pytest.fixture(scope="module")
def trainer() -> Iterator[object]:
    cluster.start(RayConfig(object_store_gb=0.2))
    yield Trainer.remote()
    cluster.stop()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_no_gradient_is_zero_gradient(zero_stage: int, trainer: object) -> None:
    trained = ray.get(trainer.run.remote(zero_stage))  # type: ignore[attr-defined]
    for name, expected in plain().items():
        torch.testing.assert_close(
            trained[name], expected, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
