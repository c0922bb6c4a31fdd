"""One DeepSpeed rank: the process that holds (a part of) the policy and trains it. Runs as a Ray actor.

Every public method is a collective that the group calls on all ranks at once. What one rank finds wrong with its
records is raised on all of them, so that nobody waits in a collective for a rank that gave up.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.config import Dtype, FusedLoss, LearnerConfig, ModelConfig, Replay, UserError
from posttrain.learner import checkpoint, engine, export, fused, lora, losses, model
from posttrain.learner.batching import MicroBatch, MicroBatchRows, RankBatch, collate
from posttrain.learner.errors import RecordError
from posttrain.learner.losses import LossInputs
from posttrain.learner.metrics import Totals, agree
from posttrain.learner.moe import balance
from posttrain.learner.moe.replay import RouterReplay
from posttrain.learner.monitors import experts
from posttrain.learner.monitors.num_zeros import NumZeros
from posttrain.learner.monitors.routes import RouteWatch, add_route_metrics
from posttrain.learner.optimizer import batch_rates
from posttrain.learner.policy import Policy, check_packable, num_parameters
from posttrain.learner.samples import Expected, fetch
from posttrain.records import LossSettings, PolicyInfo, SampleRef, TrainingSample, WeightBundle

TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}
MISMATCH_THRESHOLDS = (1.1, 1.25, 2.0)


class LearnerWorker:
    """Holds one engine at a time; `setup` builds the first, `reset` the next one in the same process."""

    def __init__(self, rank: int, num_ranks: int, num_threads: int | None) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.engine: Any = None
        self.policy: Policy
        self.replay: RouterReplay | None
        self.num_zeros: NumZeros
        self.health: experts.ExpertHealth | None = None
        self.frozen_routers = False
        self._rejected: dict[str, str] = {}
        self._heads: dict[int, Tensor] = {}
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    # ---- life ----

    def open_store(self) -> tuple[str, int]:
        """Rank 0 alone: opens the rendezvous on a free port; returns (host, port)."""
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, self.num_ranks, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def setup(
        self,
        address: tuple[str, int],
        learner: LearnerConfig,
        model_config: ModelConfig,
        total_steps: int,
        seed: int,
    ) -> PolicyInfo:
        """Joins the process group and builds the engine. Raises `UserError` for what the user can mend."""
        if self.rank != 0:
            self._store = dist.TCPStore(*address, self.num_ranks, is_master=False)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        engine.init_distributed(backend, self._store, self.rank, self.num_ranks)
        return self.reset(learner, model_config, total_steps, seed)

    def reset(
        self, learner: LearnerConfig, model_config: ModelConfig, total_steps: int, seed: int
    ) -> PolicyInfo:
        """Everything as in a fresh process: weights of ``model_config.path``, empty optimizer, new hyper-parameters.

        The engine is built anew, because a live ZeRO engine keeps copies of the former weights in several places.
        """
        if self.engine is not None:
            former, self.engine = self.engine, None
            del self.policy, self.replay, self.num_zeros, self.health
            engine.destroy(former)
            del former
        self._heads = {}
        self.learner, self.model_config = learner, model_config
        self.total_steps, self.seed = total_steps, seed
        error: Exception | None = None
        try:  # the checkpoint may be bad on one node only
            self._load_model()
        except UserError as raised:
            error = raised
        agree(error)
        self.engine = engine.build(self.policy, learner)
        # Weights that never move need not be in every checkpoint. The expert bias, which may move, is a buffer.
        self.base = checkpoint.frozen_digest(self.policy) if learner.lora.rank > 0 else None
        self.num_zeros = NumZeros(self.engine)
        self.health = None
        if self.replay is not None:
            self.health = experts.ExpertHealth(self.replay, self.num_zeros, learner.expert_window)
        self.trained = False
        self.num_skipped = 0  # updates
        return self.info()

    def _load_model(self) -> None:
        torch.manual_seed(self.seed + self.rank)
        engine.check_options(self.learner)
        self.source = model.resolve(self.model_config)
        loaded = model.load(self.model_config, self.source, TORCH_DTYPES[self.learner.dtype])
        if self.learner.pack_tokens > 0:
            check_packable(loaded)
        if self.learner.gradient_checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.replay = RouterReplay.attach(loaded)
        adapted = self.learner.lora.rank > 0
        frozen = self.learner.freeze_router or adapted
        self.bias_rate = balance.resolve_bias_rate(self.replay, self.learner.expert_bias_rate, frozen)
        if adapted:
            lora.attach(loaded, self.replay, self.learner.lora, self.source, self.seed)
        self.frozen_routers = balance.resolve_freezing(self.replay, self.learner)
        fuses = self.learner.fused_loss is FusedLoss.liger
        if fuses:
            fused.require(self.device)
        self.policy = Policy(loaded, self.learner.logprob_chunk_tokens, fuses)
        self.vocab_size = int(loaded.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def info(self) -> PolicyInfo:
        """The shape of the policy."""
        replay = self.replay
        return PolicyInfo(
            vocab_size=self.vocab_size,
            num_parameters=num_parameters(self.policy),
            num_moe_layers=replay.num_layers if replay else 0,
            num_experts=replay.num_experts if replay else 0,
            top_k=replay.top_k if replay else 0,
            num_ranks=self.num_ranks,
        )

    # ---- training ----

    def set_heads(self, heads: dict[int, Any]) -> None:
        """Frozen LM heads of teachers by number, see `LearnerGroup.set_heads`. Rows beyond the policy's vocabulary,
        which pad a larger head, are left out: both softmaxes are over the same ids."""
        self._heads = {}
        for number, array in zip(heads, _get(list(heads.values())), strict=True):
            if len(array) < self.vocab_size:
                raise UserError(
                    f"algorithm.signal='full': the LM head of a teacher has {len(array)} rows, the student's vocabulary"
                    f" {self.vocab_size}; give a teacher with at least as many"
                )
            self._heads[number] = self._states(np.array(array[: self.vocab_size]))

    def train_step(self, batch: RankBatch, loss: LossSettings, step: int, updates: int) -> dict[str, float]:
        """``updates`` optimizer steps on one batch; metrics of the whole batch, the same on every rank. ``lr``,
        ``grad_norm`` and the zeros are those of the last update. A rollout whose routes contradict the live routers
        or are missing stays out of the loss, see `rejected`. An update whose gradient or loss is not finite, or whose
        loss is above ``loss.max_loss``, is not made: ``skipped`` counts them, and the next one has its learning rate.

        Raises `RecordError` for a bad record, for a token without a route, or where many rollouts are rejected, and
        `NonFiniteRouterError`, all before weights change.
        """
        replayed = self._replays(loss)
        watch = self._route_watch() if replayed else None
        rejected = {} if watch is None else watch.rejected
        micro_batches = self._micro_batches(batch, self._expected(loss, replayed), rejected)
        self.engine.train()
        old = [self._score(b) for b in micro_batches] if updates > 1 else [None] * len(micro_batches)
        totals, metrics, before = Totals(), {}, self.num_skipped
        if self.health is not None:
            self.health.start()
        for index in range(updates):
            rate = batch_rates(self.learner, step, updates, self.total_steps, self.num_skipped)[index]
            own = totals.sums.get("loss", 0.0)
            routed = self._accumulate(micro_batches, old, batch, loss, totals, watch)
            self._check_routes(watch, batch.num_samples)
            is_usable = self._is_usable(totals.sums.get("loss", 0.0) - own, loss.max_loss)
            metrics = self._update(rate, routed, is_usable)
        if self.health is not None:
            metrics |= self.health.metrics()
        metrics["skipped"] = float(self.num_skipped - before)
        if watch is not None:
            self._rejected = watch.rejected
            totals.add_sum("replay/rejected", len(watch.rejected))
        for micro_batch in micro_batches:
            totals.add_sum("num_tokens", int(micro_batch.token_mask.sum()))
            totals.add_sum("num_loss_tokens", len(micro_batch.target_ids))
        reduced = totals.reduce()
        for name in ("loss", "aux_loss"):
            if name in reduced:
                reduced[name] /= updates
        return {**reduced, **metrics}

    def _accumulate(
        self,
        micro_batches: list[MicroBatch],
        old: list[Tensor | None],
        batch: RankBatch,
        loss: LossSettings,
        totals: Totals,
        watch: RouteWatch | None,
    ) -> Tensor | None:
        """Forward and backward of all micro-batches. Returns what `experts.pack` says of this rank, None if dense."""
        routed: Tensor | None = None
        last = len(micro_batches) - 1
        for index, (micro_batch, old_logprobs) in enumerate(zip(micro_batches, old, strict=True)):
            self.engine.set_gradient_accumulation_boundary(index == last)
            with self._routing(micro_batch, keep_scores=self._aux_coef(loss) > 0, measure_health=True):
                scored = self._forward(micro_batch, loss)
                inputs = self._loss_inputs(micro_batch, scored, old_logprobs, batch.domains, loss)
                if watch is not None:
                    inputs.weights = inputs.weights * self._trusted(watch, micro_batch)
                output = losses.compute(inputs, loss)
                total = output.loss
                auxiliary = self._auxiliary_loss(micro_batch, batch.num_samples, loss)
                if auxiliary is not None:
                    totals.add_sum("aux_loss", auxiliary.detach())
                    total = total + auxiliary
                self.engine.backward(total * self.num_ranks)
            totals.add_sum("loss", output.loss.detach())
            for name, (value, count) in output.metrics.items():
                if not name.startswith("/"):  # samples without a domain
                    totals.add_mean(name, value, count)
            for name, value in output.maxima.items():
                totals.add_maximum(name, value)
            if self.replay is not None and self.replay.last is not None:
                own = experts.pack(self.replay.last)
                routed = own if routed is None else routed + own
                if watch is not None:
                    add_route_metrics(totals, self.replay, "replay/")
        return routed

    def _route_watch(self) -> RouteWatch:
        assert self.replay is not None
        limit = self.learner.max_route_distance
        return RouteWatch(replay=self.replay, limit=float("inf") if limit is None else limit)

    def _trusted(self, watch: RouteWatch, micro_batch: MicroBatch) -> Tensor:
        """[N] bool: loss tokens of rollouts whose routes may be of this policy."""
        documents = self._tensor(micro_batch.document_ids)
        keep = watch.watch(documents, self._tensor(micro_batch.expected_mask), micro_batch.names)
        return keep[documents.flatten()[self._tensor(micro_batch.target_positions)]]

    def _check_routes(self, watch: RouteWatch | None, num_samples: int) -> None:
        if watch is None:
            return
        try:  # this rank's gradients must not stay behind
            watch.check(num_samples)
        except RecordError:
            engine.clear_gradients(self.engine)
            raise

    def rejected(self) -> dict[str, str]:
        """Rollouts of this rank that the last train step kept out of the loss: name -> reason."""
        return self._rejected

    def _is_usable(self, own: float, max_loss: float) -> bool:
        """Whether the loss of an update, of which ``own`` is this rank's part, is finite and at most ``max_loss``."""
        total = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return bool(torch.isfinite(total) & (total <= max_loss))

    def _update(self, rate: float, routed: Tensor | None, is_usable: bool) -> dict[str, float]:
        """Checks the gradient, counts its zeros, steps, clears it, moves the expert bias. Where the gradient is not finite
        or the loss not ``is_usable``, weights, optimizer and bias stay as they are, on every rank."""
        norm = engine.gradient_norm(self.engine)
        counts = None if routed is None or self.health is None else self.health.observe(routed)
        metrics = {"grad_norm": norm, "lr": rate}
        if not (is_usable and np.isfinite(norm)):
            self.num_skipped += 1
        else:
            metrics |= self.num_zeros.count()
            engine.set_learning_rate(self.engine, rate)
            self.engine.step()
            self.trained = True
            if counts is not None and self.replay is not None:
                balance.update_expert_bias(self.replay, counts, self.bias_rate)
        engine.clear_gradients(self.engine)
        if counts is not None:
            metrics |= self._balance_metrics(counts)
        return metrics

    def _balance_metrics(self, counts_LE: Tensor) -> dict[str, float]:
        """MaxVio, mean over layers and by global layer number."""
        assert self.replay is not None
        violations = balance.max_violation(counts_LE)
        by_layer = zip(self.replay.layers, violations.tolist(), strict=True)
        return {"balance/max_vio": float(violations.mean())} | {
            f"balance/max_vio/layer_{layer}": violation for layer, violation in by_layer
        }

    # ---- reading the policy ----

    def logprobs(
        self, samples: dict[int, TrainingSample], micro_batches: list[MicroBatchRows], replayed: bool
    ) -> dict[int, np.ndarray]:
        """Logprobs [T] of this rank's samples by index, entry 0 is 0.0; ``replayed``: under the routes they carry."""
        expected = self._expected(None, replayed)
        refs = {
            index: SampleRef(source_ref=samples, index=index, num_tokens=len(sample.token_ids), weight=0.0)
            for index, sample in samples.items()
        }
        batch = RankBatch(refs=refs, micro_batches=micro_batches, domains=[""], num_samples=len(samples))
        scored: dict[int, np.ndarray] = {}
        for micro_batch in self._micro_batches(batch, expected):
            values = self._score(micro_batch).cpu().numpy()
            for index in np.unique(micro_batch.sequence_ids):
                own = values[micro_batch.sequence_ids == index]
                scored[int(index)] = np.concatenate([np.zeros(1, np.float32), own])
        return {**{index: np.zeros(1, np.float32) for index in samples}, **scored}

    def expert_load(self) -> dict[str, Any]:
        """Load of every expert over the last steps, see `ExpertHealth.load`; of MoE models that have trained."""
        assert self.health is not None
        return self.health.load()

    def mismatch(self, batch: RankBatch) -> dict[str, float]:
        """Distance of the policy to what the rollout engine reported, with recorded routes and (``_without``) live ones.

        k3, f1.1, f1.25, f2 over loss tokens; MoE models add coverage and route_mismatch,
        in all and as ``route_mismatch/layer_<global number>``.
        """
        settings = LossSettings(kind="policy_gradient", beta=0.0, alpha=0.0)
        totals = Totals()
        expected = self._expected(settings, self._replays(settings))
        for micro_batch in self._micro_batches(batch, expected, rejected={}):
            self._add_mismatch(totals, micro_batch, "")
            if micro_batch.routes is not None and self.replay is not None:
                add_route_metrics(totals, self.replay)
            self._add_mismatch(totals, replace(micro_batch, routes=None), "_without")
        return totals.reduce()

    def validate(self, batch: RankBatch) -> dict[str, float]:
        """Mean cross-entropy over the loss tokens of every domain and, as ``all``, of the batch: no gradient, no dropout,
        live routes."""
        totals = Totals()
        for micro_batch in self._micro_batches(batch, self._expected(LossSettings(kind="sft"), False)):
            losses_N = -self._score(micro_batch).cpu().numpy().astype(np.float64)
            totals.add_mean("all", losses_N.sum(), len(losses_N))
            for number in np.unique(micro_batch.domain_ids):
                own = losses_N[micro_batch.domain_ids == number]
                totals.add_mean(batch.domains[number], own.sum(), len(own))
        return totals.reduce()

    def _add_mismatch(self, totals: Totals, micro_batch: MicroBatch, suffix: str) -> None:
        assert micro_batch.rollout_logprobs is not None
        x = self._score(micro_batch).cpu().numpy().astype(np.float64) - micro_batch.rollout_logprobs
        totals.add_mean(f"k3{suffix}", (np.expm1(x) - x).sum(), len(x))
        for threshold in MISMATCH_THRESHOLDS:
            totals.add_mean(f"f{threshold:g}{suffix}", (np.abs(x) > np.log(threshold)).sum(), len(x))

    def export_weights(self, policy_version: int, dtype: Dtype) -> WeightBundle | None:
        """All weights under checkpoint names; None on other ranks than 0."""
        tensors = export.checkpoint_tensors(self.policy.model, self.replay, TORCH_DTYPES[dtype])
        return None if tensors is None else export.bundle(tensors, policy_version)

    def save_model(self, folder: Path) -> None:
        """Hugging Face directory; see `export.save_model`."""
        dtype = TORCH_DTYPES[self.learner.dtype]
        # An adapter has no place for the expert bias.
        export.save_model(folder, self.source, self.policy.model, self.replay, dtype, self.bias_rate == 0)

    def save_checkpoint(self, folder: Path) -> None:
        """Training state; see `checkpoint.save`."""
        state = {
            "num_skipped": self.num_skipped,
            "expert_load": None if self.health is None else self.health.state(),
            "silent_experts": None if self.health is None else self.health.silent.state(),
        }
        checkpoint.save(folder, self.engine, self.learner, state, self.base)

    def load_checkpoint(self, folder: Path) -> None:
        """Training state back; see `checkpoint.load`."""
        checkpoint.check(folder, self.policy, self.learner, self.base)
        if self.trained:  # DeepSpeed loads into an engine that has not trained yet
            self.reset(self.learner, self.model_config, self.total_steps, self.seed)
        state = checkpoint.load(folder, self.engine, self.learner)
        self.num_skipped = int(state.get("num_skipped", 0))
        if self.health is not None:
            self.health.load_state(state.get("expert_load"))
            self.health.silent.load_state(state.get("silent_experts"))
        self.trained = True

    # ---- parts ----

    def _replays(self, loss: LossSettings) -> bool:
        return self.replay is not None and loss.kind != "sft" and self.learner.routing_replay is Replay.auto

    def _routes_shape(self) -> tuple[int, int]:
        assert self.replay is not None
        return self.replay.num_layers, self.replay.top_k

    def _expected(self, loss: LossSettings | None, replayed: bool) -> Expected:
        return Expected(
            vocab_size=self.vocab_size,
            routes_shape=self._routes_shape() if replayed else None,
            num_experts=self.replay.num_experts if self.replay is not None else 0,
            rollout_logprobs=loss is not None and loss.kind != "sft",
            teacher_logprobs=loss is not None and loss.kind != "sft" and loss.beta != 0,
            signal=_signal(loss),
            top_k=loss.top_k if loss is not None else 0,
            heads={number: head.shape[1] for number, head in self._heads.items()},
        )

    def _micro_batches(
        self, batch: RankBatch, expected: Expected, rejected: dict[str, str] | None = None
    ) -> list[MicroBatch]:
        """With ``rejected``: without the rollouts whose routes are missing or of another shape, which are noted there."""
        error: Exception | None = None
        made: list[MicroBatch] = []
        try:  # records come from other processes
            samples = fetch(batch.refs, _get, expected, rejected)
            made = [
                collate(
                    samples,
                    [kept for row in rows if (kept := [i for i in row if i in samples])],
                    batch.domains,
                    routes_shape=expected.routes_shape,
                    packed=self.learner.pack_tokens > 0,
                )
                for rows in batch.micro_batches
            ]
        except Exception as raised:
            error = raised
        agree(error)
        return made

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _routing(
        self, micro_batch: MicroBatch, keep_scores: bool = False, measure_health: bool = False
    ) -> Any:
        """The block in which forward and backward of one micro-batch run."""
        if self.replay is None:
            return nullcontext()
        return self.replay.routes(
            None if micro_batch.routes is None else self._tensor(micro_batch.routes),
            token_mask_BT=self._tensor(micro_batch.token_mask),
            expected_mask_BT=self._tensor(micro_batch.expected_mask),
            keep_scores=keep_scores,
            measure_health=measure_health,
        )

    def _states(self, array: np.ndarray) -> Tensor:
        """Hidden states or heads of a teacher, bfloat16 travels as uint16."""
        tensor = torch.from_numpy(array)
        return (tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor).to(self.device)

    def _forward(self, micro_batch: MicroBatch, loss: LossSettings | None = None) -> Tensor:
        """Logprobs [N] of the targets, as the first of several columns where the signal of ``loss`` needs more."""
        targets, signal = self._tensor(micro_batch.target_ids), _signal(loss)
        teacher = None
        if signal in ("top_k", "top_k_renorm"):
            assert micro_batch.topk_ids is not None
            inside = self._tensor(micro_batch.topk_ids).clamp(max=self.vocab_size - 1)
            targets = torch.cat([targets[:, None], inside], dim=1)
        elif signal == "full":
            teacher = [
                (self._tensor(rows), self._states(states), self._heads[number])
                for number, (rows, states) in micro_batch.hidden.items()
            ]
        return self.engine(
            self._tensor(micro_batch.input_ids),
            self._tensor(micro_batch.position_ids),
            self._tensor(micro_batch.target_positions),
            targets,
            teacher,
        )

    def _score(self, micro_batch: MicroBatch) -> Tensor:
        """Logprobs [N] without gradient, under the routes of the micro-batch."""
        self.engine.eval()
        with torch.no_grad(), self._routing(micro_batch):
            logprobs = self._forward(micro_batch)
        self.engine.train()
        return logprobs

    def _loss_inputs(
        self,
        micro_batch: MicroBatch,
        scored: Tensor,
        old_logprobs: Tensor | None,
        domains: list[str],
        loss: LossSettings,
    ) -> LossInputs:
        """``scored`` is what `_forward` gave."""
        logprobs = scored if scored.dim() == 1 else scored[:, 0]
        teacher_topk_logprobs = None
        if _signal(loss) in ("top_k", "top_k_renorm"):
            assert micro_batch.topk_ids is not None and micro_batch.topk_logprobs is not None
            absent = self._tensor(micro_batch.topk_ids) >= self.vocab_size
            teacher_topk_logprobs = self._tensor(micro_batch.topk_logprobs).masked_fill(absent, -torch.inf)

        def stream(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else self._tensor(array)

        return LossInputs(
            policy_logprobs=logprobs,
            weights=self._tensor(micro_batch.weights),
            domain_ids=self._tensor(micro_batch.domain_ids),
            domains=domains,
            rollout_logprobs=stream(micro_batch.rollout_logprobs),
            old_logprobs=logprobs.detach() if old_logprobs is None else old_logprobs,
            teacher_logprobs=stream(micro_batch.teacher_logprobs),
            policy_topk_logprobs=None if teacher_topk_logprobs is None else scored[:, 1:],
            teacher_topk_logprobs=teacher_topk_logprobs,
            teacher_kl=scored[:, 1] if _signal(loss) == "full" else None,
            orm_advantages=stream(micro_batch.orm_advantages),
            policy_versions=stream(micro_batch.policy_versions),
            sequence_ids=self._tensor(micro_batch.sequence_ids),
        )

    def _aux_coef(self, loss: LossSettings) -> float:
        if loss.kind != "sft" or self.replay is None:
            return 0.0
        if self.learner.aux_loss_coef is None:
            return 0.0 if self.frozen_routers else balance.DEFAULT_AUX_COEF
        return self.learner.aux_loss_coef

    def _auxiliary_loss(self, micro_batch: MicroBatch, num_samples: int, loss: LossSettings) -> Tensor | None:
        coefficient = self._aux_coef(loss)
        if coefficient == 0:
            return None
        assert self.replay is not None and self.replay.last is not None
        if self.learner.aux_loss_coef is None and any(s is None for s in self.replay.last.scores):
            return None  # routers that give no scores to balance
        documents = self._tensor(micro_batch.document_ids)
        return balance.sequence_auxiliary_loss(self.replay.last, documents, num_samples, coefficient)


def _signal(loss: LossSettings | None) -> str:
    """What of the teachers the forward pass has to look at."""
    return "sampled" if loss is None or loss.kind == "sft" or loss.beta == 0 else loss.signal


def _get(references: list[Any]) -> list[Any]:
    """``ray.get`` of object references at once; values that came along inside the batch are taken as they are."""
    remote = [r for r in references if isinstance(r, ray.ObjectRef)]
    values = iter(ray.get(remote) if remote else [])
    return [next(values) if isinstance(r, ray.ObjectRef) else r for r in references]
