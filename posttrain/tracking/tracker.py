"""One fan-out: whoever logs a step or an event speaks to `Tracker`, which tells the files, wandb and the console.

Owns nothing but the order: files first, so that what is on screen is also on disk.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.config import TrackingConfig, WandbMode
from posttrain.tracking.console import ConsoleDisplay
from posttrain.tracking.jsonl import EventsFile, LoadFile, MetricsFile
from posttrain.tracking.wandb_sink import WandbSink


class Tracker:
    """Metrics and events of one run (in a pipeline: of one stage). Also a context manager that finishes itself."""

    def __init__(
        self,
        run_dir: Path | str,
        cfg: TrackingConfig,
        run_name: str,
        config: dict[str, Any],
        total_steps: int,
        resume_step: int = 0,
        headline: list[str] | None = None,
    ) -> None:
        """Open ``run_dir``/metrics.jsonl, cut back to ``resume_step`` (0: a new run), and everything else.

        ``config`` is the resolved configuration, for wandb. ``headline`` names the metrics that the console shows
        (those of them that a step has); null: reward, teacher gap and loss, where they are.
        """
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(folder / "metrics.jsonl", resume_step)
        self._load = LoadFile(folder / "expert_load.jsonl", resume_step)
        self._events = EventsFile(folder / "events.jsonl")
        self._wandb = None if cfg.wandb == WandbMode.disabled else WandbSink(folder, cfg, run_name, config)
        self._console = ConsoleDisplay(run_name, total_steps, resume_step, headline) if cfg.console else None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of ``step`` (1-indexed, each exactly once; 0: before training); values are numbers.

        A value that is not finite is written as null, and as an event with its name.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.write(step, values)
        bad = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        if bad:
            self.event(
                "not_finite", step=step, metrics=bad, message=f"step {step}: not finite: {', '.join(bad)}"
            )
        if self._wandb is not None:
            self._wandb.log(step, values)
        if self._console is not None:
            self._console.log(step, values)

    def expert_load(self, step: int, load: dict[str, Any]) -> None:
        """Record the load of the experts over the window that ends with ``step``, for a heat map."""
        self._load.write(step, load)

    def event(self, kind: str, **fields: Any) -> None:
        """Record an alarm, restart, preflight row or the like. A field ``message`` is also shown on screen; an alarm is an
        alert of wandb too."""
        self._events.write(kind, fields)
        if self._wandb is not None and kind == "alarm":
            self._wandb.alert(fields["name"], fields["message"])
        if self._console is not None and "message" in fields:
            self._console.message(f"{kind}: {fields['message']}")

    def show(self, renderable: Any) -> None:
        """Print a line or a table of rich above the live display; it goes to no file."""
        if self._console is not None:
            self._console.show(renderable)

    def status(self, text: str) -> None:
        """What is going on within the step, for the live display only."""
        if self._console is not None:
            self._console.status(text)

    def finish(self, failed: bool = False) -> None:
        """Close everything; the display leaves its last state. ``failed`` marks the wandb run as crashed."""
        if self._console is not None:
            self._console.finish()
        if self._wandb is not None:
            self._wandb.finish(failed)
        self._metrics.close()
        self._events.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(failed=error is not None)
