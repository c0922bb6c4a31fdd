"""num-zeros under DeepSpeed ZeRO 0 to 3, offloaded too, on one and two ranks, against brute force over whole gradients.

Four batches: everything used; one expert and one whole parameter unused (as an expert is that has a parameter of its
own: ZeRO-3 and offload would show it the gradient of the step before); both used in the first micro-batch only, or in
the second only. Odd sizes force padding, one parameter is never used, and zeros are planted. The norm of the gradient is
checked beside its zeros.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytestmark = pytest.mark.integration

IDLE = 5
MICRO_BATCHES = 2
BATCHES = ("all", "late", "early", "idle", "late", "all")
PLANTED = 5  # of the 13 elements of `partial` have a gradient
MARKS = {
    "experts": "routed_expert",
    "gate.": "router",
    "self_attn": "attention",
    "norm": "norm",
    "embed": "embedding",
    "lm_head": "head",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    stage: int
    dtype: str = "float32"
    offload: tuple[str, ...] = ()  # DeepSpeed's names of what lies on the CPU
    persists: bool = False  # stage 3: parameters this small stay whole, as by default

    def learner(self, num_ranks: int) -> Any:
        from posttrain.config import Dtype, LearnerConfig

        zero: dict[str, Any] = {name: {"device": "cpu"} for name in self.offload}
        if self.stage == 3 and not self.persists:
            zero["stage3_param_persistence_threshold"] = 0
        return LearnerConfig(
            zero_stage=self.stage,
            num_ranks=num_ranks,
            dtype=Dtype(self.dtype),
            deepspeed={"zero_optimization": zero},
        )


OPTIMIZER, PARAMETERS = ("offload_optimizer",), ("offload_optimizer", "offload_param")
CELLS = (
    *(Cell(stage=stage) for stage in (0, 1, 2, 3)),
    *(Cell(stage=stage, offload=OPTIMIZER) for stage in (1, 2, 3)),
    Cell(stage=3, offload=PARAMETERS),
    Cell(stage=3, offload=PARAMETERS[1:]),
    Cell(stage=3, persists=True),
    *(Cell(stage=stage, dtype="bfloat16") for stage in (2, 3)),
    *(Cell(stage=stage, dtype="bfloat16", offload=OPTIMIZER) for stage in (2, 3)),
)
SOME = (*CELLS[:7], *(cell for cell in CELLS if cell.dtype == "bfloat16"))
VARIANTS = {"plain": CELLS, "tied": SOME, "frozen": SOME}
Expected = dict[str, tuple[dict[str, float], float]]  # by batch


class Net(nn.Module):
    """A tiny MoE and three parameters of odd length: never used, used in part, used in some batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.ones(7))
        self.partial = nn.Parameter(torch.ones(13))
        self.sometimes = nn.Parameter(torch.ones(11))

    def forward(self, tokens: Tensor, sometimes: bool) -> Tensor:
        loss = self.model(tokens, use_cache=False).logits.square().mean() + self.partial[:PLANTED].sum()
        return loss + self.sometimes.sum() if sometimes else loss


def uses_all(batch: str, micro: int) -> bool:
    return batch == "all" or (batch == "late" and micro == 1) or (batch == "early" and micro == 0)


def build(variant: str, dtype: str) -> tuple[Net, Any]:
    from posttrain.learner.moe.replay import RouterReplay
    from tests.unit.moe_families import FAMILIES

    model = FAMILIES["mimo_v2_flash"].build().train()
    if variant == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    if variant == "frozen":  # experts of one layer of two, attention of all, and the head
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not re.search(r"layers\.1\.mlp\.experts|self_attn|lm_head", name))
    net = Net(model)
    return net.to(getattr(torch, dtype)), RouterReplay.attach(net.model)


def data(batch: str, rank: int, micro: int, num_layers: int) -> tuple[Tensor, Tensor]:
    """Tokens [2, 6] and routes [2, 6, L, 2]; the idle expert is left out where the batch says so."""
    seed = BATCHES.index(batch) * 100 + rank * 10 + micro
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (2, 6), generator=generator)
    scores = torch.rand(2, 6, num_layers, 8, generator=generator)
    if not uses_all(batch, micro):
        scores[..., IDLE] = -1
    return tokens, scores.topk(2).indices


def brute_force(net: Net, replay: Any, batch: str, num_ranks: int) -> tuple[dict[str, float], float]:
    """Zeros of whole gradients of an undivided model, per class and layer by name and per expert by slice; their norm."""
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    gradients = {name: torch.zeros(parameter.shape) for name, parameter in trained.items()}
    for micro in range(MICRO_BATCHES):
        net.zero_grad(set_to_none=True)
        for rank in range(
            num_ranks
        ):  # added up in the parameters' type, as ranks do, and micro-batches in float32
            tokens, routes = data(batch, rank, micro, replay.num_layers)
            with replay.routes(routes):
                (net(tokens, uses_all(batch, micro)) / num_ranks).backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                gradients[name] += parameter.grad
    counts: dict[str, float] = {"total": 0.0}
    experts: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        zeros = float((gradient == 0).sum())
        layer = re.search(r"layers\.(\d+)\.", name)
        module_class = next((c for mark, c in MARKS.items() if mark in name), "other")
        keys = [module_class, "total"]
        if layer is not None:
            keys += [f"layer_{layer[1]}"]
            keys += [f"not_experts/layer_{layer[1]}"] if module_class != "routed_expert" else []
        for key in keys:
            counts[key] = counts.get(key, 0.0) + zeros
        if module_class == "routed_expert":
            assert layer is not None
            experts[layer[1]] = experts.get(layer[1], torch.zeros(8)) + gradient.abs().flatten(1).sum(1)
    dead = {layer: float((total == 0).sum()) for layer, total in experts.items()}
    dead |= dict.fromkeys({"1", "2"} - dead.keys(), 0.0)  # frozen experts are not dead
    counts |= {f"dead_experts/layer_{layer}": number for layer, number in dead.items()}
    counts["dead_experts"] = sum(dead.values())
    counts["share"] = counts["total"] / sum(parameter.numel() for parameter in trained.values())
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    return {f"num_zeros/{name}": count for name, count in counts.items()}, float(norm)


def expectations(variant: str, dtype: str, num_ranks: int) -> Expected:
    whole, replay = build(variant, dtype)
    return {batch: brute_force(whole, replay, batch, num_ranks) for batch in dict.fromkeys(BATCHES)}


def check_cell(cell: Cell, variant: str, expectation: Expected, rank: int, num_ranks: int) -> None:
    from posttrain.learner import engine as engines
    from posttrain.learner.monitors.num_zeros import NumZeros

    net, replay = build(variant, cell.dtype)
    engine = engines.build(net, cell.learner(num_ranks))
    engines.set_learning_rate(engine, 0.0)  # the weights stay those of the undivided model
    counter = NumZeros(engine)
    tolerance = 1e-5 if cell.dtype == "float32" else 1e-2
    for batch in BATCHES:
        expected, norm = expectation[batch]
        for micro in range(MICRO_BATCHES):
            engine.set_gradient_accumulation_boundary(micro == MICRO_BATCHES - 1)
            tokens, routes = data(batch, rank, micro, replay.num_layers)
            with replay.routes(routes):
                engine.backward(engine(tokens, uses_all(batch, micro)))
        got = counter.count()
        wrong = {
            name: (got.get(name), n)
            for name, n in expected.items()
            if got.get(name) != pytest.approx(n, rel=1e-12)
        }
        assert not wrong and got.keys() == expected.keys(), (variant, cell, batch, wrong)
        assert engines.gradient_norm(engine) == pytest.approx(norm, rel=tolerance), (variant, cell, batch)
        engine.step()
        engines.clear_gradients(engine)
    engines.destroy(engine)


def check_batches(plain: Expected, tied: Expected) -> None:
    """The planted zeros are there, and the batches differ as this file says."""
    zeros = {batch: counts for batch, (counts, _) in plain.items()}
    assert zeros["idle"]["num_zeros/dead_experts"] > zeros["late"]["num_zeros/dead_experts"]
    assert zeros["idle"]["num_zeros/other"] - zeros["early"]["num_zeros/other"] >= 11
    assert zeros["all"]["num_zeros/other"] >= 7 + 13 - PLANTED
    embedding = "num_zeros/embedding"
    assert tied["all"][0][embedding] < zeros["all"][embedding], "the head gives every row a gradient"
    assert "num_zeros/head" not in tied["all"][0]


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    from posttrain.learner import engine as engines

    store = dist.FileStore(f"{folder}/store", num_ranks)
    engines.init_distributed("gloo", store, rank, num_ranks)
    expected: dict[tuple[str, str], Expected] = {}
    for variant, cells in VARIANTS.items():
        for cell in cells:
            key = (variant, cell.dtype)
            expected[key] = expected.get(key) or expectations(*key, num_ranks)
            check_cell(cell, variant, expected[key], rank, num_ranks)
    check_batches(expected["plain", "float32"], expected["tied", "float32"])
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_counts_equal_brute_force_in_every_cell(num_ranks: int, tmp_path: Any) -> None:
    mp.spawn(run_rank, args=(num_ranks, str(tmp_path)), nprocs=num_ranks, join=True)  # type: ignore[attr-defined]
