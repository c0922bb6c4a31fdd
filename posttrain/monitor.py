"""What a run does about its alarms: says them, saves, stops, or has the learner leave a batch out.

One `Monitor` serves every training loop. It sees the metrics of each step before they are logged, and on a restart those
that are on disk, so that its bands are those of one run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.alarms import Alarms
from posttrain.config import AlarmAction, UserError
from posttrain.tracking import Tracker

MAX_SKIPPED = 5  # batches in a row: one bad batch is data, five are the weights or the settings


class Monitor:
    """``actions``: what is done about an alarm, by name (`tracking.alarms`); ``history``: rows of metrics.jsonl."""

    def __init__(
        self, actions: Mapping[str, AlarmAction], tracker: Tracker, history: Iterable[dict[str, Any]]
    ) -> None:
        self._actions = actions
        self._tracker = tracker
        self._alarms = Alarms()
        self._num_skipped = 0  # in a row
        self._end: str | None = None
        for row in history:
            if row["step"] > 0:
                self._alarms.check(row)  # heard before the restart
                self._count_skipped(row)

    @property
    def max_loss(self) -> float:
        """Loss above which the learner leaves the batch out; infinity unless `tracking.alarms.loss_spike` is skip."""
        wanted = self._actions.get("loss_spike") is AlarmAction.skip
        return self._alarms.early.max_loss if wanted else math.inf

    def check(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Sound the alarms of a step; True: a checkpoint of it is wanted. `end` tells whether it was the last."""
        save = False
        for alarm in self._alarms.check(metrics):
            action = self._actions.get(alarm.name, AlarmAction.warn)
            self._tracker.event(
                "alarm",
                name=alarm.name,
                step=step,
                layer=alarm.layer,
                metric=alarm.metric,
                value=alarm.value,
                low=alarm.low if math.isfinite(alarm.low) else None,
                high=alarm.high if math.isfinite(alarm.high) else None,
                action=action.value,
                message=f"step {step}: {alarm.name}: {alarm.message}",
            )
            if action is AlarmAction.stop and self._end is None:
                self._end = (
                    f"tracking.alarms.{alarm.name}='stop': step {step}: {alarm.message}; the checkpoint of step {step} is"
                    " saved, and the same command goes on from it; to end there with a model give it"
                    f" algorithm.steps={step}"
                )
            save = save or action in (AlarmAction.save, AlarmAction.stop)
        self._count_skipped(metrics)
        if self._num_skipped >= MAX_SKIPPED and self._end is None:
            self._end = (
                f"step {step}: {self._num_skipped} batches in a row made no optimizer step (events.jsonl says why); the weights"
                " are those before them; lower learner.lr, look for bad records, or try learner.dtype=float32"
            )
        return save

    def end(self) -> None:
        """Call it once the step is logged and saved. Raises `UserError` where the run is to end here."""
        if self._end is not None:
            raise UserError(self._end)

    def _count_skipped(self, metrics: Mapping[str, Any]) -> None:
        self._num_skipped = self._num_skipped + 1 if metrics.get("skipped") else 0
