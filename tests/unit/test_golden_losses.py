"""Every outcome loss, correction and aggregation against numbers that were worked out without this system."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor

from posttrain.config import CLIPS, Aggregation, Loss
from posttrain.learner.losses import LossInputs, compute
from posttrain.records import LossSettings
from posttrain.weighting import token_weights
from tests.unit.golden import derive

GOLDEN = json.loads(derive.FILE.read_text())
DOMAINS = ["math", "code"]


def inputs(aggregation: str, order: list[int] | None = None) -> LossInputs:
    """The golden case; ``order`` chooses answers, so that a part of the batch keeps the weights of the whole."""
    lengths = [len(tokens) for _, _, tokens in derive.SEQUENCES]
    weights = token_weights(
        lengths,
        [domain for domain, _, _ in derive.SEQUENCES],
        Aggregation(aggregation),
        derive.TARGET,
        length_norm=derive.LENGTH_NORM,
    ).weights
    order = list(range(len(lengths))) if order is None else order
    rows = [(i, *derive.SEQUENCES[i][:2], token) for i in order for token in derive.SEQUENCES[i][2]]

    def stream(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    moved = stream([token[0] for *_, token in rows]).log()
    engines = stream([token[1] for *_, token in rows]).log()
    policy = stream([token[2] for *_, token in rows])
    return LossInputs(
        policy_logprobs=policy.clone().requires_grad_(),
        old_logprobs=policy - moved,
        rollout_logprobs=policy - moved - engines,
        weights=stream([weights[i] for i, *_ in rows]),
        orm_advantages=stream([advantage for _, _, advantage, _ in rows]),
        sequence_ids=torch.tensor([i for i, *_ in rows], dtype=torch.int64),
        domain_ids=torch.tensor([DOMAINS.index(domain) for _, domain, _, _ in rows], dtype=torch.int64),
        domains=DOMAINS,
    )


def settings(loss: str, correction: str) -> LossSettings:
    low, high = CLIPS.get(Loss(loss), (0.0, 0.0))
    return LossSettings(kind=loss, correction=correction, clip_low=low, clip_high=high)


def test_the_numbers_on_disk_are_the_derived_ones() -> None:
    assert json.loads(json.dumps(derive.all_cases())) == GOLDEN
    assert len(GOLDEN) == len(derive.LOSSES) * len(derive.CORRECTIONS) * len(derive.AGGREGATIONS)
    assert set(derive.LOSSES) == {loss.value for loss in Loss}
    assert set(derive.AGGREGATIONS) == {aggregation.value for aggregation in Aggregation}


@pytest.mark.parametrize("name", GOLDEN)
def test_loss_and_gradient(name: str) -> None:
    loss, correction, aggregation = name.split("/")
    given = inputs(aggregation)
    output = compute(given, settings(loss, correction))
    (gradient,) = torch.autograd.grad(output.loss, given.policy_logprobs)
    assert output.loss.item() == pytest.approx(GOLDEN[name]["loss"], rel=1e-12)
    torch.testing.assert_close(
        gradient, torch.tensor(GOLDEN[name]["gradient"], dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_form_gives_the_same_loss(name: str) -> None:
    assert derive.published_loss(*name.split("/")) == pytest.approx(GOLDEN[name]["loss"], rel=1e-12)


def test_the_table_by_hand() -> None:
    text = derive.FILE.with_name("README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \| ([-\d.]+) \|$", text, re.M)
    assert [row[0] for row in rows] == list(derive.LOSSES)
    for loss, *values in rows:
        for aggregation, value in zip(derive.AGGREGATIONS, values, strict=True):
            assert GOLDEN[f"{loss}/icepop/{aggregation}"]["loss"] == pytest.approx(float(value), abs=6e-8)


@pytest.mark.parametrize("name", [name for name in GOLDEN if "/icepop/" in name])
@pytest.mark.parametrize("cut", [[[0, 1, 2, 3]], [[3], [1], [2], [0]], [[2, 0], [], [3, 1]]])
def test_equal_for_any_cut_and_order(name: str, cut: list[list[int]]) -> None:
    loss, correction, aggregation = name.split("/")
    parts = [compute(inputs(aggregation, part), settings(loss, correction)) for part in cut]
    assert sum(part.loss.item() for part in parts) == pytest.approx(GOLDEN[name]["loss"], rel=1e-12)
    for domain in DOMAINS:  # a share adds up too
        pair = [sum(p.metrics[f"share/gradient/{domain}"][i] for p in parts) for i in range(2)]
        golden = torch.tensor(GOLDEN[name]["gradient"]).abs()
        own = golden[:4].sum() if domain == "math" else golden[4:].sum()
        assert float(pair[0] / pair[1]) == pytest.approx(float(own / golden.sum()), rel=1e-6)
