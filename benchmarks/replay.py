"""What routing replay (R3) does to the mismatch between learner and engine, and what it costs.

    .venv/bin/python benchmarks/replay.py [--json FILE] [--quick] [--only effect|cost] [--work DIR] [KEY=VALUE ...]

Effect: a tiny Qwen3-MoE (softmax router) and a tiny MiMo-V2-Flash (sigmoid router with a bias), each trained by the
ordinary `sft` run, sample at temperature 1 in bfloat16 on training prompts of all four domains. The float32 learner
scores every sampled token with the recorded routes and with live ones. Cost: see `replay_cost.py`. Each figure that
has a bar is printed beside it. Settings (rollout.head_dtype=null) go to the runs of the effect.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import replay_cost

from examples.tiny.make_data import make
from examples.tiny.model import build_model
from posttrain.clock import Clock
from posttrain.compose import compose
from posttrain.config import PipelineRun
from posttrain.data.sources import load_prompts
from posttrain.data.tokenizer import load_tokenizer
from posttrain.engines import Engines
from posttrain.learner.group import LearnerGroup
from posttrain.records import GroupSummary, Prompt, RolloutGroup, SampleRef, SamplingSettings
from posttrain.runs import evaluate, pipeline, sft
from posttrain.waves import TRAINABLE
from rollout.pool import RolloutPool

FAMILIES = {  # family -> what its routers need in SFT: only a router with a bias is balanced by it
    "qwen3_moe": ["sft.learner.expert_bias_rate=0", "sft.learner.aux_loss_coef=1.0e-3"],
    "mimo_v2_flash": [],
}
THRESHOLDS = (1.1, 1.25, 2.0)  # F(t): share of tokens whose probabilities differ by more than this factor
TAIL = 0.999
BARS = {"k3": 0.35, "p99.9": 0.5, "f1.1": 0.5}  # largest ratio with / without
MIN_F = 1e-3  # an F below it without replay has no bar
NUM_DRAWS = 1000
PROMPTS_PER_DOMAIN = 5000


# -- effect -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Scores:
    """What is kept of the sampled tokens while slices of rollouts come and go."""

    gaps: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"with": [], "without": []})
    owners: list[np.ndarray] = field(default_factory=list)  # number of the rollout of every token
    tokens_by_domain: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    slices: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (rows of routes, `mismatch`)
    payloads: set[tuple[str, float]] = field(default_factory=set)  # (type, bytes a token) of routes
    failures: Counter[str] = field(default_factory=Counter)  # rollouts that cannot be scored, by status
    num_rollouts: int = 0

    @property
    def num_tokens(self) -> int:
        """Sampled tokens so far."""
        return sum(map(len, self.owners))

    def mean(self, key: str) -> float:
        """Mean of a figure of `LearnerGroup.mismatch` over all (token, layer) pairs."""
        return sum(n * m[key] for n, m in self.slices) / sum(n for n, _ in self.slices)


def effect(
    family: str,
    work: Path,
    settings: list[str],
    num_tokens: int,
    sft_steps: int,
    slice_prompts: int,
    num_prompts: int,
) -> dict[str, Any]:
    """Train, sample and score one family."""
    cfg, clock, scores = prepare(family, work, settings, sft_steps, num_prompts), Clock(), Scores()
    with Engines(cfg.ray) as engines:
        with clock("sft"):
            trained = replace(cfg.model, path=sft.run(pipeline.sft_config(cfg), engines))
        with clock("start"):
            starting = engines.in_background(
                engines.rollouts, cfg.rollout, trained, cfg.environments, cfg.seed
            )
            learner = engines.learner(cfg.mopd.learner, trained, 1, cfg.seed)
            rollouts, info = starting.result(), learner.info
        slices = sample(rollouts, training_prompts(cfg, trained.path), cfg, slice_prompts)
        while scores.num_tokens < num_tokens:
            with clock("sample"):
                finished = next(slices)
            with clock("score"):
                score(learner, finished, scores)
            print(f"{family}: {scores.num_tokens:,} of {num_tokens:,} sampled tokens", flush=True)
    layers = [key for key in scores.slices[0][1] if key.startswith("route_mismatch/")]
    coverage = min(m["coverage"] for _, m in scores.slices)
    return {
        "num_tokens": scores.num_tokens,
        "num_rollouts": scores.num_rollouts,
        "failures": dict(scores.failures),
        "tokens_by_domain": dict(scores.tokens_by_domain),
        "time": clock.metrics(scores.num_tokens),
        "measures": compare(scores),
        "route_mismatch": scores.mean("route_mismatch"),
        "route_mismatch_by_layer": {k.rpartition("_")[2]: scores.mean(k) for k in layers},
        "coverage": {
            "value": coverage,
            "bar": 1.0,
            "met": coverage == 1.0 and not scores.failures["engine_error"],
        },
        "payload": replay_cost.payload(scores.payloads, info.num_moe_layers * info.top_k),
    }


def prepare(family: str, work: Path, settings: list[str], sft_steps: int, num_prompts: int) -> PipelineRun:
    """Model, corpus and configuration of the tiny setting, in a folder of the family's name."""
    inputs = work / family / "inputs"
    make(inputs, seed=0, num_sft=24_000, num_prompts=num_prompts, num_valid=10, num_heldout=10)
    build_model(inputs / "model", 0, family=family)
    overrides = [
        "experiment=tiny",
        f"name={family}",
        f"runs_dir={work}",
        f"sft.algorithm.steps={sft_steps}",
        "tracking.wandb=disabled",
        *FAMILIES[family],
        *settings,
    ]
    _, cfg = compose("pipeline", overrides)
    assert isinstance(cfg, PipelineRun)
    return cfg


def training_prompts(cfg: PipelineRun, model: str) -> list[Prompt]:
    """Prompts of all domains, mixed, so that every slice holds all of them."""
    prompts = load_prompts(cfg.data, load_tokenizer(model, None, False), evaluate.room(cfg.rollout))
    random.Random(cfg.seed).shuffle(prompts)
    return prompts


def sample(
    rollouts: RolloutPool, prompts: list[Prompt], cfg: PipelineRun, slice_prompts: int
) -> Iterator[list[tuple[Any, GroupSummary]]]:
    """Finished groups of one rollout each, a slice at a time, as long as somebody asks."""
    settings = SamplingSettings(max_new_tokens=cfg.rollout.max_new_tokens, max_turns=cfg.rollout.max_turns)
    numbers = itertools.count()
    while True:
        for number in itertools.islice(numbers, slice_prompts):
            rollouts.submit(prompts[number % len(prompts)], settings, f"replay-{number}")
        yield rollouts.drain()
        assert not rollouts.pop_lost(), rollouts.quarantined


def score(learner: LearnerGroup, finished: list[tuple[Any, GroupSummary]], scores: Scores) -> None:
    """Add one slice."""
    groups: list[RolloutGroup] = ray.get([ref for ref, _ in finished])
    sampled = [(ref, group.rollouts[0]) for (ref, _), group in zip(finished, groups, strict=True)]
    scores.failures.update(r.status.value for _, r in sampled if r.status not in TRAINABLE)
    kept = [(ref, r) for ref, r in sampled if r.status in TRAINABLE]
    refs = [
        SampleRef(source_ref=ref, index=0, num_tokens=len(r.token_ids), weight=0.0, domain=r.domain)
        for ref, r in kept
    ]
    mismatch = learner.mismatch(refs)
    token_ids, routes = [r.token_ids for _, r in kept], [r.routed_experts for _, r in kept]
    logprobs = {"with": learner.logprobs(token_ids, routes), "without": learner.logprobs(token_ids)}
    before = scores.num_tokens
    for i, (_, rollout) in enumerate(kept):
        mask, recorded = rollout.loss_mask, rollout.routed_experts
        assert recorded is not None, "the learner would have refused it"
        scores.payloads.add((str(recorded.dtype), recorded.nbytes / (len(mask) - 1)))
        for side, values in logprobs.items():
            gap = values[i].astype(np.float64) - rollout.rollout_logprobs
            scores.gaps[side].append(gap[mask])
        scores.owners.append(np.full(int(mask.sum()), scores.num_rollouts))
        scores.tokens_by_domain[rollout.domain] += int(mask.sum())
        scores.num_rollouts += 1
    scores.slices.append((sum(len(ids) - 1 for ids in token_ids), mismatch))
    for side, suffix in (("with", ""), ("without", "_without")):  # the run's own figure is this one
        gap = np.concatenate(scores.gaps[side])[before:]
        own = float((np.expm1(gap) - gap).mean())
        assert np.isclose(own, mismatch[f"k3{suffix}"], rtol=1e-3, atol=1e-9), (side, own, mismatch)


def compare(scores: Scores) -> dict[str, dict[str, Any]]:
    """Every measure with, without, and their ratio with its 95 % bootstrap interval over rollouts."""
    owners = np.concatenate(scores.owners)
    sides = {side: Gaps(np.concatenate(parts)) for side, parts in scores.gaps.items()}
    point = {side: gaps.measures(np.ones(len(owners))) for side, gaps in sides.items()}
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(NUM_DRAWS):
        counts = np.bincount(rng.integers(scores.num_rollouts, size=scores.num_rollouts))
        weights = np.pad(counts, (0, scores.num_rollouts - len(counts)))[owners].astype(np.float64)
        draws.append(ratios(*(sides[side].measures(weights) for side in ("with", "without"))))
    point_ratios = ratios(point["with"], point["without"])
    compared = {}
    for name, ratio in point_ratios.items():
        values = np.array([draw[name] for draw in draws])
        low, high = np.nanquantile(values, [0.025, 0.975]) if np.isfinite(values).any() else (np.nan,) * 2
        if name.startswith("f") and point["with"][name] == 0 < point["without"][name]:
            high = 3 / (point["without"][name] * len(owners))  # no draw can show an event: the rule of three
        bar = BARS.get(name)
        if name.startswith("f") and point["without"][name] <= MIN_F:
            bar = None
        compared[name] = {
            "with": point["with"][name],
            "without": point["without"][name],
            "ratio": finite(ratio),
            "low": finite(low),
            "high": finite(high),
            "bar": bar,
            "met": None if bar is None else bool(ratio <= bar),
        }
    return compared


class Gaps:
    """Learner minus rollout logprob of every sampled token [N], on one side."""

    def __init__(self, gap: np.ndarray) -> None:
        size = np.abs(gap)
        columns = [np.expm1(gap) - gap, *(size > np.log(threshold) for threshold in THRESHOLDS)]
        self._names = ["k3", *(f"f{threshold:g}" for threshold in THRESHOLDS)]
        self._columns_MN = np.stack(columns).astype(np.float64)
        self._order = np.argsort(size)
        self._sorted = size[self._order]

    def measures(self, weights: np.ndarray) -> dict[str, float]:
        """k3, F and the tail of |difference| when token n counts ``weights[n]`` times."""
        total = weights.sum()
        means = dict(zip(self._names, (self._columns_MN @ weights / total).tolist(), strict=True))
        rank = np.searchsorted(np.cumsum(weights[self._order]), TAIL * total)
        return {"k3": means.pop("k3"), f"p{100 * TAIL:g}": float(self._sorted[rank]), **means}


def ratios(numerator: dict[str, float], denominator: dict[str, float]) -> dict[str, float]:
    return {
        name: value / denominator[name] if denominator[name] else np.nan for name, value in numerator.items()
    }


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return float(value) if np.isfinite(value) else None


# -- tables -----------------------------------------------------------------------------------------------------


def met(flag: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: ""}[flag]


def print_effect(family: str, result: dict[str, Any]) -> None:
    counts = f"{result['num_tokens']:,} sampled tokens in {result['num_rollouts']:,} rollouts"
    print(f"\n{family}: {counts}, failed: {result['failures'] or 'none'}")
    print(f"{'measure':>8} {'with':>9} {'without':>9} {'ratio':>7} {'95 %':>16} {'bar':>8}")
    for name, row in result["measures"].items():
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        interval = "" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
        bar = "" if row["bar"] is None else f"<= {row['bar']:g}"
        values = f"{row['with']:9.2e} {row['without']:9.2e}"
        print(f"{name:>8} {values} {ratio:>7} {interval:>16} {bar:>8} {met(row['met'])}")
    layers = ", ".join(f"layer {n} {100 * v:.2f} %" for n, v in result["route_mismatch_by_layer"].items())
    print(f"routes that differ: {100 * result['route_mismatch']:.2f} % ({layers})")
    print(f"coverage {result['coverage']['value']:g}, bar 1: {met(result['coverage']['met'])}")
    print_payload(result["payload"])


def print_payload(payload: dict[str, Any]) -> None:
    seen = ", ".join(f"{size:g} bytes a token ({dtype})" for dtype, size in payload["seen"])
    print(f"routes: {seen}; bar L_moe * K = {payload['bar']} at uint8: {met(payload['met'])}")


def print_cost(name: str, result: dict[str, Any]) -> None:
    rollout, learner = result["rollout"], result["learner"]
    step = f"decode step of {replay_cost.NUM_SEQUENCES} sequences {1e3 * rollout['decode_step_s']:.0f} ms"
    print(f"\n{name}: {step}, learner step {learner['step_s']:.2f} s")
    print(f"{'':>9} {'tokens/s with':>13} {'without':>8} {'cost':>23} {'by timers':>23}  upper end < 3 %")
    for part, row in (("recording", rollout), ("replaying", learner)):
        rates = f"{row['tokens_per_s_with']:13,.0f} {row['tokens_per_s_without']:8,.0f}"
        print(
            f"{part:>9} {rates} {percent(row['cost']):>23} {percent(row['cost_by_timers']):>23}  {row['bar']}"
        )
    on, off = rollout["memory"]["with"], rollout["memory"]["without"]
    for key, label in (("peak_mib", "peak memory"), ("resident_mib", "resident at the end")):
        print(f"{label} of the worker: {on[key]:,.0f} MiB with, {off[key]:,.0f} MiB without")
    print(f"vLLM's buffer of routes, resident as it fills: {on['slot_buffer_mib']:,.0f} MiB")
    print_payload(result["payload"])
    print(f"{'function':>85} {'ms with':>9} {'without':>9} {'share of run':>13}")
    for part in (rollout, learner):
        for label, row in part["functions"].items():
            outer = replay_cost.part_of(label)
            shown = f"{label} (in {outer})" if outer else label
            seconds = f"{row['ms_with']:9.2f} {row['ms_without']:9.2f}"
            print(f"{shown:>85} {seconds} {100 * row['share']:11.3f} %")


def percent(interval: dict[str, float]) -> str:
    """A share with its 95 % interval, in %."""
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}] %"


# -- command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--tokens", type=int, default=200_000, help="sampled tokens of each family")
    parser.add_argument("--sft-steps", type=int, default=250, help="SFT steps before")
    parser.add_argument("--only", choices=("effect", "cost"), help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean nothing")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the effect's runs")
    args = parser.parse_args()
    sizes = (2_000, 10, 128, 200) if args.quick else (args.tokens, args.sft_steps, 2048, PROMPTS_PER_DOMAIN)
    models = [replay_cost.shortened(m) if args.quick else m for m in replay_cost.MODELS]
    machine = platform.processor() or platform.machine()
    result: dict[str, Any] = {"machine": machine, "settings": args.settings, "effect": {}, "cost": {}}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for family in FAMILIES if args.only != "cost" else ():
            result["effect"][family] = effect(family, work, args.settings, *sizes)
            write(args.json, result)
        for model in models if args.only != "effect" else ():
            result["cost"][model.name] = replay_cost.measure(model, work)
            write(args.json, result)
    for family, row in result["effect"].items():
        print_effect(family, row)
    for name, row in result["cost"].items():
        print_cost(name, row)


def write(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
