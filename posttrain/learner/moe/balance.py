"""Expert balance: the bias update without auxiliary loss, the sequence-wise auxiliary loss, the load metric, and
freezing routers. Loads come from `replay.LiveRouting`; nothing here runs a router again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.config import LearnerConfig, UserError
from posttrain.learner.moe.replay import LiveRouting, RouterReplay

DEFAULT_BIAS_RATE = 1e-4  # of SFT, MiMo-V2-Flash report
DEFAULT_AUX_COEF = 1e-6


def has_expert_bias(replay: RouterReplay | None) -> bool:
    """Whether every router that learns has a correction bias."""
    learned = [] if replay is None else [router for router in replay.routers if not router.is_table]
    return bool(learned) and all(router.correction_bias() is not None for router in learned)


def resolve_bias_rate(replay: RouterReplay | None, rate: float | None, frozen: bool) -> float:
    """``learner.expert_bias_rate``, or what null means for this model. `UserError` as `require_expert_bias`."""
    if rate is None:
        return DEFAULT_BIAS_RATE if has_expert_bias(replay) and not frozen else 0.0
    require_expert_bias(replay, rate)
    return rate


def require_expert_bias(replay: RouterReplay | None, rate: float) -> None:
    """`UserError` when ``learner.expert_bias_rate`` is set for a model whose routers have no correction bias."""
    if rate != 0 and not has_expert_bias(replay):
        raise UserError(
            f"learner.expert_bias_rate={rate!r}: this model's routers have no expert bias; "
            "give 0 (SFT can use learner.aux_loss_coef instead)"
        )


@torch.no_grad()
def update_expert_bias(replay: RouterReplay, counts_LE: Tensor, rate: float) -> None:
    """b_i += rate * sign(mean load - load_i), DeepSeek-V3 report section 2.1.2; once per optimizer step.

    ``counts_LE`` are the tokens per expert of the *global* batch (summed over micro-batches and ranks), so every rank
    computes the same bias: no optimizer touches it. It is kept in float32, since a small rate is lost in bfloat16.
    Raises `UserError` for routers without a bias.
    """
    require_expert_bias(replay, rate)
    if rate == 0:
        return
    for router, counts_E in zip(replay.routers, counts_LE, strict=True):
        if router.is_table:
            continue
        bias = router.correction_bias()
        assert bias is not None and bias.numel() == router.num_choices, (
            f"{router.name}: the expert bias is not whole here"
        )
        if bias.dtype != torch.float32:
            bias.data = bias.data.float()
        counts = counts_E.to(bias.device, torch.float64)
        step = rate * torch.sign(counts.mean() - counts)
        bias.add_(step.to(bias.dtype).view_as(bias))


def sequence_auxiliary_loss(
    live: LiveRouting, sequence_ids: Tensor, num_sequences: int, coefficient: float
) -> Tensor:
    """coefficient / num_sequences * sum over layers and sequences of sum_i f_i P_i (DeepSeek-V3 report, eq. 17 to 20).

    f_i = E / (K T) * (tokens of the sequence that select expert i), P_i = mean over its T tokens of the score of i
    divided by the sum of its scores; both from the live routers, whatever is replayed. ``sequence_ids`` [B, T] int64
    numbers the sequences of this micro-batch from 0, packed documents apart, -1 for padding. ``num_sequences`` is the
    count over the *global* batch. Add it to the loss inside the ``routes(..., keep_scores=True)`` block. Scalar float32
    with gradient to the routers; reentrant activation checkpointing has none to give and is refused.
    """
    ids = sequence_ids.reshape(-1)
    real = ids >= 0
    ids = ids[real]
    num_local = int(ids.max()) + 1 if ids.numel() else 0
    total: Tensor | None = None
    for scores, indices in zip(live.scores, live.indices, strict=True):
        assert indices is not None, "no scores: open routes() with keep_scores=True"
        if scores is None:
            raise UserError(
                f"learner.aux_loss_coef={coefficient!r}: the routers of this model score neither by softmax nor by sigmoid; "
                "give 0 (models with an expert bias: learner.expert_bias_rate)"
            )
        if torch.is_grad_enabled() and not scores.requires_grad:
            raise UserError(
                f"learner.aux_loss_coef={coefficient!r}: reentrant activation checkpointing hides the router scores; "
                "use learner.gradient_checkpointing=false or the non-reentrant kind"
            )
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        layer = _layer_loss(exact[real], indices[real], ids, num_local)
        total = layer if total is None else total + layer
    assert total is not None, "no MoE layer"
    return total * (coefficient / num_sequences)


def _layer_loss(scores: Tensor, indices: Tensor, ids: Tensor, num_local: int) -> Tensor:
    """Sum over the sequences of sum_i f_i P_i. ``scores`` [n, E], ``indices`` [n, K], ``ids`` [n]."""
    num_experts, top_k = scores.shape[1], indices.shape[1]
    lengths = scores.new_zeros(num_local).index_add_(0, ids, scores.new_ones(len(ids))).clamp(min=1)
    normalised = scores / scores.sum(-1, keepdim=True)
    mean_scores = scores.new_zeros(num_local, num_experts).index_add(0, ids, normalised) / lengths[:, None]
    slots = (ids[:, None] * num_experts + indices).flatten()
    counts = scores.new_zeros(num_local * num_experts).index_add_(0, slots, scores.new_ones(len(slots)))
    fractions = counts.view(num_local, num_experts) * num_experts / (top_k * lengths[:, None])
    return (fractions * mean_scores).sum()


def max_violation(counts_LE: Tensor) -> Tensor:
    """MaxVio [L]: (largest load - mean load) / mean load of each MoE layer; 0 where no token was routed."""
    counts = counts_LE.double()
    average = counts.mean(-1)
    return torch.where(
        average > 0, (counts.max(-1).values - average) / average.clamp(min=1e-30), torch.zeros_like(average)
    )


def resolve_freezing(replay: RouterReplay | None, learner: LearnerConfig) -> bool:
    """Freezes the routers where ``learner.freeze_router`` says so; whether no router parameter trains. `UserError` where that
    leaves adapters or a balance loss without anything to do."""
    if replay is None:
        return False
    if learner.lora.rank == 0:
        if learner.freeze_router:
            freeze_routers(replay)
        return learner.freeze_router
    is_adapted = any(p.requires_grad for router in replay.routers for p in router.parameters())
    if is_adapted and learner.freeze_router:
        raise UserError(
            "learner.freeze_router=True: learner.lora adapts routers; leave them out, or give false"
        )
    if learner.aux_loss_coef and not is_adapted:
        raise UserError(
            f"learner.aux_loss_coef={learner.aux_loss_coef!r}: adapters leave the routers frozen; give 0, or adapt them"
            " (learner.lora.target_parameters=[gate.weight])"
        )
    return not is_adapted


def freeze_routers(replay: RouterReplay) -> None:
    """No gradient for any router parameter. Call it before the optimizer is built."""
    for router in replay.routers:
        parameters = router.parameters()
        assert parameters, f"{router.name} has no router parameters"
        for parameter in parameters:
            parameter.requires_grad_(False)
