"""What recording and replaying routes costs, in time, bytes and memory. `replay.py` runs it.

Recording: two engines, each in a process of its own on the same core, sample the same requests in turn, one with
``rollout.record_routes=auto`` and one with ``off``. Replaying: one learner takes the same step on the same rollouts
in turn with ``learner.routing_replay=auto`` and ``off``. A pair of runs gives one ratio of tokens per second, and the
interval is a bootstrap over pairs. A machine's noise is often larger than the cost, so further pairs run with timers
around the functions that record or replay: seconds with minus seconds without, as a share of the run.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from examples.tiny.model import build_model
from examples.tiny.tokenizer import MARKS, VOCABULARY
from posttrain import cluster
from posttrain.config import LearnerConfig, ModelConfig, RayConfig, Replay, RolloutConfig
from posttrain.learner.actor import LearnerActor
from posttrain.learner.batching import RankBatch, plan
from posttrain.records import LossSettings, SampleRef, TrainingSample
from rollout.segment import Segment, SegmentResult

COST_BAR = 0.03  # share of tokens per second
STEP_BAR_S = 0.1  # a decode step must last this long for the bar to mean anything
NUM_SEQUENCES = 64
PROMPT_TOKENS = 8
NUM_DRAWS = 4000
INNER = {  # watched function -> the watched function that it is part of; these are not in the sum
    "store_batch": "update_from_output",
    "get": "update_from_output",
    "routes_problem": "_result",
    "_select": "forward",
}


@dataclass(kw_only=True, slots=True)
class CostModel:
    """A random model, and how much of everything is measured on it."""

    name: str
    shape: dict[str, Any]  # of `examples.tiny.model.build_model`
    new_tokens: int
    rollout_pairs: int
    learner_rollouts: int  # in one learner step
    learner_pairs: int
    has_bar: bool


TINY = CostModel(
    name="tiny MiMo-V2-Flash",
    shape={"family": "mimo_v2_flash"},
    new_tokens=32,
    rollout_pairs=40,
    learner_rollouts=64,
    learner_pairs=30,
    has_bar=False,
)
LARGE = CostModel(
    name="random Qwen3-MoE, hidden 1024",
    shape={
        "family": "qwen3_moe",
        "hidden": 1024,
        "num_layers": 6,
        "num_experts": 32,
        "top_k": 8,
        "moe_width": 256,
    },
    new_tokens=12,
    rollout_pairs=18,
    learner_rollouts=12,
    learner_pairs=18,
    has_bar=True,
)
MODELS = (TINY, LARGE)


def shortened(model: CostModel) -> CostModel:
    """For a smoke run: the same path, hardly repeated."""
    return replace(model, rollout_pairs=2, learner_pairs=2, learner_rollouts=8)


@dataclass(kw_only=True, slots=True)
class Timing:
    """One run: wall seconds, tokens, and seconds in the watched functions."""

    seconds: float
    num_tokens: int
    parts: dict[str, float]
    decode_step_s: float = (
        0.0  # the first step after the prompts; sequences that ended at once make it shorter
    )
    digest: str = ""  # of the sampled tokens


@dataclass(slots=True)
class Stopwatch:
    """Seconds in functions of this process, by file, line and name."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def watch(self, owner: Any, name: str) -> None:
        """Time ``owner.name`` from now on, on this one object or module."""
        function = getattr(owner, name)
        code = inspect.unwrap(function).__code__
        owner_name = getattr(owner, "__name__", type(owner).__name__).rpartition(".")[2]
        label = f"{Path(code.co_filename).name}:{code.co_firstlineno} {owner_name}.{name}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[label] += time.perf_counter() - begin
            return result

        setattr(owner, name, timed)
        self.seconds[label] = 0.0

    def take(self) -> dict[str, float]:
        """Seconds by function since the last call, and start again at 0."""
        taken = dict(self.seconds)
        for label in taken:
            self.seconds[label] = 0.0
        return taken


# -- recording --------------------------------------------------------------------------------------------------


class Sampler:
    """An actor with one engine that runs batches of random prompts."""

    def __init__(self, model: str, record: bool, new_tokens: int) -> None:
        from rollout import process

        process.prepare(index=0, cores_per_worker=1)
        from rollout.engine import Engine

        config = RolloutConfig(
            record_routes=Replay.auto if record else Replay.off,
            max_model_len=PROMPT_TOKENS + new_tokens,
            vllm={"max_num_seqs": NUM_SEQUENCES},
        )
        self._new_tokens = new_tokens
        self._engine = Engine(config, ModelConfig(path=model), seed=0)
        self._stopwatch = Stopwatch()

    def run(self, number: int) -> Timing:
        """Sample batch ``number``; the same number gives the same prompts and seeds."""
        prompts = self._prompts(number)
        begin = time.perf_counter()
        steps, results = self._sample(number, prompts)
        seconds = time.perf_counter() - begin
        tokens = [results[i].token_ids for i in range(NUM_SEQUENCES)]
        return Timing(
            seconds=seconds,
            num_tokens=sum(map(len, tokens)),
            parts=self._stopwatch.take(),
            decode_step_s=steps[1],
            digest=hashlib.sha256(np.concatenate(tokens).tobytes()).hexdigest(),
        )

    def rollouts(self, number: int, count: int) -> list[TrainingSample]:
        """The first ``count`` rollouts of batch ``number`` as the learner reads them."""
        prompts = self._prompts(number)
        _, results = self._sample(number, prompts)
        return [_training_sample(prompts[i], results[i]) for i in range(count)]

    def memory(self) -> dict[str, float]:
        """MiB: the largest resident size so far (loading included), the present one, and vLLM's buffer of routes for
        every KV slot, which becomes resident as it fills."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        manager = getattr(self._scheduler(), "routed_experts_mgr", None)
        return {
            "peak_mib": int(status["VmHWM"].split()[0]) / 1024,
            "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
            "slot_buffer_mib": 0.0 if manager is None else manager.routed_experts_by_slot.nbytes / 2**20,
        }

    def watch(self) -> None:
        """Put timers around what records routes, and around its surroundings where it is inlined."""
        import rollout.engine

        engine, scheduler = self._engine, self._scheduler()
        runner = engine.vllm.collective_rpc(_model_runner)[0]
        if engine.records_routes:
            self._stopwatch.watch(runner.routed_experts_capturer, "capture")
        self._stopwatch.watch(runner, "_build_attention_metadata")
        self._stopwatch.watch(runner, "_bookkeeping_sync")
        self._stopwatch.watch(scheduler, "_update_after_schedule")
        self._stopwatch.watch(scheduler, "update_from_output")
        if engine.records_routes:
            self._stopwatch.watch(scheduler.routed_experts_mgr, "store_batch")
            self._stopwatch.watch(scheduler.routed_experts_mgr, "get")
        self._stopwatch.watch(engine.vllm.output_processor, "process_outputs")
        self._stopwatch.watch(engine, "_result")
        self._stopwatch.watch(rollout.engine, "routes_problem")

    def _scheduler(self) -> Any:
        return self._engine.vllm.engine_core.engine_core.scheduler  # type: ignore[attr-defined]

    def _prompts(self, number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        return rng.integers(len(MARKS), len(VOCABULARY), size=(NUM_SEQUENCES, PROMPT_TOKENS), dtype=np.int32)

    def _sample(self, number: int, prompts: np.ndarray) -> tuple[list[float], dict[int, SegmentResult]]:
        """Seconds of every step, and the results by row of ``prompts``."""
        for i, prompt in enumerate(prompts):
            seed = number * NUM_SEQUENCES + i
            segment = Segment(
                request_id=str(i), token_ids=prompt.tolist(), max_tokens=self._new_tokens, seed=seed
            )
            self._engine.add_request(segment)
        steps: list[float] = []
        results: dict[int, SegmentResult] = {}
        while self._engine.num_running:
            begin = time.perf_counter()
            finished = self._engine.step()
            steps.append(time.perf_counter() - begin)
            results |= {int(result.request_id): result for result in finished}
        for result in results.values():
            assert result.error is None, result.error
        return steps, results


def _model_runner(worker: Any) -> Any:
    return worker.model_runner


def _training_sample(prompt: np.ndarray, result: SegmentResult) -> TrainingSample:
    token_ids = np.concatenate([prompt, result.token_ids])
    given = len(prompt)
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= given,
        weights=np.zeros(len(token_ids), np.float32),
        rollout_logprobs=np.concatenate([np.zeros(given, np.float32), result.logprobs]),
        policy_versions=np.concatenate([np.full(given, -1, np.int32), result.policy_versions]),
        routed_experts=result.routed_experts,
    )


def rollout_cost(cost_model: CostModel, model: str) -> tuple[dict[str, Any], list[TrainingSample]]:
    """Recording against not recording on one model, and rollouts for the learner."""
    actor = ray.remote(Sampler).options(num_cpus=0)
    samplers = {on: actor.remote(model, on, cost_model.new_tokens) for on in (True, False)}

    def run(on: bool, number: int) -> Timing:
        return ray.get(samplers[on].run.remote(number))

    for on in samplers:  # the first batch touches memory and builds what is built once
        run(on, 0)
    plain = alternate(run, 1, cost_model.rollout_pairs)
    memory = {on: ray.get(samplers[on].memory.remote()) for on in samplers}
    ray.get([sampler.watch.remote() for sampler in samplers.values()])
    timed = alternate(run, 1 + cost_model.rollout_pairs, timed_pairs(cost_model.rollout_pairs))
    samples = ray.get(samplers[True].rollouts.remote(0, cost_model.learner_rollouts))
    for sampler in samplers.values():
        ray.kill(sampler)
    result = summarise(plain, timed)
    result["decode_step_s"] = statistics.median(off.decode_step_s for _, off in plain)
    result["pairs_with_equal_tokens"] = sum(on.digest == off.digest for on, off in plain)
    result["memory"] = {"with": memory[True], "without": memory[False]}
    return result, samples


# -- replaying --------------------------------------------------------------------------------------------------


class Learner(LearnerActor):
    """A learner rank on which replay is switched between two steps. Without it the routers are those of Transformers:
    no block of routes is opened, and what wraps them passes everything through."""

    def __init__(self, rank: int, num_ranks: int, num_threads: int | None) -> None:
        super().__init__(rank, num_ranks, num_threads)
        self._stopwatch = Stopwatch()
        self._replay: Any = None

    def run(self, replayed: bool, batch: RankBatch, step: int) -> Timing:
        """One train step."""
        self._replay = self._replay or self._worker.replay
        self._worker.replay = self._replay if replayed else None
        routing_replay = Replay.auto if replayed else Replay.off
        self._worker.learner = replace(self._worker.learner, routing_replay=routing_replay)
        begin = time.perf_counter()
        metrics = self._worker.train_step(batch, LossSettings(kind="policy_gradient"), step, 1)
        seconds = time.perf_counter() - begin
        assert metrics.get("replay/coverage", 0.0) == float(replayed), "replay did not follow its switch"
        return Timing(seconds=seconds, num_tokens=int(metrics["num_tokens"]), parts=self._stopwatch.take())

    def watch(self) -> None:
        """Put timers around what replays and checks routes."""
        from posttrain.learner import worker

        self._stopwatch.watch(worker, "fetch")
        self._stopwatch.watch(worker, "collate")
        self._stopwatch.watch(self._replay, "_open")
        for router in self._replay.routers:
            self._stopwatch.watch(router.module, "forward")
        self._stopwatch.watch(self._replay, "_select")
        self._stopwatch.watch(self._worker, "_trusted")
        self._stopwatch.watch(self._worker, "_check_routes")
        self._stopwatch.watch(worker, "add_route_metrics")


def learner_cost(cost_model: CostModel, model: str, samples: list[TrainingSample]) -> dict[str, Any]:
    """A train step with replay against one without, on the same rollouts."""
    threads = os.cpu_count() or 1
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    actor = ray.remote(Learner).options(
        num_cpus=0, num_gpus=0, runtime_env={"env_vars": variables | {"CUDA_VISIBLE_DEVICES": ""}}
    )
    learner = actor.remote(0, 1, threads)
    config = LearnerConfig(lr=1e-9, warmup_steps=0, max_tokens_per_micro_batch=2000)
    address = ray.get(learner.open_store.remote())
    info = ray.get(learner.setup.remote(address, config, ModelConfig(path=model), 1000, 0))
    batch = rank_batch(samples, config)

    def run(on: bool, number: int) -> Timing:
        return ray.get(learner.run.remote(on, batch, number))

    for on in (True, False):
        run(on, 1)
    plain = alternate(run, 2, cost_model.learner_pairs)
    ray.get(learner.watch.remote())
    timed = alternate(run, 2 + cost_model.learner_pairs, timed_pairs(cost_model.learner_pairs))
    ray.kill(learner)
    result = summarise(plain, timed)
    result["step_s"] = statistics.median(off.seconds for _, off in plain)
    result["route_size"] = info.num_moe_layers * info.top_k
    return result


def rank_batch(samples: list[TrainingSample], config: LearnerConfig) -> RankBatch:
    """The samples in Ray's store as one step of one rank."""
    ref = ray.put(samples)
    lengths = [len(sample.token_ids) for sample in samples]
    weight = 1.0 / sum(int(sample.loss_mask.sum()) for sample in samples)
    refs = {
        i: SampleRef(
            source_ref=ref, index=i, num_tokens=n, weight=weight, orm_advantage=1.0 if i % 2 else -1.0
        )
        for i, n in enumerate(lengths)
    }
    (micro_batches,) = plan(lengths, 1, config.max_tokens_per_micro_batch, config.pack_tokens)
    return RankBatch(refs=refs, micro_batches=micro_batches, domains=[""], num_samples=len(samples))


# -- statistics -------------------------------------------------------------------------------------------------


def alternate(run: Callable[[bool, int], Timing], first: int, num_pairs: int) -> list[tuple[Timing, Timing]]:
    """(with, without) of every pair; which comes first changes from pair to pair."""
    pairs = []
    for number in range(first, first + num_pairs):
        timing = {on: run(on, number) for on in ((True, False) if number % 2 else (False, True))}
        pairs.append((timing[True], timing[False]))
    return pairs


def timed_pairs(num_pairs: int) -> int:
    """Further pairs that run with timers."""
    return max(2, num_pairs // 3)


def summarise(plain: list[tuple[Timing, Timing]], timed: list[tuple[Timing, Timing]]) -> dict[str, Any]:
    """Rates, cost by pairs, cost by timers, and the timed functions with the dearest first."""
    ratios = [(on.num_tokens / on.seconds) / (off.num_tokens / off.seconds) for on, off in plain]
    labels = list(timed[0][0].parts)
    gaps = {
        label: np.array([on.parts[label] - off.parts.get(label, 0.0) for on, off in timed])
        for label in labels
    }
    seconds = np.array([off.seconds for _, off in timed])
    outer = sum(gaps[label] for label in labels if part_of(label) is None)
    dearest_first = sorted(labels, key=lambda label: -gaps[label].mean())
    functions = {
        label: {
            "ms_with": 1e3 * float(np.mean([on.parts[label] for on, _ in timed])),
            "ms_without": 1e3 * float(np.mean([off.parts.get(label, 0.0) for _, off in timed])),
            "share": float(np.mean(gaps[label] / seconds)),
        }
        for label in dearest_first
    }
    return {
        "num_pairs": len(plain),
        "tokens_per_s_with": statistics.median(on.num_tokens / on.seconds for on, _ in plain),
        "tokens_per_s_without": statistics.median(off.num_tokens / off.seconds for _, off in plain),
        "cost": mean_interval(1.0 - np.array(ratios)),
        "cost_by_timers": mean_interval(outer / seconds),
        "functions": functions,
    }


def part_of(label: str) -> str | None:
    """The watched function that contains this one, if there is one."""
    return INNER.get(label.rpartition(".")[2])


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Mean with the ends of its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = values[rng.integers(len(values), size=(NUM_DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def verdict(result: dict[str, Any]) -> str:
    """By the pairs where their interval lies on one side of the bar, else by the timers. Replay cannot save time: an
    interval below 0 shows a machine that does not stand still."""
    pairs, timers = result["cost"], result["cost_by_timers"]
    if 0 <= pairs["high"] < COST_BAR:
        return "met"
    if pairs["low"] > COST_BAR:
        return "not met"
    return "met by timers, pairs too noisy" if timers["high"] < COST_BAR else "not met"


def measure(cost_model: CostModel, work: Path) -> dict[str, Any]:
    """Everything about one model."""
    model = str(build_model(work / cost_model.name.split()[0], 0, **cost_model.shape))
    cluster.start(RayConfig())
    rollout, samples = rollout_cost(cost_model, model)
    learner = learner_cost(cost_model, model, samples)
    cluster.stop()
    routes = [sample.routed_experts for sample in samples if sample.routed_experts is not None]
    seen = {(str(r.dtype), r.nbytes / len(r)) for r in routes}
    is_long = rollout["decode_step_s"] >= STEP_BAR_S
    rollout["bar"] = verdict(rollout) if cost_model.has_bar and is_long else "no bar: a step is too short"
    learner["bar"] = verdict(learner) if cost_model.has_bar else "no bar"
    return {
        "shape": cost_model.shape,
        "rollout": rollout,
        "learner": learner,
        "payload": payload(seen, learner.pop("route_size")),
    }


def payload(seen: set[tuple[str, float]], route_size: int) -> dict[str, Any]:
    """(type, bytes a token) of the routes as the worker returned them, against ``route_size`` = L_moe * K bytes."""
    return {"seen": sorted(seen), "bar": route_size, "met": seen == {("uint8", float(route_size))}}
