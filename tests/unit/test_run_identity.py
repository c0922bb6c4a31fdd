"""Whose run folder it is: runs that may go on there, that are refused, that are moved aside, and stages that keep their steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain import run_folder
from posttrain.config import UserError
from posttrain.run_folder import RunFolder
from tests.unit.run_folders import contents, write_weights


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("rl", "seed=0", r"the folder of another run \(`posttrain sft`\)"),
        (
            "sft",
            "model.path=/other",
            r"model\.path='/other': .* is the folder of a run with model\.path='/m'",
        ),
        (
            "sft",
            "data.path=/e.jsonl",
            r"data\.path='/e\.jsonl': .* is the folder of a run with data\.path='/d\.jsonl'",
        ),
        ("sft", "seed=3", r"seed=3: "),
    ],
)
def test_the_folder_of_another_run_is_refused_and_untouched(make, command, override, expected):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {})
    before = contents(folder.path)
    with pytest.raises(UserError, match=expected) as error:
        RunFolder.open(make(command, override))
    assert "fresh=true" in str(error.value) and "\n" not in str(error.value)
    assert contents(folder.path) == before


def test_other_settings_may_change_on_resume(make, capsys):
    RunFolder.open(make()).save(1, write_weights("one"), {})
    folder = RunFolder.open(make("sft", "learner.lr=1e-3", "algorithm.steps=500"))
    assert folder.latest().step == 1
    assert "learner.lr" in capsys.readouterr().out


def test_fresh_moves_the_old_run_aside_but_not_what_it_reads(make, tmp_path, capsys):
    inputs = tmp_path / "run" / "inputs"
    inputs.mkdir(parents=True)
    (inputs / "d.jsonl").write_text("{}")
    own = f"data.path={inputs / 'd.jsonl'}"
    RunFolder.open(make("sft", own)).save(1, write_weights("one"), {})
    folder = RunFolder.open(make("rl", own, "fresh=true"))
    (old,) = tmp_path.glob("run.old-*")
    assert (old / "checkpoints" / "step_1" / "state.json").exists() and (old / "config.yaml").exists()
    assert (inputs / "d.jsonl").exists() and folder.latest() is None
    assert str(old) in capsys.readouterr().out
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["fresh"] is False


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_start_that_ended_before_its_first_step_binds_nobody(make, tmp_path, command, capsys):
    """The keys that it was refused for can be mended without fresh=true."""
    folder = RunFolder.open(make())
    for name in ("metrics.jsonl", "events.jsonl", "teachers.json"):
        (folder.path / name).write_text('{"step": 0}\n' if name == "metrics.jsonl" else "{}\n")
    mended = make(command, "model.path=/other")
    why = "is the folder of " + (
        "a run with model.path='/m'" if command == "sft" else "another run (`posttrain sft`)"
    )
    assert f"{why}, which ended before its first step and is moved aside" in run_folder.check_folder(mended)
    assert RunFolder.open(mended).read_json("teachers.json") is None
    (old,) = tmp_path.glob("run.old-*")
    said = capsys.readouterr().out
    assert (old / "teachers.json").exists() and str(old) in said and why in said
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["model"]["path"] == "/other"
    RunFolder.open(make()).close()
    assert len(list(tmp_path.glob("run.old-*"))) == 2, "two in one second"


KEEPERS = {
    "metrics.jsonl": '{"step": 0}\n{"step": 1}\n',
    "expert_load.jsonl": '{"loss": 1}\n',
    "notes.txt": "mine",
    "samples.jsonl": "",
    "b/config.yaml": "{}",  # a run of another name, perhaps alive
    "wandb/manifest.json": "{}",
}


@pytest.mark.parametrize("file", KEEPERS)
def test_a_run_with_a_step_or_a_file_of_the_user_is_not_moved(make, tmp_path, monkeypatch, file):
    folder = RunFolder.open(make())
    (folder.path / file).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / file).write_text(KEEPERS[file])
    before = contents(folder.path)
    for ask in (run_folder.check_folder, RunFolder.open):
        with pytest.raises(
            UserError, match=r"model\.path='/other': .* is the folder of a run with model\.path='/m'"
        ):
            ask(make("sft", "model.path=/other"))
    monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg: {"model.path": "new"})
    folder.write_json(
        "manifest.json", folder.read_json("manifest.json") | {"fingerprints": {"model.path": "old"}}
    )
    with pytest.raises(UserError, match=r"model\.path='/m': its weights changed since this run began"):
        RunFolder.open(make())
    assert contents(folder.path).keys() == before.keys() and not list(tmp_path.glob("run.old-*"))


def test_a_move_that_was_cut_off_is_gone_on_with(make, tmp_path, monkeypatch):
    """What says whose folder it is goes last: no later start takes the refused one's teachers."""
    folder = RunFolder.open(make())
    for name in ("events.jsonl", "preflight.json", "teachers.json"):
        (folder.path / name).write_text("{}")
    replace = os.replace

    def cut(source, target):
        if Path(source).name in ("config.yaml", "manifest.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(run_folder.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.open(make("sft", "model.path=/other"))
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "lock", "manifest.json"]


@pytest.mark.parametrize("command", ["sft", "rl"])
@pytest.mark.parametrize("file", ["config.yaml", "manifest.json"])
@pytest.mark.parametrize("content", ["", "mine: 1  # a remark", '{"mine": 1}', "{", "# posttrain sft\n"])
def test_what_a_user_or_an_accident_left_there_is_refused(make, tmp_path, file, content, command):
    """One line and nothing is written over, with one of the two files of a run or both."""
    path = tmp_path / "run"
    path.mkdir()
    for others in (
        {},
        {"notes.txt": "", "config.yaml": "# posttrain sft\n{}", "manifest.json": '{"command": "sft"}'},
    ):
        for name, text in (others | {file: content}).items():
            (path / name).write_text(text)
        if not others and file == "config.yaml" and content.startswith("# posttrain"):
            continue  # of a start that was killed between the two files
        if not others and file == "manifest.json":
            (path / "notes.txt").write_text("")
        before = contents(path)
        for ask in (run_folder.check_folder, RunFolder.open):
            with pytest.raises(
                UserError, match=r"^(name='run'|model\.path='/m'): .*run.*; choose another name="
            ):
                ask(make(command))
        assert contents(path) == before


def test_a_run_that_lives_below_is_not_pulled_away(make, tmp_path):
    """With fresh=true, and for a run of the name `run/wandb`."""
    for below in ("b", "wandb"):
        (tmp_path / "run" / below).mkdir(parents=True)
        holder = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'w'); f.write('77'); f.flush();"
             " fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()",
             str(tmp_path / "run" / below / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout.readline() == b"held\n"
        RunFolder.open(make()).close() if below == "b" else None
        for ask in (run_folder.check_folder, RunFolder.open):
            with pytest.raises(
                UserError, match=rf"process 77 is working in .*run/{below}, and .* would be moved"
            ):
                ask(make("sft", "fresh=true"))
        holder.communicate(b"")
        run_folder._locks.pop(tmp_path / "run").close()
    RunFolder.open(make("sft", "fresh=true"))


def test_links(make, tmp_path):
    """A folder on another disk is moved aside there; what is read through a link is not moved or written over."""
    disk = tmp_path / "disk"
    (disk / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(disk / "run")
    RunFolder.open(make()).close()
    RunFolder.open(make("sft", "seed=1")).close()
    assert len(list(disk.glob("run.old-*"))) == 1 and not list(tmp_path.glob("run.old-*"))
    (disk / "run" / "chat.jsonl").write_text("{}")
    (tmp_path / "chat.jsonl").symlink_to(disk / "run" / "chat.jsonl")
    RunFolder.open(make("sft", f"data.path={tmp_path}/chat.jsonl", "fresh=true"))
    assert (tmp_path / "chat.jsonl").exists()
    (disk / "run" / "data").mkdir()
    (tmp_path / "far.jsonl").write_text("{}")
    (disk / "run" / "data" / "near.jsonl").symlink_to(tmp_path / "far.jsonl")
    RunFolder.open(make("sft", f"data.path={tmp_path}/run/data/near.jsonl", "fresh=true"))
    assert (tmp_path / "run" / "data" / "near.jsonl").exists()
    (tmp_path / "model").symlink_to(disk / "run" / "model")
    with pytest.raises(UserError, match="this run would write its own model there"):
        RunFolder.open(make("sft", f"model.path={tmp_path}/model", "fresh=true"))


def test_weights_that_were_mended_after_a_refused_start(make, tmp_path, monkeypatch):
    for weights in ("torn", "whole"):
        monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg, weights=weights: {"model.path": weights})
        folder = RunFolder.open(make())
    assert folder.read_json("manifest.json")["fingerprints"] == {"model.path": "whole"}
    assert len(list(tmp_path.glob("run.old-*"))) == 1


def test_files_that_a_run_would_write_but_no_config(make, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds model but no config\.yaml"):
        RunFolder.open(make())


def test_changed_weights_are_another_run(make, monkeypatch):
    monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg: {"model.path": "aa"})
    RunFolder.open(make()).save(1, write_weights("one"), {})
    monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg: {"model.path": "bb"})
    with pytest.raises(UserError, match=r"model\.path='/m': its weights changed since this run began"):
        RunFolder.open(make())


def test_fewer_steps_than_the_newest_checkpoint_has_are_refused_with_the_way_back(make):
    folder = RunFolder.open(make("sft", "algorithm.steps=100"))
    for step in (50, 72):
        folder.save(step, write_weights(f"{step}"), {})
    folder.close()
    before = contents(folder.path)
    for ask in (run_folder.check_folder, RunFolder.open):
        with pytest.raises(
            UserError, match=r"^algorithm\.steps=60: the newest .* is of step 72; give 72 or more, or write"
        ) as e:
            ask(make("sft", "algorithm.steps=60"))
        run_folder._locks.pop(folder.path, None)
    assert f"write step_50 into {folder.path}/checkpoints/latest to go back to it" in str(e.value)
    with pytest.raises(UserError, match="none before it was kept"):
        run_folder.check_folder(make("sft", "algorithm.steps=40"))
    assert contents(folder.path) == before
    (folder.path / "checkpoints" / "latest").write_text("step_50\n")  # what the message says
    resumed = RunFolder.open(make("sft", "algorithm.steps=60"))
    assert resumed.latest().step == 50
    resumed.close()
    (folder.path / "checkpoints" / "latest").write_text("step_72\n")
    more = RunFolder.open(make("sft", "algorithm.steps=72"))
    assert more.latest().step == 72
    more.close()
    (folder.path / "finished.json").write_text(
        '{"steps": 50}'
    )  # a run that got more steps, and died after 72
    with pytest.raises(UserError, match=r"the newest checkpoint in .* is of step 72"):
        run_folder.check_folder(make("sft", "algorithm.steps=60"))
    run_folder.check_folder(make("sft", "algorithm.steps=50"))  # finished before


@pytest.fixture
def finished_pipeline(make, tmp_path):
    """A pipeline whose SFT (5 steps) and teachers (math by RL, 7; code by SFT, 4) are finished, and MOPD has begun."""
    common = ["sft_data.path=/s.jsonl", "teachers.math.train=rl", "teachers.code.train=sft"]
    common += ["teachers.given.path=/g", "teachers.same.train=none"]
    former = [
        "sft.algorithm.steps=5",
        "rl.algorithm.steps=7",
        "teachers.code.steps=4",
        "mopd.algorithm.steps=9",
    ]

    def open_(*overrides):
        return RunFolder.open(make("pipeline", *common, *former, *overrides))

    def begin(stage, steps):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "config.yaml").write_text("# posttrain rl\n{}")
        (tmp_path / "run" / stage / "metrics.jsonl").write_text('{"step": 1}\n')
        if steps:
            (tmp_path / "run" / stage / "finished.json").write_text(json.dumps({"steps": steps}))

    open_().close()
    for stage, steps in (("sft", 5), ("teachers/math", 7), ("teachers/code", 4), ("mopd", 9)):
        begin(stage, steps)
    return open_


@pytest.mark.parametrize(
    ("key", "new", "old", "stage"),
    [
        ("sft.algorithm.steps", 6, 5, "sft"),
        ("sft.algorithm.steps", 4, 5, "sft"),
        ("rl.algorithm.steps", 8, 7, "teachers/math"),
        ("teachers.math.steps", 8, 7, "teachers/math"),
        ("teachers.code.steps", 5, 4, "teachers/code"),
    ],
)
def test_a_stage_that_later_ones_were_made_from_keeps_its_steps(
    finished_pipeline, tmp_path, key, new, old, stage
):
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        finished_pipeline(f"{key}={new}")
    text = str(error.value)
    assert (
        text.startswith(f"{key}={new}: {tmp_path}/run/{stage} finished with {old} steps") and "\n" not in text
    )
    assert f"{key}={old}" in text and "another name=" in text and "fresh=true" in text
    assert contents(tmp_path) == before
    finished_pipeline(f"{key}={old}")


def test_stages_that_nothing_was_made_from_may_go_on(finished_pipeline, tmp_path):
    finished_pipeline("mopd.algorithm.steps=20")
    shutil.rmtree(tmp_path / "run" / "mopd")
    finished_pipeline("rl.algorithm.steps=20", "teachers.code.steps=20")
    with pytest.raises(UserError, match=r"sft\.algorithm\.steps=6: .* and teachers/code was trained from"):
        finished_pipeline("sft.algorithm.steps=6")
    shutil.rmtree(tmp_path / "run" / "teachers")
    finished_pipeline("sft.algorithm.steps=6")


def test_a_student_that_the_second_round_was_made_from_keeps_its_steps(finished_pipeline, tmp_path):
    finished_pipeline("rounds=2", "mopd.algorithm.steps=9")
    begun = tmp_path / "run" / "round2" / "teachers" / "math"
    begun.mkdir(parents=True)
    (begun / "config.yaml").write_text("# posttrain rl\n{}")
    (begun / "metrics.jsonl").write_text("")
    finished_pipeline("rounds=2", "mopd.algorithm.steps=20")  # it made no step
    (begun / "metrics.jsonl").write_text('{"step": 1}\n')
    found = (
        r"mopd\.algorithm\.steps=20: .*run/mopd finished with 9 steps and round2/teachers/math was trained"
    )
    with pytest.raises(UserError, match=found):
        finished_pipeline("rounds=2", "mopd.algorithm.steps=20")
    finished_pipeline("rounds=2")
    (begun / "finished.json").write_text('{"steps": 7}')
    student = tmp_path / "run" / "round2" / "mopd"
    student.mkdir()
    (student / "config.yaml").write_text("{}")
    (student / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"rl\.algorithm\.steps=8: .*run/teachers/math finished with 7 steps"):
        finished_pipeline("rounds=2", "rl.algorithm.steps=8")


def test_a_pipeline_with_other_steps_starts_over(finished_pipeline, tmp_path):
    finished_pipeline("sft.algorithm.steps=6", "fresh=true")
    assert not (tmp_path / "run" / "sft").exists()
