"""The learner on real Ray and DeepSpeed against plain PyTorch, and what must survive a save, a resume, a reset.

One group of one rank and one of two are started; everything else is a reset of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.config import Dtype, LearnerConfig, ModelConfig, Schedule, UserError
from posttrain.learner.errors import RecordError
from posttrain.learner.group import LearnerGroup
from posttrain.learner.moe.replay import RouterReplay
from posttrain.records import LossSettings, SampleRef, TeacherScores, TrainingSample, WeightBundle
from tests.metric_names import undocumented
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

LENGTHS = (30, 7, 19, 12, 26, 9, 3)
WEIGHT = 1 / 40
RL = LossSettings(kind="policy_gradient", beta=0.0, alpha=1.0, correction="off")
SFT = LossSettings(kind="sft")
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3_moe": tiny_qwen3_moe(folder / "qwen3_moe", num_layers=2),
        "mimo": tiny_mimo(folder / "mimo", num_layers=3),
        "dense": tiny_dense(folder / "dense", num_layers=1),
    }


def config(**options: Any) -> LearnerConfig:
    # A large epsilon: Adam's first step would otherwise be the sign of gradients that differ in their last bit only.
    base: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "warmup_steps": 0, "max_tokens_per_micro_batch": 4000}
    base["max_route_distance"] = None  # the routes of these batches are random
    if options.get("zero_stage") == 3:
        base["deepspeed"] = PARTITIONED
    return LearnerConfig(**{**base, **options})


@pytest.fixture(scope="module")
def one(local_ray: None, models: dict[str, Path]) -> Iterator[LearnerGroup]:
    group = LearnerGroup.start(config(), ModelConfig(path=str(models["qwen3_moe"])), 10, 0)
    yield group
    group.shutdown()


@pytest.fixture(scope="module")
def two(local_ray: None, models: dict[str, Path]) -> Iterator[LearnerGroup]:
    group = LearnerGroup.start(config(num_ranks=2), ModelConfig(path=str(models["qwen3_moe"])), 10, 0)
    yield group
    group.shutdown()


def make_batch(experts: tuple[int, int], seed: int = 0) -> list[TrainingSample]:
    """Samples whose recorded routes name experts from ``range(*experts)`` only."""
    rng = np.random.default_rng(seed)
    batch = []
    for length in LENGTHS:
        mask = np.zeros(length, bool)
        mask[length // 3 + 1 :] = True
        pool = np.arange(*experts)
        routes = np.stack([rng.permutation(pool)[:2] for _ in range(length - 1)])[:, None, :]
        batch.append(
            TrainingSample(
                token_ids=rng.integers(0, 90, length).astype(np.int32),
                loss_mask=mask,
                weights=np.ones(length, np.float32),
                rollout_logprobs=np.where(mask, -4.0, 0.0).astype(np.float32),
                policy_versions=np.zeros(length, np.int32),
                orm_advantages=np.full(length, rng.normal(), np.float32),
                routed_experts=routes.astype(np.uint8),
                domain=f"d{length % 2}",
            )
        )
    return batch


def references(batch: list[TrainingSample], weight: float = WEIGHT) -> list[SampleRef]:
    source = ray.put(batch)
    return [
        SampleRef(source_ref=source, index=i, num_tokens=len(s.token_ids), weight=weight, domain=s.domain)
        for i, s in enumerate(batch)
    ]


def tensors(bundle: WeightBundle) -> Tensors:
    return {
        name: torch.from_numpy(raw.copy())
        .view(getattr(torch, bundle.dtypes[name]))
        .reshape(bundle.shapes[name])
        for name, raw in bundle.tensors.items()
    }


def exported(group: LearnerGroup, dtype: Dtype = Dtype.float32) -> Tensors:
    return tensors(ray.get(group.export_weights(0, dtype)))


# Expert 7 gets every kind of token in the first step and none in the second; expert 0 the other way round.
BATCHES = [make_batch((1, 8), seed=0), make_batch((0, 7), seed=1)]


def plain_training(
    path: Path,
    folder: Path,
    batches: list[list[TrainingSample]],
    sample_loss: Callable[[int, TrainingSample, torch.Tensor], torch.Tensor],
) -> tuple[list[float], list[float], Tensors]:
    """Losses, gradient norms and weights in plain PyTorch: one document at a time, no DeepSpeed.

    ``sample_loss`` gets index, sample and the logprobs [N, V] that predict its loss tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    replay = RouterReplay.attach(model)
    assert replay is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0)
    losses, norms = [], []
    for batch in batches:
        total = 0.0
        for index, sample in enumerate(batch):
            ids = torch.from_numpy(sample.token_ids).long()[None]
            live = np.full((1, *sample.routed_experts.shape[1:]), -1)
            routes = torch.from_numpy(np.concatenate([sample.routed_experts.astype(np.int64), live]))[None]
            with replay.routes(routes):
                logits = model(ids, use_cache=False).logits[0, :-1]
                logprobs = torch.log_softmax(logits, -1)[torch.from_numpy(sample.loss_mask[1:])]
                loss = sample_loss(index, sample, logprobs)
                loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    model.save_pretrained(folder)
    return losses, norms, load_file(folder / "model.safetensors")


def chosen(sample: TrainingSample, logprobs: torch.Tensor) -> torch.Tensor:
    """[N] of the loss tokens."""
    targets = torch.from_numpy(sample.token_ids[sample.loss_mask]).long()
    return logprobs.gather(1, targets[:, None])[:, 0]


@pytest.fixture(scope="module")
def plain(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[float], Tensors]:
    """The two steps of `BATCHES`."""

    def loss(index: int, sample: TrainingSample, logprobs: torch.Tensor) -> torch.Tensor:
        return -(WEIGHT * float(sample.orm_advantages[0]) * chosen(sample, logprobs)).sum()

    return plain_training(models["qwen3_moe"], tmp_path_factory.mktemp("plain"), BATCHES, loss)


def train(
    group: LearnerGroup, settings: LossSettings = RL, batches: list[Any] | None = None
) -> list[dict[str, float]]:
    return [
        group.train_step(references(batch), settings, step)
        for step, batch in enumerate(batches or BATCHES, start=1)
    ]


CUTS = [
    ("one", {}),
    ("one", {"max_tokens_per_micro_batch": 30}),
    ("one", {"max_tokens_per_micro_batch": 80, "pack_tokens": 40, "zero_stage": 2}),
    ("one", {"max_tokens_per_micro_batch": 40, "zero_stage": 3, "gradient_checkpointing": True}),
    ("two", {"max_tokens_per_micro_batch": 30}),
    ("two", {"max_tokens_per_micro_batch": 30, "zero_stage": 2}),
    ("two", {"max_tokens_per_micro_batch": 80, "pack_tokens": 40, "zero_stage": 3}),
]


@pytest.mark.parametrize(
    ("ranks", "options"), CUTS, ids=[f"{ranks}-{sorted(o.items())}" for ranks, o in CUTS]
)
def test_numbers_do_not_depend_on_the_cut(
    ranks: str,
    options: dict[str, Any],
    models: dict[str, Path],
    plain: tuple[list[float], list[float], Tensors],
    request: pytest.FixtureRequest,
) -> None:
    group = request.getfixturevalue(ranks)
    num_ranks = 1 if ranks == "one" else 2
    group.reset(config(num_ranks=num_ranks, **options), ModelConfig(path=str(models["qwen3_moe"])), 10, 0)
    metrics = train(group)
    losses, norms, weights = plain
    assert [m["loss"] for m in metrics] == pytest.approx(losses, abs=2e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    assert all(m["replay/coverage"] == 1.0 and m["num_zeros/dead_experts"] == 1.0 for m in metrics)
    assert all(m["num_tokens"] == sum(LENGTHS) for m in metrics)
    ours = exported(group)
    assert ours.keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(
            ours[name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


TOP_K = 12
PADDING = 5  # rows of the teachers' heads beyond the student's vocabulary


def teachers(batch: list[TrainingSample], vocab: int) -> tuple[list[TeacherScores], dict[int, np.ndarray]]:
    """Scores by two teachers of other hidden sizes than the student's, and their heads."""
    g = torch.Generator().manual_seed(0)
    heads = {number: torch.randn(vocab + PADDING, width, generator=g) for number, width in ((0, 5), (4, 24))}
    scores = []
    for i, sample in enumerate(batch):
        number = 4 if i % 3 else 0
        head, mask = heads[number], torch.from_numpy(sample.loss_mask)
        hidden = torch.randn(int(mask.sum()), head.shape[1], generator=g) / head.shape[1] ** 0.5
        logprobs = (hidden @ head.T).log_softmax(-1)
        top = logprobs.topk(TOP_K)
        own = np.zeros(len(mask), np.float32)
        own[sample.loss_mask] = chosen(sample, logprobs).numpy()
        scores.append(
            TeacherScores(
                teacher="t",
                logprobs=own,
                topk_ids=top.indices.numpy().astype(np.int32),
                topk_logprobs=top.values.numpy(),
                hidden=hidden.numpy(),
                head_id=number,
            )
        )
    return scores, {number: head.numpy() for number, head in heads.items()}


def divergences(
    logprobs: torch.Tensor, scores: TeacherScores, heads: dict[int, np.ndarray], signal: str
) -> torch.Tensor:
    """[N] as the definitions say, one token at a time."""
    vocab = logprobs.shape[1]
    if signal == "full":
        other = torch.from_numpy(scores.hidden @ heads[scores.head_id][:vocab].T).log_softmax(-1)
        return (logprobs.exp() * (logprobs - other)).sum(-1)
    rows = []
    for own, ids, values in zip(logprobs, scores.topk_ids, scores.topk_logprobs, strict=True):
        inside = ids < vocab
        p, q = own[torch.from_numpy(ids[inside]).long()].exp(), torch.from_numpy(values[inside]).exp()
        if signal == "top_k":
            rows.append((p * (p / q).log() - p + q).sum())
        else:
            p, q = p / p.sum(), q / q.sum()
            rows.append((p * (p / q).log()).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("signal", ["top_k", "top_k_renorm", "full"])
def test_signals_do_not_depend_on_the_cut(
    signal: str, one: LearnerGroup, two: LearnerGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    model = ModelConfig(path=str(models["qwen3_moe"]))
    batch = BATCHES[0]
    vocab = one.info.vocab_size
    scores, heads = teachers(batch, vocab)
    assert any((score.topk_ids >= vocab).any() for score in scores)
    settings = LossSettings(
        kind="policy_gradient", beta=0.7, alpha=0.5, signal=signal, top_k=TOP_K, ratio_low=0.6
    )
    dropped, kls = [], []

    def loss(index: int, sample: TrainingSample, logprobs: torch.Tensor) -> torch.Tensor:
        target = chosen(sample, logprobs)
        ratio = (target.detach() + 4.0).exp()
        keep = (ratio >= 0.6).float()
        kl = divergences(logprobs, scores[index], heads, signal)
        dropped.extend((1 - keep).tolist())
        kls.extend(kl.tolist())
        outcome = 0.5 * float(sample.orm_advantages[0]) * ratio * target
        return (WEIGHT * keep * (0.7 * kl - outcome)).sum()

    losses, norms, weights = plain_training(models["qwen3_moe"], tmp_path / "plain", [batch], loss)
    assert 0.05 < np.mean(dropped) < 0.95
    refs = references(batch)
    scores_ref = ray.put(scores)
    for i, ref in enumerate(refs):
        ref.teacher_ref, ref.teacher_index = scores_ref, i
    head_refs = {number: ray.put(head) for number, head in heads.items()}
    for num_ranks, group, options in (
        (1, one, {"max_tokens_per_micro_batch": 30, "logprob_chunk_tokens": 3}),
        (2, two, {"max_tokens_per_micro_batch": 80, "pack_tokens": 40, "zero_stage": 3}),
    ):
        group.reset(config(num_ranks=num_ranks, **options), model, 10, 0)
        if signal == "full":
            with pytest.raises(RecordError, match=r"^sample \d .*the LM head that turns them into logits"):
                group.train_step(refs, settings, 1)
            with pytest.raises(UserError, match=r"^algorithm\.signal='full': .* has 20 rows"):
                group.set_heads({0: ray.put(heads[0][:20])})
        group.set_heads(head_refs)
        metrics = group.train_step(refs, settings, 1)
        assert metrics["loss"] == pytest.approx(losses[0], abs=2e-5)
        assert metrics["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
        assert metrics["clip/ratio_dropped"] == pytest.approx(np.mean(dropped))
        assert metrics["teacher/kl"] == pytest.approx(np.mean(kls), rel=1e-4)
        assert {"d0/teacher_kl", "d1/teacher_kl", "teacher/k3"} <= metrics.keys()
        assert ("teacher/topk_mass" in metrics) == (signal != "full")
        ours = exported(group)
        for name, expected in weights.items():
            torch.testing.assert_close(
                ours[name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["ppo_clip", "gspo"])
def test_metrics_are_the_same_for_one_and_two_ranks(
    kind: str, one: LearnerGroup, two: LearnerGroup, models: dict[str, Path]
) -> None:
    """The ratio of gspo is that of whole sequences, also where ranks and micro-batches share a batch."""
    model = ModelConfig(path=str(models["qwen3_moe"]))
    settings = LossSettings(kind=kind, beta=0.0, alpha=1.0)
    one.reset(config(), model, 10, 0)
    two.reset(config(num_ranks=2, zero_stage=2, max_tokens_per_micro_batch=30), model, 10, 0)
    first, second = (g.train_step(references(BATCHES[0]), settings, 1, updates=2) for g in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        assert second[name] == pytest.approx(first[name], abs=1e-4, rel=1e-3), name
    assert {"mismatch/k3", "clip/ppo", "balance/max_vio", "entropy", "d0/entropy", "lr"} <= first.keys()
    assert undocumented(first) == set()


def test_bad_records_and_gradients_change_nothing(two: LearnerGroup, models: dict[str, Path]) -> None:
    two.reset(config(num_ranks=2, zero_stage=3), ModelConfig(path=str(models["qwen3_moe"])), 10, 0)
    two.train_step(references(BATCHES[0]), RL, 1)
    before = exported(two)
    bare = make_batch((0, 8))
    bare[2].rollout_logprobs = None  # one rank alone sees it, both must answer
    with pytest.raises(RecordError, match=r"^sample 2 \(d1\): rollout_logprobs is missing"):
        two.train_step(references(bare), RL, 2)
    assert two.train_step(references(BATCHES[1], weight=float("inf")), RL, 2)["skipped"] == 1.0
    after = exported(two)
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = two.train_step(references(BATCHES[1]), RL, 2)
    assert np.isfinite(metrics["loss"]) and metrics["replay/coverage"] == 1.0


def test_a_rollout_without_routes_stays_out_and_many_stop_the_step(
    two: LearnerGroup, models: dict[str, Path]
) -> None:
    model = ModelConfig(path=str(models["qwen3_moe"]))
    bare, whole = make_batch((0, 8)), make_batch((0, 8))
    assert bare[2].routed_experts is not None
    bare[2].routed_experts = bare[2].routed_experts[:-1]
    two.reset(config(num_ranks=2, zero_stage=2), model, 10, 0)
    dropped = two.train_step(references(bare), RL, 1)
    assert dropped["replay/rejected"] == 1.0
    (reason,) = two.rejected().items()
    assert reason[0] == "sample 2 (d1)" and reason[1].startswith("routed_experts has shape (17, 1, 2)")
    weights = exported(two)
    two.reset(config(num_ranks=2, zero_stage=2), model, 10, 0)
    left_out = two.train_step(references(whole[:2] + whole[3:]), RL, 1)
    assert left_out["loss"] == pytest.approx(dropped["loss"], rel=1e-5)
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in exported(two).items())
    bare[4].routed_experts = None
    weights = exported(two)
    with pytest.raises(RecordError, match=r"^2 of 7 rollouts .* sample 4 \(d0\): routed_experts is missing"):
        two.train_step(references(bare), RL, 2)
    assert all(torch.equal(weights[name], tensor) for name, tensor in exported(two).items())
    assert two.train_step(references(bare), SFT, 2)["num_tokens"] > 0  # SFT replays nothing


def test_logprobs_and_mismatch(two: LearnerGroup, models: dict[str, Path]) -> None:
    two.reset(
        config(num_ranks=2, zero_stage=3, max_tokens_per_micro_batch=40),
        ModelConfig(path=str(models["qwen3_moe"])),
        10,
        0,
    )
    batch = make_batch((0, 8))
    ids = [sample.token_ids for sample in batch]
    live = two.logprobs(ids)
    replayed = two.logprobs(ids, [sample.routed_experts for sample in batch])
    model = AutoModelForCausalLM.from_pretrained(models["qwen3_moe"], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[0]).long()[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids[0]).long()[1:, None])[:, 0]
    np.testing.assert_allclose(live[0][1:], expected.numpy(), atol=1e-5)
    assert live[0][0] == 0.0 and [len(x) for x in live] == list(LENGTHS)
    for sample, values in zip(batch, replayed, strict=True):
        sample.rollout_logprobs = values
    numbers = two.mismatch(references(batch))
    assert numbers["coverage"] == 1.0 and numbers["k3"] < 1e-10 and numbers["f1.1"] == 0.0
    assert numbers["k3_without"] > 1e-6 and 0.3 < numbers["route_mismatch"] <= 1.0


def mimo_config(**options: Any) -> LearnerConfig:
    return config(
        expert_bias_rate=1e-2,
        aux_loss_coef=1e-2,
        schedule=Schedule.cosine,
        weight_decay=0.1,
        eps=1e-8,
        max_tokens_per_micro_batch=60,
        **options,
    )


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_resume_and_reset_are_exact(
    zero_stage: int, two: LearnerGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    learner = mimo_config(num_ranks=2, zero_stage=zero_stage)
    model = ModelConfig(path=str(models["mimo"]))
    batches = [make_batch((0, 8), seed) for seed in range(4)]
    two.reset(learner, model, 4, 0)
    first = [two.train_step(references(b), SFT, s) for s, b in enumerate(batches[:2], 1)]
    two.save_checkpoint(tmp_path / "state")
    rest = [two.train_step(references(b), SFT, s) for s, b in enumerate(batches[2:], 3)]
    whole = exported(two)
    assert whole["model.layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0

    two.load_checkpoint(tmp_path / "state")
    again = [two.train_step(references(b), SFT, s) for s, b in enumerate(batches[2:], 3)]
    resumed = exported(two)
    assert again == rest
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    two.reset(learner, model, 4, 0)
    assert [two.train_step(references(b), SFT, s) for s, b in enumerate(batches[:2], 1)] == first

    if zero_stage == 0:
        with pytest.raises(UserError, match=r"no learner state in it"):
            two.load_checkpoint(tmp_path)
        two.reset(mimo_config(num_ranks=2, zero_stage=2), model, 4, 0)
        with pytest.raises(UserError, match=r"^learner\.zero_stage=2: checkpoint .* written with 0"):
            two.load_checkpoint(tmp_path / "state")
        two.reset(config(num_ranks=2), ModelConfig(path=str(models["qwen3_moe"])), 4, 0)
        with pytest.raises(UserError, match=r"belongs to a model of another shape"):
            two.load_checkpoint(tmp_path / "state")


def test_reset_equals_a_fresh_start(models: dict[str, Path]) -> None:
    learner = mimo_config(zero_stage=2)
    model = ModelConfig(path=str(models["mimo"]))
    batches = [make_batch((0, 8), seed) for seed in range(2)]
    group = LearnerGroup.start(learner, model, 4, 0)
    assert group.info.num_moe_layers == 2 and group.info.top_k == 2 and group.info.num_experts == 8
    fresh = train(group, SFT, batches)
    weights = exported(group)
    with pytest.raises(UserError, match=r"model\.path=.*no such directory"):
        group.reset(learner, ModelConfig(path="/nowhere/model"), 4, 0)
    with pytest.raises(UserError, match=r"^learner\.num_ranks=2"):
        group.reset(mimo_config(num_ranks=2), model, 4, 0)
    group.reset(learner, model, 4, 0)
    assert train(group, SFT, batches) == fresh
    again = exported(group)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    group.shutdown()


@pytest.mark.parametrize("family", ["mimo", "dense"])
def test_saved_models_load_and_match_the_export(
    family: str, two: LearnerGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    source = models[family]
    two.reset(config(num_ranks=2, zero_stage=3), ModelConfig(path=str(source)), 4, 0)
    batch = make_batch((0, 8))
    two.train_step(references(batch), SFT, 1)
    folder = tmp_path / "model"
    two.save_model(folder)
    two.save_model(folder)  # again over the former one
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {p.name for p in folder.iterdir()} == {p.name for p in source.iterdir()}
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )

    saved, original = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in original.items()}
    whole = exported(two)
    assert saved.keys() == whole.keys() and all(torch.equal(saved[n], whole[n]) for n in saved)
    for name, tensor in exported(two, Dtype.bfloat16).items():
        exact = "mlp.gate." in name
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(tensor, saved[name].to(tensor.dtype))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = batch[0].token_ids
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids).long()[1:, None])[:, 0]
    np.testing.assert_allclose(two.logprobs([ids])[0][1:], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bfloat16(zero_stage: int, two: LearnerGroup, models: dict[str, Path]) -> None:
    learner = config(num_ranks=2, zero_stage=zero_stage, dtype=Dtype.bfloat16)
    two.reset(learner, ModelConfig(path=str(models["mimo"])), 4, 0)
    batch = make_batch((0, 8))
    losses = [two.train_step(references(batch), SFT, step)["loss"] for step in (1, 2, 3)]
    assert losses[2] < losses[1] < losses[0]
    bias = exported(two, Dtype.bfloat16)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    with pytest.raises(UserError, match=r"^learner\.zero_stage=0: with learner\.dtype=bfloat16"):
        two.reset(config(num_ranks=2, dtype=Dtype.bfloat16), ModelConfig(path=str(models["mimo"])), 4, 0)
