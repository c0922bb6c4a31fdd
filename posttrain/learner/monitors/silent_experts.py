"""Experts that fell silent: hardly any tokens, for longer than their own first steps let one expect. No constant is from a source.

Every expert is compared with itself: what share of its layer's tokens it had in the run's first steps, and how often it was
quiet then. So a slow death counts like a sudden one, and an expert of a domain that comes in every fifth batch has to be
quiet for longer than one that every batch needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

USUAL_STEPS = 20  # the first of a run: what is usual for each expert
QUIET_SHARE = 0.05  # of its usual share; what a router no longer wants keeps a token now and then
LEAST_STEPS = 5  # of silence
LEAST_TOKENS = 4.0  # a step, usually; of an expert with fewer, 20 steps say too little
CHANCE = 1e-6  # of a silence that long, were it quiet as often as in the first steps, each time by itself


class SilentExperts:
    """Tells from the tokens per expert [L, E] of each train step which experts fell silent. Pure; has no window."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []  # loads of the first steps
        self._quiet_LE: Tensor | None = None  # steps in a row
        self._usual: tuple[Tensor, Tensor] | None = None  # as `usual` says, once the first steps are over

    def observe(self, loads_LE: Tensor) -> Tensor:
        """[L, E] bool after one more step; none of the first USUAL_STEPS. An expert that usually has fewer than LEAST_TOKENS
        is not among them, and a step with less than half of the usual tokens in a layer says nothing about it."""
        loads_LE = loads_LE.double()
        if self._quiet_LE is None:
            self._quiet_LE = torch.zeros_like(loads_LE)
        if len(self._first) < USUAL_STEPS:
            self._first.append(loads_LE)
            return self._quiet_LE > 0
        if self._usual is None:
            self._usual = usual(torch.stack(self._first))
        usual_LE, needed_LE = self._usual
        says_L = loads_LE.sum(-1) >= 0.5 * usual_LE.sum(-1)
        quiet_LE = torch.where(_is_quiet(loads_LE, usual_LE), self._quiet_LE + 1, 0.0)
        self._quiet_LE = torch.where(says_L[:, None], quiet_LE, self._quiet_LE)
        return self._quiet_LE >= needed_LE

    def state(self) -> dict[str, Tensor] | None:
        """For a checkpoint; None before the first step."""
        if self._quiet_LE is None:
            return None
        return {"first": torch.stack(self._first), "quiet": self._quiet_LE}

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        """A checkpoint's state back; None: it has none, and what is usual is learned anew."""
        self._first = [] if state is None else list(state["first"].unbind())
        self._quiet_LE = None if state is None else state["quiet"]
        self._usual = None


def usual(first_SLE: Tensor) -> tuple[Tensor, Tensor]:
    """Of the loads of the first steps: usual tokens a step, and the steps of silence in a row that are too many, both [L, E];
    infinity for an expert of which they say too little."""
    usual_LE = first_SLE.mean(0)
    often_LE = (_is_quiet(first_SLE, usual_LE).sum(0) + 1) / (
        len(first_SLE) + 2
    )  # Laplace: 0 of 20 is not never
    needed_LE = (math.log(CHANCE) / often_LE.log()).ceil().clamp(min=LEAST_STEPS)
    return usual_LE, torch.where(usual_LE >= LEAST_TOKENS, needed_LE, torch.inf)


def _is_quiet(loads_LE: Tensor, usual_LE: Tensor) -> Tensor:
    share_LE = loads_LE / loads_LE.sum(-1, keepdim=True).clamp(min=1)
    return share_LE < QUIET_SHARE * usual_LE / usual_LE.sum(-1, keepdim=True).clamp(min=1)
