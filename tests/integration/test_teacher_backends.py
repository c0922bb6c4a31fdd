"""The same scores from Transformers, a vLLM engine and a vLLM server; a MOPD run whose teachers change on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from benchmarks.teacher_agreement import vllm_server
from posttrain.config import Dtype, ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from posttrain.records import RolloutStatus
from posttrain.tracking.jsonl import read_jsonl
from teachers.check import check_teachers
from teachers.gates import Verdict
from teachers.pool import TeacherPool
from teachers.scorer import Scorer
from teachers.server import ServerScorer
from teachers.teacher import Teacher
from tests.integration.test_teacher_pool import make_group
from tests.tiny_models import tiny_mimo, tiny_qwen3_moe

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
LENGTHS = [20, 3, 90, 1, 140, 2, 61]
MEAN_BAR = 1e-5  # nat, float32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("backends")
    return {
        "qwen": str(tiny_qwen3_moe(folder / "qwen", seed=1)),
        "mimo": str(tiny_mimo(folder / "mimo", seed=1)),
    }


def gaps(found: list[np.ndarray], path: str, ids: list[np.ndarray], dtype: Dtype) -> np.ndarray:
    """|difference| to Transformers in this process, over every token that has a prediction."""
    expected = [s.logprobs for s in Scorer(path, ModelConfig(), dtype).score(ids, 100_000)]
    return np.concatenate([np.abs(a - b)[1:] for a, b in zip(found, expected, strict=True)])


def rounding(path: str, ids: list[np.ndarray]) -> float:
    """Twice the mean |bfloat16 - float32| of one engine: each of two that round on their own is that far from exact."""
    rounded = [s.logprobs for s in Scorer(path, ModelConfig(), Dtype.bfloat16).score(ids, 100_000)]
    return 2 * float(gaps(rounded, path, ids, Dtype.float32).mean())


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("qwen", Dtype.float32), ("qwen", Dtype.bfloat16), ("mimo", Dtype.bfloat16)],
)
def test_vllm_gives_the_same_numbers(
    local_ray: None, models: dict[str, str], model: str, dtype: Dtype
) -> None:
    """In the pool beside a Transformers teacher, twice (so that nothing of the first call is left over)."""
    cfg = TeacherWorkerConfig(dtype=dtype, cores_per_worker=1, max_tokens_per_batch=256)
    pool = TeacherPool(cfg, ModelConfig())
    engine = Teacher(key="teachers.math", path=models[model], backend=TeacherBackend.vllm)
    other = "mimo" if model == "qwen" else "qwen"
    bar = (
        MEAN_BAR
        if dtype is Dtype.float32
        else rounding(models[model], [r.token_ids for r in make_group(LENGTHS, 1).rollouts])
    )
    rows = pool.set_teachers({"math": engine, "code": Teacher(key="teachers.code", path=models[other])})
    assert [[Path(p).name for p in row["paths"]] for row in rows] == [[other], [model]]
    group = make_group(LENGTHS, 1)
    group.rollouts[0].status = RolloutStatus.engine_error
    ref = ray.put(group)
    ids = [rollout.token_ids for rollout in group.rollouts][1:]
    for _ in range(2):
        scores = ray.get(pool.score("math", [ref]), timeout=300)
        assert np.isnan(scores[0].logprobs).all() and scores[3].logprobs.tolist() == [0.0]
        found = gaps([s.logprobs for s in scores[1:]], models[model], ids, dtype)
        print(
            f"\n{model} {dtype.value}: mean {found.mean():.2e} max {found.max():.2e} of {found.size} tokens"
        )
        assert found.mean() < bar
    # The direct forward of the preflight has a process of its own, which knows nothing of vLLM.
    texts = [i for i, text in enumerate(ids) if len(text) > 50]
    found = pool.examine("math", [ids[i] for i in texts], [scores[1 + i].logprobs for i in texts])
    assert found is not None and found.num_tokens > 100 and found.mean_abs < bar
    # Swapping the engine for another one ends it; the shared worker goes on.
    if model == "qwen" and dtype is Dtype.float32:
        rows = pool.set_teachers({"math": Teacher(key="teachers.math", path=models["qwen"])})
        assert len(rows) == 1 and [Path(p).name for p in rows[0]["paths"]] == ["qwen"]
        with pytest.raises(UserError, match=r"teachers\.math\.path='.*mimo': vLLM cannot hold it"):
            pool.set_teachers(
                {"math": Teacher(key="teachers.math", path=models["mimo"], backend=TeacherBackend.vllm)}
            )
    pool.shutdown()


def test_vllm_top_k(models: dict[str, str]) -> None:
    """In a process of its own, because vLLM wants the process set up first."""
    code = f"""
import json, sys
import numpy as np
from rollout.process import prepare
prepare(0, 1)
from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig, UserError
from teachers.vllm_scorer import VllmScorer, engine_options
cfg = TeacherWorkerConfig(vllm={{"max_model_len": 64}})
scorer = VllmScorer({models["qwen"]!r}, cfg, ModelConfig(), "teachers.math")
ids = np.arange(20, dtype=np.int32)
one = scorer.score([ids], 0, signal="top_k", top_k=30)[0]
refused = []
for texts, signal in (([np.zeros(64, np.int32)], "sampled"), ([ids], "full")):
    try: scorer.score(texts, 0, signal=signal)
    except UserError as error: refused.append(str(error))
json.dump({{"ids": one.topk_ids.tolist(), "logprobs": one.topk_logprobs.tolist(), "vocab_size": scorer.vocab_size,
  "refused": refused, "heads": [engine_options("x", TeacherWorkerConfig(head_dtype=h and Dtype(h), vllm=v), ModelConfig()).get("hf_overrides")
  for h, v in (("float32", {{}}), (None, {{}}), ("float32", {{"hf_overrides": {{"head_dtype": "model", "a": 1}}}}))]}}, open(sys.argv[1], "w"))
"""
    out = Path(models["qwen"]).parent / "topk.json"
    subprocess.run(
        [sys.executable, "-c", code, str(out)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    content = json.loads(out.read_text())
    model = AutoModelForCausalLM.from_pretrained(models["qwen"], dtype=torch.float32).eval()
    with torch.no_grad():
        table = model(input_ids=torch.arange(20)[None], use_cache=False).logits[0].log_softmax(-1)
    values, indices = table[:-1].topk(30)
    assert content["vocab_size"] == model.config.vocab_size
    assert content["ids"][1:] == indices.tolist() and content["ids"][0] == [0] * 30
    np.testing.assert_allclose(content["logprobs"][1:], values.numpy(), atol=1e-5)
    assert "a text of 64 tokens, and the engine holds 63" in content["refused"][0]
    assert "algorithm.signal='full'" in content["refused"][1]
    assert content["heads"] == [{"head_dtype": "float32"}, None, {"head_dtype": "model", "a": 1}]


def test_a_vllm_server_gives_the_same_numbers(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TEACHER_KEY", "key-of-the-test")
    ids = [rollout.token_ids for rollout in make_group(LENGTHS, 1).rollouts]
    cfg = TeacherWorkerConfig(api_key_env="TEACHER_KEY", server_retries=1)
    with vllm_server(models["qwen"], Dtype.float32, tmp_path / "server.log", "key-of-the-test", 256) as url:
        teacher = Teacher(key="teachers.math", path=url, backend=TeacherBackend.server, model="teacher")
        rows = check_teachers({"math": teacher}, ModelConfig(path=models["qwen"]), cfg, 255)
        assert {row.gate for row in rows if row.verdict is Verdict.ok} == {
            *("server", "context", "vocabulary", "special_tokens", "tokenizer", "shared")
        }
        assert {row.verdict for row in rows} == {Verdict.ok, Verdict.unmeasured}
        with pytest.raises(UserError, match="its context is 256"):
            check_teachers({"math": teacher}, ModelConfig(path=models["qwen"]), cfg, 256)
        with pytest.raises(UserError, match="HTTP 401"):
            ServerScorer(teacher, TeacherWorkerConfig(server_retries=0)).score(ids, 0)
        scorer = ServerScorer(teacher, cfg)
        for _ in range(2):
            scores = scorer.score(ids, 0)
            found = gaps([s.logprobs for s in scores], models["qwen"], ids, Dtype.float32)
            print(f"\nserver float32: mean {found.mean():.2e} max {found.max():.2e} of {found.size} tokens")
            assert found.mean() < MEAN_BAR
        top = scorer.score(ids[:1], 0, signal="top_k", top_k=5)[0]
        assert top.topk_logprobs is not None and (np.diff(top.topk_logprobs[1:], axis=1) <= 0).all()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start model, three teachers near it, one far from it, an adapter, prompts of two domains."""
    import peft

    folder = tmp_path_factory.mktemp("swap")
    start = tiny_qwen3_moe(folder / "start", seed=1, num_layers=2)
    for name, scale in (("near_a", 0.01), ("near_b", 0.02), ("far", 6.0)):
        model = AutoModelForCausalLM.from_pretrained(start)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += scale * parameter.std() * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        for file in start.glob("*token*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
        (folder / name / "chat_template.jinja").write_bytes((start / "chat_template.jinja").read_bytes())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(start), config)
    for name, parameter in adapted.named_parameters():
        parameter.data *= 0.1 if "lora_B" in name else 1.0  # far below the limit: 60 tokens decide
    adapted.save_pretrained(folder / "adapter")
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(64)]
    rows = [
        {"messages": [{"role": "user", "content": w}], "domain": ["math", "code"][i % 2]}
        for i, w in enumerate(words)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMMAND = [
    "mopd", "name=swap", "model.path=start", "data.path=prompts.jsonl", "algorithm.steps=24", "algorithm.prompts_per_step=16",
    "teachers.default.path=near_a", "teachers.code.adapter=adapter", "learner.lr=1e-4", "learner.warmup_steps=0",
    "checkpoint.every_steps=2", "algorithm.overlong=keep", "rollout.max_new_tokens=8", "rollout.max_model_len=64",
    "rollout.vllm.max_num_seqs=64", "teacher_workers.max_initial_kl=0.5", "teacher_workers.accept=[foreign]", "tracking.wandb=disabled", "ray.object_store_gb=0.2",
]  # fmt: skip


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    with (folder / "posttrain.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "posttrain.cli", *COMMAND, *overrides],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )


def wait_for(folder: Path, process: subprocess.Popen[bytes], condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, (folder / "posttrain.log").read_text()[-5000:]
        assert time.monotonic() < deadline, (folder / "posttrain.log").read_text()[-5000:]
        time.sleep(0.02)


def test_a_start_that_the_preflight_refuses_binds_nobody(user: Path) -> None:
    """What it really leaves is what is moved aside when the teacher is mended."""
    refused = ["name=refused", "teachers.default.path=far", "tracking.wandb=offline"]
    assert start(user, *refused).wait() == 2
    assert (user / "runs/refused/preflight.json").exists(), "by its scores, with everything up"
    plan = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *COMMAND, "name=refused", "dry_run=true"],
        cwd=user, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    assert "with teachers.default.path='far', which ended before its first step" in " ".join(
        plan.stdout.split()
    )


def test_teachers_change_during_a_run_and_survive_its_death(user: Path) -> None:
    """A bad swap changes nothing, a far teacher is taken back, a near one stays; `kill -9`; the resumed run has it."""
    run = user / "runs/swap"

    def events(kind: str) -> list[dict[str, Any]]:
        return (
            [e for e in read_jsonl(run / "events.jsonl") if e["kind"] == kind]
            if (run / "events.jsonl").exists()
            else []
        )

    def in_record() -> dict[str, str]:
        record = json.loads((run / "teachers.json").read_text())
        return {domain: teacher["path"] for domain, teacher in record["teachers"].items()}

    process = start(user)
    wait_for(user, process, lambda: {e["domain"] for e in events("preflight")} == {"math", "code"})
    (run / "teachers.yaml").write_text("math: far\n")
    wait_for(user, process, lambda: len(events("teacher_swap_refused")) == 1)
    (run / "teachers.yaml").write_text("math: near_b\ncode: {path: near_a}\n")
    swapped = {"math": "near_b", "code": "near_a"}
    wait_for(user, process, lambda: (run / "teachers.json").exists() and in_record() == swapped)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start(user)
    assert process.wait() == 0, (user / "posttrain.log").read_text()[-5000:]

    [refused] = events("teacher_swap_refused")
    assert "far" in refused["path"] and "max_initial_kl=0.5" in refused["message"] and refused["version"] == 3
    swaps = [(e["domain"], e["path"], e["version"]) for e in events("teacher_swap")]
    assert swaps == [("math", "far", 2), ("code", "near_a", 4), ("math", "near_b", 4)]
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[0]["teacher/version"] == 1 and rows[-1]["teacher/version"] == 4
    assert in_record() == swapped
    assert (run / "model/model.safetensors").exists()
