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
from tests.metric_names import undocumented
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


def others(n: int) -> list[dict[str, str]]:
    """User messages that no training prompt has."""
    return [{"role": "user", "content": f"{'h' * (i + 1)}gfedc"} for i in range(n)]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a Qwen3-MoE checkpoint, conversations, prompts of two domains, a module with a reward."""
    folder = tmp_path_factory.mktemp("user")
    tiny_qwen3_moe(folder / "my_model", seed=1, num_layers=2)
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(200)]
    chat = [[{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}] for w in words]
    write_rows(folder / "chat.jsonl", [{"messages": m} for m in chat[16:]])
    write_rows(folder / "held_out_chat.jsonl", [{"messages": m, "domain": "words"} for m in chat[:16]])
    domains = ["math", "code"]
    rows = [{"messages": m[:1], "domain": domains[i % 2], "answer": "x"} for i, m in enumerate(chat)]
    write_rows(folder / "prompts.jsonl", rows)
    held_out = [{"messages": [m], "domain": domains[i % 2], "answer": "x"} for i, m in enumerate(others(16))]
    write_rows(folder / "heldout.jsonl", held_out)
    (folder / "my_module.py").write_text(MY_MODULE)
    return folder


def test_user_trains_own_checkpoint_on_own_messages(user: Path) -> None:
    """Killed in the middle, and started again by the same command."""
    command = [
        "sft", "data.path=chat.jsonl", "model.path=my_model", "algorithm.steps=20", "checkpoint.every_steps=4",
        "algorithm.batch_size=32", "learner.lr=1e-3", "learner.aux_loss_coef=1e-4", "learner.expert_bias_rate=0",
        "data.eval_path=held_out_chat.jsonl", "algorithm.validate_every=5",
    ]  # fmt: skip
    kill_in(user, user / "runs/sft", command)
    posttrain(user, *command)
    assert "resuming after step" in (user / "posttrain.log").read_text()
    rows = read_jsonl(user / "runs/sft/metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    validated = [r for r in rows if "validation/loss/words" in r]
    assert [r["step"] for r in validated] == [5, 10, 15, 20]
    assert validated[-1]["validation/loss/all"] == validated[-1]["validation/loss/words"]
    assert validated[-1]["validation/loss/all"] < validated[0]["validation/loss/all"]
    assert undocumented(name for row in rows for name in row) == set()
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
        "eval.every_steps=4", "eval.num_samples=8", "data.eval_path=heldout.jsonl",
    )  # fmt: skip
    start, *rows = read_jsonl(user / "runs/rl/metrics.jsonl")
    rewards = [row["reward/all"] for row in rows]
    assert len(rewards) == 6
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1, rewards
    assert [row["step"] for row in [start, *rows] if "eval/math" in row] == [0, 4, 6]
    assert rows[-1]["eval/math/gain"] == rows[-1]["eval/math"] - start["eval/math"] > 0.1
    assert undocumented(name for row in [start, *rows] for name in row) == set()
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
    assert undocumented(name for row in rows for name in row) == set()
    gap = [row["math/teacher_abs"] for row in rows]
    assert sum(gap[-3:]) / 3 < 0.7 * sum(gap[:2]) / 2, gap
    preflight = [e for e in read_jsonl(user / "runs/mopd/events.jsonl") if e["kind"] == "preflight"]
    gates = {(e["domain"], e["gate"]): e["verdict"] for e in preflight}
    assert len(gates) == len(preflight), "every gate once"
    for domain in ("math", "code"):
        for gate in ("vocabulary", "self_teacher", "foreign", "scoring", "noise", "initial_kl"):
            assert gates[domain, gate] == "ok", (domain, gate)
    assert json.loads((user / "runs/mopd/preflight.json").read_text())


def test_outcome_beside_the_teachers_with_balanced_domains(user: Path) -> None:
    """alpha > 0 with a clipped loss, two updates on a batch, shares that follow the gaps, and every clip's own share."""
    posttrain(
        user, "mopd", "model.path=runs/sft/model", "data.path=prompts.jsonl", "algorithm.steps=4", "name=mixed",
        "teachers.math.path=runs/rl/model", "teachers.code.path=runs/sft/model", "teachers.code.self=true",
        "algorithm.prompts_per_step=16",
        "algorithm.alpha=0.5", "algorithm.group_size=4", "rewards._target_=my_module.VowelReward", "algorithm.loss=gspo",
        "algorithm.updates_per_batch=2", "algorithm.aggregation=token_mean_balanced", "algorithm.gap_following=true",
        "algorithm.target_shares={math: 0.5, code: 0.5}", "algorithm.overlong=shape", "learner.lr=1e-3",
        "learner.warmup_steps=0", "teacher_workers.max_initial_kl=4", *ROLLOUT,
    )  # fmt: skip
    rows = read_jsonl(user / "runs/mixed/metrics.jsonl")
    assert len(rows) == 4 and undocumented(name for row in rows for name in row) == set()
    assert rows[0]["share/target/math"] == pytest.approx(0.5)
    assert rows[1]["share/target/math"] > 0.5, "math is the domain with a gap"
    for row in rows:
        assert row["share/weight/math"] == pytest.approx(row["share/target/math"], rel=0.01)
        assert row["share/gradient/math"] + row["share/gradient/code"] == pytest.approx(1)
        assert row["reward/overlong_penalty"] >= 0
    assert max(row["clip/ppo"] for row in rows) > 0, "the second update leaves the band of 3e-4"


def test_answers_of_a_teacher_become_sft_data(user: Path) -> None:
    """Off-policy distillation: the RL model's answers, the better ones, sampled and then trained on as they are."""
    posttrain(
        user, "sample", "model.path=runs/rl/model", "data.path=prompts.jsonl", "domain=math", "name=answers",
        "rewards.math._target_=my_module.VowelReward", "sample.num_samples=4", "sample.num_prompts=40",
        "sample.min_reward=0.1", "sample.keep_truncated=true", *ROLLOUT,
    )  # fmt: skip
    rows = read_jsonl(user / "runs/answers/samples.jsonl")
    counts = json.loads((user / "runs/answers/summary.json").read_text())["domains"]["math"]
    assert counts["prompts"] == 40 and counts["written"] == len(rows) > 20
    assert counts["written"] + counts["rejected"] == 160 and min(row["reward"] for row in rows) >= 0.1
    posttrain(
        user, "sft", "model.path=runs/sft/model", "data.sources.math.path=runs/answers/samples.jsonl",
        "name=off-policy", "algorithm.steps=12", "algorithm.batch_size=32", "learner.lr=1e-3",
    )  # fmt: skip
    losses = [row["loss"] for row in read_jsonl(user / "runs/off-policy/metrics.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    manifest = json.loads((user / "runs/off-policy/manifest.json").read_text())
    stages = [entry["stage"] for entry in manifest["lineage"].values()]
    assert stages == [None, "sft"], "the base, then the SFT model that this run starts from"


@pytest.mark.slow
def test_rl_on_all_domains_reports_each(user: Path) -> None:
    """Mix-RL, and then MOPD of one domain of the same prompts."""
    posttrain(
        user, "rl", "model.path=runs/sft/model", "data.path=prompts.jsonl", "name=mix-rl", "algorithm.steps=2",
        "rewards.math._target_=my_module.VowelReward", "rewards.code._target_=my_module.VowelReward",
        "algorithm.prompts_per_step=8", "algorithm.group_size=4", "algorithm.overlong=keep", *ROLLOUT,
    )  # fmt: skip
    rows = read_jsonl(user / "runs/mix-rl/metrics.jsonl")
    assert all({"reward/math", "reward/code", "length/math", "share/tokens/code"} <= set(row) for row in rows)
    posttrain(
        user, "mopd", "model.path=runs/sft/model", "data.path=prompts.jsonl", "name=one", "domain=math",
        "teachers.math.path=runs/mix-rl/model", "algorithm.steps=2", "algorithm.prompts_per_step=8",
        "algorithm.overlong=keep", "teacher_workers.max_initial_kl=4", *ROLLOUT,
    )  # fmt: skip
    rows = read_jsonl(user / "runs/one/metrics.jsonl")
    assert [row["share/prompts/math"] for row in rows] == [1.0, 1.0] and "length/code" not in rows[0]


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
        "mopd": {"algorithm": {"steps": 4, "prompts_per_step": 16, "signal": "full"}},
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
    assert all(row["teacher/kl"] >= 0 for row in read_jsonl(run / "mopd/metrics.jsonl"))
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"sft", "teachers", "teachers_all", "mopd", "average_merge"}
    assert summary["num_eval"] == dict.fromkeys(summary["domains"], 16)
    assert summary["replay"]["coverage"] == 1.0
    assert (run / "summary.png").stat().st_size > 10_000
    assert "resuming after step" in (pipeline_inputs / "posttrain.log").read_text()


@pytest.mark.slow
def test_a_second_round_starts_from_the_student(pipeline_inputs: Path) -> None:
    """One round first; the same command with rounds=2 goes on, killed in the second round's teachers."""
    config = {
        "sft": {"algorithm": {"steps": 2}},
        "rl": {"algorithm": {"steps": 4, "prompts_per_step": 8, "group_size": 4}},
        "mopd": {"algorithm": {"steps": 2, "prompts_per_step": 16}},
        "teachers": {"code": {"steps": 2}, "tool": {"train": "none"}, "instruct": {"train": "none"}},
        "eval": {"num_samples": 2, "cross_num_prompts": 4},
        "rollout": {"num_workers": 1},
        "checkpoint": {"every_steps": 1},
    }
    (pipeline_inputs / "small.yaml").write_text(yaml.safe_dump(config))
    command = ["pipeline", "experiment=tiny", "--config", "small.yaml"]
    run = pipeline_inputs / "runs/tiny"
    posttrain(pipeline_inputs, *command)
    before = {
        file: file.stat().st_mtime_ns
        for stage in ("sft", "mopd")
        for file in (run / stage / "model").iterdir()
    }
    assert not (run / "round2").exists() and "rounds" not in json.loads((run / "summary.json").read_text())
    kill_in(pipeline_inputs, run / "round2/teachers/math", [*command, "rounds=2"])
    posttrain(pipeline_inputs, *command, "rounds=2")
    assert {file: file.stat().st_mtime_ns for file in before} == before, "the first round was trained again"
    expected = {"teachers/math": 4, "round2/teachers/math": 4, "round2/teachers/code": 2, "round2/mopd": 2}
    assert {s: steps(run / s) for s in expected} == {s: list(range(1, n + 1)) for s, n in expected.items()}
    started = {s: yaml.safe_load((run / s / "config.yaml").read_text()) for s in expected}
    for stage in ("round2/teachers/math", "round2/teachers/code", "round2/mopd"):
        assert started[stage]["model"]["path"] == str(run / "mopd/model")
    assert started["round2/mopd"]["teachers"]["tool"]["path"] == str(run / "mopd/model")
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["rounds"]) == 2 and set(summary["accuracy"]["mopd"]) == set(summary["domains"])
    made = {entry["model"]: entry["trained_from"] for entry in summary["lineage"]}
    assert made["round2/mopd"]["teachers.math.path"] == "round2/teachers/math"
    assert made["round2/teachers/math"] == {"model.path": "mopd"} and made["sft"] == {
        "model.path": "inputs/model"
    }
