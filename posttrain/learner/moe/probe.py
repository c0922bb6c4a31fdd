"""Measures, once per router class, that exchanging the selection works; refuses the family by name where it does not.

The model runs on a few token ids up to the MoE block; the block then runs twice on what it was given there: once to see
which calls could be the selection, once with other experts forced. The forced experts, and no other, must then get the
token, each with a weight that is not 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import UserError
from posttrain.learner.moe.routers import Call, Choice, Router, Selection, num_rows_of

NUM_ROWS = 4
INPUT_RMS = 0.01  # small logits: no weight of a forced expert rounds to 0
SELECTING = (("topk",), ("max", "argmax"), ("__getitem__",))


class _Stop(Exception):
    """Ends a forward pass that has shown what it should."""


def probe(router: Router, model: nn.Module) -> None:
    """Sets ``choice`` and ``module`` of the router. Raises `UserError` naming the family when routes
    would not be replayed."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _evaluating(model):
        args, kwargs = _arguments(router, model)
        problems = []
        for module in dict.fromkeys((router.module, router.block)):
            router.module = module
            problem = _problem(router, args, kwargs)
            if problem is None:
                return
            problems.append(problem)
    raise _refusal(router, problems[0])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _arguments(router: Router, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model hands to the block, its hidden states scaled to `INPUT_RMS`."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise _Stop

    device = next(model.parameters()).device
    hook = router.block.register_forward_pre_hook(stop, with_kwargs=True)
    try:  # a model of a class that nobody here has seen may ask for other inputs
        model(input_ids=torch.arange(1, NUM_ROWS + 1, device=device)[None], **_without_cache(model))
    except _Stop:
        pass
    except Exception as error:
        raise _refusal(router, f"the model does not run on token ids alone ({error})") from error
    finally:
        hook.remove()
    if not given:
        raise _refusal(router, "its MoE block is not part of the forward pass")
    args, kwargs = given[0]
    return tuple(_scaled(value) for value in args), {k: _scaled(v) for k, v in kwargs.items()}


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """A block that attends, too, would find its own keys in a cache when it runs again."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if takes_any or "use_cache" in parameters else {}


def _scaled(value: Any) -> Any:
    """The hidden states [1, T, H] or [T, H] at `INPUT_RMS`, anything else as it is."""
    is_hidden = isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3)
    if not is_hidden or num_rows_of((value,), {}) != NUM_ROWS:
        return value
    return value * (INPUT_RMS / value.float().square().mean().sqrt().clamp(min=1e-12)).to(value.dtype)


def _problem(router: Router, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why exchanging the selection does not work in ``router.module``; None, and the router set, where it does."""
    router.choice = None
    selection, live_weights = _run(router, args, kwargs, lambda live, _: live)
    calls = [] if selection is None else selection.calls
    numbers = _selecting(calls, router.top_k)
    if not numbers:
        return "its router selects neither by topk over all experts nor by max, one expert after the other"
    first = calls[numbers[0]]
    num_choices = first.num_choices or router.num_experts
    router.choice = Choice(name=first.name, calls=numbers, num_choices=num_choices)
    forced = _other_experts(first.indices, router)
    _, weights = _run(router, args, kwargs, lambda *_: forced)
    if weights is None:
        return "what its experts are given does not show which tokens they get"
    got, wanted = ~weights.isnan(), torch.zeros_like(weights, dtype=torch.bool).scatter(1, forced, True)
    if not torch.equal(got, wanted):
        return "its experts are not handed the exchanged selection"
    if bool((weights == 0).any()):
        return "its weights vanish for experts outside the live selection"
    if live_weights is not None and _are_left(live_weights, weights):
        return "its weights stay those of the live selection"
    return None


def _are_left(before: Tensor, after: Tensor) -> bool:
    """Other experts have bitwise the same weights in every row, and not because all weights are alike."""
    if before.shape != after.shape or torch.equal(before.isnan(), after.isnan()):
        return False
    values = [weights.nan_to_num(float("inf")).sort(dim=1).values for weights in (before, after)]
    return torch.equal(*values) and not torch.equal(values[0], values[0][:1].expand_as(values[0]))


def _selecting(calls: list[Call], top_k: int) -> tuple[int, ...]:
    """Numbers of the calls that select: the last topk, else the last K max or argmax, else the last look-up. One expert
    may be found by argmax and weighed by max, so with K = 1 all of these count."""
    for names in SELECTING:
        numbers = [number for number, call in enumerate(calls) if call.name in names]
        num_needed = top_k if "max" in names else 1
        if len(numbers) >= num_needed:
            return tuple(numbers if "max" in names and top_k == 1 else numbers[-num_needed:])
    return ()


def _other_experts(live: Tensor, router: Router) -> Tensor:
    """For every row the top_k experts that follow its first live ones, which is another set unless all are used."""
    start = live.max(dim=1, keepdim=True).values + 1
    return (start + torch.arange(router.top_k, device=live.device)) % router.num_experts


def _run(
    router: Router,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    select: Callable[[Tensor, Tensor | None], Tensor],
) -> tuple[Selection | None, Tensor | None]:
    """Runs the block with ``select`` active in the router's first call; what that saw, and the weights [N, E] with
    which the experts got the tokens, NaN for an expert that did not get it."""
    made: list[Selection] = []
    original = router.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        made.append(Selection(router, num_rows_of(args, kwargs), select))
        with made[-1]:
            return original(*args, **kwargs)

    router.module.forward = forward  # type: ignore[method-assign]
    try:
        weights = _weights(router, args, kwargs)
    finally:
        del router.module.forward
    return (made[0] if made else None), weights


def _weights(router: Router, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    experts: Any = router.block.experts
    if isinstance(experts, nn.ModuleList):
        return _weights_of_modules(router, list(experts), args, kwargs)
    handed: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handed.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        raise _Stop

    hook = experts.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        router.block(*args, **kwargs)
    except _Stop:
        pass
    finally:
        hook.remove()
    return _weights_of_pairs(router, handed) if handed else None


def _weights_of_pairs(router: Router, handed: list[Tensor]) -> Tensor | None:
    """Fused experts get ids and weights [N, K], or weights [N, E] with 0 for the others, or every token once per expert,
    multiplied by its weight, [E * N, H]."""
    num_experts, nobody = router.num_experts, float("nan")
    pairs = [t.reshape(NUM_ROWS, -1) for t in handed if t.shape[-1:] == (router.top_k,) and _is_per_row(t)]
    ids = [t for t in pairs if not t.is_floating_point()]
    values = [t for t in pairs if t.is_floating_point()]
    if ids and values:
        width = max(num_experts, int(ids[0].max()) + 1)  # a choice that is no expert has a higher number
        return values[0].new_full((NUM_ROWS, width), nobody).scatter(1, ids[0].long(), values[0])
    for given in handed:
        if given.is_floating_point() and given.shape[-1] == num_experts and _is_per_row(given):
            gates = given.reshape(NUM_ROWS, -1)
            return gates.masked_fill(gates == 0, nobody)
        if given.dim() == 2 and len(given) == num_experts * NUM_ROWS:
            largest = given.view(num_experts, NUM_ROWS, -1).abs().amax(-1).T
            return largest.masked_fill(largest == 0, nobody)
    return None


def _is_per_row(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.numel() == NUM_ROWS * tensor.shape[-1]


def _weights_of_modules(
    router: Router, experts: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Experts that are modules of their own: the derivative of the block's output by theirs is the weight."""
    hidden = next(t for t in (*args, *kwargs.values()) if num_rows_of((t,), {}) == NUM_ROWS)
    hidden = hidden.reshape(NUM_ROWS, -1)
    seen: list[tuple[int, Tensor, Tensor]] = []  # expert, rows that it got [n], its output [n, H]

    def note(number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            rows = (args[0].reshape(-1, 1, hidden.shape[1]) == hidden).all(-1).int().argmax(1)
            seen.append((number, rows, out.detach().requires_grad_()))
            return seen[-1][2]

        return hook

    hooks = [expert.register_forward_hook(note(number)) for number, expert in enumerate(experts)]
    try:
        with torch.enable_grad():
            out = router.block(*args, **kwargs)
            total = (out if isinstance(out, Tensor) else out[0]).sum()
            grads = torch.autograd.grad(total, [o for _, _, o in seen], allow_unused=True)
    finally:
        for handle in hooks:
            handle.remove()
    weights = hidden.new_full((NUM_ROWS, len(experts)), float("nan"))
    for (number, rows, _), grad in zip(seen, grads, strict=True):
        if grad is not None and len(rows):
            weights[rows, number] = grad.reshape(len(rows), -1)[:, 0]
    dense = len(seen) == len(experts) and all(len(rows) == NUM_ROWS for _, rows, _ in seen)
    return torch.where(weights == 0, torch.nan, weights) if dense else weights


def _refusal(router: Router, why: str) -> UserError:
    return UserError(
        f"model.path: routing replay does not know {router.family} ({router.name}): {why}; "
        "choose a model of a family that docs/routing-replay.md lists"
    )


def is_materialised(module: nn.Module) -> bool:
    """False while ZeRO-3 or the meta device holds the weights elsewhere, when nothing can be measured."""
    return all(p.numel() > 0 and not p.is_meta for p in module.parameters())
