"""The SFT loop and its monitor: warn, save, stop and skip, on a learner that answers with planted metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain.runs.sft as sft
from posttrain.config import (
    AlarmAction,
    CheckpointConfig,
    SFTAlgorithm,
    SFTRun,
    TrackingConfig,
    UserError,
    WandbMode,
)
from posttrain.monitor import MAX_SKIPPED
from posttrain.records import LossSettings, SampleRef, TrainingSample
from posttrain.run_folder import Checkpoint
from posttrain.tracking import Tracker
from posttrain.tracking.jsonl import read_jsonl

STEPS = 60
BAD = 40  # step of the planted trouble


class FakeLearner:
    """Answers as the real one: a batch above ``max_loss`` or without a finite gradient is left out."""

    def __init__(self, losses: Callable[[int], float], norms: Callable[[int], float]) -> None:
        self.losses, self.norms = losses, norms
        self.updated: list[int] = []

    def train_step(self, samples: list[SampleRef], loss: LossSettings, step: int) -> dict[str, float]:
        value, norm = self.losses(step), self.norms(step)
        is_usable = bool(np.isfinite(norm)) and value <= loss.max_loss
        if is_usable:
            self.updated.append(step)
        return {"loss": value, "grad_norm": norm, "skipped": float(not is_usable), "num_tokens": 10.0}

    def load_checkpoint(self, folder: Path) -> None: ...

    def save_checkpoint(self, folder: Path) -> None: ...

    def save_model(self, folder: Path) -> None:
        folder.mkdir()


class FakeFolder:
    finished = False

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.path, self.model = path, path / "model"
        self.states: dict[int, dict[str, Any]] = {}

    def latest(self) -> Checkpoint | None:
        if not self.states:
            return None
        return Checkpoint(step=max(self.states), folder=self.path, state=self.states[max(self.states)])

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        self.states[step] = json.loads(json.dumps(state))

    def finish(self) -> None:
        self.finished = True


class Run:
    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **alarms: AlarmAction) -> None:
        self.folder = FakeFolder(path)
        self.cfg = SFTRun(
            algorithm=SFTAlgorithm(steps=STEPS, batch_size=2),
            checkpoint=CheckpointConfig(every_steps=1000),
            tracking=TrackingConfig(wandb=WandbMode.disabled, console=False, alarms=alarms),
        )
        samples = [
            TrainingSample(
                token_ids=np.array([i, 1, 2]), loss_mask=np.array([False, True, True]), weights=np.ones(3)
            )
            for i in range(8)
        ]
        monkeypatch.setattr(sft, "conversations", lambda cfg: ({"all": samples}, {"all": 1.0}))
        monkeypatch.setattr(sft.RunFolder, "open", lambda cfg: self.folder)
        monkeypatch.setattr(sft.ray, "put", lambda value: value)

    def start(
        self, losses: Callable[[int], float] = lambda step: 1.0, norms: Callable[[int], float] = lambda s: 1.0
    ) -> FakeLearner:
        learner = FakeLearner(losses, norms)
        engines: Any = type("Engines", (), {"learner": lambda *_: learner})()
        sft.run(self.cfg, engines)
        return learner

    @property
    def alarms(self) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.folder.path / "events.jsonl") if e["kind"] == "alarm"]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in read_jsonl(self.folder.path / "metrics.jsonl")]


def spike(step: int) -> float:
    return 9.0 if step == BAD else 1.0 + 0.01 * (step % 7)


def nan(step: int) -> float:
    return float("nan") if step == BAD else 1.0


def test_warn_is_the_default_and_says_step_number_band_and_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    assert run.start(spike).updated == list(range(1, STEPS + 1))
    (alarm,) = run.alarms
    assert (alarm["name"], alarm["step"], alarm["metric"], alarm["value"]) == ("loss_spike", BAD, "loss", 9.0)
    assert alarm["action"] == "warn" and alarm["layer"] is alarm["low"] is None and 1 < alarm["high"] < 2
    assert (
        alarm["message"].startswith(f"step {BAD}: loss_spike: loss is 9, above 1.5")
        and "lower" in alarm["message"]
    )
    assert list(run.folder.states) == [STEPS] and run.steps == list(range(1, STEPS + 1))


def test_save_writes_a_checkpoint_of_that_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, loss_spike=AlarmAction.save)
    run.start(spike)
    assert list(run.folder.states) == [BAD, STEPS]


def test_stop_saves_ends_with_one_line_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, loss_spike=AlarmAction.stop)
    with pytest.raises(UserError, match=r"^tracking\.alarms\.loss_spike='stop': step 40: loss is 9, above"):
        run.start(spike)
    assert list(run.folder.states) == [BAD] and run.steps == list(range(1, BAD + 1))
    assert run.start(spike).updated == list(range(BAD + 1, STEPS + 1))
    assert run.steps == list(range(1, STEPS + 1)) and len(run.alarms) == 1 and run.folder.finished


def test_a_stopped_run_makes_its_model_with_the_steps_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, loss_spike=AlarmAction.stop)
    with pytest.raises(UserError, match=r"to end there with a model give it algorithm\.steps=40$"):
        run.start(spike)
    assert not run.folder.model.exists()
    run.cfg.algorithm.steps = BAD
    assert run.start(spike).updated == [] and run.folder.model.exists() and run.folder.finished


def test_skip_leaves_the_spike_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, loss_spike=AlarmAction.skip)
    assert run.start(spike).updated == [s for s in range(1, STEPS + 1) if s != BAD]
    assert [(a["name"], a["action"]) for a in run.alarms] == [("loss_spike", "skip")]


@pytest.mark.parametrize("action", [AlarmAction.skip, AlarmAction.warn, AlarmAction.stop])
def test_a_nan_is_left_out_whatever_the_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: AlarmAction
) -> None:
    run = Run(tmp_path, monkeypatch, nan=action)
    if action is AlarmAction.stop:
        with pytest.raises(
            UserError, match=r"^tracking\.alarms\.nan='stop': step 40: grad_norm is nan: no optim"
        ):
            run.start(norms=nan)
        assert run.steps[-1] == BAD and list(run.folder.states) == [BAD]
    else:
        assert BAD not in run.start(norms=nan).updated and run.steps[-1] == STEPS
    assert [(a["name"], a["step"], a["value"]) for a in run.alarms] == [("nan", BAD, "nan")]


def test_too_many_left_out_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"^step 24: 5 batches in a row made no optimizer step .* lower learner\.lr"
    ):
        run.start(norms=lambda step: float("inf") if step >= 20 else 1.0)
    assert run.steps[-1] == 20 + MAX_SKIPPED - 1 and len(run.alarms) == 1
    bursts = Run(tmp_path / "bursts", monkeypatch)
    bursts.start(norms=lambda step: float("inf") if step % 5 else 1.0)
    assert bursts.steps[-1] == STEPS, "four in a row are borne"


def test_alarms_are_alerts_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with Tracker(tmp_path, TrackingConfig(console=False), "t", {}, 1) as tracker:
        assert tracker._wandb is not None
        sent: list[tuple[Any, ...]] = []
        alert = tracker._wandb._run.alert
        monkeypatch.setattr(tracker._wandb._run, "alert", lambda *a, **k: (sent.append(a), alert(*a, **k)))
        tracker.event("alarm", name="nan", step=3, message="step 3: nan: look")
        tracker.event("worker_restarted", message="no alert")
    assert sent == [("nan", "step 3: nan: look")]
