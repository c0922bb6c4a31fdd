"""Real training that is broken on purpose: every kind of trouble is named within 20 steps, nothing before it is there.

`benchmarks/early_warning.py --quick`, as a user would run it; the full benchmark has two models and more seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.early_warning import BAR_STEPS, PLANTS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
REPO = Path(__file__).resolve().parents[2]


def test_every_kind_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.early_warning", "--planted", "--quick", "--seeds", "0"]
    found = subprocess.run(
        [*command, "--threads", "1", "--work", str(tmp_path)],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    lines = json.loads((tmp_path / "early_warning.json").read_text())["planted"]["lines"]
    assert [line["trouble"] for line in lines] == [plant.name for plant in PLANTS]
    for line in lines:
        assert line["named_after"] is not None and line["named_after"] <= BAR_STEPS, line
        assert line["right_layer"] in (True, None) and line["false_alarms"] == [], line
    assert sum(line["right_layer"] is True for line in lines) == sum(p.layer is not None for p in PLANTS)
