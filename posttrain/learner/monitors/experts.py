"""Expert health: who gets the tokens over a window of steps, how sure the routers are, how far weights and biases spread.

Measured in the forward passes of training; an activation recompute adds nothing, and padding never counts. Everything
that ranks must add up travels in one all-reduce. Live load is what the routers of the policy select, replayed load what
the recorded routes say; with replay on it is the latter that trains the experts.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.learner.moe.balance import max_violation
from posttrain.learner.moe.replay import LiveRouting, RouterReplay
from posttrain.learner.monitors.gradients import weight_fragment
from posttrain.learner.monitors.num_zeros import NumZeros, add_by_expert
from posttrain.learner.monitors.silent_experts import SilentExperts

STARVING_SHARE = 0.1  # of the mean load


def pack(live: LiveRouting) -> Tensor:
    """[2 L E + 2 L] float64: what `ExpertHealth.observe` needs of one forward pass; adds up over micro-batches."""
    parts = (live.counts_LE, live.replayed_counts_LE, live.entropy_L, live.scored_L)
    return torch.cat([part.flatten() for part in parts])


class ExpertHealth:
    """Loads of the last ``window`` train steps. Build it when the engine is there; `observe` is a collective."""

    def __init__(self, replay: RouterReplay, num_zeros: NumZeros, window: int) -> None:
        self.replay = replay
        self.window: deque[Tensor] = deque(maxlen=window)  # per step [2, L, E]: live, replayed
        self.silent = SilentExperts()
        self._shape = (2, replay.num_layers, replay.num_experts)
        # Adapters are not weights of experts: their norms would say nothing of the spread.
        self._slots = [s for s in num_zeros.slots if s.module_class == "routed_expert" and not s.is_adapter]
        self._norms_shape = (num_zeros.num_layers, num_zeros.num_experts)
        self.start()

    def start(self) -> None:
        """Before the updates of a train step: forgets what an attempt that failed has left."""
        self._sums: Tensor | None = None
        self._norm_spread: float | None = None

    @torch.no_grad()
    def observe(self, sums: Tensor) -> Tensor:
        """Once per update with what `pack` gave of this rank's micro-batches. Returns the live tokens per expert [L, E] of the
        global batch. Norms are those before the update."""
        squares = self._squares(sums.device)
        packed = torch.cat([sums, squares.flatten()])
        if dist.is_initialized():
            dist.all_reduce(packed)
        sums, squares = packed[: len(sums)], packed[len(sums) :].view(self._norms_shape)
        self._sums = sums if self._sums is None else self._sums + sums
        if self._slots:
            norms = squares.sqrt()
            spread = norms.std(-1, correction=0) / norms.mean(-1).clamp(min=1e-30)
            self._norm_spread = float(spread.max())
        size = self._shape[1] * self._shape[2]
        return sums[:size].view(self._shape[1:])

    def metrics(self) -> dict[str, float]:
        """After the last update of a train step, which ends it; names as in docs/metrics.md."""
        assert self._sums is not None, "nothing was observed"
        sums = self._sums.cpu()
        size = 2 * self._shape[1] * self._shape[2]
        entropy_L, scored_L = sums[size:].view(2, -1)
        self.window.append(sums[:size].view(self._shape))
        loads = torch.stack(list(self.window)).sum(0)
        metrics = {"balance/max_vio/window": float(max_violation(loads[0]).mean())}
        metrics |= self._idle(loads[0], "", by_layer=True)
        metrics |= self._silent()
        if self.window[-1][1].any():
            metrics["balance/max_vio/replayed"] = float(max_violation(self.window[-1][1]).mean())
            metrics["balance/max_vio/replayed_window"] = float(max_violation(loads[1]).mean())
            metrics |= self._idle(loads[1], "/replayed")
        if scored_L.any():
            metrics["experts/router_entropy"] = float(entropy_L.sum() / scored_L.sum())
        if self._norm_spread is not None:
            metrics["experts/norm_spread"] = self._norm_spread
        biases = [router.correction_bias() for router in self.replay.routers if not router.is_table]
        ranges = [float(bias.max() - bias.min()) for bias in biases if bias is not None and bias.numel()]
        if ranges:
            metrics["experts/bias_range"] = max(ranges)
        return metrics

    def load(self) -> dict[str, Any]:
        """Tokens per layer and expert over the window: a row of expert_load.jsonl. ``layers`` are global numbers; ``replayed``
        is None where nothing was replayed."""
        loads = torch.stack(list(self.window)).sum(0).long()
        return {
            "num_steps": len(self.window),
            "layers": self.replay.layers,
            "live": loads[0].tolist(),
            "replayed": loads[1].tolist() if loads[1].any() else None,
        }

    def state(self) -> Tensor | None:
        """The window [steps, 2, L, E], for a checkpoint."""
        return torch.stack(list(self.window)) if self.window else None

    def load_state(self, state: Tensor | None) -> None:
        """A checkpoint's window back; None: it has none."""
        self.window.clear()
        self.window.extend([] if state is None else state.unbind())

    def _silent(self) -> dict[str, float]:
        """Experts that fell silent, over all layers and by layer."""
        silent_LE = self.silent.observe(self.window[-1][0])
        found = {
            f"experts/silent/layer_{router.layer}": float(silent_LE[row, : router.num_experts].sum())
            for row, router in enumerate(self.replay.routers)
            if not router.is_table
        }
        return {"experts/silent": sum(found.values())} | found

    def _idle(self, loads_LE: Tensor, suffix: str, by_layer: bool = False) -> dict[str, float]:
        """Experts with little or no load. Choices that compute nothing are no experts, and a table cannot starve."""
        rows = [index for index, router in enumerate(self.replay.routers) if not router.is_table]
        loads = loads_LE[rows, : self.replay.routers[0].num_experts]
        means = loads.mean(-1, keepdim=True)
        starving = (loads < STARVING_SHARE * means).sum(-1).tolist()
        metrics = {
            f"experts/starving{suffix}": float(sum(starving)),
            f"experts/dying{suffix}": float(((loads == 0) & (means > 0)).sum()),
        }
        if by_layer:
            layers = [self.replay.layers[row] for row in rows]
            for layer, number in zip(layers, starving, strict=True):
                metrics[f"experts/starving{suffix}/layer_{layer}"] = float(number)
        return metrics

    def _squares(self, device: torch.device) -> Tensor:
        """This rank's part of the sum of the squared weights of every expert [L, E]."""
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        squares = torch.zeros(self._norms_shape, dtype=torch.float64, device=device)
        for slot in self._slots:
            start, weights = weight_fragment(slot.parameter, rank, num_ranks)
            if len(weights):
                add_by_expert(squares[slot.layer], slot, start, weights, _square_sums)
        return squares


def _square_sums(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square()
