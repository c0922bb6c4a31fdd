"""The command line: help, exit codes, what an error looks like, dry run. No engine starts here."""

from __future__ import annotations

import errno
import subprocess
import sys
import time

import pytest
import ray.exceptions

from posttrain import cli
from posttrain.cli import main, user_problem
from posttrain.config import RUNS, UserError


@pytest.mark.parametrize("command", [None, *RUNS])
def test_help_has_words_and_examples(command, capsys):
    assert main([*([command] if command else []), "--help"]) == 0
    text = capsys.readouterr().out
    assert "posttrain" in text and "model.path=" in text
    if command:
        assert "Example" in text and ("Groups:" in text) is (command not in ("merge", "sample"))


def test_help_lists_experiments_where_they_compose(capsys):
    for command in RUNS:
        main([command, "--help"])
        assert ("experiment=tiny" in capsys.readouterr().out) is (command == "pipeline")


def test_help_is_fast_and_imports_no_engine():
    code = (
        "import sys, posttrain.cli as c; c.main(['rl', '--help']);"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    begin = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("[]")
    assert time.perf_counter() - begin < 10  # about 0.5 s on a quiet machine


def test_version_and_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("posttrain 0.")
    assert main([]) == 2


def test_unknown_command_and_option(capsys):
    assert main(["piplne", "x=1"]) == 2
    assert capsys.readouterr().err == "error: piplne: no such command; did you mean pipeline?\n"
    assert main(["sft", "--lr", "3"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: unrecognized arguments: --lr") and err.count("\n") == 1


def test_cfg_job_prints_the_config_and_starts_nothing(capsys, tmp_path):
    assert main(["rl", "--cfg", "job", "model.path=/m", f"runs_dir={tmp_path}", "learner.lr=2e-5"]) == 0
    out = capsys.readouterr().out
    assert "lr: 2.0e-05" in out or "lr: 2e-05" in out
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_shows_what_is_missing(capsys):
    assert main(["rl", "--cfg", "job"]) == 2
    captured = capsys.readouterr()
    assert "path: ???" in captured.out
    assert captured.err.startswith("error: model.path is missing")


@pytest.mark.parametrize("debug", [False, True])
def test_user_error_is_one_line_and_traceback_only_with_debug(debug, capsys):
    assert main(["sft", "model.path=/nowhere", *(["--debug"] if debug else [])]) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) is debug
    assert err.splitlines()[-1].startswith("error: model.path='/nowhere': ")
    if not debug:
        assert err.count("\n") == 1


def run_with(monkeypatch, error: BaseException) -> int:
    def start(command, cfg):
        raise error

    monkeypatch.setattr(cli, "_start", start)
    return main(["sft", "model.path=/m", "fresh=true"])


def test_defect_has_a_traceback_and_exit_code_1(monkeypatch, capsys):
    assert run_with(monkeypatch, ZeroDivisionError("boom")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_says_how_to_resume(monkeypatch, capsys):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    err = capsys.readouterr().err
    assert "posttrain sft model.path=/m\n" in err  # without fresh=true, which would start over
    assert "Traceback" not in err


def test_full_disk_is_a_line(monkeypatch, capsys):
    assert run_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/runs/x")) == 2
    assert capsys.readouterr().err.startswith("error: /runs/x: the disk is full")


def test_user_error_of_a_ray_worker_is_found():
    cause = UserError("learner.lr=0: give a positive learning rate")
    task = ray.exceptions.RayTaskError("f", "Traceback ...\nposttrain.config.UserError: x", cause)
    assert user_problem(task) == str(cause)
    assert user_problem(task.as_instanceof_cause()) == str(cause)
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = task
    assert user_problem(wrapped) == str(cause)
    assert user_problem(ray.exceptions.RayTaskError("f", "Traceback", ValueError("x"))) is None


def test_user_error_in_an_actors_start_is_found():
    task = ray.exceptions.RayTaskError(
        "A.__init__", "Traceback\nposttrain.config.UserError: a=1: b", UserError("a=1: b")
    )
    task._actor_id = "00"
    assert user_problem(ray.exceptions.ActorDiedError(task)) == "a=1: b"


def test_modules_of_the_working_directory_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    cli._prepare_process()
    assert sys.path[0] == str(tmp_path)


def test_users_own_environment_settings_stay(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cli._prepare_process()
    import os

    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG" and "HF_HUB_OFFLINE" not in os.environ
