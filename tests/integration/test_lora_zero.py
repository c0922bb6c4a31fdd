"""LoRA in the learner under ZeRO 0 to 3 against plain PEFT with torch's AdamW on one process.

Two float32 steps on a tiny MoE whose attention, experts and routers are adapted: losses, merged weights and num-zeros are
those of the reference, frozen weights do not move by a bit. In either type an export and a save leave no trace in
training, and a resume is exact.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.integration.test_skip_zero import fingerprint

pytestmark = pytest.mark.integration

CELLS = ((0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16"))
TARGETS: dict[str, Any] = {
    "target_modules": ["all-linear"],
    "target_parameters": ["experts.down_proj", "experts.gate_up_proj", "gate.weight"],
}
RANK, ALPHA, RATE, SEED, WEIGHT, LENGTH = 2, 8.0, 1e-2, 3, 1 / 12, 7
EPSILON = 1e-5  # of AdamW: gradients that are rounding alone must not decide about steps of full length
DEAD = "num_zeros/dead_experts"


def conversations(step: int, num_ranks: int) -> np.ndarray:
    """Token ids [num_ranks, LENGTH]: one short conversation per rank, so that some experts get no token."""
    return np.random.default_rng(step).integers(0, 90, (num_ranks, LENGTH)).astype(np.int32)


def batch(step: int, rank: int, num_ranks: int) -> Any:
    from posttrain.learner.batching import RankBatch
    from posttrain.records import SampleRef, TrainingSample

    sample = TrainingSample(
        token_ids=conversations(step, num_ranks)[rank],
        loss_mask=np.arange(LENGTH) > 0,
        weights=np.ones(LENGTH, np.float32),
    )
    ref = SampleRef(source_ref=[sample], index=0, num_tokens=LENGTH, weight=WEIGHT, domain="d")
    micro_batches: Any = [[[0]]]
    return RankBatch(refs={0: ref}, micro_batches=micro_batches, domains=["d"], num_samples=num_ranks)


class Reference:
    """PEFT's own model and merge, torch's AdamW, no DeepSpeed."""

    def __init__(self, folder: str) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=int(ALPHA),
            target_modules=modules,
            target_parameters=TARGETS["target_parameters"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(SEED)
            self.adapted = peft.get_peft_model(self.model, config)
        self.factors = {n: p for n, p in self.adapted.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in self.factors)
        self.optimizer = torch.optim.AdamW(
            self.factors.values(), lr=RATE, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.1
        )

    def step(self, step: int, num_ranks: int) -> tuple[float, dict[str, float]]:
        """(loss, num-zeros by name) of one step."""
        self.optimizer.zero_grad()
        ids = torch.from_numpy(conversations(step, num_ranks)).long()
        logprobs = self.adapted(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
        loss = -WEIGHT * logprobs.gather(-1, ids[:, 1:, None]).sum()
        loss.backward()
        zeros = self.zeros()
        self.optimizer.step()
        return float(loss), zeros

    def zeros(self) -> dict[str, float]:
        marks = {".experts.": "routed_expert", ".gate.": "router", "self_attn": "attention"}
        counts = dict.fromkeys(marks.values(), 0)
        alive: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            assert factor.grad is not None
            counts[next(c for mark, c in marks.items() if mark in name)] += int((factor.grad == 0).sum())
            if ".experts." in name:
                block = name.partition(".experts.")[0]
                grad = factor.grad
                own = grad.view(8, -1).T if "lora_A" in name else grad.view(len(grad) * RANK, 8)
                alive[block] = alive.get(block, torch.zeros(8, dtype=torch.bool)) | (own != 0).any(0)
        dead = sum(int((~experts).sum()) for experts in alive.values())
        named = {f"num_zeros/{name}": float(count) for name, count in counts.items()}
        return {**named, "num_zeros/total": float(sum(counts.values())), DEAD: float(dead)}

    def merged(self) -> dict[str, Tensor]:
        return dict(self.adapted.merge_and_unload().named_parameters())


def make(folder: str, num_ranks: int) -> tuple[dict[str, Tensor], list[tuple[float, dict[str, float]]]]:
    """(merged weights by the model's names, losses and zeros of two steps)."""
    reference = Reference(f"{folder}/model")
    steps = [reference.step(step, num_ranks) for step in (1, 2)]
    assert steps[0][1][DEAD] > 0, "a batch in which an expert gets no token"
    return reference.merged(), steps


def frozen(worker: Any) -> dict[str, Tensor]:
    named = worker.engine.module.named_parameters()
    return {n: getattr(p, "ds_tensor", p).detach().clone() for n, p in named if not p.requires_grad}


def learner_config(stage: int, dtype: str, num_ranks: int, **lora: Any) -> Any:
    from posttrain.config import Dtype, LearnerConfig, LoraConfig

    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    settings = {"rank": RANK, "alpha": ALPHA, **TARGETS, **lora}
    return LearnerConfig(
        zero_stage=stage,
        num_ranks=num_ranks,
        dtype=Dtype(dtype),
        lr=RATE,
        warmup_steps=0,
        weight_decay=0.1,
        eps=EPSILON,
        grad_clip=0,
        gradient_checkpointing=stage in (1, 3),
        deepspeed=whole,
        lora=LoraConfig(**settings),
    )


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    from posttrain.config import Dtype, ModelConfig
    from posttrain.learner import engine as engines
    from posttrain.learner.worker import LearnerWorker
    from posttrain.records import LossSettings

    engines.init_distributed("gloo", dist.FileStore(f"{folder}/store", num_ranks), rank, num_ranks)
    merged, steps = make(folder, num_ranks)
    base_model = dict(
        AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).named_parameters()
    )
    moved = {n.split(".")[-2] for n, p in merged.items() if (p - base_model[n]).abs().max() > 1e-3}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate"}
    worker = LearnerWorker(rank, num_ranks, 1)

    def train(step: int) -> dict[str, float]:
        return worker.train_step(batch(step, rank, num_ranks), LossSettings(kind="sft"), step, 1)

    for stage, dtype in CELLS:
        learner = learner_config(stage, dtype, num_ranks)
        worker.reset(learner, ModelConfig(path=f"{folder}/model"), 10, SEED)
        base = frozen(worker)
        for step, (loss, zeros) in enumerate(steps, start=1):
            got = train(step)
            if dtype == "float32":
                assert got["loss"] == pytest.approx(loss, rel=1e-5), (stage, step)
                assert {name: got[name] for name in zeros} == zeros, (stage, step)
        assert {n: bool(torch.equal(p, base[n])) for n, p in frozen(worker).items()} == dict.fromkeys(
            base, True
        )

        before = fingerprint(worker)
        bundle = worker.export_weights(2, Dtype.float32)
        model, state = Path(folder) / f"{stage}-{dtype}", Path(folder) / f"{stage}-{dtype}-state"
        worker.save_model(model)
        worker.save_checkpoint(state)
        assert fingerprint(worker) == before, (stage, dtype, "an export changes nothing")
        if rank == 0:
            check_files(model, bundle, merged if dtype == "float32" else None)
        later = train(3)
        last = fingerprint(worker)
        worker.load_checkpoint(state)
        assert fingerprint(worker) == before, (stage, dtype, "a resume brings everything back")
        again = train(3)
        assert fingerprint(worker) == last and again["loss"] == later["loss"], (stage, dtype)
        check_refusals(worker, learner, state, folder)
    dist.destroy_process_group()


def check_files(model: Path, bundle: Any, merged: dict[str, Tensor] | None) -> None:
    """The directory is a plain model with the weights of the bundle, and an adapter that teachers take."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from teachers.adapter import check_adapter

    written = load_file(model / "model.safetensors")
    assert (
        written.keys() == bundle.tensors.keys() == load_file(model.parent / "model/model.safetensors").keys()
    )
    check_adapter(str(model / "adapter"), str(model.parent / "model"), "teachers.d")
    loaded = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    if merged is None:
        return
    assert loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(
            loaded[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, array in bundle.tensors.items():
        assert np.array_equal(array, written[name].reshape(-1).view(torch.uint8).numpy()), name


def check_refusals(worker: Any, learner: Any, state: Path, folder: str) -> None:
    """A resume with other settings, or on other weights, is refused in one line."""
    from posttrain.config import ModelConfig, UserError

    stage, dtype, num_ranks = learner.zero_stage, learner.dtype.value, learner.num_ranks
    sizes = {p.stat().st_size for p in (state / "state").iterdir()}
    assert max(sizes) < (Path(folder) / "model/model.safetensors").stat().st_size, (
        "frozen weights are left out"
    )
    worker.learner = learner_config(stage, dtype, num_ranks, alpha=16.0)
    with pytest.raises(
        UserError, match=r"^learner\.lora\.alpha=16\.0: checkpoint .* was written with 8\.0; use that"
    ):
        worker.load_checkpoint(state)
    worker.learner = learner
    if (stage, dtype) == (3, "float32"):
        worker.reset(learner, ModelConfig(path=f"{folder}/other"), 10, SEED)
        with pytest.raises(UserError, match="other base weights"):
            worker.load_checkpoint(state)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_lora_equals_plain_peft(num_ranks: int, tmp_path: Any) -> None:
    from tests.tiny_models import tiny_qwen3_moe

    tiny_qwen3_moe(tmp_path / "model", num_layers=2)
    tiny_qwen3_moe(tmp_path / "other", seed=1, num_layers=2)
    mp.spawn(run_rank, args=(num_ranks, str(tmp_path)), nprocs=num_ranks, join=True)  # type: ignore[attr-defined]
