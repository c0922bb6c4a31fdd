"""The runs as users start them: own model, own data, own reward; learning; crashes. Real Ray, vLLM, DeepSpeed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from posttrain.tracking.jsonl import read_jsonl
from tests.tiny_models import tiny_mimo, tiny_qwen3_moe

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

REPO = Path(__file__).resolve().parents[2]
QUIET = ["tracking.wandb=disabled", "ray.object_store_gb=0.2"]
ROLLOUT = ["rollout.max_new_tokens=8", "rollout.max_model_len=64", "rollout.vllm.max_num_seqs=128"]
MY_MODULE = '''
class VowelReward:
    """Share of the answer's characters that are vowels."""

    def score(self, rollout):
        text = rollout.completion
        return (sum(c in "aeiou" for c in text) / max(len(text), 4), {"length": len(text)})
'''


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`posttrain ...` in ``folder``, as a user would, with its output in posttrain.log."""
    log = (folder / "posttrain.log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain.cli", *arguments, *QUIET],
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        text=True,
    )


def posttrain(folder: Path, *arguments: str) -> None:
    """Run to the end; on failure the output is the message."""
    code = start(folder, *arguments).wait()
    assert code == 0, (folder / "posttrain.log").read_text()[-6000:]


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run / "metrics.jsonl")]


def kill_in(folder: Path, stage: Path, command: list[str]) -> None:
    """`kill -9` of the driver once ``stage`` has a checkpoint and has gone on from it."""
    process = start(folder, *command)
    deadline = time.monotonic() + 240
    while not (stage / "checkpoints/latest").exists() or len(steps(stage)) < 3:
        assert process.poll() is None, (folder / "posttrain.log").read_text()[-6000:]
        assert time.monotonic() < deadline, (folder / "posttrain.log").read_text()[-6000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a Qwen3-MoE checkpoint, conversations, prompts of two domains, a module with a reward."""
    folder = tmp_path_factory.mktemp("user")
    tiny_qwen3_moe(folder / "my_model", seed=1, num_layers=2)
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(200)]
    chat = [[{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}] for w in words]
    write_rows(folder / "chat.jsonl", [{"messages": m} for m in chat])
    domains = ["math", "code"]
    rows = [{"messages": m[:1], "domain": domains[i % 2], "answer": "x"} for i, m in enumerate(chat)]
    write_rows(folder / "prompts.jsonl", rows)
    (folder / "my_module.py").write_text(MY_MODULE)
    return folder


def test_user_trains_own_checkpoint_on_own_messages(user: Path) -> None:
    """Killed in the middle, and started again by the same command."""
    command = [
        "sft", "data.path=chat.jsonl", "model.path=my_model", "algorithm.steps=20", "checkpoint.every_steps=4",
        "algorithm.batch_size=32", "learner.lr=1e-3", "learner.aux_loss_coef=1e-4", "learner.expert_bias_rate=0",
    ]  # fmt: skip
    kill_in(user, user / "runs/sft", command)
    posttrain(user, *command)
    assert "resuming after step" in (user / "posttrain.log").read_text()
    rows = read_jsonl(user / "runs/sft/metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(user / "runs/sft/model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert AutoTokenizer.from_pretrained(user / "runs/sft/model").chat_template


def test_user_reward_rises_on_two_ranks_and_two_workers(user: Path) -> None:
    """The model comes from the SFT run, so this also loads its result in vLLM."""
    posttrain(
        user, "rl", "model.path=runs/sft/model", "data.path=prompts.jsonl", "domain=math",
        "rewards._target_=my_module.VowelReward", "algorithm.steps=6", "algorithm.prompts_per_step=12",
        "algorithm.group_size=8", "algorithm.overlong=keep", "learner.lr=1e-3", "learner.warmup_steps=0",
        "learner.num_ranks=2", "learner.zero_stage=2", "rollout.num_workers=2", *ROLLOUT,
    )  # fmt: skip
    rewards = [row["reward/all"] for row in read_jsonl(user / "runs/rl/metrics.jsonl")]
    assert len(rewards) == 6
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1, rewards
    rows = read_jsonl(user / "runs/rl/metrics.jsonl")
    assert all(row["replay/coverage"] == 1.0 for row in rows)
    assert all(row["probe/mean_abs"] < 0.05 for row in rows)


def test_student_closes_the_gap_to_two_teachers(user: Path) -> None:
    """math has the RL model as teacher, code the student itself: its gap is the engines' noise."""
    posttrain(
        user, "mopd", "model.path=runs/sft/model", "data.path=prompts.jsonl", "algorithm.steps=14",
        "teachers.math.path=runs/rl/model", "teachers.code.path=runs/sft/model", "teachers.code.self=true",
        "algorithm.prompts_per_step=64",
        "learner.lr=1e-3", "learner.warmup_steps=0", "algorithm.overlong=keep", "teacher_workers.max_initial_kl=4", *ROLLOUT,
    )  # fmt: skip
    rows = read_jsonl(user / "runs/mopd/metrics.jsonl")
    assert rows[0]["code/teacher_abs"] < 0.02, "teacher = student gives nothing at step 1"
    gap = [row["math/teacher_abs"] for row in rows]
    assert sum(gap[-3:]) / 3 < 0.7 * sum(gap[:2]) / 2, gap
    preflight = [e for e in read_jsonl(user / "runs/mopd/events.jsonl") if e["kind"] == "preflight"]
    gates = {(e["domain"], e["gate"]): e["verdict"] for e in preflight}
    assert len(gates) == len(preflight), "every gate once"
    for domain in ("math", "code"):
        for gate in ("vocabulary", "self_teacher", "foreign", "scoring", "noise", "initial_kl"):
            assert gates[domain, gate] == "ok", (domain, gate)
    assert json.loads((user / "runs/mopd/preflight.json").read_text())


@pytest.fixture
def pipeline_inputs(tmp_path: Path) -> Path:
    from examples.tiny.make_data import make

    folder = tmp_path
    make(folder / "runs/tiny/inputs", seed=0, num_sft=640, num_prompts=160, num_valid=8, num_heldout=16)
    tiny_mimo(folder / "runs/tiny/inputs/model", seed=0)
    return folder


@pytest.mark.parametrize(
    "killed_in",
    [("teachers/math", "mopd"), pytest.param(("sft", "teachers/math", "mopd"), marks=pytest.mark.slow)],
    ids=len,
)
def test_pipeline_killed_in_every_stage_resumes(pipeline_inputs: Path, killed_in: tuple[str, ...]) -> None:
    """`kill -9` of the driver in SFT, RL and MOPD; each stage ends with every step exactly once. The fast variant leaves
    SFT to the test of `posttrain sft`."""
    config = {
        "sft": {"algorithm": {"steps": 8}},
        "rl": {"algorithm": {"steps": 4}},
        "mopd": {"algorithm": {"steps": 4, "prompts_per_step": 16}},
        "teachers": {
            "tool": {"steps": 4},
            "instruct": {"train": "none"},
            "code": {"train": "sft", "steps": 4},
        },
        "eval": {"num_samples": 2, "cross_num_prompts": 4},
        "rollout": {"num_workers": 1},
        "checkpoint": {"every_steps": 2},
    }
    (pipeline_inputs / "small.yaml").write_text(yaml.safe_dump(config))
    command = ["pipeline", "experiment=tiny", "--config", "small.yaml"]
    run = pipeline_inputs / "runs/tiny"
    for stage in killed_in:
        kill_in(pipeline_inputs, run / stage, command)
    posttrain(pipeline_inputs, *command)

    expected = {"sft": 8, "teachers/math": 4, "teachers/code": 4, "teachers/tool": 4, "mopd": 4}
    assert {stage: steps(run / stage) for stage in expected} == {
        stage: list(range(1, n + 1)) for stage, n in expected.items()
    }
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"sft", "teachers", "teachers_all", "mopd", "average_merge"}
    assert summary["num_eval"] == dict.fromkeys(summary["domains"], 16)
    assert summary["replay"]["coverage"] == 1.0
    assert (run / "summary.png").stat().st_size > 10_000
    assert "resuming after step" in (pipeline_inputs / "posttrain.log").read_text()
