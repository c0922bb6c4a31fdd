"""Routes of any size are followed; routes that cannot be, and routers that compute NaN, end in a named error."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.learner.errors import NonFiniteRouterError, RecordError
from posttrain.learner.moe.replay import RouterReplay
from posttrain.learner.samples import Expected, check
from posttrain.records import TrainingSample
from tests.unit.moe_families import FAMILIES, NUM_EXPERTS, Family
from tests.unit.moe_passes import Handed, attached, random_routes, tokens

SOME = ["qwen3_moe", "deepseek_v2_grouped", "gpt_oss", "phimoe", "llama4_top2", "zaya", "dbrx"]
PROFILE = settings(max_examples=25, deadline=None, derandomize=True)


@cache
def sized(num_layers: int, num_experts: int, top_k: int) -> tuple[Any, RouterReplay]:
    sizes = dict(num_hidden_layers=num_layers, num_experts=num_experts, num_experts_per_tok=top_k)
    family = FAMILIES["qwen3_moe"]
    config = {**family.config, **sizes, "mlp_only_layers": [], "hidden_size": 16, "head_dim": 8}
    model = Family(family.model_class, config, family.rule).build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    return model, replay


@PROFILE
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    num_layers=st.integers(1, 3),
    num_experts=st.sampled_from([2, 5, 16]),
    top_k=st.integers(1, 4),
    share_live=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_routes_are_followed(
    rows: int, length: int, num_layers: int, num_experts: int, top_k: int, share_live: float, seed: int
) -> None:
    top_k = min(top_k, num_experts)
    model, replay = sized(num_layers, num_experts, top_k)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, length, num_layers, num_experts, generator=generator)
    routes = scores.argsort(-1)[..., :top_k]
    routes[torch.rand(rows, length, num_layers, generator=generator) < share_live] = -1
    mask = torch.rand(rows, length, generator=generator) < 0.8
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    with Handed(replay) as handed, replay.routes(routes, token_mask_BT=mask):
        replayed = model(input_ids=ids, use_cache=False).logits
    last = replay.last
    assert last is not None
    flat = routes.flatten(0, 1)
    for layer in range(num_layers):
        given_routes, got = flat[:, layer], handed.indices[layer].sort(-1).values
        is_live = given_routes[:, 0] < 0
        assert torch.equal(got[~is_live], given_routes[~is_live].sort(-1).values)
        assert (got[:, 1:] != got[:, :-1]).all()
        torch.testing.assert_close(handed.gates[layer].sum(-1), torch.ones(rows * length))
        assert last.replayed_L[layer] == (mask.flatten() & ~is_live).sum()
        assert last.counts_LE[layer].sum() == mask.sum() * top_k
        if layer == 0:  # its input is what it is without replay
            logits = handed.hidden[0] @ replay.routers[0].module.weight.T
            live = logits.topk(top_k).indices.sort(-1).values
            assert torch.equal(got[is_live], live[is_live])
            differs = (live != given_routes.sort(-1).values).any(-1)
            assert last.mismatched_L[0] == (mask.flatten() & ~is_live & differs).sum()
    if share_live == 1.0:
        assert torch.equal(replayed, model(input_ids=ids, use_cache=False).logits)


def put(value: int | list[int]) -> Callable[[Tensor], Tensor]:
    """Into one token of the last MoE layer: all of its experts, or the first."""

    def change(routes: Tensor) -> Tensor:
        routes[1, 2, -1] = torch.tensor(value)
        return routes

    return change


BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "an id too large": (put([0, NUM_EXPERTS + 2]), "token 9, MoE layer .*below"),
    "an id far too large": (put([2**40, 1]), "token 9, MoE layer .*below"),
    "an expert twice": (put([3, 3]), "token 9, MoE layer .*different"),
    "half a route": (put([-1, 2]), "token 9, MoE layer"),
    "a negative id": (put([-2, 2]), "token 9, MoE layer"),
    "negative ids throughout": (put([-2, -2]), "token 9, MoE layer"),
    "a layer too few": (lambda r: r[:, :, 1:], "expected .B, T"),
    "a layer too many": (lambda r: torch.cat([r, r[:, :, :1]], dim=2), "expected .B, T"),
    "an expert too few": (lambda r: r[..., :1], "expected .B, T"),
    "an expert too many": (lambda r: torch.cat([r, (r[..., :1] + 1) % 8], dim=3), "expected .B, T"),
    "a token too few": (lambda r: r[:, :-1], "sees 14 tokens"),
    "a token too many": (lambda r: torch.cat([r, r[:, :1]], dim=1), "sees 14 tokens"),
    "a row too few": (lambda r: r[:1], "sees 14 tokens"),
    "flat": (lambda r: r.flatten(0, 1), "expected .B, T"),
    "no token": (lambda r: r[:, :0], "sees 14 tokens"),
    "of the engine's type": (lambda r: r.to(torch.uint8), "uint8"),
    "whole numbers as real ones": (lambda r: r.float(), "float32"),
    "bool": (lambda r: r > 3, "bool"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", SOME)
def test_routes_that_cannot_be_are_refused(name: str, broken: str) -> None:
    _, model, replay = attached(name)
    change, message = BROKEN[broken]
    routes = random_routes(replay)
    if replay.top_k == 1 and message.startswith("token"):
        routes[1, 2, -1] = {"an id too large": 9, "an id far too large": 2**40}.get(broken, -2)
    elif replay.top_k == 1 and broken == "an expert too few":
        routes = routes[..., :0]
    else:
        routes = change(routes)
    with pytest.raises(ValueError, match=message), replay.routes(routes):
        model(input_ids=tokens(), use_cache=False)
    with replay.routes(None):  # the block is closed again
        model(input_ids=tokens(), use_cache=False)


@PROFILE
@given(data=st.data())
def test_no_array_passes_in_silence(data: st.DataObject) -> None:
    """Any small array as routes: it is refused with ValueError, or the experts get exactly what it says."""
    _, model, replay = attached("qwen3_moe")
    shape = data.draw(
        st.sampled_from([(2, 7, 2, 2), (2, 7, 2, 2), (2, 7, 2, 2), (14, 2, 2), (1, 14, 2, 2), (2, 7, 3, 2)])
    )
    dtype = data.draw(st.sampled_from(["int64", "int64", "int64", "int32", "uint8", "float64"]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    low, high = data.draw(st.sampled_from([(0, 8), (-1, 8), (0, 9), (0, 8)]))
    array = generator.integers(low, high, shape)
    if data.draw(st.booleans()):
        array[..., 1:] = (array[..., :1] + 1) % 8
    routes = torch.from_numpy(array.astype(dtype))
    try:
        with Handed(replay) as handed, replay.routes(routes):
            model(input_ids=tokens(), use_cache=False)
    except ValueError:
        return
    assert routes.dtype == torch.int64
    for layer in range(replay.num_layers):
        recorded = routes.reshape(14, 2, 2)[:, layer]
        followed = recorded[:, 0] >= 0
        assert torch.equal(
            handed.indices[layer].sort(-1).values[followed], recorded.sort(-1).values[followed]
        )
        assert (recorded[~followed] == -1).all()


RECORDED = np.zeros((6, 3, 2), np.uint8)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (None, "is missing"),
        (RECORDED[:-1], "has shape"),
        (RECORDED[:, 1:], "has shape"),
        (RECORDED[..., :1], "has shape"),
        (RECORDED[0], "has shape"),
        (RECORDED.astype(np.int64) - 1, "has type int64"),  # would select live in silence
        (RECORDED.astype(np.float32), "has type float32"),
        (RECORDED + np.uint8(8), "names expert 8 of 8"),
        (np.full_like(RECORDED, 255), "names expert 255 of 8"),
    ],
)
def test_records_that_cannot_be_routes_are_refused(routes: np.ndarray | None, message: str) -> None:
    sample = TrainingSample(
        name="rollout 3",
        token_ids=np.arange(7, dtype=np.int32),
        loss_mask=np.arange(7) > 3,
        weights=np.ones(7, np.float32),
        routed_experts=routes,
    )
    expected = Expected(
        vocab_size=64, routes_shape=(3, 2), num_experts=8, rollout_logprobs=False, teacher_logprobs=False
    )
    with pytest.raises(RecordError, match=f"rollout 3: routed_experts {message}"):
        check(sample, 7, expected)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("where", ["logit of an expert that no route names", "hidden states"])
def test_nan_in_a_router_is_no_selection(name: str, where: str) -> None:
    """Over a recorded set the gates can be finite all the same, and so can the loss."""
    family = FAMILIES[name]
    model = family.build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    routes = torch.arange(replay.top_k).expand(2, 7, replay.num_layers, -1).contiguous()
    with replay.routes(routes):
        model(input_ids=tokens(), use_cache=False)
    layer = replay.layers[-1]
    matrix = [p for p in replay.routers[-1].parameters() if p.dim() == 2][-1]
    if where.startswith("logit"):
        matrix.data[NUM_EXPERTS - 1] = torch.nan
    else:
        model.get_input_embeddings().weight.data[int(tokens()[1, 3])] = torch.nan
        layer = replay.layers[0]
    message = f"router of layer {layer} computed NaN"
    for recorded in (routes, None):
        with pytest.raises(NonFiniteRouterError, match=message), replay.routes(recorded):
            model(input_ids=tokens(), use_cache=False)


def test_nan_in_padding_is_nobodys_business() -> None:
    model = FAMILIES["qwen3_moe"].build()
    replay = RouterReplay.attach(model)
    assert replay is not None
    ids = tokens()
    ids[ids == 63] = 62
    ids[1, 3] = 63
    model.get_input_embeddings().weight.data[63] = torch.nan
    mask = torch.tensor([[True], [False]]).expand(2, 7)
    with replay.routes(random_routes(replay), token_mask_BT=mask):
        assert model(input_ids=ids, use_cache=False).logits[mask].isfinite().all()
    with pytest.raises(NonFiniteRouterError), replay.routes(random_routes(replay)):
        model(input_ids=ids, use_cache=False)
