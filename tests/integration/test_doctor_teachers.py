"""`posttrain doctor teachers` on the real engines: one right teacher, a foreign one, and the student passed off as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import tiny_qwen3_moe, tiny_teacher

pytestmark = pytest.mark.integration
REPO = Path(__file__).resolve().parents[2]
SCORED = {"scoring", "noise", "initial_kl", "domain_swap", "lengths", "cost"}


def test_command_tells_right_from_wrong(tmp_path: Path) -> None:
    student = tiny_qwen3_moe(tmp_path / "student", num_layers=2)
    teachers = {
        "math": tiny_teacher(student, tmp_path / "math"),
        "code": tiny_qwen3_moe(tmp_path / "code", seed=9, num_layers=2),
        "tool": student,
    }
    rows = [
        {"messages": [{"role": "user", "content": f"{i}+{i}=?"}], "domain": domain}
        for domain in teachers
        for i in range(8)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [
            *[sys.executable, "-m", "posttrain.cli", "doctor", "teachers", f"model.path={student}"],
            *[f"teachers.{domain}.path={path}" for domain, path in teachers.items()],
            *["data.path=prompts.jsonl", "teacher_check.num_samples=8", "teacher_check.max_new_tokens=8"],
            *["rollout.dtype=float32", "rollout.max_model_len=64", "ray.object_store_gb=0.2"],
            *["teacher_workers.cores_per_worker=1", "rollout.vllm.max_num_seqs=16"],
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1, done.stdout
    cells = {
        (row["domain"], row["gate"]): row
        for row in json.loads((tmp_path / "runs/doctor/preflight.json").read_text())
    }
    red = {key for key, row in cells.items() if row["verdict"] == "red"}
    assert red == {("code", "foreign"), ("tool", "self_teacher")}, done.stdout
    assert {gate for domain, gate in cells if domain == "math"} >= SCORED
    # The student's engine and the teachers' forward agree on equal weights, and tell others apart.
    gap = {domain: cells[domain, "initial_kl"]["number"] for domain in teachers}
    assert gap["tool"] < 0.1 * gap["math"] and gap["math"] < 0.3 * gap["code"], gap
    for domain in teachers:
        assert cells[domain, "scoring"]["number"] < 1e-4 and cells[domain, "noise"]["number"] < 1e-4
        assert cells[domain, "cost"]["number"] > 0
    assert "red foreign: teachers.code.path=" in done.stdout
    assert "teacher_workers.accept=[self_teacher]" in done.stdout and "Traceback" not in done.stdout
    events = [json.loads(line) for line in (tmp_path / "runs/doctor/events.jsonl").read_text().splitlines()]
    assert {(e["domain"], e["gate"]) for e in events if e["kind"] == "preflight"} == set(cells)
