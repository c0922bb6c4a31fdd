"""Held-out loss of SFT on real DeepSpeed engines without Ray: its value on any cut, early stop, and resume."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.compose import compose
from posttrain.config import LearnerConfig, ModelConfig
from posttrain.learner.batching import RankBatch, plan
from posttrain.learner.group import LearnerGroup
from posttrain.learner.worker import LearnerWorker
from posttrain.records import SampleRef, TrainingSample
from posttrain.runs import sft
from tests.metric_names import undocumented
from tests.tiny_models import tiny_mimo

pytestmark = pytest.mark.integration
LENGTHS = (30, 7, 19, 12, 26, 9, 3)
CUTS = ((0, 4000, 0), (0, 40, 0), (0, 200, 60), (3, 40, 0))  # ZeRO stage, tokens of a micro-batch, of a row


def held_out() -> list[TrainingSample]:
    rng = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        mask = np.zeros(length, bool)
        mask[length // 3 + 1 :] = True
        ids = rng.integers(0, 90, length).astype(np.int32)
        weights = np.ones(length, np.float32)
        made.append(TrainingSample(token_ids=ids, loss_mask=mask, weights=weights, domain=f"d{length % 2}"))
    return made


def dropping(folder: Path) -> Path:
    """A model whose attention drops half of everything while it trains."""
    path = tiny_mimo(folder / "model", num_layers=3)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    return path


def measure(rank: int, num_ranks: int, port: int, path: str, out: str) -> None:
    torch.set_num_threads(1)
    worker = LearnerWorker(rank, num_ranks, 1)
    if rank == 0:
        worker._store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=True, wait_for_workers=False)
    samples = held_out()
    found = []
    for number, (zero_stage, max_tokens, pack_tokens) in enumerate(CUTS):
        learner = LearnerConfig(
            num_ranks=num_ranks,
            zero_stage=zero_stage,
            max_tokens_per_micro_batch=max_tokens,
            pack_tokens=pack_tokens,
        )
        if number == 0:
            worker.setup(("127.0.0.1", port), learner, ModelConfig(path=path), 10, 0)
        else:
            worker.reset(learner, ModelConfig(path=path), 10, 0)
        worker.engine.train()
        rows = plan(LENGTHS, num_ranks, max_tokens, pack_tokens)[rank]
        refs = {
            i: SampleRef(
                source_ref=samples, index=i, num_tokens=LENGTHS[i], weight=0.0, domain=samples[i].domain
            )
            for row in rows
            for documents in row
            for i in documents
        }
        state = torch.get_rng_state()
        batch = RankBatch(refs=refs, micro_batches=rows, domains=["d0", "d1"], num_samples=len(samples))
        found.append(worker.validate(batch))
        assert torch.equal(state, torch.get_rng_state()) and worker.engine.training
        assert all(parameter.grad is None for parameter in worker.policy.parameters())
    if rank == 0:
        Path(out).write_text(json.dumps(found))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_loss_is_that_of_a_plain_model_on_every_cut(num_ranks: int, tmp_path: Path) -> None:
    path = dropping(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sums: dict[str, list[float]] = {"all": [], "d0": [], "d1": []}
    for sample in held_out():
        ids = torch.from_numpy(sample.token_ids).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
        own = own[sample.loss_mask[1:]].tolist()
        sums["all"] += own
        sums[sample.domain] += own
    expected = {name: math.fsum(values) / len(values) for name, values in sums.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, (num_ranks, port, str(path), str(tmp_path / "found.json")), nprocs=num_ranks)
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert found == pytest.approx(expected, abs=1e-5)


class LocalGroup(LearnerGroup):
    """A group of one rank in this process; fails at step ``fails_at`` as a lost machine would."""

    def __init__(self, worker: LearnerWorker, learner: LearnerConfig, fails_at: int | None) -> None:
        super().__init__([worker], [], learner)
        self._setup = None
        self.fails_at = fails_at

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self._ranks[0], method)(*arguments)]

    def _call_each(self, method: str, first: list[Any], *arguments: Any) -> list[Any]:
        if method == "train_step" and arguments[1] == self.fails_at:
            raise ConnectionError("lost")
        return self._call(method, first[0], *arguments)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> LearnerWorker:
    made = LearnerWorker(0, 1, 1)
    made._store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    path = tiny_mimo(tmp_path_factory.mktemp("first") / "model", num_layers=2)
    made.setup(("127.0.0.1", made._store.port), LearnerConfig(), ModelConfig(path=str(path)), 1, 0)
    return made


def write(path: Path, answers: dict[str, str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "domain": d}
        for d in ("math", "code")
        for q, a in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(
    folder: Path, worker: LearnerWorker, *overrides: str, fails_at: int | None = None
) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of the run ``folder``; the learner is that of a fresh process."""
    cfg = compose(
        "sft",
        [
            *(f"name={folder.name}", f"runs_dir={folder.parent}", f"model.path={folder.parent}/model"),
            *(f"data.path={folder.parent}/train.jsonl", f"data.eval_path={folder.parent}/held_out.jsonl"),
            *("tracking.wandb=disabled", "tracking.console=false", "algorithm.batch_size=8"),
            *("learner.lr=2e-2", "learner.warmup_steps=0", "algorithm.max_tokens=40", *overrides),
        ],
    )[1]

    def learner(config: LearnerConfig, model: ModelConfig, steps: int, seed: int) -> LocalGroup:
        worker.reset(config, model, steps, seed)
        return LocalGroup(worker, config, fails_at)

    sft.run(cfg, SimpleNamespace(learner=learner))  # type: ignore[arg-type]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    names = ("step", "loss", "validation/loss/all", "validation/loss/math", "validation/loss/code")
    return [{name: row[name] for name in names if name in row} for row in rows]


def test_early_stop_keeps_the_best_weights_and_resumes_exactly(
    tmp_path: Path, worker: LearnerWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft.ray, "put", lambda value: value)
    tiny_mimo(tmp_path / "model", num_layers=2)
    write(tmp_path / "train.jsonl", {f"{i}+1=?": str(i + 1) for i in range(8)})
    write(tmp_path / "held_out.jsonl", {f"{i}+2=?": str(i + 2) for i in range(3, 7)})
    keys = ["algorithm.steps=40", "algorithm.validate_every=2", "checkpoint.every_steps=3"]
    stopping = [*keys, "algorithm.early_stop_patience=2"]

    whole = train(tmp_path / "whole", worker, *stopping)
    assert undocumented(whole[1]) == set()
    assert whole[1]["aux_loss"] > 0  # on by default
    losses = {row["step"]: row["validation/loss/all"] for row in whole if "validation/loss/all" in row}
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(2, len(whole) + 1, 2)) and len(whole) == best + 4 < 40
    by_domain = [whole[best - 1][f"validation/loss/{domain}"] for domain in ("math", "code")]
    assert losses[best] == pytest.approx(np.mean(by_domain), rel=1e-6)

    # The same run without a stop, cut off after the best step: its last weights are the best ones of the other.
    until = train(tmp_path / "until", worker, *keys, "algorithm.early_stop_patience=null")
    assert measured(until)[: len(whole)] == measured(whole) and len(until) == 40
    final = load_file(tmp_path / "until" / "model" / "model.safetensors")
    kept = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert any(not torch.equal(final[name], kept[name]) for name in kept)
    worker.reset(LearnerConfig(), ModelConfig(path=str(tmp_path / "whole" / "model")), 1, 0)
    samples = sft.held_out(compose("sft", [f"model.path={tmp_path}/model", "algorithm.max_tokens=40",
        f"data.path={tmp_path}/train.jsonl", f"data.eval_path={tmp_path}/held_out.jsonl",
        "algorithm.validate_every=1"])[1])  # fmt: skip
    again = LocalGroup(worker, LearnerConfig(), None).validate(samples)
    assert again["all"] == pytest.approx(losses[best], abs=1e-6)

    for fails_at in (best, best + 3):
        folder = tmp_path / f"lost_{fails_at}"
        with pytest.raises(ConnectionError):
            train(folder, worker, *stopping, fails_at=fails_at)
        assert measured(train(folder, worker, *stopping)) == measured(whole)
        resumed = load_file(folder / "model" / "model.safetensors")
        assert all(torch.equal(resumed[name], kept[name]) for name in kept)
    assert len(train(tmp_path / "whole", worker, *stopping)) == len(whole)  # finished
