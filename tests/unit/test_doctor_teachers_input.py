"""`posttrain doctor teachers` as far as it goes without engines: bad input, dry runs, teachers that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.cli import main
from tests.tiny_models import tiny_dense, tiny_teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_teacher(tiny_dense(tmp_path / "student", num_layers=1), tmp_path / "math")
    row = {"messages": [{"role": "user", "content": "1+1=?"}], "domain": "math"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def doctor(*overrides: str) -> int:
    room = ["rollout.max_model_len=64", "teacher_check.max_new_tokens=16"]
    return main(["doctor", "teachers", "model.path=student", "data.path=prompts.jsonl", *room, *overrides])


def rows(place: Path) -> dict[str, str]:
    content = json.loads((place / "runs/doctor/preflight.json").read_text())
    return {row["gate"]: row["verdict"] for row in content}


def test_dry_run_shows_what_files_tell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("teachers.math.path=math", "dry_run=true") == 0
    out = capsys.readouterr().out
    assert "cosine 1.000" in out and "were not measured: dry run" in out and "0 red" in out
    assert set(rows(place).values()) == {"ok"}


def test_a_red_line_can_be_accepted_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("teachers.math.path=student", "dry_run=true") == 1
    assert "teacher_workers.accept=[self_teacher]" in capsys.readouterr().out
    assert doctor("teachers.math.path=student", "dry_run=true", "teacher_workers.accept=[self_teacher]") == 0
    assert rows(place)["self_teacher"] == "accepted"
    assert doctor("teachers.math.path=student", "dry_run=true", "teachers.math.self=true") == 0
    assert rows(place)["self_teacher"] == "ok"


def test_a_default_teacher_of_one_domain(place: Path) -> None:
    """The other domain's teacher counts for nothing."""
    row = {"messages": [{"role": "user", "content": "x=1"}], "domain": "code"}
    with (place / "prompts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    one = ["teachers.default.path=math", "teachers.code.path=gone", "dry_run=true"]
    assert doctor(*one, "domain=math") == 0
    assert set(rows(place).values()) == {"ok"}
    assert doctor(*one) == 1
    assert rows(place)["files"] == "ok" and doctor(*one, "~teachers.code") == 0


def test_nothing_starts_for_a_teacher_that_cannot_be_loaded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "math" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert doctor("teachers.math.path=math") == 1
    out = capsys.readouterr().out
    assert "red files: teachers.math.path='math': " in out and "mend what is red" in out
    assert rows(place) == {"files": "red"}


def test_the_folder_of_a_run_is_not_its_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run").mkdir()
    (place / "math").rename(place / "run" / "model")
    assert doctor("teachers.math.path=run", "dry_run=true") == 1
    assert "config.json is missing; give a Hugging Face checkpoint directory" in (
        out := capsys.readouterr().out
    )
    assert "did you mean 'run/model'?" in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "teachers={}: give a teacher for each domain"),
        (["teachers.law.path=math"], "teachers.law.path='math': no prompt belongs to domain 'law' (there are math)"),
        (["teachers.default.path=math", "domain=math", "teacher_workers.vllm.seed=1"], "teacher_workers.vllm={'seed': 1}: no teacher has backend=vllm"),
        (["teachers.math.path=math", "teacher_workers.accept=[all]"], "teacher_workers.accept='all': no such gate"),
        (["teachers.math.path=math", "teacher_check.max_new_tokens=64"], "teacher_check.max_new_tokens=64: leaves no room for a prompt in rollout.max_model_len=64"),
        (["teachers.math.path=math", "teacher_check.max_new_tokens=99", "rollout.max_new_tokens=70"], "rollout.max_new_tokens=70: leaves no room"),
        (["teachers.math.path=math", "teacher_check.num_samples=0"], "teacher_check.num_samples=0: give 1 or more"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    assert doctor(*overrides) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {expected}") and err.count("\n") == 1
