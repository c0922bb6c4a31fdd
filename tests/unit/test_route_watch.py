"""Which recorded routes are told from those of the present policy: swapped layers, shifted rows, other weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from posttrain.learner.errors import RecordError
from posttrain.learner.metrics import Totals
from posttrain.learner.moe.replay import LiveRouting, RouterReplay
from posttrain.learner.monitors import routes as monitor
from posttrain.learner.monitors.routes import RouteWatch, add_route_metrics, route_distance
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, TOP_K

B, T = 4, 24
NAMES = [f"rollout g{i}/0" for i in range(B)]
LENGTHS = (24, 20, 16, 12)


@cache
def policy(seed: int) -> tuple[nn.Module, RouterReplay]:
    model = FAMILIES["mimo_v2_flash"].build(seed)
    replay = RouterReplay.attach(model)
    assert replay is not None
    return model, replay


def tokens() -> Tensor:
    return torch.randint(3, 64, (B, T), generator=torch.Generator().manual_seed(4))


def documents() -> Tensor:
    ids = torch.full((B, T), -1)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = row
    return ids


def expected() -> Tensor:
    mask = documents() >= 0
    for row, length in enumerate(LENGTHS):
        mask[row, length - 1] = False
    return mask


def recorded(seed: int = 0) -> Tensor:
    """[B, T, L, K] live routes of the policy with this seed, -1 where none is expected."""
    model, replay = policy(seed)
    with torch.no_grad(), replay.routes(None, keep_scores=True):
        model(tokens())
        assert replay.last is not None
        routes = torch.stack([i for i in replay.last.indices if i is not None], dim=1)
    routes = routes.view(B, T, replay.num_layers, TOP_K).clone()
    routes[~expected()] = -1
    return routes


def run(routes: Tensor, watch: RouteWatch | None = None) -> Tensor:
    """One forward pass of policy 0 under ``routes``; the documents that may reach the loss."""
    model, replay = policy(0)
    watch = watch or RouteWatch(replay=replay, limit=0.5)
    with torch.no_grad(), replay.routes(routes, documents() >= 0, expected()):
        model(tokens())
        return watch.watch(documents(), expected(), NAMES)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> RouteWatch:
    monkeypatch.setattr(monitor, "gather", lambda value: [value])
    return RouteWatch(replay=policy(0)[1], limit=0.5)


def test_own_routes_are_at_distance_zero(watch: RouteWatch) -> None:
    assert run(recorded(), watch).all()
    assert route_distance(watch.replay.last, documents(), expected(), TOP_K).value.tolist() == [0.0] * B
    watch.check(num_samples=B)
    assert watch.covered == watch.expected == sum(length - 1 for length in LENGTHS) * 2


def test_a_few_close_calls_pass() -> None:
    routes = recorded()
    for t in (2, 9, 14):  # one of two experts differs, in one layer
        row = routes[0, t, 1]
        row[0] = next(e for e in range(NUM_EXPERTS) if e not in row)
    assert run(routes).all()


def swap_layers(routes: Tensor) -> None:
    routes[1] = routes[1].flip(1)


def shift_rows(routes: Tensor) -> None:
    routes[1, : LENGTHS[1] - 1] = routes[1, : LENGTHS[1] - 1].roll(1, 0)


def other_weights(routes: Tensor) -> None:
    routes[1] = recorded(seed=1)[1]


def one_layer_of_another_rollout(routes: Tensor) -> None:
    routes[1, : LENGTHS[1] - 1, 1] = recorded()[0, 4 : 4 + LENGTHS[1] - 1, 1]


@pytest.mark.parametrize("fault", [swap_layers, shift_rows, other_weights, one_layer_of_another_rollout])
def test_wrong_routes_are_named_and_stay_out(fault, watch: RouteWatch) -> None:  # type: ignore[no-untyped-def]
    routes = recorded()
    fault(routes)
    assert run(routes, watch).tolist() == [True, False, True, True]
    assert list(watch.rejected) == ["rollout g1/0"]
    assert "learner.max_route_distance=0.5" in watch.rejected["rollout g1/0"]
    watch.check(num_samples=B)


def test_many_wrong_rollouts_stop_the_step(watch: RouteWatch) -> None:
    run(recorded(seed=1), watch)
    with pytest.raises(
        RecordError,
        match=r"4 of 4 rollouts have routes that are missing or contradict.*rollout g0/0: its routes in layer",
    ):
        watch.check(num_samples=B)


def test_a_token_without_route_stops_the_step(watch: RouteWatch) -> None:
    routes = recorded()
    routes[2, 5] = -1
    run(routes, watch)
    with pytest.raises(RecordError, match=r"replay/coverage is 0.985.*2 of 136 \(token, layer\) pairs"):
        watch.check(num_samples=B)


def test_no_limit_lets_everything_pass() -> None:
    watch = RouteWatch(replay=policy(0)[1], limit=float("inf"))
    assert run(recorded(seed=1), watch).all() and not watch.rejected


def test_metrics_by_global_layer_number(watch: RouteWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = recorded()
    swap_layers(routes)
    run(routes, watch)
    monkeypatch.setattr("posttrain.learner.metrics.gather", lambda value: [value])
    totals = Totals()
    add_route_metrics(totals, watch.replay, "replay/")
    metrics = totals.reduce()
    assert metrics["replay/coverage"] == 1.0
    both = [metrics[f"replay/route_mismatch/layer_{layer}"] for layer in (1, 2)]
    assert all(0.1 < share < 0.5 for share in both)
    assert metrics["replay/route_mismatch"] == pytest.approx(sum(both) / 2)


def live_routing(outside: Tensor) -> LiveRouting:
    """``outside`` [L, N] with loads that are even."""
    num_tokens = torch.tensor(float(outside.shape[1]), dtype=torch.float64)
    layers = torch.zeros(len(outside), dtype=torch.float64)
    return LiveRouting(
        counts_LE=torch.full((len(outside), NUM_EXPERTS), float(num_tokens) * TOP_K / NUM_EXPERTS).double(),
        mismatched_L=layers,
        replayed_L=layers,
        num_tokens=num_tokens,
        num_expected=num_tokens,
        outside_LN=outside,
        scores=[],
        indices=[],
    )


def test_one_wrong_turn_of_a_long_episode_is_not_averaged_away() -> None:
    documents = torch.full((3, 110), -1)
    for row, length in enumerate((100, 110, 9)):
        documents[row, :length] = row
    outside = torch.zeros(2, 3, 110, dtype=torch.uint8)
    outside[1, 0, 70:100] = TOP_K  # the last 30 of 100 tokens
    outside[0, 1, ::10] = 1  # close calls
    expected = documents >= 0
    distance = route_distance(live_routing(outside.flatten(1)), documents, expected, TOP_K)
    assert distance.value.argmax() == 0 and distance.value[0] > 0.8
    assert distance.value[1] < 0.2 and distance.value[2] == 0
    assert (int(distance.layer[0]), int(distance.start[0])) == (1, 64)
    means = outside.flatten(1)[:, expected.flatten()].double().mean()
    assert means < 0.2, "over the whole it would pass"


def test_windows_tile_documents_that_lie_in_any_order() -> None:
    ids = torch.tensor([2] * 70 + [0] * 31 + [1] * 33 + [4] * 64)
    windows, firsts = monitor._windows(ids, 5)
    assert firsts.tolist() == [0, 1, 2, 4, 5, 7]  # the fourth document has no token
    assert torch.bincount(windows, minlength=7).tolist() == [31, 33, 32, 38, 0, 32, 32]


def test_what_stays_out_stays_out_of_every_update(watch: RouteWatch) -> None:
    routes = recorded()
    swap_layers(routes)
    assert run(routes, watch).tolist() == [True, False, True, True]
    watch.check(num_samples=B)
    assert run(recorded(), watch).tolist() == [True, False, True, True], (
        "the policy came nearer after an update"
    )
    others = recorded()
    others[2] = recorded(seed=1)[2]
    assert run(others, watch).tolist() == [True, False, True, True], "or went away from another rollout"
    watch.check(num_samples=B)
    assert list(watch.rejected) == ["rollout g1/0"]
