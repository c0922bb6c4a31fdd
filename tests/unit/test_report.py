"""Bootstrap, summary.json, table, picture and recorded rollouts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from posttrain.records import Prompt, RewardResult, Rollout, RolloutStatus, TeacherScores, Turn
from posttrain.report.bootstrap import normalised, standard_error
from posttrain.report.picture import draw_summary, smooth
from posttrain.report.rollouts import ScoredRollout, write_rollouts
from posttrain.report.summary import (
    EvalScores,
    EvalTable,
    build_summary,
    domain_of_teacher,
    standard_errors,
    teacher_name,
    write_summary,
)
from posttrain.report.table import print_summary

REPLAY = {"coverage": 1.0, "k3": 5e-5, "k3_without": 3.5e-4, "route_mismatch": 0.008}


def bernoulli(p: float, num_prompts: int, seed: int, num_samples: int = 4) -> np.ndarray:
    return (np.random.default_rng(seed).random((num_prompts, num_samples)) < p).astype(float)


def test_normalised_by_hand() -> None:
    """sft .25, teacher .75, model .5: half of the way; with a second domain at the whole way, the mean is .75."""
    sft = {"math": np.array([0, 0, 0, 1.0]), "code": np.array([[0, 0], [1, 0.0]])}
    teacher = {"math": np.array([0, 1, 1, 1.0]), "code": np.array([[1, 1], [1, 0.0]])}
    model = {"math": np.array([0, 1, 0, 1.0]), "code": np.array([[1, 1], [0, 1.0]])}
    values, mean = normalised(sft, teacher, model, seed=0)
    assert values["math"].value == pytest.approx(0.5)
    assert values["code"].value == pytest.approx(1.0)
    assert mean.value == pytest.approx(0.75)
    assert values["math"].low <= 0.5 <= values["math"].high


def test_interval_has_the_size_that_the_delta_method_gives() -> None:
    n = 500
    arrays = [{"d": bernoulli(p, n, seed)} for seed, p in enumerate((0.4, 0.9, 0.8))]
    values, mean = normalised(*arrays, seed=1)
    interval = values["d"]
    sft, teacher, model = (array["d"].mean(axis=1) for array in arrays)
    gain = teacher.mean() - sft.mean()
    share = (model.mean() - sft.mean()) / gain
    influence = ((model - sft) - share * (teacher - sft)) / gain
    half = 1.96 * influence.std(ddof=1) / np.sqrt(n)
    assert interval.value == pytest.approx(share)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    assert (mean.value, mean.low, mean.high) == (interval.value, interval.low, interval.high)


def test_pairing_narrows_the_interval() -> None:
    """A student equal to its teacher prompt by prompt has no uncertainty at all; shuffled prompts give it some."""
    sft, teacher = bernoulli(0.4, 300, 0), bernoulli(0.9, 300, 1)
    values, _ = normalised({"d": sft}, {"d": teacher}, {"d": teacher}, seed=0)
    assert values["d"].low == values["d"].high == pytest.approx(1.0)
    shuffled = np.random.default_rng(2).permutation(teacher)
    values, _ = normalised({"d": sft}, {"d": teacher}, {"d": shuffled}, seed=0)
    assert values["d"].high - values["d"].low > 0.05


def test_intervals_are_reproducible_and_depend_on_the_seed() -> None:
    arrays = [{"d": bernoulli(p, 100, seed)} for seed, p in enumerate((0.4, 0.9, 0.8))]
    ends = [(i["d"].low, i["d"].high) for i in (normalised(*arrays, seed=seed)[0] for seed in (0, 0, 1))]
    assert ends[0] == ends[1] != ends[2]


def test_teacher_without_gain_gives_no_share() -> None:
    sft, model = {"d": bernoulli(0.5, 100, 0)}, {"d": bernoulli(0.6, 100, 1)}
    values, mean = normalised(sft, sft, model, seed=0)
    assert values["d"].value is None and mean.value is None


def test_uncertain_gain_gives_an_infinite_end() -> None:
    """A teacher hardly above SFT: some draws have no gain, and the interval says so."""
    sft = {"d": np.array([0.0] * 50 + [1.0] * 50)}
    teacher = {"d": np.array([0.0] * 49 + [1.0] * 51)}
    values, _ = normalised(sft, teacher, teacher, seed=0)
    assert values["d"].value == pytest.approx(1.0) and values["d"].high == np.inf


def test_unpaired_prompts_are_refused() -> None:
    with pytest.raises(AssertionError, match="different prompts"):
        normalised({"d": np.zeros(3)}, {"d": np.ones(3)}, {"d": np.ones(4)}, seed=0)


def test_standard_error_is_over_prompts() -> None:
    rewards = np.array([[1, 1, 1, 1], [0, 0, 0, 0.0]])
    assert standard_error(rewards) == pytest.approx(np.std([1, 0], ddof=1) / np.sqrt(2))


@pytest.fixture
def table() -> EvalTable:
    accuracies = {"sft": (0.4, 0.5), "mopd": (0.8, 0.9), "average_merge": (0.6, 0.6)}

    def cell(p: float, seed: int, n: int = 60) -> EvalScores:
        return EvalScores(sampled=bernoulli(p, n, seed), greedy=bernoulli(p, n, seed + 50, 1)[:, 0])

    result = {
        name: {domain: cell(p, i) for i, (domain, p) in enumerate(zip(("math", "code"), ps, strict=True))}
        for name, ps in accuracies.items()
    }
    result[teacher_name("math")] = {"math": cell(0.85, 10), "code": cell(0.5, 11, n=20)}
    result[teacher_name("code")] = {"math": cell(0.4, 12, n=20), "code": cell(0.95, 13)}
    return result


def test_summary_has_the_agreed_shape(table: EvalTable, tmp_path: Path) -> None:
    summary = build_summary(table, {"sft": 10.04, "mopd": 20.0}, REPLAY, seed=3)
    write_summary(tmp_path / "summary.json", summary)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == [
        "domains", "num_eval", "accuracy", "accuracy_greedy", "normalised", "wall_s", "replay", "seed",
    ]  # fmt: skip
    assert summary["domains"] == ["math", "code"] and summary["num_eval"] == {"math": 60, "code": 60}
    for key in ("accuracy", "accuracy_greedy"):
        accuracy = summary[key]
        assert set(accuracy) == {"sft", "teachers", "teachers_all", "mopd", "average_merge"}
        for name in ("sft", "teachers", "mopd", "average_merge"):
            assert set(accuracy[name]) == {"math", "code"}
        assert {teacher: set(cells) for teacher, cells in accuracy["teachers_all"].items()} == {
            "math": {"math", "code"},
            "code": {"math", "code"},
        }
        assert accuracy["teachers"]["code"] == accuracy["teachers_all"]["code"]["code"]
    sft, teacher, student = (
        table[name]["math"].sampled.mean() for name in ("sft", teacher_name("math"), "mopd")
    )
    assert summary["accuracy"]["sft"]["math"] == pytest.approx(sft, abs=1e-6)
    assert summary["accuracy_greedy"]["sft"]["math"] == pytest.approx(
        table["sft"]["math"].greedy.mean(), abs=1e-6
    )
    for name in ("mopd", "average_merge"):
        shares = summary["normalised"][name]
        assert set(shares) == {"math", "code", "mean", "ci"} and set(shares["ci"]) == {"math", "code", "mean"}
        for domain in ("math", "code", "mean"):
            low, high = shares["ci"][domain]
            assert low < shares[domain] < high
    assert summary["normalised"]["mopd"]["math"] == pytest.approx((student - sft) / (teacher - sft), abs=1e-4)
    assert summary["wall_s"] == {"sft": 10.0, "mopd": 20.0, "total": 30.0}
    assert summary["replay"] == REPLAY and summary["seed"] == 3


def test_summary_of_a_dense_model_with_a_self_teacher(table: EvalTable) -> None:
    """No replay, no merge, no greedy pass, one domain without gain: null, and table and picture still come."""
    table[teacher_name("math")]["math"] = table["sft"]["math"]
    del table["average_merge"]
    for cells in table.values():
        for cell in cells.values():
            cell.greedy = None
    summary = build_summary(table, {"total": 5.0}, None, seed=0)
    assert summary["replay"] is None and "accuracy_greedy" not in summary
    assert list(summary["normalised"]) == ["mopd"]
    assert summary["normalised"]["mopd"]["math"] is None and summary["normalised"]["mopd"]["mean"] is None
    json.dumps(summary, allow_nan=False)
    assert "math" in show(summary)


def show(summary: dict[str, object]) -> str:
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=80))
    return out.getvalue()


def test_table_fits_80_columns_and_shows_the_numbers(table: EvalTable) -> None:
    summary = build_summary(table, {"sft": 10.0, "mopd": 100.0}, REPLAY, seed=3)
    text = show(summary)
    shares = summary["normalised"]["mopd"]
    for domain in ("math", "code", "mean"):
        row = next(line for line in text.splitlines() if line.split()[:1] == [domain])
        low, high = shares["ci"][domain]
        assert f"{shares[domain]:.2f} [{low:.2f}, {high:.2f}]" in row
        assert row.split()[-1] == f"{summary['normalised']['average_merge'][domain]:.2f}"
    assert "coverage 1," in text and "time 1:50 min" in text and "seed 3" in text


def test_second_round_in_summary_and_table(table: EvalTable) -> None:
    """Shares of both rounds are those of the first round's teachers; the rest of the summary stays the first round's."""
    plain = build_summary(table, {"sft": 1.0}, REPLAY, seed=3)
    table["round2/mopd"] = {
        d: EvalScores(sampled=bernoulli(0.9, 60, i)) for i, d in enumerate(("math", "code"))
    }
    for domain in ("math", "code"):
        table[f"round2/{teacher_name(domain)}"] = table["round2/mopd"]
    summary = build_summary(table, {"sft": 1.0}, REPLAY, seed=3)
    assert {key: summary[key] for key in plain} == plain and "rounds" not in plain
    first, second = summary["rounds"]
    assert (
        first["mopd"] == summary["accuracy"]["mopd"] and first["teachers"] == summary["accuracy"]["teachers"]
    )
    assert first["normalised"] == summary["normalised"]["mopd"]
    sft, teacher, student = (
        table[name]["math"].sampled.mean() for name in ("sft", teacher_name("math"), "round2/mopd")
    )
    assert second["normalised"]["math"] == pytest.approx((student - sft) / (teacher - sft), abs=1e-4)
    assert second["teachers"] == second["mopd"]
    summary["lineage"] = [
        {"model": "inputs/model", "stage": None, "trained_from": {}, "fingerprint": "a"},
        {"model": "sft", "stage": "sft", "trained_from": {"model.path": "inputs/model"}, "fingerprint": "b"},
        {
            "model": "mopd",
            "stage": "mopd",
            "trained_from": {"model.path": "sft", "teachers.a.path": "teachers/a", "teachers.b.path": "sft"},
            "fingerprint": "c",
        },
    ]
    text = show(summary)
    row = next(line for line in text.splitlines() if line.split()[:1] == ["math"] and len(line.split()) == 7)
    assert row.split()[-1] == f"{second['normalised']['math']:.2f}"
    assert (
        "sft: sft of inputs/model\n" in text.replace(" \n", "\n")
        and "mopd: mopd of sft; sft, teachers/a" in text
    )


def test_names_of_teachers() -> None:
    assert domain_of_teacher(teacher_name("math")) == domain_of_teacher("round2/teacher/math") == "math"
    assert domain_of_teacher("mopd") is None and domain_of_teacher("round2/mopd") is None


def test_picture(table: EvalTable, tmp_path: Path) -> None:
    summary = build_summary(table, {"sft": 1.0}, REPLAY, seed=0)
    rows = [
        {"step": i, "reward/math": i / 20, "reward/code": None, "teacher/mean_abs": 1 / i}
        for i in range(1, 20)
    ]
    sizes = []
    for name, metrics in {"curves": rows, "none": []}.items():
        path = tmp_path / f"{name}.png"
        draw_summary(path, summary, metrics, standard_errors(table))
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1], "the curves left no trace"


def test_smoothing_keeps_length_and_mean_at_the_ends() -> None:
    assert smooth(np.array([1.0, 2, 3, 4, 5, 6])).tolist() == [2.0, 2.5, 3.0, 4.0, 4.5, 5.0]
    for n in range(1, 8):
        assert smooth(np.ones(n)).tolist() == [1.0] * n


def make_rollout(i: int) -> Rollout:
    prompt = Prompt(
        prompt_id="p1",
        source="math.jsonl",
        domain="math",
        messages=[{"role": "user", "content": "1+1?"}],
        token_ids=np.array([5, 6], np.int32),
        answer="2",
    )
    turns = [
        Turn(
            author=author,
            token_ids=np.array(ids, np.int32),
            loss_mask=np.full(len(ids), author == "policy"),
            rollout_logprobs=np.full(len(ids), -0.5 if author == "policy" else 0.0, np.float32),
            policy_versions=np.full(len(ids), 4 if author == "policy" else -1, np.int32),
        )
        for author, ids in (("prompt", [5, 6]), ("policy", [7, 8, 9]), ("environment", [1]), ("policy", [2]))
    ]
    return Rollout(
        group_id="g",
        rollout_id=f"g-{i}",
        prompt=prompt,
        turns=turns,
        messages=[{"role": "assistant", "content": "2"}],
        routed_experts=np.arange(6 * 2 * 2, dtype=np.uint8).reshape(6, 2, 2),
        finish_reason="stop",
        status=RolloutStatus.completed,
    )


def test_rollouts_keep_every_score(tmp_path: Path) -> None:
    scores = TeacherScores(teacher="runs/t", logprobs=np.linspace(-1, 0, 7, dtype=np.float32))
    samples = [
        ScoredRollout(
            rollout=make_rollout(0), reward=RewardResult(reward=1.0, breakdown={"ok": 1.0}), teacher=scores
        ),
        ScoredRollout(rollout=make_rollout(1), reward=RewardResult(reward=0.0, error="sandbox died")),
        ScoredRollout(rollout=make_rollout(2)),
    ]
    path = write_rollouts(tmp_path, 10, samples, decode=lambda ids: " ".join(map(str, ids)))
    assert path == tmp_path / "rollouts" / "step_000010.parquet"
    assert [file.name for file in path.parent.iterdir()] == ["step_000010.parquet"]
    first, second, third = pq.read_table(path).to_pylist()
    assert first["step"] == 10 and first["rollout_id"] == "g-0" and first["domain"] == "math"
    assert first["text"] == "5 6 7 8 9 1 2" and first["token_ids"] == [5, 6, 7, 8, 9, 1, 2]
    assert first["loss_mask"] == [False, False, True, True, True, False, True]
    assert first["rollout_logprobs"] == [0, 0, -0.5, -0.5, -0.5, 0, -0.5]
    assert first["policy_versions"] == [-1, -1, 4, 4, 4, -1, 4]
    assert first["turn_authors"] == ["prompt", "policy", "environment", "policy"]
    assert first["turn_num_tokens"] == [2, 3, 1, 1]
    assert np.array(first["teacher_logprobs"], np.float32).tolist() == scores.logprobs.tolist()
    assert first["teacher"] == "runs/t" and first["reward"] == 1.0
    assert json.loads(first["reward_breakdown"]) == {"ok": 1.0} and json.loads(first["answer"]) == "2"
    assert [message["role"] for message in json.loads(first["messages"])] == ["user", "assistant"]
    routes = np.frombuffer(first["routed_experts"], first["routed_experts_dtype"]).reshape(
        first["routed_experts_shape"]
    )
    assert np.array_equal(routes, make_rollout(0).routed_experts)
    assert second["reward"] is None and second["error"] == "sandbox died", (
        "a failed reward is not a reward of 0"
    )
    assert third["reward"] is None and third["error"] is None and third["teacher_logprobs"] is None
