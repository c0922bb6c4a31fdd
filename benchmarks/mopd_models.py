"""The models of `benchmarks/mopd.py`: every method as ordinary runs, for one seed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import locked
from benchmarks.mopd_table import DOMAINS
from examples.tiny.make_data import make
from examples.tiny.model import build_model
from posttrain.compose import compose
from posttrain.config import (
    Aggregation,
    DataConfig,
    MergeMethod,
    MergeRun,
    PipelineRun,
    SampleConfig,
    SampleRun,
    SourceConfig,
)
from posttrain.data.sources import load_prompts
from posttrain.data.tokenizer import load_tokenizer
from posttrain.disk import write_atomic
from posttrain.engines import Engines
from posttrain.runs import evaluate, merge, mopd, pipeline, rl, sample, sft
from posttrain.tracking.jsonl import read_jsonl
from teachers.fingerprint import fingerprint

SETTING = [
    "experiment=tiny",
    "rollout.max_new_tokens=72",
    "rl.algorithm.steps=80",  # teachers that hardly rise any more: what a student gains beyond them is no distillation
    "teachers.code.steps=80",
    "mopd.algorithm.steps=360",
    "mopd.algorithm.prompts_per_step=64",
    "checkpoint.keep=1",
    "tracking.wandb=disabled",
    "tracking.console=false",
    "tracking.rollout_samples=0",
    "tracking.rollout_every_steps=1000",
]
QUICK = [
    "sft.algorithm.steps=4",
    "rl.algorithm.steps=2",
    "rl.algorithm.prompts_per_step=4",
    "rl.algorithm.group_size=4",
    "teachers.code.steps=2",
    "mopd.algorithm.steps=2",
    "mopd.algorithm.prompts_per_step=16",
    "eval.num_samples=2",
]
SIZES = {"num_sft": 32_000, "num_prompts": 2_000, "num_valid": 300, "num_heldout": 1_000}
QUICK_SIZES = {"num_sft": 640, "num_prompts": 32, "num_valid": 8, "num_heldout": 16}
CURVE_POINTS, CURVE_PROMPTS = 18, 200  # held-out accuracy on the way; it leaves training as it is
SFT_EPOCHS = 2  # over the teachers' answers, off-policy

Models = dict[str, str]  # domain -> the checkpoint that answers its prompts


class Seed:
    """All models of one seed: each made once, by an ordinary run in a folder of its own, resumed where it stands."""

    def __init__(self, work: Path, seed: int, quick: bool, engines: Engines | None = None) -> None:
        self.seed, self.quick, self.engines = seed, quick, engines
        self.folder = work / f"seed{seed}"
        self._work = work
        self.cfg = self.configuration()
        self.used: set[str] = set()  # runs behind the present cell
        self._made: dict[str, str] = {}

    def configuration(self, *overrides: str) -> PipelineRun:
        place = [f"name={self.folder.name}", f"runs_dir={self._work}", f"seed={self.seed}"]
        # An engine's decode steps are mostly overhead, which two engines on one core would pay twice.
        engines = [f"rollout.num_workers={min(2, len(os.sched_getaffinity(0)))}"]
        cfg = compose("pipeline", [*SETTING, *(QUICK if self.quick else []), *place, *engines, *overrides])[1]
        assert isinstance(cfg, PipelineRun)
        return cfg

    def make_inputs(self) -> None:
        inputs = self.folder / "inputs"
        with self._alone("inputs"):
            if not (inputs / "READY").exists():
                make(inputs, seed=self.seed, long_math=True, **(QUICK_SIZES if self.quick else SIZES))
                build_model(inputs / "model", self.seed)
                (inputs / "READY").touch()

    # Runs -----------------------------------------------------------------------------------------------------

    def train(self, module: Any, run: Any, name: str, lr: float | None = None, **algorithm: Any) -> str:
        """Start (or skip, or resume) a run under ``name``, and note that the present cell is made of it."""
        run = replace(run, name=f"{self.cfg.name}/{name}")
        if lr is not None:
            run = replace(run, learner=replace(run.learner, lr=lr))
        if algorithm:
            run = replace(run, algorithm=replace(run.algorithm, **algorithm))
        self.used.add(name)
        if name not in self._made:
            with self._alone(name), self._timed(name):
                self._made[name] = module.run(run, self.engines)
        return self._made[name]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._alone("wall.json"):
                seconds = self.wall_seconds()
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
                self._write("wall.json", seconds)

    def wall_seconds(self) -> dict[str, float]:
        """Seconds that every run of this seed has taken, by name, over all processes that worked on it."""
        return self._read("wall.json") or {}

    def _alone(self, name: str) -> AbstractContextManager[None]:
        """Wait until no other process makes ``name`` of this seed."""
        return locked(self.folder / "locks" / name.replace("/", "-"))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is made in here does not count for the present cell."""
        former, self.used = self.used, set()
        try:
            yield
        finally:
            self.used = former

    def sft(self) -> str:
        return self.train(sft, pipeline.sft_config(self.cfg), "sft")

    def teachers(self, start: str | None = None, number: int = 1, lr: float | None = None) -> Models:
        found, lr = {}, lr or self.teacher_lr
        for domain in DOMAINS:
            run = pipeline.rl_config(self.cfg, domain, start or self.sft(), number)
            found[domain] = self.train(rl, run, f"{run.name.partition('/')[2]}-{lr:g}", lr)
        return found

    @property
    def teacher_lr(self) -> float:
        """The teachers' learning rate as it was chosen, or that of the setting."""
        chosen = self._work / "chosen.json"
        found = json.loads(chosen.read_text()) if chosen.exists() else {}
        return float(found["teachers"]["value"] if "teachers" in found else self.cfg.rl.learner.lr)

    def student(self, lr: float, *overrides: str) -> str:
        cfg = self.configuration(*overrides)
        run = self.watched(pipeline.mopd_config(cfg, self.sft(), self.teachers()))
        tags = [o.rpartition("=")[2] for o in overrides]
        return self.train(mopd, run, "-".join(["mopd", *tags, f"{lr:g}"]), lr)

    def foreign_teachers(self) -> Models:
        """Teachers of another initialisation, trained on this seed's data as its own are."""
        start = self.folder / "foreign_model"
        build_model(start, self.seed + 1)
        run = pipeline.sft_config(self.cfg)
        run = replace(run, model=replace(run.model, path=str(start)))
        origin = self.train(sft, run, "teachers/foreign/sft")
        foreign = {}
        for domain in DOMAINS:
            teacher = pipeline.rl_config(self.cfg, domain, origin)
            foreign[domain] = self.train(rl, teacher, f"teachers/foreign/{domain}", self.teacher_lr)
        return foreign

    def student_of_foreigners(self, lr: float) -> str:
        """MOPD with foreign teachers. The preflight's red lines are accepted by name."""
        student = self.watched(pipeline.mopd_config(self.cfg, self.sft(), self.foreign_teachers()))
        workers = replace(student.teacher_workers, accept=["foreign", "initial_kl"])
        return self.train(mopd, replace(student, teacher_workers=workers), f"mopd-foreign-{lr:g}", lr)

    def watched(self, run: Any) -> Any:
        every = max(1, run.algorithm.steps // CURVE_POINTS)
        num_prompts = 8 if self.quick else CURVE_PROMPTS
        return replace(run, eval=replace(run.eval, every_steps=every, num_prompts=num_prompts))

    def mixed(self, lr: float, name: str, tokens: float, batch: float = 1.0) -> str:
        """RL on all domains at once, for as many steps as ``tokens`` pay for. ``batch``: prompts of a step, as a share of
        those of the teachers' RL."""
        lengths = self.answer_lengths()
        num_steps = self.num_steps(tokens / batch, float(np.mean([lengths[d] for d in DOMAINS])))
        run = replace(pipeline.rl_config(self.cfg, DOMAINS[0], self.sft()), domain=None)
        num_prompts = round(batch * run.algorithm.prompts_per_step)
        run = replace(run, algorithm=replace(run.algorithm, steps=num_steps, prompts_per_step=num_prompts))
        return self.train(rl, self.watched(run), f"{name}-{lr:g}", lr)

    def cascade(self, lr: float, tokens: float) -> str:
        """RL on one domain after the other, each from the former's model; as many answers for each domain."""
        num_steps = self.num_steps(tokens, sum(self.answer_lengths().values()))
        model = self.sft()
        for domain in DOMAINS:
            run = pipeline.rl_config(self.cfg, domain, model)
            model = self.train(rl, run, f"cascade-{lr:g}/{domain}", lr, steps=num_steps)
        return model

    def oracle(self, lr: float) -> Models:
        """One student per domain, with that domain's teacher alone and the prompts that MOPD gives the domain."""
        models, teachers = {}, self.teachers()
        share = self.cfg.mopd.algorithm.prompts_per_step // len(DOMAINS)
        for domain in DOMAINS:
            run = pipeline.mopd_config(self.cfg, self.sft(), {domain: teachers[domain]})
            run = replace(run, domain=domain)
            models[domain] = self.train(mopd, run, f"oracle-{lr:g}/{domain}", lr, prompts_per_step=share)
        return models

    def off_policy(self, lr: float, filtered: bool = False, seq_mean: bool = False) -> str:
        """SFT on the teachers' own answers, as many as the student of MOPD samples; ``filtered``: on the right ones;
        ``seq_mean``: every answer weighs the same, as in MOPD, and no balancing rule moves the routers."""
        teachers, kind = self.teachers(), "filtered" if filtered else "all"
        each = self.cfg.mopd.algorithm.steps * self.cfg.mopd.algorithm.prompts_per_step // len(DOMAINS)
        num_samples = math.ceil(each / (QUICK_SIZES if self.quick else SIZES)["num_prompts"])
        least = (0.0 if self.quick else 1.0) if filtered else None
        chosen = SampleConfig(
            num_samples=num_samples, num_prompts=math.ceil(each / num_samples), min_reward=least
        )
        sources, num_rows = {}, 0
        for domain in DOMAINS:
            run = SampleRun(
                **pipeline.shared(self.cfg, "", teachers[domain]),
                domain=domain,
                rollout=self.cfg.rollout,
                rewards=self.cfg.rewards,
                environments=self.cfg.environments,
                sample=chosen,
            )
            path = self.train(sample, run, f"samples-{kind}/{domain}")
            sources[domain] = SourceConfig(path=path)
            num_rows += Path(path).read_text().count("\n")
        run = replace(pipeline.sft_config(self.cfg), data=DataConfig(sources=sources))
        run = replace(run, model=replace(run.model, path=self.sft()))
        algorithm: dict[str, Any] = {"steps": max(1, SFT_EPOCHS * num_rows // run.algorithm.batch_size)}
        if seq_mean:
            run = replace(run, learner=replace(run.learner, expert_bias_rate=0.0, aux_loss_coef=0.0))
            algorithm["aggregation"], kind = Aggregation.seq_mean, "seq_mean"
        return self.train(sft, run, f"off_policy-{kind}-{lr:g}", lr, **algorithm)

    def second_round(self, lr: float) -> str:
        student = self.student(lr)
        teachers = self.teachers(student, number=2)
        run = pipeline.mopd_config(self.cfg, student, teachers, 2)
        return self.train(mopd, run, f"round2/mopd-{lr:g}", lr)

    def merged(self, coefficient: float | None) -> str:
        """The teachers' average, or task arithmetic with this coefficient."""
        models = list(self.teachers().values())
        run = MergeRun(
            **pipeline.shared(
                self.cfg, "average" if coefficient is None else f"arithmetic-{coefficient:g}", ""
            ),
            models=models,
            method=MergeMethod.average if coefficient is None else MergeMethod.task_arithmetic,
            base=None if coefficient is None else self.sft(),
            coefficient=coefficient or 0.5,
        )
        return merge.run(run)

    # Budgets --------------------------------------------------------------------------------------------------

    def tokens(self, name: str) -> float:
        """Tokens that were sampled in a run."""
        if (summary := self._read(f"{name}/summary.json")) is not None:
            return summary["num_tokens"]
        steps = self.folder / name / "metrics.jsonl"
        return sum(row.get("tokens/all", 0.0) for row in read_jsonl(steps)) if steps.exists() else 0.0

    def course(self, name: str) -> dict[str, Any]:
        """What the metrics of a run say on the way: held-out accuracy over sampled tokens, and shares of the domains,
        averaged over the steps. Empty where the run was not watched."""
        file = self.folder / name / "metrics.jsonl"
        rows = read_jsonl(file) if file.exists() else []
        tokens = np.cumsum([row.get("tokens/all", 0.0) for row in rows])
        seen = [(t, row) for t, row in zip(tokens, rows, strict=True) if "eval/all" in row]
        if not seen:
            return {}
        curve = {d: [round(row[f"eval/{d}"], 4) for _, row in seen] for d in DOMAINS}
        watched = {"num_prompts": self.watched(self.cfg.mopd).eval.num_prompts}
        found: dict[str, Any] = {
            "curve": {"tokens": [round(t) for t, _ in seen], "accuracy": curve} | watched
        }
        steps = [row for row in rows if row["step"] > 0]
        for kind in ("tokens", "gradient", "weight"):
            shares = {d: [row.get(f"share/{kind}/{d}", 0.0) for row in steps] for d in DOMAINS}
            found[f"share_{kind}"] = {d: round(float(np.mean(v)), 4) for d, v in shares.items()}
        errors = [
            abs(row[f"share/weight/{d}"] - row[f"share/target/{d}"])
            for row in steps
            for d in DOMAINS
            if f"share/target/{d}" in row
        ]
        return found | ({"target_error": max(errors)} if errors else {})

    def budget(self, lr: float, teachers: bool = False) -> float:
        """Sampled tokens of the student of MOPD, with those of its teachers."""
        with self.aside():
            self.student(lr)
            names = [n for n in self.used if teachers or not n.startswith("teachers/")]
            return sum(map(self.tokens, names))

    def answer_lengths(self) -> dict[str, float]:
        """Mean sampled tokens of an answer over the RL of each domain's teacher, which is what RL rows pay for."""
        with self.aside():
            self.teachers()
        lengths = {}
        for domain in DOMAINS:
            rows = read_jsonl(self.folder / "teachers" / f"{domain}-{self.teacher_lr:g}" / "metrics.jsonl")
            lengths[domain] = float(np.mean([row["length/all"] for row in rows]))
        return lengths

    def num_steps(self, tokens: float, tokens_per_answer: float) -> int:
        algorithm = self.cfg.rl.algorithm
        per_step = algorithm.prompts_per_step * algorithm.group_size * tokens_per_answer
        return max(1, round(tokens / per_step))

    # Scores ---------------------------------------------------------------------------------------------------

    def evaluate(self, models: Models, split: str) -> evaluate.Scores:
        """Scores on the validation ("valid") or held-out ("heldout") prompts; greedy as well on the latter."""
        prompts = self._prompts(split)
        sampled, greedy = evaluate.eval_settings(self.cfg)
        scores = evaluate.Scores(sampled={}, greedy={})
        for path in dict.fromkeys(models.values()):
            domains = [d for d in DOMAINS if models[d] == path]
            file = f"eval/{split}-{fingerprint(path)[:16]}-{'-'.join(domains)}.json"
            with self._alone(file):
                if self._read(file) is None:
                    asked = {d: prompts[d] for d in domains}
                    settings = (sampled, greedy if split == "heldout" else None)
                    self._write(file, self._answers(path, asked, *settings).to_json())
            found = evaluate.Scores.read(self.folder / file)
            scores.sampled |= found.sampled
            scores.greedy |= found.greedy or {}
        return scores

    def _answers(self, path: str, prompts: dict[str, Any], *settings: Any) -> evaluate.Scores:
        assert self.engines is not None
        rewards = self.engines.rewards(self.cfg.rewards, self.cfg.reward_workers, DOMAINS)
        model = replace(self.cfg.model, path=path)
        rollouts = self.engines.rollouts(self.cfg.rollout, model, self.cfg.environments, self.seed)
        rollouts.load_checkpoint(path, 1)
        return evaluate.evaluate(rollouts, rewards, prompts, *settings)

    def _prompts(self, split: str) -> dict[str, Any]:
        inputs = self.folder / "inputs"
        sources = {d: SourceConfig(path=str(inputs / f"{split}.{d}.jsonl")) for d in DOMAINS}
        tokenizer = load_tokenizer(str(inputs / "model"))
        loaded = load_prompts(
            DataConfig(eval_sources=sources), tokenizer, evaluate.room(self.cfg.rollout), eval=True
        )
        return evaluate.held_out(loaded, None)

    def _read(self, name: str) -> Any:
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else None

    def _write(self, name: str, value: Any) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(value) + "\n")
