"""The live display: stage, step, headline metrics, tokens/s, time left. Plain lines where there is no terminal.

Owns what is printed while a stage runs. One display per stage: when it closes, its last state stays on screen and
the next stage draws below it, so a pipeline reads as a list of finished stages with a moving last line.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0
RATE_STEPS = 20  # steps whose mean duration gives the time left
REFRESH_PER_S = 4.0
DEFAULT_HEADLINE = ("reward/mean", "reward", "teacher/mean_abs", "loss")
DEFAULT_SHOWN = 3


class ConsoleDisplay:
    """Progress of one stage."""

    def __init__(
        self,
        stage: str,
        total_steps: int,
        first_step: int = 0,
        headline: list[str] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``first_step``: steps that are done already (a resumed run). ``headline``: metrics to show, in order."""
        self._console = console or Console()
        self._clock = clock
        self._stage, self._total, self._step = stage, total_steps, first_step
        self._headline = headline
        self._metrics: dict[str, float] = {}
        self._status = "starting"
        self._started = self._clock()
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_STEPS + 1)  # (time, step)
        self._tokens_per_s: float | None = None
        self._last_plain: float | None = None
        self._spinner = Spinner("dots")
        self._bar = ProgressBar(total=max(total_steps, 1), width=24)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                refresh_per_second=REFRESH_PER_S,
                get_renderable=self._render,
                transient=False,
            )
            self._live.start()
        else:
            resumed = f", resumed after step {first_step}" if first_step else ""
            self._print(f"{stage}: {total_steps} steps{resumed}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics of a finished step."""
        now = self._clock()
        self._measure_tokens(now, metrics)
        self._step, self._metrics, self._status = step, metrics, ""
        self._marks.append((now, step))
        if self._live is None and self._plain_is_due(now):
            self._last_plain = now
            self._print(f"{self._stage}  step {step}/{self._total}  " + "  ".join(self._facts()))

    def status(self, text: str) -> None:
        """What the stage is doing right now; shown beside the bar, and not at all without a terminal."""
        self._status = text

    def message(self, text: str) -> None:
        """One line above the display."""
        self._console.print(Text(text), highlight=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A line, or a table of rich, above the display."""
        if isinstance(renderable, str):
            self.message(renderable)
        else:
            self._console.print(renderable)

    def finish(self) -> None:
        """Leave the last state on screen and give the terminal back."""
        self._status = ""
        if self._live is not None:
            self._live.stop()
            self._live = None
        else:
            self._print(
                f"{self._stage}: step {self._step}/{self._total} after {format_s(self._clock() - self._started)}"
            )

    def _measure_tokens(self, now: float, metrics: dict[str, float]) -> None:
        if "tokens_per_s" in metrics:
            self._tokens_per_s = metrics["tokens_per_s"]
        elif "num_tokens" in metrics:
            since = self._marks[-1][0] if self._marks else self._started
            self._tokens_per_s = metrics["num_tokens"] / max(now - since, 1e-9)

    def _plain_is_due(self, now: float) -> bool:
        return (
            self._last_plain is None or now - self._last_plain >= PLAIN_EVERY_S or self._step >= self._total
        )

    def _facts(self) -> list[str]:
        names = self._headline
        if names is None:
            names = [name for name in DEFAULT_HEADLINE if name in self._metrics][:DEFAULT_SHOWN]
        facts = [f"{name} {self._metrics[name]:.4g}" for name in names if name in self._metrics]
        if self._tokens_per_s is not None:
            facts.append(f"{self._tokens_per_s:,.0f} tokens/s")
        left = self._seconds_left()
        if left is not None and self._step < self._total:
            facts.append(f"{format_s(left)} left")
        return facts

    def _seconds_left(self) -> float | None:
        if len(self._marks) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        return (last_time - first_time) / max(last_step - first_step, 1) * (self._total - self._step)

    def _render(self) -> Table:
        done = self._step >= self._total
        grid = Table.grid(padding=(0, 1))
        self._bar.update(self._step)
        mark = Text("✓", style="green") if done else self._spinner
        elapsed = format_s(self._clock() - self._started)
        grid.add_row(
            mark,
            Text(self._stage, style="bold"),
            self._bar,
            Text(f"{self._step}/{self._total}"),
            Text(" · ".join([*self._facts(), elapsed])),
            Text(self._status, style="dim"),
        )
        return grid

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def format_s(seconds: float) -> str:
    """12 s, 3:05 min, 2:07 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
