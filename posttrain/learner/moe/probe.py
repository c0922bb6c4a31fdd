"""Measures, once per router class, that exchanging the selection works; refuses the family by name where it does not.

The MoE block is run on a few random rows: once to see which topk call selects, once with other experts forced. The
experts must then be handed exactly the forced set, with weights of which none is exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import UserError
from posttrain.learner.moe.routers import Router, Selection

NUM_ROWS = 4


def probe(router: Router, hidden_size: int) -> None:
    """Sets ``router.selecting_call``. Raises `UserError` naming the family when routes would not be replayed."""
    weights = next(p for p in router.block.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, NUM_ROWS, hidden_size, generator=generator).to(weights.device, weights.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        live = _observe(router, rows)
        forced = _other_experts(live, router.num_experts)
        handed = _run(router, rows, lambda _: forced)
    _check(router, handed, forced)


def _observe(router: Router, rows: Tensor) -> Tensor:
    """Counts the calls that could be the selection; the last one is it. Returns its indices [N, K]."""
    seen: list[Tensor] = []

    def note(indices: Tensor) -> Tensor:
        seen.append(indices)
        return indices

    router.selecting_call = -1  # nothing selected yet: count first
    counter = Selection(router, note)
    _call(router, rows, counter)
    if counter.num_candidates == 0:
        raise _refusal(router, "its router does not select by torch.topk over all experts")
    router.selecting_call = counter.num_candidates - 1
    _call(router, rows, Selection(router, note))
    return seen[-1]


def _other_experts(live: Tensor, num_experts: int) -> Tensor:
    """For every row the top_k experts that follow its first live one, which is another set unless all are used."""
    top_k = live.shape[1]
    start = live.max(dim=1, keepdim=True).values + 1
    return (start + torch.arange(top_k, device=live.device)) % num_experts


def _call(router: Router, rows: Tensor, selection: Selection) -> tuple[Any, ...]:
    """Runs the block with ``selection`` active in the router; returns what the experts were handed."""
    handed: list[tuple[Any, ...]] = []
    hook = router.block.experts.register_forward_pre_hook(
        lambda _, args, kwargs: handed.append((*args, *kwargs.values())), with_kwargs=True
    )
    original = router.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with selection:
            return original(*args, **kwargs)

    router.module.forward = forward  # type: ignore[method-assign]
    try:  # a block of a class that nobody here has seen may ask for other arguments
        router.block(rows)
    except Exception as error:
        raise _refusal(router, f"its block does not run on hidden states alone ({error})") from error
    finally:
        hook.remove()
        del router.module.forward
    return handed[0] if handed else ()


def _run(router: Router, rows: Tensor, select: Any) -> tuple[Any, ...]:
    return _call(router, rows, Selection(router, select))


def _check(router: Router, handed: tuple[Any, ...], forced: Tensor) -> None:
    tensors = [value for value in handed if isinstance(value, Tensor)]
    indices = [t for t in tensors if t.shape == forced.shape and not t.is_floating_point()]
    if not any(torch.equal(t, forced) for t in indices):
        raise _refusal(router, "its experts are not handed the exchanged selection")
    weights = [t for t in tensors if t.shape == forced.shape and t.is_floating_point()]
    if not weights or any(bool((t == 0).any()) or not bool(t.isfinite().all()) for t in weights):
        raise _refusal(router, "its weights vanish for experts outside the live selection")


def _refusal(router: Router, why: str) -> UserError:
    return UserError(
        f"model.path: routing replay does not know {router.family} ({router.name}): {why}; "
        "choose a model of a family that routes by torch.topk"
    )


def is_materialised(module: nn.Module) -> bool:
    """False while ZeRO-3 or the meta device holds the weights elsewhere, when nothing can be measured."""
    return all(p.numel() > 0 and not p.is_meta for p in module.parameters())
