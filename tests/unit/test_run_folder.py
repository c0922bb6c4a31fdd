"""The run folder: what a crash leaves, resume, full and damaged disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from posttrain import disk, manifest, run_folder
from posttrain.compose import compose
from posttrain.config import UserError
from posttrain.run_folder import RunFolder, find_damage
from tests.unit.run_folders import contents, write_weights


def test_a_new_folder_has_config_and_manifest(make):
    folder = RunFolder.open(make("sft", "learner.lr=2e-5"))
    written = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert written["learner"]["lr"] == 2e-5 and written["data"]["path"] == "/d.jsonl"
    record = folder.read_json("manifest.json")
    assert record["command"] == "sft" and record["packages"]["ray"] and record["seed"] == 0
    assert folder.latest() is None and not folder.finished


def test_config_yaml_starts_the_same_run_again(make):
    cfg = make("rl", "rewards._target_=a.B", "algorithm.correction=off")
    folder = RunFolder.open(cfg)
    assert compose("rl", [], config_file=str(folder.path / "config.yaml"))[1] == cfg


def test_secrets_are_not_written(make, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret-value")
    folder = RunFolder.open(
        make(
            "rl",
            "rewards._target_=a.B",
            "rewards.url='https://u:${oc.env:JUDGE_API_KEY}@h'",
            "rewards.api_key=abc",
            "rewards.max_tokens=5",
        )
    )
    text = "".join(p.read_text() for p in folder.path.iterdir())
    assert "sk-very-secret-value" not in text and "abc" not in text
    rewards = yaml.safe_load((folder.path / "config.yaml").read_text())["rewards"]
    assert rewards == {"_target_": "a.B", "url": "<redacted>", "api_key": "<redacted>", "max_tokens": 5}
    RunFolder.open(make("rl", "rewards._target_=a.B"))  # and such a run can be resumed


def test_save_and_resume(make, capsys):
    folder = RunFolder.open(make())
    folder.save(3, write_weights("three"), {"cursor": 7})
    found = RunFolder.open(make()).latest()
    assert (found.step, found.state) == (3, {"cursor": 7})
    assert (found.folder / "rank_0" / "weights.bin").read_text() == "three"
    assert "resuming after step 3" in capsys.readouterr().out
    assert (folder.path / "checkpoints" / "latest").read_text() == "step_3\n"
    hashes = json.loads((found.folder / "manifest.json").read_text())
    assert set(hashes) == {"rank_0/weights.bin", "state.json"}


def test_only_the_last_checkpoints_are_kept(make):
    folder = RunFolder.open(make("sft", "checkpoint.keep=2"))
    for step in (2, 4, 10):
        folder.save(step, write_weights(str(step)), {})
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == ["latest", "step_10", "step_4"]


def test_a_crash_while_writing_leaves_the_former_checkpoint(make):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {"cursor": 1})

    def die(aside: Path) -> None:
        write_weights("half")(aside)
        raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"):
        folder.save(2, die, {"cursor": 2})
    assert folder.latest().step == 1
    assert not list((folder.path / "checkpoints").glob(".tmp*"))


def test_a_checkpoint_that_latest_does_not_name_is_not_used(make):
    """The process died between the rename and `latest`: metrics of that step may be missing."""
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {})
    folder.save(2, write_weights("two"), {})
    (folder.path / "checkpoints" / "latest").write_text("step_1\n")
    assert folder.latest().step == 1


def test_latest_changes_last(make, monkeypatch):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {})
    real, seen = os.replace, []

    def replace(source, target):
        seen.append(Path(target).name)
        if Path(target).name == "step_2":
            assert find_damage(Path(source)) is None, "complete before the rename"
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    folder.save(2, write_weights("two"), {})
    assert seen == ["state.json", "manifest.json", "step_2", "latest"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_former_used(make, damage, capsys):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {})
    folder.save(2, write_weights("two"), {})
    file = folder.path / "checkpoints" / "step_2" / "rank_0" / "weights.bin"
    if damage == "flip":
        file.write_text("tvo")
    elif damage == "truncate":
        file.write_text("t")
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent.parent / "manifest.json").write_text("{")
    assert folder.latest().step == 1
    assert "step_2: " in capsys.readouterr().out


def test_no_whole_checkpoint_is_an_error(make):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {})
    (folder.path / "checkpoints" / "step_1" / "state.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole; start over with fresh=true"):
        folder.latest()


@pytest.mark.parametrize("how", ["errno", "worker text", "torch"])
def test_full_disk_keeps_the_last_checkpoint(make, how, monkeypatch):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {"cursor": 1})

    def fill(aside: Path) -> None:
        write_weights("half")(aside)
        if how == "errno":
            raise OSError(errno.ENOSPC, "No space left on device")
        if how == "worker text":
            raise ValueError("in a worker") from RuntimeError("[Errno 28] No space left on device: 'x'")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    if how == "torch":
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(UserError, match=r"disk is full, step 2 was not saved; the last checkpoint is whole"):
        folder.save(2, fill, {"cursor": 2})
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == ["latest", "step_1"]
    assert folder.latest().state == {"cursor": 1}


def test_full_disk_at_the_pointer(make, monkeypatch):
    folder = RunFolder.open(make())
    folder.save(1, write_weights("one"), {})
    real = disk.write_atomic

    def write(file, text):
        if file.name == "latest":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, text)

    monkeypatch.setattr(disk, "write_atomic", write)
    with pytest.raises(UserError, match="disk is full"):
        folder.save(2, write_weights("two"), {})
    assert folder.latest().step == 1


def test_a_run_does_not_overwrite_the_model_it_reads(make, tmp_path):
    with pytest.raises(UserError, match=r"model\.path=.*: this run would write its own model there"):
        RunFolder.open(make("sft", f"model.path={tmp_path / 'run' / 'model'}"))


@pytest.mark.parametrize("name", ["../x", "/abs", ""])
def test_names_stay_below_runs_dir(make, name):
    with pytest.raises(UserError, match="give a plain name"):
        RunFolder.open(make("sft", f"name='{name}'"))


def test_runs_dir_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runs_dir=.* cannot be written"):
        RunFolder.open(make("sft", f"runs_dir={tmp_path / 'file'}"))


def test_the_plan_says_where_a_run_would_start(make):
    def where(*overrides):
        return run_folder.check_folder(make("sft", "algorithm.steps=100", *overrides)).partition(": ")[2]

    assert where() == "would begin" and where("fresh=true") == "would begin (fresh=true)"
    folder = RunFolder.open(make("sft", "algorithm.steps=100"))
    assert where() == "would go on; it has no checkpoint"
    folder.save(50, write_weights("50"), {})
    assert where() == "would resume after step 50"
    assert where("fresh=true") == "would begin, what is there is moved aside (fresh=true)"
    folder.finish()
    assert where() == "finished before, nothing to do"
    assert where("algorithm.steps=120") == "would resume after step 50"


def test_finished_and_more_steps(make):
    folder = RunFolder.open(make("sft", "algorithm.steps=5"))
    folder.finish()
    assert RunFolder.open(make("sft", "algorithm.steps=5")).finished
    assert not RunFolder.open(make("sft", "algorithm.steps=9")).finished


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("sft", ()),
        ("rl", ("rewards._target_=a.B",)),
        ("mopd", ("teachers.math.path=/t",)),
        ("sample", ("domain=math",)),
    ],
)
def test_a_finished_run_is_let_go_of(make, command, overrides):
    """A driver that only looks at a finished run keeps no other process from it."""
    cfg = make(command, *overrides)
    RunFolder.open(cfg).finish()
    made = import_module(f"posttrain.runs.{command}").run(cfg)
    assert Path(made).name in ("model", "samples.jsonl") and not run_folder._locks


def test_a_finished_run_keeps_its_record(make, capsys):
    RunFolder.open(make("sft", "algorithm.steps=5", "learner.lr=2e-5")).finish()
    before = contents(Path(make().runs_dir) / "run")
    folder = RunFolder.open(make("sft", "algorithm.steps=5", "learner.lr=3e-5"))
    assert folder.finished and contents(folder.path) == before
    out = capsys.readouterr().out
    assert "has no effect: learner.lr 2e-05 -> 3e-05; give another name=" in out and out.count("\n") == 1
    RunFolder.open(make("sft", "algorithm.steps=5", "learner.lr=2e-5"))
    assert contents(folder.path) == before and capsys.readouterr().out == ""
    RunFolder.open(make("sft", "algorithm.steps=7", "learner.lr=3e-5"))
    written = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert written["learner"]["lr"] == 3e-5 and "no effect" not in capsys.readouterr().out


def test_manifest_names_what_the_run_was_made_from(make, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg: {"model.path": "print of " + cfg.model.path})
    former = RunFolder.open(make("sft"))
    former.model.mkdir()
    folder = RunFolder.open(make("rl", "name=next", f"model.path={former.model}"))
    lineage = folder.read_json("manifest.json")["lineage"]
    assert lineage == {
        "print of /m": {"path": "/m", "stage": None, "trained_from": {}},
        f"print of {former.model}": {
            "path": str(former.model),
            "stage": "sft",
            "trained_from": {"model.path": "print of /m"},
        },
    }


def test_json_files(make):
    folder = RunFolder.open(make())
    folder.write_json("eval/a.json", {"x": [1, 2]})
    assert folder.read_json("eval/a.json") == {"x": [1, 2]} and folder.read_json("none.json") is None


HOLD = """
import sys, time
from posttrain import run_folder
from posttrain.compose import compose
run_folder._fingerprints = lambda cfg: {}
run_folder.RunFolder.open(compose("sft", sys.argv[1:])[1])
print("open", flush=True)
time.sleep(60)
"""


def test_two_drivers_cannot_share_a_folder_and_a_killed_one_frees_it(make, tmp_path):
    arguments = ["model.path=/m", "data.path=/d.jsonl", f"runs_dir={tmp_path}", "name=run"]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=rf"name='run': process {holder.pid} is working in"):
            RunFolder.open(make())
    finally:
        holder.kill()
        holder.wait()
    RunFolder.open(make())


def test_manifest_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert manifest.code_revision() is None
