"""`posttrain doctor replay` on the real engines: right checkpoints pass, a learner with other routers is seen, a family
that replay does not know is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from posttrain.compose import compose
from posttrain.config import DoctorRun, ModelConfig
from posttrain.data.tokenizer import load_tokenizer
from posttrain.doctor import replay
from posttrain.doctor import replay_samples as samples
from posttrain.doctor.findings import Finding
from posttrain.engines import Engines
from posttrain.learner.group import LearnerGroup
from posttrain.records import Prompt
from rollout.pool import RolloutPool
from tests.tiny_models import tiny_mimo, tiny_qwen3_moe
from tests.unit.moe_families import REFUSED, SHAPE

pytestmark = pytest.mark.integration
REPO = Path(__file__).resolve().parents[2]
SETTINGS = ["replay.num_rollouts=32", "ray.object_store_gb=0.2"]
ROWS = [
    "sampling",
    "shape",
    "recorded routes",
    "coverage",
    "routes of one prefill",
    "logprobs of one prefill",
    "live routes",
    "learner against engine",
    "effect of replay",
    "control",
    "router gradient",
]


class Bench:
    """One engine and one learner on a random MiMo, and the prompts of the check."""

    def __init__(self, path: Path, engines: Engines) -> None:
        cfg = compose("doctor", [f"model.path={path}", *SETTINGS])[1]
        assert isinstance(cfg, DoctorRun)
        self.cfg = cfg
        self.learner_config, self.rollout = replay.sections(cfg, replay.check_input(cfg))
        tokenizer = load_tokenizer(str(path))
        self.plain = samples.plain_tokens(tokenizer)
        self.prompts: list[Prompt] = samples.make_prompts(cfg, tokenizer, self.rollout)
        environments = {"random": {"_target_": "posttrain.doctor.replay_samples.GoOn"}}
        starting = engines.in_background(engines.rollouts, self.rollout, cfg.model, environments, 0)
        self.learner: LearnerGroup = engines.learner(self.learner_config, cfg.model, 2, 0)
        self.pool: RolloutPool = starting.result()

    def hold(self, path: Path) -> None:
        """Gives the learner the weights of ``path``; the engine keeps its own."""
        self.learner.reset(self.learner_config, ModelConfig(path=str(path)), 2, 0)

    def findings(self) -> dict[str, Finding]:
        found, _ = replay.measure(self.cfg, self.learner, self.pool, self.prompts, self.plain, self.rollout)
        return {finding.name: finding for finding in found}


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mimo(tmp_path_factory.mktemp("replay") / "mimo")


@pytest.fixture(scope="module")
def bench(mimo: Path) -> Iterator[Bench]:
    cfg = compose("doctor", SETTINGS)[1]
    with Engines(cfg.ray) as engines:
        yield Bench(mimo, engines)


def test_rollouts_take_turns_and_go_on_from_the_prefix_cache(bench: Bench) -> None:
    rollouts, finding = samples.sample_rollouts(
        bench.cfg, bench.pool, bench.prompts, bench.plain, bench.rollout
    )
    assert finding.way_out is None and len(rollouts) == 32
    assert sum(r.prompt.metadata.get("continued_at", 0) > 64 for r in rollouts) == 8
    assert sum(r.prompt.metadata.get("continued_at", 0) > 320 for r in rollouts) >= 2
    assert sum(len(r.turns) == 4 for r in rollouts) >= 2, finding.value
    mismatch, comparison = (
        bench.learner.mismatch(replay.references(rollouts)),
        replay.compare(bench.learner, rollouts),
    )
    for name, parts in (("k3", comparison.replayed), ("k3_without", comparison.live)):
        log_ratio = np.concatenate(parts)
        assert mismatch[name] == pytest.approx((np.expm1(log_ratio) - log_ratio).mean(), rel=1e-3)


def test_a_right_checkpoint_passes_every_check(bench: Bench, mimo: Path) -> None:
    bench.hold(mimo)
    found = bench.findings()
    assert list(found) == ROWS
    assert {f.name: f.way_out for f in found.values() if f.way_out} == {}
    assert found["coverage"].value == "1 exactly"
    assert found["shape"].value.startswith("3 MoE layers, 8 experts, 2 chosen in engine (bfloat16)")
    assert "replay lowers it" in found["effect of replay"].value
    assert found["control"].value.startswith("routes of layers 1 and 3 swapped: ")


def test_a_learner_with_other_routers_is_seen(bench: Bench, mimo: Path, tmp_path: Path) -> None:
    """The learner's routers of layers 1 and 3 are swapped, everything else is the engine's."""
    other = tmp_path / "other"
    shutil.copytree(mimo, other)
    tensors = load_file(other / "model.safetensors")
    for name in [n for n in tensors if ".layers.1.mlp.gate." in n]:
        twin = name.replace(".layers.1.", ".layers.3.")
        tensors[name], tensors[twin] = tensors[twin], tensors[name]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    bench.hold(other)
    found = bench.findings()
    assert found["coverage"].way_out is None and found["routes of one prefill"].way_out is None
    assert found["live routes"].way_out and "no rounding" in found["live routes"].way_out


def doctor(*arguments: str) -> tuple[int, str]:
    """Exit code and output of `posttrain doctor replay ...` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "doctor", "replay", *arguments, *SETTINGS],
        env=os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "220"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout


def test_command_in_float32_finds_all_routes_equal(tmp_path: Path) -> None:
    path = tiny_qwen3_moe(tmp_path / "qwen", num_layers=2)  # one MoE layer: the control shuffles tokens
    code, out = doctor(f"model.path={path}", "rollout.dtype=float32")
    assert code == 0, out
    assert f"routing replay works for {path} (Qwen3MoeForCausalLM): all 11 checks are right" in out
    assert "wrong" not in out and "routes shuffled among the tokens" in out
    assert "100.00 % of" in out and "without replay" in out and "F(1.25)" in out


@pytest.mark.slow
def test_command_names_a_family_that_replay_does_not_know(tmp_path: Path, mimo: Path) -> None:
    refused = REFUSED["jetmoe"]
    tokenizer = load_tokenizer(str(mimo))
    config_class = getattr(transformers, refused.model_class.replace("ForCausalLM", "Config"))
    config = config_class(**SHAPE | refused.config | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    getattr(transformers, refused.model_class)(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, out = doctor(f"model.path={tmp_path}", "rollout.max_model_len=128", "replay.max_new_tokens=16")
    assert code == 1, out
    assert "routing replay does not know JetMoe" in out and refused.message in out
    assert "Traceback" not in out and "1 of 1 checks are wrong" in out
