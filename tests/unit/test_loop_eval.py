"""The whole loop without engines: evaluation leaves training alone, a restart goes on exactly, gaps move the weights.

The engine of these tests draws from one random stream, as vLLM does, and a request with a seed draws from it too, as on
vLLM's CPU back end: what training samples shows whether an evaluation disturbed it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain.loop
from posttrain.config import (
    Aggregation,
    Dtype,
    Overlong,
    PolicyAlgorithm,
    StepEvalConfig,
    TrackingConfig,
    UserError,
    WandbMode,
)
from posttrain.held_out import START_FILE, HeldOut, accuracy
from posttrain.loop import PolicyLoop
from posttrain.records import (
    GroupSummary,
    LossSettings,
    Prompt,
    RewardResult,
    RolloutStatus,
    SampleRef,
    SamplingSettings,
)
from posttrain.runs.evaluate import evaluate
from posttrain.scheduler import Scheduler
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl
from posttrain.weighting import GapFollower
from tests.metric_names import undocumented

DOMAINS = ("math", "code")
STEPS = 6
Request = tuple[Prompt, SamplingSettings, str]


def prompts(kind: str, n: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"{kind}{i}", source=domain, domain=domain, messages=[], token_ids=np.arange(3))
        for i in range(n)
        for domain in (DOMAINS[i % 2],)
    ]


class FakeRollouts:
    """Samples lengths. Finished groups come back in another order than they were submitted in."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.queue: list[Request] = []
        self.requests: list[Request] = []
        self.lengths: dict[str, list[int]] = {}  # of training groups
        self.evaluated: list[tuple[int, int]] = []  # (policy version, seed)
        self.version = -1
        self.loaded: list[str] = []
        self.quarantined: list[tuple[str, str]] = []
        self.num_workers = 1
        self.num_restarts = 0
        self.info = type("Info", (), {"records_routes": False})
        self.slow = 0  # groups that each `wait` leaves in flight

    def submit(self, prompt: Prompt, settings: SamplingSettings, group_id: str) -> None:
        self.queue.append((prompt, settings, group_id))
        self.requests.append((prompt, settings, group_id))

    def wait(self, timeout_s: float) -> list[tuple[Any, GroupSummary]]:
        ready = self.queue[self.slow :] or self.queue[:1]
        self.queue = [request for request in self.queue if request not in ready]
        return [self.finish(*request) for request in reversed(ready)]

    def finish(self, prompt: Prompt, settings: SamplingSettings, group_id: str) -> tuple[Any, GroupSummary]:
        lengths = self.rng.integers(2, 9, settings.group_size).tolist()
        if settings.seed is None:
            self.lengths[group_id] = lengths
        else:
            self.evaluated.append((self.version, settings.seed))
            lengths = np.random.default_rng(settings.seed).integers(2, 9, settings.group_size).tolist()
        summary = GroupSummary(
            group_id=group_id,
            prompt_id=prompt.prompt_id,
            domain=prompt.domain,
            source=prompt.source,
            statuses=[RolloutStatus.truncated if n == 8 else RolloutStatus.completed for n in lengths],
            num_tokens=[3 + n for n in lengths],
            num_loss_tokens=lengths,
            min_policy_version=self.version,
            max_policy_version=self.version,
            engine_s=0.0,
            errors=[None] * len(lengths),
            repeated=[False] * len(lengths),
        )
        return (group_id, lengths), summary

    def pop_lost(self) -> list[str]:
        return []

    def pop_restarts(self) -> list[tuple[str, str]]:
        return []

    @contextmanager
    def keep_random_state(self) -> Iterator[None]:
        state, busy = self.rng.bit_generator.state, bool(self.queue)
        yield
        if not busy:
            self.rng.bit_generator.state = state

    def update_weights(self, bundle: Any, policy_version: int) -> None:
        self.version = policy_version

    def load_checkpoint(self, path: str, policy_version: int) -> None:
        self.loaded.append(path)

    def score(self, texts: list[np.ndarray], worker: int) -> tuple[list[np.ndarray], list[None]]:
        return [np.zeros(len(t), np.float32) for t in texts], [None] * len(texts)


class FakeRewards:
    def score(self, refs: list[tuple[str, list[int]]]) -> list[list[RewardResult]]:
        return [[RewardResult(reward=float(n > 4)) for n in lengths] for _, lengths in refs]

    def results(
        self, groups: list[tuple[Any, int]], call: list[list[RewardResult]]
    ) -> list[list[RewardResult]]:
        assert all(len(lengths) == num_rollouts for (_, lengths), num_rollouts in groups)
        return call

    def score_all(self, groups: list[tuple[Any, int]]) -> list[list[RewardResult]]:
        assert all(len(lengths) == num_rollouts for (_, lengths), num_rollouts in groups)
        return self.score([ref for ref, _ in groups])


class FakeLearner:
    """Answers with the mean |advantage| of each domain, as the real one; dies before the step it is told to."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.weights: dict[int, dict[str, float]] = {}  # step -> share of the weights by domain
        self.advantages: dict[int, list[float]] = {}

    def export_weights(self, policy_version: int, dtype: Dtype) -> None: ...

    def logprobs(self, texts: list[np.ndarray], routes: list[Any]) -> list[np.ndarray]:
        return [np.zeros(len(t), np.float32) for t in texts]

    def train_step(
        self, samples: list[SampleRef], loss: LossSettings, step: int, updates: int
    ) -> dict[str, float]:
        if step == self.dies_at:
            raise KeyboardInterrupt
        mass = {d: sum(s.weight * (s.num_tokens - 3) for s in samples if s.domain == d) for d in DOMAINS}
        self.weights[step] = {d: m / sum(mass.values()) for d, m in mass.items()}
        self.advantages[step] = [s.orm_advantage for s in samples]
        return {"loss": 0.0, "math/advantage_abs": 0.3, "code/advantage_abs": 0.1 / step}

    def save_checkpoint(self, folder: Path) -> None: ...


class FakeFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: dict[int, str] = {}

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        self.states[step] = json.dumps(state)

    def write_json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value))

    def read_json(self, name: str) -> Any | None:
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None


class Run:
    """One attempt at a run in ``path``; `start` goes on after the last checkpoint of a former attempt."""

    def __init__(self, path: Path, every_steps: int = 0, **changes: Any) -> None:
        path.mkdir(exist_ok=True)
        self.rollouts, self.learner = FakeRollouts(), FakeLearner(changes.pop("dies_at", None))
        self.rollouts.slow = changes.pop("slow", 0)
        self.folder = FakeFolder(path)
        self.teachers: dict[str, str] = changes.pop("teachers", {})
        self.measured_on: dict[str, Any] = changes.pop("measured_on", {"model": "m"})
        self.every_steps = every_steps
        settings = {"steps": STEPS, "prompts_per_step": 4, "group_size": 4, "overlong": Overlong.keep}
        self.algorithm = PolicyAlgorithm(**{**settings, **changes})

    def start(self, former: Run | None = None) -> Run:
        pool: Any = self.rollouts
        rewards: Any = FakeRewards()
        folder: Any = self.folder
        scheduler = Scheduler({d: [p for p in prompts("p", 20) if p.domain == d] for d in DOMAINS}, seed=1)
        first_step, gaps = 1, GapFollower()
        if former is not None and former.folder.states:
            first_step = max(former.folder.states) + 1
            state = json.loads(former.folder.states[first_step - 1])
            scheduler.load_state(state["scheduler"])
            gaps = GapFollower(state["gaps"])
        quiet = TrackingConfig(wandb=WandbMode.disabled, console=False)
        learner: Any = self.learner
        with Tracker(self.folder.path, quiet, "t", {}, STEPS, first_step - 1) as tracker:
            held_out = None
            if self.every_steps:
                by_domain = {d: [p for p in prompts("e", 10) if p.domain == d] for d in DOMAINS}
                sampled = SamplingSettings(group_size=2, seed=7)
                cfg = StepEvalConfig(every_steps=self.every_steps)
                measured_on, event = self.measured_on, tracker.event
                held_out = HeldOut(
                    cfg, by_domain, sampled, pool, rewards, folder, measured_on, self.teachers, event
                )
            PolicyLoop(
                algorithm=self.algorithm,
                loss=LossSettings(kind="ppo_clip"),
                sampling=SamplingSettings(group_size=self.algorithm.group_size, max_new_tokens=8),
                rollout_dtype=Dtype.float32,
                scheduler=scheduler,
                rollouts=pool,
                learner=learner,
                rewards=rewards,
                teachers=None,
                tracker=tracker,
                folder=folder,
                checkpoint_every=2,
                probe_texts=[np.arange(3)],
                probe_tolerance=0.1,
                decode=str,
                rollout_samples=0,
                rollout_every_steps=1,
                held_out=held_out,
                gaps=gaps,
            ).run(first_step)
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder.path / "metrics.jsonl")

    @property
    def training(self) -> list[tuple[str, str, SamplingSettings]]:
        return [(g, p.prompt_id, s) for p, s, g in self.rollouts.requests if not g.startswith("eval-")]


@pytest.fixture(autouse=True)
def plain_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes hand out objects, not references."""
    monkeypatch.setattr(posttrain.loop.ray, "get", lambda value: value)


@pytest.mark.parametrize("max_off_policy_steps", [0, 2])
def test_training_draws_the_same_prompts_with_and_without_evaluation(
    tmp_path: Path, max_off_policy_steps: int
) -> None:
    plain = Run(tmp_path / "plain", max_off_policy_steps=max_off_policy_steps).start()
    evaluated = Run(tmp_path / "eval", 2, max_off_policy_steps=max_off_policy_steps).start()
    assert plain.training == evaluated.training and len(plain.training) == 4 * STEPS
    assert all(settings.seed is None for *_, settings in evaluated.training)
    assert [row["step"] for row in plain.rows] == list(range(1, STEPS + 1))


def test_training_samples_the_same_tokens_with_and_without_evaluation(tmp_path: Path) -> None:
    plain, evaluated = Run(tmp_path / "plain").start(), Run(tmp_path / "eval", 2).start()
    assert plain.rollouts.lengths == evaluated.rollouts.lengths
    assert plain.learner.advantages == evaluated.learner.advantages


def test_groups_of_later_waves_that_finish_during_an_evaluation_are_not_lost(tmp_path: Path) -> None:
    run = Run(tmp_path, 1, max_off_policy_steps=2, slow=3).start()
    assert [row["step"] for row in run.rows] == list(range(STEPS + 1))
    assert sorted(run.rollouts.lengths) == sorted(g for g, *_ in run.training)
    assert len(run.rollouts.evaluated) == 10 * (STEPS + 1)


def test_rows_of_an_evaluated_run(tmp_path: Path) -> None:
    run = Run(tmp_path, 4).start()
    assert [row["step"] for row in run.rows] == list(range(STEPS + 1))
    assert [row["step"] for row in run.rows if "eval/math" in row] == [0, 4, STEPS]
    for row in run.rows:
        assert undocumented(row) == set()
        for domain in DOMAINS:
            if f"eval/{domain}" in row:
                assert row[f"eval/{domain}/low"] <= row[f"eval/{domain}"] <= row[f"eval/{domain}/high"]
    last, start = run.rows[-1], run.rows[0]
    assert last["eval/math/gain"] == last["eval/math"] - start["eval/math"]
    assert "time_s/eval" in last and "eval/math/headroom" not in last
    versions = [version for version, _ in run.rollouts.evaluated]
    assert sorted(set(versions)) == [0, 4, STEPS] and versions.count(4) == 10
    seeds = [seed for version, seed in run.rollouts.evaluated if version == 0]
    assert len(set(seeds)) == 10, "every prompt has random numbers of its own"
    assert sorted(seeds) == sorted(seed for version, seed in run.rollouts.evaluated if version == 4)


def test_a_restart_evaluates_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", 2).start()
    killed = Run(tmp_path / "killed", 2, dies_at=6)
    with pytest.raises(KeyboardInterrupt):
        killed.start()
    assert max(killed.folder.states) == 4
    resumed = Run(tmp_path / "killed", 2).start(killed)
    assert [row["step"] for row in resumed.rows] == list(range(STEPS + 1))
    assert {version for version, _ in resumed.rollouts.evaluated} == {STEPS}
    assert "eval/math/gain" in resumed.rows[-1], "the start model's accuracy is on disk"
    assert killed.training[: 4 * 4] + resumed.training == whole.training
    assert resumed.folder.states[6] == whole.folder.states[6], "data cursor and gaps"


def test_a_restart_before_the_first_checkpoint_keeps_the_start_models_accuracy(tmp_path: Path) -> None:
    killed = Run(tmp_path, 2, dies_at=1)
    with pytest.raises(KeyboardInterrupt):
        killed.start()
    start = killed.rows[0]
    resumed = Run(tmp_path, 2).start(killed)
    assert 0 not in {version for version, _ in resumed.rollouts.evaluated}
    assert {k: v for k, v in resumed.rows[0].items() if k != "time"} == {
        k: v for k, v in start.items() if k != "time"
    }
    other = Run(tmp_path, 2, measured_on={"model": "another"}).start()
    assert 0 in {version for version, _ in other.rollouts.evaluated}, "measured on something else"


def test_teachers_are_measured_once_and_give_the_headroom(tmp_path: Path, monkeypatch: Any) -> None:
    scores = iter([0.4, 0.9, 0.6, 0.7, 0.8])  # start, teacher, steps 2, 4 and 6
    measured: list[tuple[int, tuple[str, ...]]] = []

    def evaluated(
        self: HeldOut, step: int, members: dict[str, list[Prompt]], others: Any
    ) -> dict[str, dict[str, float]]:
        value = next(scores)
        measured.append((run.rollouts.version, tuple(members)))
        return {d: {"accuracy": value, "low": value - 0.1, "high": value + 0.1} for d in members}

    monkeypatch.setattr(HeldOut, "_evaluate", evaluated)
    run = Run(tmp_path, 2, teachers={"math": "/teacher", "law": "/other"})
    run.start()
    assert run.rollouts.loaded == ["/teacher"]
    assert measured == [(0, DOMAINS), (0, ("math",)), (2, DOMAINS), (4, DOMAINS), (6, DOMAINS)]
    assert run.rows[0]["eval/math/teacher"] == 0.9 and "eval/code/teacher" not in run.rows[0]
    assert [r["eval/math/headroom"] for r in run.rows if "eval/math/headroom" in r] == pytest.approx(
        [0.4, 0.6, 0.8]
    )
    assert all(undocumented(row) == set() for row in run.rows)
    assert json.loads((tmp_path / START_FILE).read_text())["teachers"]["math"]["accuracy"] == 0.9


def test_a_domain_that_fails_in_an_evaluation_is_left_out_and_training_goes_on(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """A reward that raises in math, then a prompt of it that is given up: code is measured, and nothing stays in flight."""
    plain = Run(tmp_path / "plain").start()
    score, wait = FakeRewards.score, FakeRollouts.wait

    def no_verifier(self: FakeRewards, refs: list[Any]) -> list[list[RewardResult]]:
        return [
            [
                RewardResult(reward=0.0, error="no verifier") if name.startswith("eval-math") else r
                for r in rewards
            ]
            for (name, _), rewards in zip(refs, score(self, refs), strict=True)
        ]

    monkeypatch.setattr(FakeRewards, "score", no_verifier)
    run = Run(tmp_path / "eval", 2).start()
    assert run.training == plain.training and run.rollouts.lengths == plain.rollouts.lengths
    assert run.rollouts.queue == []
    measured = [row for row in run.rows if "eval/code" in row]
    assert [row["step"] for row in measured] == [0, 2, 4, 6] and "eval/code/gain" in measured[-1]
    assert not any("eval/math" in row or "eval/all" in row for row in run.rows)
    events = [e for e in read_jsonl(run.folder.path / "events.jsonl") if e["kind"] == "eval_incomplete"]
    assert [(e["step"], e["domain"]) for e in events] == [(step, "math") for step in (0, 2, 4, 6)]
    assert "no verifier" in events[0]["message"]

    monkeypatch.setattr(FakeRewards, "score", score)
    lost: list[str] = []

    def give_up(self: FakeRollouts, timeout_s: float) -> list[tuple[Any, GroupSummary]]:
        gone = [r for r in self.queue if r[2] == "eval-math-0"]
        self.queue = [r for r in self.queue if r not in gone]
        lost.extend(name for *_, name in gone)
        self.quarantined += [(name, "prompt too long") for *_, name in gone]
        return wait(self, timeout_s) if self.queue else []

    def pop_lost(self: FakeRollouts) -> list[str]:
        found = list(lost)
        lost.clear()
        return found

    monkeypatch.setattr(FakeRollouts, "wait", give_up)
    monkeypatch.setattr(FakeRollouts, "pop_lost", pop_lost)
    other = Run(tmp_path / "lost", 2).start()
    assert other.training == plain.training
    assert all(
        ("eval/code" in row) == (row["step"] % 2 == 0) and "eval/math" not in row for row in other.rows
    )
    events = [e for e in read_jsonl(other.folder.path / "events.jsonl") if e["kind"] == "eval_incomplete"]
    assert len(events) == 4 and "prompt too long" in events[0]["message"]


def test_an_evaluation_of_its_own_stops_at_the_first_failure(monkeypatch: Any) -> None:
    def score(self: FakeRewards, refs: list[Any]) -> list[list[RewardResult]]:
        return [[RewardResult(reward=0.0, error="no verifier")] * len(lengths) for _, lengths in refs]

    monkeypatch.setattr(FakeRewards, "score", score)
    pool: Any = FakeRollouts()
    rewards: Any = FakeRewards()
    with pytest.raises(UserError, match=r"evaluation: eval-.*: no verifier"):
        evaluate(pool, rewards, {"math": prompts("e", 2)}, SamplingSettings(group_size=2, seed=7), None)


# Accuracy -----------------------------------------------------------------------------------------------------------


def test_wilson_interval_by_hand() -> None:
    """0 of 20: z^2 / (20 + z^2) above; 10 of 20 with the sample's standard error, which is that of 19 answers."""
    none = accuracy(np.zeros((20, 1)))
    assert (none["accuracy"], none["low"]) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert none["high"] == pytest.approx(1.96**2 / (20 + 1.96**2))
    half = accuracy(np.array([[1.0]] * 10 + [[0.0]] * 10))
    assert (half["low"], half["high"]) == pytest.approx((0.29495, 0.70505), abs=1e-5)


def test_the_interval_covers_the_truth_and_does_not_count_samples_of_one_prompt_as_independent() -> None:
    rng = np.random.default_rng(0)
    hits, num_trials = 0, 400
    for _ in range(num_trials):
        easy = rng.random(40) < 0.3  # a prompt is either solved in all four samples or in none
        found = accuracy(np.repeat(easy[:, None], 4, axis=1).astype(float))
        hits += found["low"] <= 0.3 <= found["high"]
    assert 0.92 <= hits / num_trials <= 0.985


def test_rewards_outside_of_0_to_1_get_a_plain_interval() -> None:
    found = accuracy(np.array([[-1.0], [2.0], [2.0]]))
    error = np.std([-1, 2, 2], ddof=1) / np.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((1 - 1.96 * error, 1 + 1.96 * error))


# Balance, length ----------------------------------------------------------------------------------------------------


def test_gap_following_moves_the_weights_from_the_second_step_on(tmp_path: Path) -> None:
    balanced = {"aggregation": Aggregation.token_mean_balanced, "target_shares": dict.fromkeys(DOMAINS, 0.5)}
    still = Run(tmp_path / "still", **balanced).start()
    following = Run(tmp_path / "following", **balanced, gap_following=True).start()
    assert all(w["math"] == pytest.approx(0.5) for w in still.learner.weights.values())
    assert following.learner.weights[1]["math"] == pytest.approx(0.5)
    assert following.learner.weights[2]["math"] == pytest.approx(0.75), "mean |A| of step 1: 0.3 and 0.1"
    assert following.learner.weights[6]["math"] > 0.75, "code's gap shrinks"
    for run in (still, following):
        assert [row["share/target/math"] for row in run.rows] == pytest.approx(
            [run.learner.weights[step]["math"] for step in range(1, STEPS + 1)]
        )


def test_shaped_rewards_change_the_advantages_and_not_the_logged_reward(tmp_path: Path) -> None:
    keep = Run(tmp_path / "keep", steps=1).start()
    shape = Run(tmp_path / "shape", steps=1, overlong=Overlong.shape, overlong_buffer=4).start()
    assert keep.rows[0]["reward/all"] == shape.rows[0]["reward/all"]
    lengths = np.concatenate([shape.rollouts.lengths[g] for g in sorted(shape.rollouts.lengths)])
    assert shape.rows[0]["reward/overlong_penalty"] == pytest.approx(np.mean((lengths - 4).clip(0, 4) / 4))
    assert keep.learner.advantages != shape.learner.advantages
    assert undocumented(shape.rows[0]) == set()
