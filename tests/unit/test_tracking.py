"""Metrics, events, wandb and console: every step once, whatever was killed, and no prompt or network."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from posttrain.config import TrackingConfig, UserError, WandbMode
from posttrain.tracking import Tracker
from posttrain.tracking import console as console_module
from posttrain.tracking.console import ConsoleDisplay, format_s
from posttrain.tracking.jsonl import EventsFile, MetricsFile, read_jsonl

QUIET = TrackingConfig(wandb=WandbMode.disabled, console=False)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2):
        file.write(step, {"loss": 0.5 * step, "nan": float("nan"), "inf": float("inf")})
        assert steps(path) == list(range(1, step + 1))
    row = json.loads(path.read_text().splitlines()[1])
    assert (
        row["loss"] == 1.0
        and row["nan"] is None
        and row["inf"] is None
        and abs(row["time"] - time.time()) < 60
    )
    with pytest.raises(AssertionError, match="step 2 after step 2"):
        file.write(2, {})


def test_resume_cuts_back_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.write(step, {"attempt": 1})
    file.close()
    with path.open("a") as stream:
        stream.write('{"step": 8, "ti')  # killed in the middle of a line
    file = MetricsFile(path, resume_step=4)
    assert steps(path) == [1, 2, 3, 4]
    file.write(5, {"attempt": 2})
    rows = read_jsonl(path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]
    assert list(tmp_path.iterdir()) == [path]


def test_step_0_is_an_evaluation_before_the_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(4):
        file.write(step, {})
    assert steps(path) == [0, 1, 2, 3]
    MetricsFile(path, resume_step=2)
    assert steps(path) == [0, 1, 2]
    MetricsFile(path).write(0, {})
    assert steps(path) == [0], "without a checkpoint nothing is kept"


def test_half_line_that_is_json_by_chance_is_dropped_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    MetricsFile(path, resume_step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_new_run_in_a_folder_without_checkpoint_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path)
    assert path.read_text() == ""


def test_damage_in_the_middle_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        MetricsFile(path, resume_step=3)
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


def test_events_survive_resumption_but_half_lines_do_not(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventsFile(path).write(
        "restart", {"worker": np.int64(3), "gap": float("nan"), "names": {"a"}, "path": tmp_path}
    )
    with path.open("a") as stream:
        stream.write('{"kind": "al')
    EventsFile(path).write("alarm", {"values": np.array([1.5, 2.5])})
    first, second = read_jsonl(path)
    assert first["kind"] == "restart" and first["worker"] == 3 and first["gap"] == "nan"
    assert first["names"] == ["a"] and first["path"] == str(tmp_path)
    assert second["kind"] == "alarm" and second["values"] == [1.5, 2.5]


def test_tracker_names_what_is_not_finite(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", QUIET, "run", {}, total_steps=1) as tracker:
        tracker.log(1, {"loss": np.float32("nan"), "lr": np.float64(1e-3), "num_tokens": 7})
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["loss"] is None and row["lr"] == 1e-3 and row["num_tokens"] == 7
    event = read_jsonl(tmp_path / "run" / "events.jsonl")[0]
    assert event["kind"] == "not_finite" and event["step"] == 1 and event["metrics"] == {"loss": "nan"}


WRITER = """
import sys, time
from posttrain.config import TrackingConfig, WandbMode
from posttrain.tracking import Tracker
tracker = Tracker(sys.argv[1], TrackingConfig(wandb=WandbMode.disabled, console=False), "run", {}, 10**6, int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, 10**6):
    tracker.log(step, {"x": step})
    print(step, flush=True)
    time.sleep(0.001)
"""


def test_killed_writer_loses_no_reported_step(tmp_path: Path) -> None:
    resume_step = 0
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(resume_step)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        reported = [int(writer.stdout.readline()) for _ in range(30)]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert steps(tmp_path / "metrics.jsonl")[: reported[-1]] == list(range(1, reported[-1] + 1))
        resume_step = reported[-1] - 5  # the last checkpoint
    MetricsFile(tmp_path / "metrics.jsonl", resume_step)
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, resume_step + 1))


def test_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real wandb, with no key, no home and no terminal: two segments of one run, all inside the run folder."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    cfg = TrackingConfig(console=False)
    for resume_step in (0, 2):
        started = time.monotonic()
        tracker = Tracker(
            folder, cfg, "tiny", {"learner": {"lr": 1e-3}}, total_steps=4, resume_step=resume_step
        )
        assert time.monotonic() - started < 10, "a loaded machine may need more than the usual 2 s, not 10"
        for step in (resume_step + 1, resume_step + 2):
            tracker.log(step, {"loss": 1 / step})
        tracker.finish()
    run_id = (folder / "wandb_id").read_text().strip()
    segments = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(segments) == 2
    for segment in segments:
        assert run_id in segment.name
        assert (segment / f"run-{run_id}.wandb").stat().st_size > 0
    written = b"".join((segment / f"run-{run_id}.wandb").read_bytes() for segment in segments)
    assert b"loss" in written and b"tiny" in written
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert steps(folder / "metrics.jsonl") == [1, 2, 3, 4]


def test_wandb_online_without_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\n"
        "from posttrain.config import TrackingConfig, UserError, WandbMode\n"
        "from posttrain.tracking import Tracker\n"
        "try:\n"
        "    Tracker(sys.argv[1], TrackingConfig(wandb=WandbMode.online, console=False), 'r', {}, 1)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment["HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.startswith("tracking.wandb='online': no API key; run `wandb login`"), done.stderr


def test_no_wandb_import_when_disabled(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from posttrain.config import TrackingConfig, WandbMode\n"
        "from posttrain.tracking import Tracker\n"
        "Tracker(sys.argv[1], TrackingConfig(wandb=WandbMode.disabled), 'r', {}, 1).finish()\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, total: int, **options: object) -> tuple[ConsoleDisplay, io.StringIO]:
    out = io.StringIO()
    return ConsoleDisplay("mopd", total, console=Console(file=out, width=120), clock=clock, **options), out  # type: ignore[arg-type]


def test_plain_lines_are_sparse_and_complete() -> None:
    clock = Clock()
    display, out = plain(clock, 60)
    for step in range(1, 61):
        clock.now += 1.0
        display.log(step, {"teacher/mean_abs": 0.25, "loss": 1.5, "num_tokens": 2000, "lr": 1e-3})
    display.message("alarm: [red]not markup[/red]")
    display.finish()
    lines = out.getvalue().splitlines()
    assert lines[0] == "mopd: 60 steps"
    assert lines[1] == "mopd  step 1/60  teacher/mean_abs 0.25  loss 1.5  2,000 tokens/s"
    assert lines[2] == "mopd  step 11/60  teacher/mean_abs 0.25  loss 1.5  2,000 tokens/s  49 s left"
    assert lines[-3].startswith("mopd  step 60/60") and "left" not in lines[-3]
    assert lines[-2:] == ["alarm: [red]not markup[/red]", "mopd: step 60/60 after 1:00 min"]
    assert len(lines) == 1 + 6 + 1 + 2


def test_resumed_display_counts_time_from_its_own_steps() -> None:
    clock = Clock()
    display, out = plain(clock, 100, first_step=90, headline=["reward/math", "absent"])
    clock.now = 500.0  # engines start
    for step in (91, 92):
        clock.now += 10.0
        display.log(step, {"reward/math": 0.5, "loss": 1.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "mopd: 100 steps, resumed after step 90"
    assert lines[2] == "mopd  step 92/100  reward/math 0.5  1:20 min left"


def test_live_display_follows_and_leaves_its_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "REFRESH_PER_S", 1.0)
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system=None, legacy_windows=False)
    for stage in ("sft", "mopd"):
        display = ConsoleDisplay(stage, 2, console=console)
        display.status("sampling")
        display.log(1, {"loss": 0.125, "tokens_per_s": 1234.0})
        display.log(2, {"loss": 0.0625, "tokens_per_s": 1234.0})
        display.finish()
    last = [line for line in out.getvalue().splitlines() if "2/2" in line]
    for stage in ("sft", "mopd"):
        assert any(f"✓ {stage}" in line and "loss 0.0625 · 1,234 tokens/s" in line for line in last)


def test_durations() -> None:
    assert [format_s(s) for s in (0.4, 59.4, 59.6, 185, 7620)] == [
        "0 s",
        "59 s",
        "1:00 min",
        "3:05 min",
        "2:07 h",
    ]
