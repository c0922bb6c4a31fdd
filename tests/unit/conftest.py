"""What several test files ask for: tiny teachers and their student, made once (`tests/unit/teacher_family.py`), and configs of
runs in a folder of the test (`tests/unit/run_folders.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.tiny.domains import WORLDS
from posttrain import run_folder
from posttrain.records import Rollout
from tests.tiny_models import tiny_qwen3_moe
from tests.unit.run_folders import run_configs
from tests.unit.teacher_family import LEARNING_RATES, NUM_RIGHT, sample
from tests.unit.wrong_teachers import SHAPE, edit, fine_tune


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    start = tiny_qwen3_moe(folder / "init", seed=0, **SHAPE)
    return fine_tune(start, folder / "student", list(WORLDS), seed=0, lr=3e-3, steps=150)


@pytest.fixture(scope="session")
def right(student: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Fine-tunings with other seeds, domains, learning rates and lengths; every fifth is saved in bfloat16."""
    folder, teachers = tmp_path_factory.mktemp("right"), []
    for seed in range(NUM_RIGHT):
        out = folder / f"teacher_{seed}"
        lr, domain = LEARNING_RATES[seed % 5], list(WORLDS)[seed % 4]
        fine_tune(student, out, [domain], seed=seed, lr=lr, steps=5 + seed)
        if seed % 5 == 4:
            edit(out, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
        teachers.append(out)
    return teachers


@pytest.fixture(scope="session")
def specialists(student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("specialists")
    return {d: fine_tune(student, folder / d, [d], seed=1, lr=1e-3, steps=40) for d in WORLDS}


@pytest.fixture(scope="session")
def samples(student: Path) -> dict[str, list[Rollout]]:
    return {domain: sample(student, domain, 32) for domain in WORLDS}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """See `run_configs`. There are no checkpoints to hash."""
    monkeypatch.setattr(run_folder, "_fingerprints", lambda cfg: {})
    with run_configs(tmp_path) as make:
        yield make
