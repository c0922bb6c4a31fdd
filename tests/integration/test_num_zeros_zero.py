"""num-zeros under DeepSpeed ZeRO 0 to 3, on one and two ranks, against brute force over whole gradients.

Three batches: everything used; one expert and one whole parameter unused (as an expert is that has a parameter of its
own: ZeRO-3 would show it the gradient of the step before); both used in the second micro-batch only. Odd sizes force
padding, and one parameter is never used.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytestmark = pytest.mark.integration

STAGES = (0, 1, 2, 3)
IDLE = 5
MICRO_BATCHES = 2
BATCHES = ("all", "idle", "late")


class Net(nn.Module):
    """A tiny MoE and three parameters of odd length: never used, used in part, used in some batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.ones(7))
        self.partial = nn.Parameter(torch.ones(13))
        self.sometimes = nn.Parameter(torch.ones(11))

    def forward(self, tokens: Tensor, sometimes: bool) -> Tensor:
        loss = self.model(tokens, use_cache=False).logits.square().mean() + self.partial[:5].sum()
        return loss + self.sometimes.sum() if sometimes else loss


def uses_all(batch: str, micro: int) -> bool:
    return batch == "all" or (batch == "late" and micro == 1)


def build() -> tuple[Net, Any]:
    from posttrain.learner.moe.replay import RouterReplay
    from tests.unit.moe_families import FAMILIES

    net = Net(FAMILIES["mimo_v2_flash"].build().train())
    return net, RouterReplay.attach(net.model)


def data(batch: str, rank: int, micro: int, num_layers: int) -> tuple[Tensor, Tensor]:
    """Tokens [2, 6] and routes [2, 6, L, 2]; the idle expert is left out where the batch says so."""
    seed = BATCHES.index(batch) * 100 + rank * 10 + micro
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (2, 6), generator=generator)
    scores = torch.rand(2, 6, num_layers, 8, generator=generator)
    if not uses_all(batch, micro):
        scores[..., IDLE] = -1
    return tokens, scores.topk(2).indices


def brute_force(net: Net, replay: Any, batch: str, num_ranks: int) -> dict[str, float]:
    """Zeros of whole gradients of an undivided model, per class by name and per expert by slice."""
    net.zero_grad(set_to_none=True)
    for rank in range(num_ranks):
        for micro in range(MICRO_BATCHES):
            tokens, routes = data(batch, rank, micro, replay.num_layers)
            with replay.routes(routes):
                (net(tokens, uses_all(batch, micro)) / num_ranks).backward()
    marks = {
        "experts": "routed_expert",
        "gate.": "router",
        "self_attn": "attention",
        "norm": "norm",
        "embed": "embedding",
        "lm_head": "head",
    }
    result: dict[str, float] = {}

    experts: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        module_class = next(
            (c for mark, c in marks.items() if mark in name and "q_norm" not in name), "other"
        )
        result[module_class] = result.get(module_class, 0) + int((gradient == 0).sum())
        if module_class == "routed_expert":
            layer = name.rsplit(".", 1)[0]
            experts[layer] = experts.get(layer, torch.zeros(8)) + gradient.abs().flatten(1).sum(1)
    dead = sum(int((total == 0).sum()) for total in experts.values())
    return {
        **{f"num_zeros/{name}": float(count) for name, count in result.items()},
        "num_zeros/total": float(sum(result.values())),
        "num_zeros/share": sum(result.values()) / sum(p.numel() for p in net.parameters()),
        "num_zeros/dead_experts": float(dead),
    }


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    from posttrain.config import LearnerConfig
    from posttrain.learner import engine as engines
    from posttrain.learner.monitors.num_zeros import NumZeros

    store = dist.FileStore(f"{folder}/store", num_ranks)
    engines.init_distributed("gloo", store, rank, num_ranks)
    whole, whole_replay = build()
    expected = {batch: brute_force(whole, whole_replay, batch, num_ranks) for batch in BATCHES}
    assert expected["idle"]["num_zeros/dead_experts"] > expected["late"]["num_zeros/dead_experts"]
    for stage in STAGES:
        net, replay = build()
        learner = LearnerConfig(
            zero_stage=stage,
            num_ranks=num_ranks,
            deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
        )
        engine = engines.build(net, learner)
        engines.set_learning_rate(engine, 0.0)  # the weights stay those of the undivided model
        counter = NumZeros(engine)
        for batch in (*BATCHES, "all", "late", "idle"):
            for micro in range(MICRO_BATCHES):
                engine.set_gradient_accumulation_boundary(micro == MICRO_BATCHES - 1)
                tokens, routes = data(batch, rank, micro, replay.num_layers)
                with replay.routes(routes):
                    engine.backward(engine(tokens, uses_all(batch, micro)))
            got = counter.count()
            assert got == pytest.approx(expected[batch], rel=1e-12), (stage, batch, got, expected[batch])
            engine.step()
            engines.clear_gradients(engine)
        engines.destroy(engine)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_counts_equal_brute_force_at_every_stage(num_ranks: int, tmp_path: Any) -> None:
    mp.spawn(run_rank, args=(num_ranks, str(tmp_path)), nprocs=num_ranks, join=True)  # type: ignore[attr-defined]
