"""Loads, entropy, norms and biases of the experts against counts and formulas written down here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import LearnerConfig, UserError
from posttrain.learner.group import is_window_end
from posttrain.learner.moe.replay import RouterReplay
from posttrain.learner.monitors.experts import ExpertHealth, pack
from posttrain.learner.monitors.num_zeros import NumZeros
from posttrain.tracking.jsonl import LoadFile, read_jsonl
from tests.metric_names import undocumented
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, TOP_K
from tests.unit.moe_passes import B, Handed, T, random_routes, tokens

MASK = torch.ones(B, T, dtype=torch.bool)
MASK[1, 4:] = False


def attach(name: str) -> tuple[Any, RouterReplay]:
    model = FAMILIES[name].build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    return model, replay


def routes_of(replay: RouterReplay) -> Tensor:
    """Recorded routes, but for the last real token of each row."""
    routes = random_routes(replay)
    routes[0, 6] = routes[1, 3] = -1
    return routes


def counted(indices: Tensor, mask: Tensor) -> list[float]:
    """Tokens per expert, one at a time."""
    counts = [0.0] * NUM_EXPERTS
    for row, is_real in zip(indices.tolist(), mask.flatten().tolist(), strict=True):
        for expert in row:
            counts[expert] += is_real
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_live_and_replayed_tokens_are_counted_once_and_apart(checkpointing: bool) -> None:
    model, replay = attach("mimo_v2_flash")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    routes = routes_of(replay)
    with Handed(replay) as handed, replay.routes(routes, token_mask_BT=MASK, measure_health=True):
        model(tokens(), use_cache=False).logits.square().mean().backward()
        last = replay.last
    assert last is not None
    recorded = MASK & (routes[:, :, 0, 0] >= 0)
    for layer in range(replay.num_layers):
        rows = routes[:, :, layer].flatten(0, 1)
        assert last.replayed_counts_LE[layer].tolist() == counted(rows, recorded)
        hidden, router = handed.hidden[layer], replay.routers[layer]
        scores = torch.sigmoid(hidden.float() @ next(iter(router.parameters())).float().T)
        bias = router.correction_bias()
        assert bias is not None
        assert last.counts_LE[layer].tolist() == counted((scores + bias).topk(TOP_K).indices, MASK)
        shares = (scores / scores.sum(-1, keepdim=True))[MASK.flatten()].double()
        entropy = -(shares * shares.log()).sum() / math.log(NUM_EXPERTS)
        assert float(last.entropy_L[layer]) == pytest.approx(entropy.item(), rel=1e-5)
    assert last.scored_L.tolist() == [float(MASK.sum())] * replay.num_layers
    assert not torch.equal(last.counts_LE, last.replayed_counts_LE)
    with replay.routes(routes, token_mask_BT=MASK):
        model(tokens(), use_cache=False)
    assert replay.last is not None and not replay.last.replayed_counts_LE.any()  # nobody asked


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "deepseek_v4"])
def test_entropy_is_1_for_an_even_router(name: str) -> None:
    model, replay = attach(name)
    with replay.routes(None, measure_health=True):
        model(tokens(), use_cache=False)
    trained = replay.last
    for router in replay.routers:
        for parameter in router.parameters():
            parameter.data.zero_()
    with replay.routes(None, measure_health=True):
        model(tokens(), use_cache=False)
    even = replay.last
    assert trained is not None and even is not None
    assert even.scored_L.tolist() == [float(B * T)] * replay.num_layers
    torch.testing.assert_close(even.entropy_L, even.scored_L, rtol=1e-5, atol=0)
    assert 0 < float(trained.entropy_L.sum()) < float(trained.scored_L.sum())


def test_routers_without_scores_have_no_entropy() -> None:
    model, replay = attach("deepseek_v4")
    health = ExpertHealth(replay, NumZeros(model), 2)
    with replay.routes(None, measure_health=True):
        model(tokens(), use_cache=False)
    assert replay.last is not None
    health.observe(pack(replay.last))
    metrics = health.metrics()
    assert "experts/router_entropy" not in metrics and "experts/starving" in metrics


def step(health: ExpertHealth, live: Tensor, replayed: Tensor | None = None) -> dict[str, float]:
    """A train step of one update with these tokens per expert in every layer."""
    layers = health.replay.num_layers
    replayed = torch.zeros(NUM_EXPERTS) if replayed is None else replayed
    counts = [part.double().expand(layers, -1).flatten() for part in (live, replayed)]
    health.start()
    observed = health.observe(torch.cat([*counts, torch.zeros(2 * layers, dtype=torch.float64)]))
    assert torch.equal(observed, counts[0].view(layers, -1))
    return health.metrics()


def test_starving_and_dying_over_the_window() -> None:
    model, replay = attach("qwen3_moe")
    health = ExpertHealth(replay, NumZeros(model), window=2)
    layers = replay.num_layers
    uneven = torch.tensor([79.0, 1, 0, 40, 40, 40, 40, 80])  # mean 40
    metrics = step(health, torch.full((NUM_EXPERTS,), 40.0))
    assert metrics["experts/starving"] == metrics["experts/dying"] == metrics["balance/max_vio/window"] == 0
    metrics = step(health, uneven)  # two steps: mean 40, the lowest had 40 and 41 of 80
    assert metrics["experts/starving"] == metrics["experts/dying"] == 0
    assert metrics["balance/max_vio/window"] == pytest.approx(0.5)
    metrics = step(health, uneven, replayed=uneven.flip(0) + 8)
    assert (metrics["experts/starving"], metrics["experts/dying"]) == (2 * layers, layers)
    assert [metrics[f"experts/starving/layer_{layer}"] for layer in replay.layers] == [2] * layers
    assert metrics["balance/max_vio/window"] == pytest.approx(1.0)
    assert (metrics["experts/starving/replayed"], metrics["experts/dying/replayed"]) == (0, 0)
    assert metrics["balance/max_vio/replayed"] == pytest.approx(88 / 48 - 1)
    assert undocumented(metrics) == set()
    row = health.load()
    assert row["num_steps"] == 2 and row["layers"] == replay.layers
    assert row["live"] == [(2 * uneven).int().tolist()] * layers
    assert row["replayed"] == [(uneven.flip(0) + 8).int().tolist()] * layers

    resumed = ExpertHealth(replay, NumZeros(model), window=2)
    assert resumed.state() is None
    resumed.load_state(health.state())
    assert resumed.load() == row and step(resumed, uneven) == step(health, uneven)


def test_an_expert_that_is_quiet_for_five_steps_fell_silent() -> None:
    model, replay = attach("qwen3_moe")
    health = ExpertHealth(replay, NumZeros(model), window=4)  # its window does not matter
    layers = replay.num_layers
    usual = torch.tensor([90.0, 90, 90, 90, 90, 90, 3, 0])  # the last two are too rare to fall silent
    quiet = torch.tensor([90.0, 90, 90, 90, 90, 3, 0, 0])  # 3 of 90 is below 5 %
    assert [step(health, usual)["experts/silent"] for _ in range(20)] == [0] * 20
    found = [step(health, quiet) for _ in range(7)]
    assert [row["experts/silent"] for row in found] == [0, 0, 0, 0, layers, layers, layers]
    assert [found[-1][f"experts/silent/layer_{layer}"] for layer in replay.layers] == [1] * layers
    assert undocumented(found[-1]) == set()
    resumed = ExpertHealth(replay, NumZeros(model), window=4)
    resumed.silent.load_state(health.silent.state())
    assert step(resumed, quiet)["experts/silent"] == layers
    assert step(health, usual)["experts/silent"] == 0


def test_updates_of_a_step_are_one_entry_and_a_failed_attempt_none() -> None:
    model, replay = attach("qwen3_moe")
    health = ExpertHealth(replay, NumZeros(model), window=3)
    even = torch.ones(2 * replay.num_layers * (NUM_EXPERTS + 1), dtype=torch.float64)
    health.observe(even)
    health.start()
    health.observe(even)
    health.observe(even)
    health.metrics()
    assert health.load()["live"][0] == [2] * NUM_EXPERTS and health.load()["num_steps"] == 1


@pytest.mark.parametrize("name", ["mimo_v2_flash", "qwen3_moe", "gpt_oss", "jamba", "longcat_flash"])
def test_norms_and_biases(name: str) -> None:
    model, replay = attach(name)
    numbers = NumZeros(model)
    squares: dict[int, Tensor] = {}
    for layer, router in enumerate(replay.routers):
        for parameter in router.block.experts.parameters():
            rows = parameter.detach().double().square().flatten(1).sum(1)[:NUM_EXPERTS]
            squares[layer] = squares.get(layer, torch.zeros(NUM_EXPERTS).double()) + rows
    spreads = [(s.sqrt().std(correction=0) / s.sqrt().mean()).item() for s in squares.values()]
    metrics = (
        step(ExpertHealth(replay, numbers, 1), torch.ones(NUM_EXPERTS)) if name != "longcat_flash" else {}
    )
    if name == "longcat_flash":
        health = ExpertHealth(replay, numbers, 1)
        assert replay.num_experts == 10  # two choices compute nothing
        loads = torch.ones(2, replay.num_layers, 10, dtype=torch.float64)
        loads[..., 8:] = 0
        health.observe(torch.cat([loads.flatten(), torch.zeros(2 * replay.num_layers)]))
        metrics = health.metrics()
        assert metrics["experts/dying"] == metrics["experts/starving"] == 0
    assert metrics["experts/norm_spread"] == pytest.approx(max(spreads), rel=1e-5)
    biases = [b for b in (router.correction_bias() for router in replay.routers) if b is not None]
    expected = [float(b.max() - b.min()) for b in biases]
    assert metrics.get("experts/bias_range") == (max(expected) if expected else None)


def test_a_line_per_window_and_one_at_the_end(tmp_path: Path) -> None:
    learner: Any = SimpleNamespace(learner=LearnerConfig(expert_window=4))
    due = [s for s in range(1, 11) if is_window_end(learner, s, 10, {"experts/starving": 0.0})]
    assert due == [4, 8, 10]
    assert not is_window_end(learner, 4, 10, {"loss": 1.0})
    file = LoadFile(tmp_path / "expert_load.jsonl")
    assert not file.path.exists()
    for number in due:
        file.write(number, {"live": [[1, number]], "replayed": None})
    assert [row["step"] for row in read_jsonl(file.path)] == due
    LoadFile(file.path, resume_step=5).write(8, {"live": [[0, 0]], "replayed": None})
    assert json.loads(file.path.read_text().splitlines()[-1]) == {
        "step": 8,
        "live": [[0, 0]],
        "replayed": None,
    }
    assert [row["step"] for row in read_jsonl(file.path)] == [4, 8]
    with pytest.raises(UserError, match=r"learner\.expert_window=0"):
        LearnerConfig(expert_window=0)
