"""What a model was made from: through runs of all kinds, once per ancestor, and honest where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.lineage import ancestry, collect


def finished_run(root: Path, name: str, command: str, **paths: str) -> str:
    """A run folder with the manifest that `collect` gives it; returns its model. Fingerprints are the paths' names."""
    inputs = {key.replace("__", "."): path for key, path in paths.items()}
    fingerprints = {key: print_of(path) for key, path in inputs.items()}
    folder = root / name
    (folder / "model").mkdir(parents=True)
    record = {"command": command, "fingerprints": fingerprints, "lineage": collect(inputs, fingerprints)}
    (folder / "manifest.json").write_text(json.dumps(record))
    return str(folder / "model")


def print_of(path: str) -> str:
    return "print of " + path


def two_rounds(root: Path) -> str:
    (root / "inputs/model").mkdir(parents=True)
    start = finished_run(root, "sft", "sft", model__path=str(root / "inputs/model"))
    for prefix in ("", "round2/"):
        teachers = {
            f"teachers__{d}__path": finished_run(root, f"{prefix}teachers/{d}", "rl", model__path=start)
            for d in ("math", "code")
        }
        start = finished_run(root, f"{prefix}mopd", "mopd", model__path=start, **teachers)
    return start


def test_two_rounds(tmp_path: Path) -> None:
    student = two_rounds(tmp_path)
    entries = ancestry(student, print_of(student), tmp_path)
    names = [entry["model"] for entry in entries]
    assert names[:2] == ["inputs/model", "sft"] and names[-1] == "round2/mopd"
    assert sorted(names) == sorted(set(names)) and len(names) == 8, "every ancestor once"
    by_name = {entry["model"]: entry for entry in entries}
    assert by_name["inputs/model"] == {
        "model": "inputs/model",
        "stage": None,
        "trained_from": {},
        "fingerprint": print_of(str(tmp_path / "inputs/model")),
    }
    assert by_name["round2/teachers/math"]["trained_from"] == {"model.path": "mopd"}
    assert by_name["round2/mopd"]["stage"] == "mopd"
    assert by_name["round2/mopd"]["trained_from"] == {
        "model.path": "mopd",
        "teachers.math.path": "round2/teachers/math",
        "teachers.code.path": "round2/teachers/code",
    }
    for index, entry in enumerate(entries):
        assert set(entry["trained_from"].values()) <= set(names[:index]), "parents come first"


def test_a_checkpoint_from_elsewhere(tmp_path: Path) -> None:
    (entry,) = ancestry("/models/base", "ab", tmp_path)
    assert entry == {"model": "/models/base", "stage": None, "trained_from": {}, "fingerprint": "ab"}


def test_a_run_of_a_former_version_has_no_lineage_but_its_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "old/model").mkdir(parents=True)
    record = {"command": "sft", "fingerprints": {"model.path": "0123456789abcdef"}}
    (tmp_path / "old/manifest.json").write_text(json.dumps(record))
    (entry,) = ancestry(str(tmp_path / "old/model"), "ff", tmp_path)
    assert entry["stage"] == "sft" and entry["trained_from"] == {"model.path": "0123456789ab"}
