"""The quality benchmark without engines: table from lines by hand, choice on validation, what is skipped and left out."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from benchmarks import mopd, mopd_models
from benchmarks.mopd import ROWS, choose
from benchmarks.mopd_models import SIZES, Seed
from benchmarks.mopd_table import (
    DOMAINS,
    LABELS,
    gain_over_tokens,
    print_table,
    rising,
    show,
    summarise,
    tokens_to,
)
from posttrain.runs.evaluate import Scores


def line(row: str, seed: int, right: float, share: float | None = None) -> dict:
    """A cell whose first prompts are answered right."""
    prompts = [1.0] * round(100 * right) + [0.0] * round(100 * (1 - right))
    return {
        "row": row,
        "seed": seed,
        "accuracy": dict.fromkeys(DOMAINS, right),
        "accuracy_greedy": dict.fromkeys(DOMAINS, right),
        "per_prompt": dict.fromkeys(DOMAINS, prompts),
        "normalised": dict.fromkeys(DOMAINS, share) | {"mean": share},
        "tokens": 1_000_000,
        "tokens_teachers": 0,
        "wall_s": 60.0,
    }


LINES = [
    *(line("sft", s, 0.4, 0.0) for s in (0, 1)),
    *(line("teachers", s, 0.9, 1.0) for s in (0, 1)),
    line("mopd", 0, 0.8, 0.8),
    line("mopd", 1, 0.9, 1.0),
    line("mix_rl", 2, 0.9, 1.0),  # a seed without SFT and teachers
]


def test_table_of_lines_by_hand():
    table = {entry["row"]: entry for entry in summarise(LINES)}
    assert set(table) == {"sft", "teachers", "mopd"}
    student = table["mopd"]
    assert student["accuracy"]["math"] == pytest.approx(0.85) and student["seeds"] == [0, 1]
    assert student["share"].value == pytest.approx(0.9)
    assert student["share"].low < 0.9 < student["share"].high
    assert student["spread"] == pytest.approx(np.std([0.8, 1.0], ddof=1))
    assert table["sft"]["share"].value == 0.0 and table["teachers"]["share"].value == 1.0


def test_difference_to_the_student_is_paired():
    """MOPD is right where the row is, and on 10 prompts more: every draw has at most what those give."""
    lines = [*LINES[:4], line("mopd", 0, 0.8), line("average", 0, 0.7)]
    table = {entry["row"]: entry for entry in summarise(lines)}
    ahead = table["average"]["ahead"]
    assert ahead.value == pytest.approx(0.2) and 0.1 < ahead.low < 0.2 < ahead.high < 0.3
    assert table["mopd"]["ahead"] is None
    equal = {entry["row"]: entry for entry in summarise([*lines[:-1], line("average", 0, 0.8)])}
    assert (equal["average"]["ahead"].low, equal["average"]["ahead"].high) == (0.0, 0.0)


def test_tokens_to_a_level_by_hand(tmp_path, capsys):
    curve = {"tokens": [0, 100, 200], "accuracy": {d: [0.4, 0.6, 0.9] for d in DOMAINS}}
    shares = dict.fromkeys(DOMAINS, 0.25)
    student = LINES[4] | {
        "curve": curve,
        "share_tokens": shares,
        "share_gradient": shares,
        "target_error": 1e-7,
    }
    cells = {("sft", 0): LINES[0], ("teachers", 0): LINES[2]}
    tokens, gains = gain_over_tokens(student, cells)
    assert gains == pytest.approx([0.0, 0.4, 1.0])
    _, of_its_prompts = gain_over_tokens(student | {"curve": curve | {"num_prompts": 80}}, cells)
    assert of_its_prompts == pytest.approx([-0.2, 0.2, 0.8]), "SFT 40 of the first 80, teachers all of them"
    assert tokens_to(0.7, tokens, gains) == pytest.approx(150)
    assert tokens_to(0.0, tokens, gains) == 0 and tokens_to(1.1, tokens, gains) is None
    assert tokens_to(0.5, [0, 1, 2, 3], [0.0, 0.6, 0.2, 0.8]) == pytest.approx(2.25), "not at the first peak"
    file = tmp_path / "mopd.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*LINES[:4], student]))
    show(file)
    printed = capsys.readouterr().out
    assert "tokens 0.250   gradient 0.250   gain 0.80   largest |weight share - target| 1.0e-07" in printed
    assert (tmp_path / "mopd_course.png").stat().st_size > 1000


def test_the_rising_fit_has_the_least_squares():
    assert rising([0.0, 0.6, 0.2, 0.8]) == pytest.approx([0.0, 0.4, 0.4, 0.8])
    assert rising([3.0, 2.0, 1.0]) == pytest.approx([2.0] * 3) and rising([1.0, 2.0]) == [1.0, 2.0]
    rng = np.random.default_rng(0)
    values = list(rng.normal(size=12))
    fit = np.array(rising(values))
    assert (np.diff(fit) >= 0).all()
    best = ((fit - values) ** 2).sum()
    for _ in range(200):  # no rising sequence nearby is closer
        other = np.maximum.accumulate(fit + rng.normal(0, 0.1, 12))
        assert ((other - values) ** 2).sum() >= best - 1e-12


def test_a_seed_alone_and_another_row_to_compare_with(tmp_path, capsys):
    file = tmp_path / "mopd.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*LINES, line("average", 0, 0.7, 0.6)]))
    show(file, seeds=[0], against="average")
    printed = capsys.readouterr().out
    row = next(text for text in printed.splitlines() if text.startswith("MOPD "))
    assert "parameter average - row" in printed and " -0.20 [" in row and row.endswith(" 1")
    assert not (tmp_path / "mopd.png").exists()


def test_choices_that_lines_were_made_with_hold_in_a_new_work_folder(tmp_path):
    results, work = tmp_path / "results" / "mopd.jsonl", tmp_path / "work"
    results.parent.mkdir()
    results.with_name("mopd_chosen.json").write_text('{"mopd": {"value": 5e-4}}')
    mopd.take_over_choices(work, results)
    assert mopd.read_choices(work / "chosen.json") == {}, "no line was made with them"
    results.write_text(json.dumps(LINES[0]) + "\n")
    mopd.take_over_choices(work, results)
    assert mopd.add_choices(work / "chosen.json", {"mix_rl": {"value": 2e-4}})["mopd"] == {"value": 5e-4}
    mopd.append(LINES[1], work / "chosen.json", results)
    assert set(mopd.read_choices(results.with_name("mopd_chosen.json"))) == {"mopd", "mix_rl"}
    (work / "chosen.json").write_text('{"mopd": {"value": 3e-4}}')
    with pytest.raises(SystemExit, match=r"mopd is 0\.0003, and the lines of .* were made with 0\.0005"):
        mopd.take_over_choices(work, results)


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path):
    results = tmp_path / "mopd.jsonl"
    results.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:40])
    mopd.append(LINES[2], tmp_path / "chosen.json", results)
    assert mopd.finished(results) == {("sft", 0), ("teachers", 0)}


def test_pairs_share_their_prompts():
    """A row equal to the teachers prompt by prompt has no uncertainty."""
    table = {entry["row"]: entry for entry in summarise([*LINES[:4], line("average", 0, 0.9, 1.0)])}
    share = table["average"]["share"]
    assert (share.value, share.low, share.high) == (1.0, 1.0, 1.0)


def test_table_and_picture_come_from_the_lines_alone(tmp_path, capsys):
    results = tmp_path / "mopd.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in [line("mopd", 0, 0.4, 0.0), *LINES]))
    show(results)
    out = capsys.readouterr().out
    row = next(text for text in out.splitlines() if text.startswith("MOPD "))
    assert row.split()[1:7] == ["85.0"] * 6 and " 0.90 [" in row
    assert (tmp_path / "mopd.png").stat().st_size > 5_000


def test_a_row_without_gain_still_prints(capsys):
    print_table(summarise([line("sft", 0, 0.5), line("teachers", 0, 0.5), line("mopd", 0, 0.5)]))
    assert capsys.readouterr().out.count(" - [") == 5  # three shares, two differences to MOPD


def test_every_row_has_a_label_and_the_core_is_what_it_says():
    assert set(ROWS) == set(LABELS)
    core = {name for name, row in ROWS.items() if row.core}
    assert core == {"sft", "teachers", "mopd", "average", "task_arithmetic", "mix_rl", "off_policy"}
    assert SIZES["num_heldout"] >= 1000 and len(DOMAINS) >= 4


class FakeSeed:
    """Made models are their value; accuracy on the validation split is best at 0.4 and at 3e-4."""

    quick = False

    def __init__(self, folder, seed=0):
        self.folder, self.seed, self.asked, self.used = folder / f"seed{seed}", seed, [], set()

    def aside(self):
        return Seed.aside(self)

    def merged(self, coefficient):
        return str(coefficient)

    def student(self, lr):
        return str(lr)

    def evaluate(self, models, split):
        self.asked.append(split)
        value = float(models["math"])
        best = 0.4 if value > 0.1 else 3e-4
        return Scores(sampled={d: np.array([[1 - abs(value - best)]]) for d in DOMAINS}, greedy=None)


def test_values_are_chosen_on_the_validation_split_and_remembered(tmp_path):
    first, second = FakeSeed(tmp_path, 0), FakeSeed(tmp_path, 1)
    assert choose(ROWS["mopd"], first) == 3e-4
    assert set(first.asked) == {"valid"} and len(first.asked) == len(ROWS["mopd"].grid)
    assert choose(ROWS["mopd"], second) == choose(ROWS["round2"], second) == 3e-4 and second.asked == []
    assert choose(ROWS["task_arithmetic"], second) == 0.4
    assert len(second.asked) == len(ROWS["task_arithmetic"].grid), "with every seed"
    written = json.loads((tmp_path / "chosen.json").read_text())
    assert set(written) == {"mopd", "task_arithmetic/seed1"} and written["mopd"]["seed"] == 0
    assert choose(ROWS["sft"], first) is None


def test_teachers_learn_at_the_rate_that_was_chosen(tmp_path):
    s = Seed(tmp_path, 3, quick=False)
    assert s.teacher_lr == s.cfg.rl.learner.lr
    (tmp_path / "chosen.json").write_text(json.dumps({"teachers": {"value": 4e-4}}))
    assert s.teacher_lr == 4e-4


def test_a_changed_tree_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(mopd, "code_revision", lambda apart_from: "abc-dirty")
    args = argparse.Namespace(seeds=[0], work=tmp_path, quick=False, jobs=2, job=False)
    with pytest.raises(SystemExit, match="commit or stash"):
        mopd.run(args, [ROWS["sft"]], tmp_path / "mopd.jsonl")
    assert not (tmp_path / "seed0").exists()


def test_finished_cells_start_nothing(tmp_path, capsys):
    results = tmp_path / "mopd.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    args = argparse.Namespace(seeds=[0, 1], work=tmp_path, quick=False, jobs=2, job=False)
    mopd.run(args, [ROWS[name] for name in ("sft", "teachers", "mopd")], results)
    assert "6 cells, 0 to do" in capsys.readouterr().out
    assert len(results.read_text().splitlines()) == len(LINES)


def test_runs_of_a_seed(tmp_path, monkeypatch):
    """Which run starts from which model with which budget; the runs themselves are replaced by their names."""
    s = Seed(tmp_path, 3, quick=False)
    seen = {}

    class Module:
        @staticmethod
        def run(cfg, engines):
            seen[cfg.name] = cfg
            return f"/model of {cfg.name}"

    for name in ("sft", "rl", "mopd"):
        monkeypatch.setattr(mopd_models, name, Module)
    monkeypatch.setattr(mopd_models.pipeline, "fingerprint", lambda path, *key: path)
    monkeypatch.setattr(s, "answer_lengths", lambda: dict(zip(DOMAINS, (60.0, 12.0, 16.0, 4.0), strict=True)))
    s.mixed(2e-4, "mix_rl", tokens=128 * 23.0 * 50)
    mixed = seen["seed3/mix_rl-0.0002"]
    assert mixed.domain is None and mixed.algorithm.steps == 50 and mixed.learner.lr == 2e-4
    assert mixed.model.path == "/model of seed3/sft" and mixed.seed == 3
    assert s.used == {"sft", "mix_rl-0.0002"}

    s.mixed(2e-4, "mix_rl_half_batch", tokens=128 * 23.0 * 50, batch=0.5)
    halved = seen["seed3/mix_rl_half_batch-0.0002"].algorithm
    assert (halved.steps, halved.prompts_per_step) == (100, mixed.algorithm.prompts_per_step // 2)

    s.cascade(1e-4, tokens=128 * 92.0 * 7)
    runs = [seen[f"seed3/cascade-0.0001/{d}"] for d in DOMAINS]
    assert [r.domain for r in runs] == DOMAINS and {r.algorithm.steps for r in runs} == {7}
    assert [r.model.path for r in runs[1:]] == [f"/model of seed3/cascade-0.0001/{d}" for d in DOMAINS[:-1]]

    models = s.oracle(3e-4)
    for domain, path in models.items():
        run = seen[f"seed3/oracle-0.0003/{domain}"]
        assert path == f"/model of {run.name}" and run.domain == domain and list(run.teachers) == [domain]
        assert run.algorithm.prompts_per_step * len(DOMAINS) == s.cfg.mopd.algorithm.prompts_per_step

    for domain in DOMAINS:
        (tmp_path / f"{domain}.jsonl").write_text("{}\n" * 480)
    monkeypatch.setattr(
        mopd_models, "sample", type("M", (), {"run": lambda cfg, _: str(tmp_path / f"{cfg.domain}.jsonl")})
    )
    s.off_policy(1e-3)
    s.off_policy(1e-3, seq_mean=True)
    plain, own = (seen[f"seed3/off_policy-{kind}-0.001"] for kind in ("all", "seq_mean"))
    assert plain.algorithm.aggregation == "token_mean" and own.algorithm.aggregation == "seq_mean"
    assert plain.data == own.data and plain.algorithm.steps == own.algorithm.steps == 2 * 4 * 480 // 96
    assert own.learner.expert_bias_rate == own.learner.aux_loss_coef == 0.0

    s.student(3e-4, "mopd.algorithm.aggregation=token_mean")
    assert seen["seed3/mopd-token_mean-0.0003"].algorithm.aggregation == "token_mean"
    s.second_round(3e-4)
    second = seen["seed3/round2/mopd-0.0003"]
    assert second.model.path == "/model of seed3/mopd-0.0003"
    assert second.teachers["math"].path == "/model of seed3/round2/teachers/math-0.0002"
    assert seen["seed3/round2/teachers/math-0.0002"].model.path == "/model of seed3/mopd-0.0003"
    assert {seen[f"seed3/teachers/{d}-0.0002"].algorithm.steps for d in DOMAINS} == {80}
    with s.aside():
        s.sft()
        assert s.used == {"sft"}
    assert "round2/mopd-0.0003" in s.used
