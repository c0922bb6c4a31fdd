"""Cells shared out among processes: each is made once, after what it needs, and a killed process gives its cell back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks import cells
from benchmarks.cells import locked, run_jobs, take
from benchmarks.mopd import ROWS, TUNING_SEED, needs

CELLS = [(row, seed) for seed in (0, 1) for row in ("sft", "teachers", "mopd", "mix_rl")]


@pytest.fixture(autouse=True)
def _poll(monkeypatch):
    monkeypatch.setattr(cells, "POLL_S", 0.01)


def read(results: Path) -> list[str]:
    return results.read_text().splitlines() if results.exists() else []


def done(results: Path) -> list[tuple[str, int]]:
    return [(line.split()[0], int(line.split()[1])) for line in read(results)]


def work(folder: Path, job: int, die_at: tuple[str, int] | None = None, wait_for: int | None = None) -> None:
    results = folder / "results"
    for cell in take(CELLS, needs, lambda: done(results), folder / "claims"):
        if cell == die_at:
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if wait_for is not None:  # hold the first cell until another process has made one
            while not any(line.endswith(f" {wait_for}") for line in read(results)):
                time.sleep(0.01)
            wait_for = None
        with locked(folder / "lock"), results.open("a") as stream:
            stream.write(f"{cell[0]} {cell[1]} {job}\n")


def start(folder: Path, job: int, **more) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, job), kwargs=more)
    process.start()
    return process


def check_order(made: list[tuple[str, int]]) -> None:
    assert sorted(made) == sorted(CELLS), "each once"
    for place, cell in enumerate(made):
        assert needs(cell) <= set(made[:place]), f"{cell} before what it needs"


def test_two_processes_make_every_cell_once_and_in_order(tmp_path):
    processes = [start(tmp_path, 0, wait_for=1), start(tmp_path, 1)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    check_order(done(tmp_path / "results"))
    assert {line.split()[2] for line in read(tmp_path / "results")} == {"0", "1"}


def test_the_cell_of_a_killed_process_is_made_by_another(tmp_path):
    killed = start(tmp_path, 0, die_at=("teachers", 0))
    killed.join(30)
    assert killed.exitcode == -signal.SIGKILL and (tmp_path / "died").exists()
    assert done(tmp_path / "results") == [("sft", 0), ("sft", 1)] or done(tmp_path / "results") == [
        ("sft", 0)
    ]
    work(tmp_path, 1)
    check_order(done(tmp_path / "results"))


def test_what_is_not_asked_for_is_not_waited_for(tmp_path):
    """Its runs lie in the work folder, or are made on the way."""
    made: list[tuple[str, int]] = []
    for cell in take([("mix_rl", 1)], needs, lambda: made, tmp_path):
        made.append(cell)
    assert made == [("mix_rl", 1)]


def test_needs_of_every_row():
    for row in ROWS:
        for seed in (0, 1):
            assert all(name in ROWS and s in (seed, TUNING_SEED) for name, s in needs((row, seed)))
    assert needs(("sft", 1)) == set()
    assert needs(("teachers", 0)) == {("sft", 0)} and needs(("teachers", 1)) == {("sft", 1), ("teachers", 0)}
    assert needs(("task_arithmetic", 1)) == {("teachers", 1)}, "chosen with every seed"
    assert needs(("mix_rl", 1)) == {("mopd", 1), ("mix_rl", 0)}
    assert needs(("off_policy_filtered", 0)) == {("teachers", 0), ("off_policy", 0)}
    assert needs(("mopd_foreign", 2)) == {("foreign_teachers", 2), ("mopd", 0)}


def test_every_process_has_its_share_of_the_cores_and_a_failure_is_told(tmp_path):
    report = "import os, sys; open(sys.argv[1] + '/' + str(os.getpid()), 'w').write("
    report += "os.environ['OMP_NUM_THREADS'] + ' ' + ' '.join(map(str, sorted(os.sched_getaffinity(0)))))"
    run_jobs(2, ["-c", report, str(tmp_path)])
    cores = sorted(os.sched_getaffinity(0))
    found = [tuple(map(int, file.read_text().split())) for file in tmp_path.iterdir()]
    shares = [cores[job::2] or cores for job in range(2)]
    assert sorted(found) == sorted((len(share), *share) for share in shares)
    with pytest.raises(SystemExit, match="2 of 2 processes failed"):
        run_jobs(2, ["-c", "raise SystemExit(3)"])
