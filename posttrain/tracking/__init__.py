"""What a run says about itself: metrics.jsonl, events.jsonl, wandb and the live display, behind one `Tracker`."""

from posttrain.tracking.tracker import Tracker

__all__ = ["Tracker"]
