"""The driver's handle on the learner: one actor per DeepSpeed rank, called together.

Plans which rank trains which sample, and passes object references, never the samples. Starts no Ray by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from posttrain.config import Dtype, LearnerConfig, ModelConfig, UserError
from posttrain.learner.actor import actor_class
from posttrain.learner.batching import RankBatch, plan
from posttrain.learner.errors import NonFiniteRouterError, RecordError
from posttrain.records import LossSettings, PolicyInfo, SampleRef, TrainingSample

# A process that was killed, by the kernel or by Ray's memory monitor.
DEATHS = (RayActorError, OutOfMemoryError)
DEATH_KNOWN_S = 10.0  # until Ray has noticed


class LearnerGroup:
    """All ranks of the learner. Methods block until every rank is done, and raise what a rank raised."""

    def __init__(self, ranks: list[Any], setup: list[Any], learner: LearnerConfig) -> None:
        self._ranks = ranks
        self._setup: list[Any] | None = setup
        self._info: PolicyInfo | None = None
        self.learner = learner

    @classmethod
    def start(cls, learner: LearnerConfig, model: ModelConfig, total_steps: int, seed: int) -> LearnerGroup:
        """Starts the ranks and returns at once, so that engines can start beside them. `info` and every other call
        wait for the set-up, and raise `UserError` for a checkpoint or setting that cannot work."""
        num_gpus = _num_gpus(learner)
        threads = _threads(learner) if num_gpus == 0 else None
        actor = actor_class(num_gpus, threads)
        ranks = [actor.remote(rank, learner.num_ranks, threads) for rank in range(learner.num_ranks)]
        address = ranks[0].open_store.remote()
        setup = [rank.setup.remote(address, learner, model, total_steps, seed) for rank in ranks]
        return cls(ranks, setup, learner)

    @property
    def info(self) -> PolicyInfo:
        """Shape of the policy."""
        self._ready()
        assert self._info is not None
        return self._info

    def reset(self, learner: LearnerConfig, model: ModelConfig, total_steps: int, seed: int) -> PolicyInfo:
        """A new stage in the living processes: as if started afresh, without the imports. Ranks and GPUs stay."""
        if learner.num_ranks != len(self._ranks):
            raise UserError(
                f"learner.num_ranks={learner.num_ranks}: the learner runs with {len(self._ranks)}; "
                "use the same number in every stage"
            )
        if learner.num_gpus_per_rank != self.learner.num_gpus_per_rank:
            raise UserError(
                f"learner.num_gpus_per_rank={learner.num_gpus_per_rank!r}: the learner runs with"
                f" {self.learner.num_gpus_per_rank!r}; use the same in every stage"
            )
        self._info = self._call("reset", learner, model, total_steps, seed)[0]
        self.learner = learner
        return self._info

    def set_heads(self, heads: dict[int, Any]) -> None:
        """References to the frozen LM heads [V, H] that the hidden states of `TeacherScores` belong to, by
        ``head_id``, in place of the former ones; needed by the signal ``full``, forgotten by `reset`. Every rank
        holds them whole. Raises `UserError` for one with fewer rows than the policy's vocabulary."""
        self._call("set_heads", heads)

    def train_step(
        self, samples: Sequence[SampleRef], loss: LossSettings, step: int, updates: int = 1
    ) -> dict[str, float]:
        """``updates`` optimizer steps on ``samples``; ``step`` (1-indexed) sets the learning rate. Returns metrics.

        The loss is the sum over loss tokens of weight * token loss, whatever the cut. Raises `RecordError` for a
        record that lacks something and `NonFiniteRouterError`; weights are then as before, and so they are after an
        update that ``skipped`` counts: one whose gradient is not finite, or whose loss is above ``loss.max_loss``.
        """
        assert samples, "a step needs samples"
        return self._call_each("train_step", self._batches(samples), loss, step, updates)[0]

    def rejected(self) -> dict[str, str]:
        """Rollouts that the last train step kept out of the loss because their routes are missing or contradict the policy (the metric
        replay/rejected counts them): name -> reason."""
        return {name: reason for own in self._call("rejected") for name, reason in own.items()}

    def expert_load(self) -> dict[str, Any]:
        """Tokens per layer and expert over the last `learner.expert_window` train steps: ``num_steps``, ``layers`` (global
        numbers), ``live`` and ``replayed`` [L][E] (None: nothing was replayed). MoE models only, after a train step."""
        return self._call("expert_load")[0]

    def mismatch(self, samples: Sequence[SampleRef]) -> dict[str, float]:
        """Policy against rollout logprobs on ``samples``: k3, f1.1, f1.25, f2 and the same ``_without`` replay; for MoE
        models also route_mismatch and coverage."""
        return self._call_each("mismatch", self._batches(samples))[0]

    def validate(self, samples: Sequence[SampleRef]) -> dict[str, float]:
        """Mean cross-entropy per loss token of ``samples`` by domain, and over all as ``all``; nothing changes. The cut
        into micro-batches and ranks does not matter, nor do the weights of the references."""
        assert samples, "a validation needs samples"
        return self._call_each("validate", self._batches(samples))[0]

    def logprobs(
        self, token_ids: Sequence[np.ndarray], routed_experts: Sequence[np.ndarray | None] | None = None
    ) -> list[np.ndarray]:
        """Logprobs [T] float32 of each sequence (entry 0 is 0.0), under ``routed_experts`` [T-1, L, K] if given for all."""
        routes = list(routed_experts) if routed_experts is not None else [None] * len(token_ids)
        replayed = bool(routes) and all(r is not None for r in routes)
        samples = [
            _scored(ids, route if replayed else None) for ids, route in zip(token_ids, routes, strict=True)
        ]
        shares = self._plan([len(ids) for ids in token_ids])
        calls = []
        for rank, micro_batches in zip(self._ranks, shares, strict=True):
            own = {i: samples[i] for rows in micro_batches for row in rows for i in row}
            calls.append(rank.logprobs.remote(own, micro_batches, replayed))
        merged: dict[int, np.ndarray] = {}
        for scored in self._wait(calls):
            merged.update(scored)
        return [merged[i] for i in range(len(samples))]

    def export_weights(self, policy_version: int, dtype: Dtype) -> Any:
        """Reference to a `WeightBundle` with all weights under checkpoint names, matrices in ``dtype``."""
        self._ready()
        calls = [rank.export_weights.remote(policy_version, dtype) for rank in self._ranks]
        pending = list(calls)
        while pending:  # a rank that failed is raised at once; the weights themselves stay where they are
            done, pending = ray.wait(pending, num_returns=1, fetch_local=False)
            if done != calls[:1]:
                self._wait(done)
        return calls[0]

    def save_model(self, folder: Path) -> None:
        """Hugging Face directory, whole or not there: weights, config.json with the source's keys, tokenizer files."""
        self._call("save_model", Path(folder).absolute())

    def save_checkpoint(self, folder: Path) -> None:
        """Everything for an exact resume, into ``folder``; the caller renames it when it is whole."""
        self._call("save_checkpoint", Path(folder).absolute())

    def load_checkpoint(self, folder: Path) -> None:
        """Exact resume. `UserError` for the state of another model, ZeRO stage, type or number of ranks."""
        self._call("load_checkpoint", Path(folder).absolute())

    def shutdown(self) -> None:
        """Ends the processes."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    # ---- calls ----

    def _ready(self) -> None:
        if self._setup is not None:
            self._info = self._wait(self._setup)[0]
            self._setup = None

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        self._ready()
        return self._wait([getattr(rank, method).remote(*arguments) for rank in self._ranks])

    def _call_each(self, method: str, first: list[Any], *arguments: Any) -> list[Any]:
        self._ready()
        calls = [
            getattr(rank, method).remote(own, *arguments)
            for rank, own in zip(self._ranks, first, strict=True)
        ]
        return self._wait(calls)

    def _wait(self, calls: list[Any]) -> list[Any]:
        """Results by rank. The first failure is raised at once: the other ranks may wait for the failed one forever."""
        pending = list(calls)
        try:  # the ranks are other processes
            while pending:
                done, pending = ray.wait(pending, num_returns=1)
                ray.get(done)
            return ray.get(calls)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RecordError | NonFiniteRouterError):
                raise error.cause from error
            if death := _find_death(calls):  # the others fail too, when the connection to the dead one breaks
                raise self._died(death) from error
            raise
        except DEATHS as error:
            if getattr(error, "actor_init_failed", False):
                raise
            raise self._died(error) from error

    def _died(self, death: BaseException) -> UserError:
        return UserError(
            f"learner.num_ranks={len(self._ranks)}: a learner process died ({str(death).splitlines()[0]}); start the same"
            " command again to resume from the last checkpoint, and if it was memory (`dmesg` names what the kernel"
            " killed) with a smaller learner.max_tokens_per_micro_batch"
        )

    # ---- plans ----

    def _plan(self, lengths: list[int]) -> list[Any]:
        learner = self.learner
        return plan(lengths, len(self._ranks), learner.max_tokens_per_micro_batch, learner.pack_tokens)

    def _batches(self, samples: Sequence[SampleRef]) -> list[Any]:
        domains = sorted({sample.domain for sample in samples})
        return [
            RankBatch(
                refs={i: samples[i] for rows in micro_batches for row in rows for i in row},
                micro_batches=micro_batches,
                domains=domains,
                num_samples=len(samples),
            )
            for micro_batches in self._plan([sample.num_tokens for sample in samples])
        ]


def _find_death(calls: list[Any]) -> BaseException | None:
    """What killed a rank, among calls of which one failed; a dead process is known within seconds."""
    for call in calls:
        try:  # each of the ranks
            ray.get(call, timeout=DEATH_KNOWN_S / len(calls))
        except (RayTaskError, GetTimeoutError):  # it lives, whatever died that it asked
            continue
        except DEATHS as error:
            return error
    return None


def is_window_end(learner: LearnerGroup, step: int, last_step: int, metrics: Mapping[str, float]) -> bool:
    """Whether `LearnerGroup.expert_load` is due: once per window, and after the last step."""
    if "experts/starving" not in metrics:  # dense
        return False
    return step % learner.learner.expert_window == 0 or step == last_step


def _scored(token_ids: np.ndarray, routes: np.ndarray | None) -> TrainingSample:
    """Every token but the first is scored."""
    mask = np.ones(len(token_ids), bool)
    mask[:1] = False
    return TrainingSample(
        token_ids=token_ids, loss_mask=mask, weights=np.zeros(len(mask), np.float32), routed_experts=routes
    )


def _num_gpus(learner: LearnerConfig) -> float:
    """GPUs of a rank: what the config says, else 1 where Ray has any, else 0."""
    available = ray.cluster_resources().get("GPU", 0.0)
    each = learner.num_gpus_per_rank
    if each is None:
        each = 1.0 if available else 0.0
    if each and available < learner.num_ranks:
        raise UserError(
            f"learner.num_ranks={learner.num_ranks}: every rank needs a GPU of its own and Ray has {available:g};"
            " use that many ranks or fewer, or learner.num_gpus_per_rank=0"
        )
    return each


def _threads(learner: LearnerConfig) -> int:
    return learner.cores_per_rank or max(1, len(os.sched_getaffinity(0)) // learner.num_ranks)
