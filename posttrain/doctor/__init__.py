"""`posttrain doctor [TOPIC]`: looks at this machine and at checkpoints, and says what is wrong with a way out.

One module per topic with `run(cfg) -> exit code`; its help text in `posttrain.usage.TOPICS` makes it known to the
command line. Without a topic it is `system`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from posttrain.config import RunConfig


def run(cfg: RunConfig, topic: str | None = None) -> int:
    """Print the report of ``topic``; returns 1 if something is wrong, else 0."""
    return cast(int, import_module(f"posttrain.doctor.{topic or 'system'}").run(cfg))
