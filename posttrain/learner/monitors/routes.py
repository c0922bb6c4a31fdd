"""Do the recorded routes belong to this policy, and are they all there? Compares them with the live selection,
rollout by rollout, before the loss.

Shapes and ids cannot tell a layer that was swapped, a row that was shifted, or routes of other weights; the live
routers can: rounding moves one expert in some tokens, a wrong route moves nearly all of them in some layer. The
measure is the share of recorded experts that the live top-k lacks, over `WINDOW` tokens of one rollout in one layer,
divided by the share that routes of unrelated tokens would lack: 0 is the live selection, 1 chance. The worst window counts,
so that one wrong turn of a long episode is not averaged away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.learner.errors import RecordError
from posttrain.learner.metrics import Totals, gather
from posttrain.learner.moe.replay import LiveRouting, RouterReplay

WINDOW = 32  # tokens; the last window of a rollout takes what is left over
MIN_TOKENS = 8  # fewer say nothing: one close call among them would be a large share
MIN_CHANCE = 0.2  # a router that sends all tokens to the same experts has none to tell routes apart by
MAX_REJECTED_SHARE = 0.1  # of a batch; more is no accident of single rollouts
NUM_NAMED = 3


@dataclass(kw_only=True, slots=True)
class RouteDistance:
    """The worst window and layer of every document of a micro-batch. All tensors [D]."""

    value: Tensor  # float64; 0 for documents under MIN_TOKENS
    layer: Tensor  # int64: index among the MoE layers
    start: Tensor  # int64: first token of that window


def route_distance(
    live: LiveRouting, document_ids_BT: Tensor, expected_mask_BT: Tensor, top_k: int
) -> RouteDistance:
    """Distance of recorded to live routes for the D documents numbered from 0 in ``document_ids_BT`` (-1: padding).
    ``expected_mask_BT`` says which tokens carry a route. Call it after the forward pass."""
    loads = live.counts_LE / live.num_tokens.clamp(min=1.0)  # share of the tokens that select each expert
    chance = (1.0 - loads.square().sum(1) / top_k).clamp(min=MIN_CHANCE)
    expected = expected_mask_BT.reshape(-1)
    documents = document_ids_BT.reshape(-1)
    num_documents = int(documents.max()) + 1 if documents.numel() else 0
    ids = documents[expected]
    outside = live.outside_LN[:, expected].double()
    windows, firsts = _windows(ids, num_documents)
    num_windows = int(firsts[-1])
    sums = outside.new_zeros(len(outside), num_windows).index_add_(1, windows, outside)
    lengths = outside.new_zeros(num_windows).index_add_(0, windows, torch.ones_like(ids, dtype=torch.float64))
    worst = (sums / (top_k * lengths.clamp(min=1.0) * chance[:, None])).max(dim=0)
    values = torch.where(lengths >= MIN_TOKENS, worst.values, torch.zeros_like(worst.values))
    value, layer, start = (
        outside.new_zeros(num_documents),
        ids.new_zeros(num_documents),
        ids.new_zeros(num_documents),
    )
    for document in range(num_documents):
        first, end = int(firsts[document]), int(firsts[document + 1])
        index = first + int(values[first:end].argmax())
        value[document], layer[document] = values[index], worst.indices[index]
        start[document] = WINDOW * (index - first)
    return RouteDistance(value=value, layer=layer, start=start)


def _windows(ids: Tensor, num_documents: int) -> tuple[Tensor, Tensor]:
    """Number of the window of every token, and where each document's windows begin [D + 1]. ``ids`` [N] are the
    documents of the tokens, each in one run; a document has at least one window."""
    lengths = torch.bincount(ids, minlength=num_documents)
    per_document = (lengths // WINDOW).clamp(min=1)
    zero = lengths.new_zeros(1)
    firsts = torch.cat([zero, per_document.cumsum(0)])
    order = ids.argsort(stable=True)
    places = torch.empty_like(ids)
    starts = torch.cat([zero, lengths.cumsum(0)])
    places[order] = torch.arange(len(ids), device=ids.device) - starts[ids[order]]
    return firsts[ids] + torch.minimum(places // WINDOW, per_document[ids] - 1), firsts


@dataclass(kw_only=True, slots=True)
class RouteWatch:
    """Watches one train step on one rank: rejects rollouts whose routes contradict the live routers, and sums coverage.

    ``limit`` is ``learner.max_route_distance``. Judges before the first update on a batch: the policy that sampled it is
    the one to compare with, and what stays out stays out of all updates.
    """

    replay: RouterReplay
    limit: float
    rejected: dict[str, str] = field(default_factory=dict)  # name of the rollout -> reason
    has_judged: bool = False
    covered: float = 0.0  # (token, layer) pairs that followed a recorded route
    expected: float = 0.0

    def watch(self, document_ids_BT: Tensor, expected_mask_BT: Tensor, names: list[str]) -> Tensor:
        """[D] bool: documents of a micro-batch (``names`` [D]) that may reach the loss. Call it after the forward pass."""
        if self.has_judged:
            keep = [name not in self.rejected for name in names]
            return torch.tensor(keep, dtype=torch.bool, device=document_ids_BT.device)
        live = self.replay.last
        assert live is not None
        covered, expected = live.coverage()
        self.covered += float(covered)
        self.expected += float(expected)
        distance = route_distance(live, document_ids_BT, expected_mask_BT, self.replay.top_k)
        wrong = distance.value > self.limit
        for index in wrong.nonzero()[:, 0].tolist():
            layer = self.replay.layers[int(distance.layer[index])]
            self.rejected[names[index]] = (
                f"its routes in layer {layer} from token {int(distance.start[index])} on are "
                f"{float(distance.value[index]):.2f} from the live ones, where 1 is chance "
                f"(learner.max_route_distance={self.limit:g}): routes of other weights, tokens or layers"
            )
        return ~wrong

    def check(self, num_samples: int) -> None:
        """Raises `RecordError` on every rank if a token had no route, or if too many of the ``num_samples`` rollouts of
        the global batch were rejected. Once a batch; a collective."""
        if self.has_judged:
            return
        self.has_judged = True
        ranks = gather((self.covered, self.expected, self.rejected))
        covered, expected = sum(r[0] for r in ranks), sum(r[1] for r in ranks)
        if covered != expected:
            raise RecordError(
                f"replay/coverage is {covered / max(expected, 1.0):.6f}: {expected - covered:.0f} of {expected:.0f} "
                "(token, layer) pairs have no recorded route; the weights were not changed"
            )
        rejected = {name: reason for r in ranks for name, reason in r[2].items()}
        if len(rejected) > max(1.0, MAX_REJECTED_SHARE * num_samples) or len(rejected) == num_samples:
            named = "; ".join(f"{name}: {reason}" for name, reason in list(rejected.items())[:NUM_NAMED])
            raise RecordError(
                f"{len(rejected)} of {num_samples} rollouts have routes that are missing or contradict the policy, and the "
                f"weights were not changed. {named}"
            )


def add_route_metrics(totals: Totals, replay: RouterReplay, prefix: str = "") -> None:
    """coverage, route_mismatch (share of (token, layer) pairs whose set differs) and the same for every layer by its
    global number, of the last forward pass."""
    live = replay.last
    assert live is not None
    totals.add_mean(f"{prefix}coverage", *live.coverage())
    totals.add_mean(f"{prefix}route_mismatch", *live.route_mismatch())
    for layer, mismatched, replayed in zip(
        replay.layers, live.mismatched_L.tolist(), live.replayed_L.tolist(), strict=True
    ):
        totals.add_mean(f"{prefix}route_mismatch/layer_{layer}", mismatched, replayed)
