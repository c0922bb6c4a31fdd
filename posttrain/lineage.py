"""What every model was made from, back to the checkpoints that no run here made.

Owns the "lineage" of a run's manifest: one entry for every checkpoint above the run, by fingerprint, parents first. So
the common ancestors of several rounds of teachers and students stand there once. The entry of a checkpoint comes from
the manifest of the run that made it, which lies beside its folder `model`; without one its origin is unknown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def collect(paths: dict[str, str], fingerprints: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Fingerprint -> {path, stage, trained_from} of the checkpoints ``paths`` (config key -> path) and all above them.

    ``stage`` is the command that made it (None: unknown), ``trained_from`` maps the config keys of that run to
    fingerprints.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, path in paths.items():
        record = _manifest_of(Path(path))
        found |= record.get("lineage", {})
        found[fingerprints[key]] = {
            "path": path,
            "stage": record.get("command"),
            "trained_from": record.get("fingerprints", {}),
        }
    return found


def ancestry(model: str, fingerprint: str, root: Path) -> list[dict[str, Any]]:
    """The model in the folder ``model`` and everything that it came from, parents first: [{model, stage, trained_from,
    fingerprint}]. Models are named by the folder of their run, relative to ``root`` where they lie in it."""
    entries = collect({"model": model}, {"model": fingerprint})
    names = {own: _name(Path(entry["path"]), root) for own, entry in entries.items()}
    return [
        {
            "model": names[own],
            "stage": entry["stage"],
            "trained_from": {
                key: names.get(parent, parent[:12]) for key, parent in entry["trained_from"].items()
            },
            "fingerprint": own,
        }
        for own, entry in entries.items()
    ]


def _manifest_of(model: Path) -> dict[str, Any]:
    """Manifest of the run that wrote this folder, {} where there is none."""
    file = model.parent / "manifest.json"
    if model.name != "model" or not file.exists():
        return {}
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def _name(path: Path, root: Path) -> str:
    run = path.parent if path.name == "model" and (path.parent / "manifest.json").exists() else path
    inside = run.absolute().is_relative_to(root.absolute())
    return str(run.absolute().relative_to(root.absolute())) if inside else str(run)
