"""Whether a start of a run came as far as its first step. Reads the run folder, changes nothing.

A start that ended before it (refused by the preflight, or killed) has made nothing that is worth keeping, so that it
binds neither its folder nor the stages that come before it.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.config import UserError
from posttrain.tracking.jsonl import read_jsonl

START_FILES = (
    *("config.yaml", "manifest.json", "lock", "events.jsonl", "eval_start.json"),
    *("preflight.json", "teachers.json", "wandb_id", "wall_s.json"),
)
STEP_FILES = ("metrics.jsonl", "expert_load.jsonl")  # one row a step
CONFIG_HEAD = "# posttrain "  # of a config.yaml that a run wrote


def has_only_begun(path: Path) -> bool:
    """Whether all that lies in the run folder ``path`` is of starts that ended before their first step. False where there
    is anything else: a folder (a pipeline's stages, a run of another name, a user's data) or a file of the user."""
    for entry in path.iterdir():
        if entry.name in STEP_FILES:
            if not _is_before_steps(entry):
                return False
        elif entry.name == "wandb":
            if (entry / "manifest.json").exists():  # a run of that name
                return False
        elif entry.name not in START_FILES or (entry.name == "config.yaml" and not wrote_config(entry)):
            return False
    return True


def wrote_config(file: Path) -> bool:
    """Whether a run wrote this config.yaml, and not the user."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(len(CONFIG_HEAD)) == CONFIG_HEAD


def _is_before_steps(file: Path) -> bool:
    """Whether no row is of a step: step 0 is the evaluation of the start model."""
    try:  # it may be the user's, of any content
        return all(row["step"] == 0 for row in read_jsonl(file))
    except (UserError, KeyError, TypeError, OSError):
        return False
