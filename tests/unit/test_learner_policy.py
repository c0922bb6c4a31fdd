"""The policy module gives the logprobs of a plain forward, packed or not, and refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from posttrain.config import ModelConfig, UserError
from posttrain.learner import model as loading
from posttrain.learner.batching import MicroBatch, collate
from posttrain.learner.policy import Policy, check_head, check_packable
from posttrain.records import TrainingSample
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe

LENGTHS = (40, 9, 23, 2, 31)
BUILDERS = {"mimo": tiny_mimo, "qwen3_moe": tiny_qwen3_moe, "dense": tiny_dense}


def samples() -> dict[int, TrainingSample]:
    rng = np.random.default_rng(1)
    made = {}
    for i, length in enumerate(LENGTHS):
        mask = np.ones(length, bool)
        mask[0] = False
        ids = rng.integers(0, 90, length).astype(np.int32)
        made[i] = TrainingSample(token_ids=ids, loss_mask=mask, weights=np.ones(length, np.float32))
    return made


def run(policy: Policy, batch: MicroBatch) -> dict[int, torch.Tensor]:
    arrays = (batch.input_ids, batch.position_ids, batch.target_positions, batch.target_ids)
    with torch.no_grad():
        logprobs = policy(*(torch.from_numpy(a) for a in arrays))
    return {i: logprobs[torch.from_numpy(batch.sequence_ids == i)] for i in range(len(LENGTHS))}


@pytest.mark.parametrize("family", BUILDERS)
def test_packed_and_padded_equal_one_document_alone(family: str, tmp_path: Path) -> None:
    path = BUILDERS[family](tmp_path / "model", num_layers=3)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, parameter in plain.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(0.7)
    policy = Policy(loading.load(ModelConfig(path=str(path)), path, torch.float32), 16)
    policy.model.load_state_dict(plain.state_dict())
    documents = samples()
    padded = run(policy, collate(documents, [[i] for i in documents], [""]))
    packed = run(policy, collate(documents, [[0, 1], [2, 3, 4]], [""], packed=True))
    for i, sample in documents.items():
        ids = torch.from_numpy(sample.token_ids).long()[None]
        with torch.no_grad():
            logits = plain(ids, use_cache=False).logits[0, :-1]
        alone = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(padded[i], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[i], alone, atol=1e-5, rtol=0)


def test_heads_that_do_more_than_a_product_are_refused() -> None:
    text = SimpleNamespace(final_logit_softcapping=30.0)
    capped = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(UserError, match=r"model\.path: .* changes its logits by final_logit_softcapping"):
        check_head(capped, nn.Linear(2, 3))  # type: ignore[arg-type]


def test_layers_that_would_mix_packed_documents_are_refused() -> None:
    text = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    hybrid = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(
        UserError, match=r"learner\.pack_tokens: linear_attention .* set learner\.pack_tokens=0"
    ):
        check_packable(hybrid)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["missing", "no_config", "no_weights", "cut", "tensor_gone", "quantized"])
def test_broken_checkpoints(damage: str, tmp_path: Path) -> None:
    path = tiny_dense(tmp_path / "model", num_layers=2)
    weights = path / "model.safetensors"
    if damage == "missing":
        path = tmp_path / "nowhere"
    elif damage == "no_config":
        (path / "config.json").unlink()
    elif damage == "no_weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "tensor_gone":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        config = (path / "config.json").read_text()
        (path / "config.json").write_text(
            config.replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1)
        )
    with pytest.raises(UserError) as caught:
        loading.load(ModelConfig(path=str(path)), loading.resolve(ModelConfig(path=str(path))), torch.float32)
    message = str(caught.value)
    assert message.startswith(f"model.path={str(path)!r}: ") and "\n" not in message
    if damage == "tensor_gone":
        assert "model.layers.1.mlp.up_proj.weight" in message


WINDOW = 8


def windowed(family: str, folder: Path, window: int) -> Policy:
    """A policy with sinks; layers with a window where the family has some, or is told so."""
    options = {"window": window} if family == "mimo" else {}
    path = BUILDERS[family.removesuffix("_window")](folder, num_layers=3, **options)
    if family.endswith("_window"):
        config = json.loads((path / "config.json").read_text())
        sliding = {"use_sliding_window": True, "sliding_window": window}
        (path / "config.json").write_text(json.dumps(config | sliding))
    loaded = loading.load(ModelConfig(path=str(path)), path, torch.float32)
    for name, parameter in loaded.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(0.7)
    return Policy(loaded, 16)


def losses(policy: Policy, batch: MicroBatch, position_ids: np.ndarray | None = None) -> torch.Tensor:
    positions = batch.position_ids if position_ids is None else position_ids
    arrays = (batch.input_ids, positions, batch.target_positions, batch.target_ids)
    return -policy(*(torch.from_numpy(a) for a in arrays))


@pytest.mark.parametrize("family", ["mimo", "qwen3_moe", "qwen3_moe_window"])
def test_packed_gradient_is_that_of_documents_alone(family: str, tmp_path: Path) -> None:
    """Loss and gradient in float32, full attention and sliding windows, documents longer than the window."""
    policy = windowed(family, tmp_path / "model", WINDOW)

    def loss_and_gradient(rows: list[list[int]], packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
        policy.zero_grad()
        total = 0.0
        for row in rows:
            loss = losses(policy, collate(samples(), [row], [""], packed=packed)).sum() / sum(LENGTHS)
            loss.backward()
            total += float(loss.detach())
        return total, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    alone, gradient = loss_and_gradient([[i] for i in range(len(LENGTHS))], packed=False)
    packed_loss, packed_gradient = loss_and_gradient([[0, 1, 2], [3, 4]], packed=True)
    assert packed_loss == pytest.approx(alone, abs=1e-6) and gradient.keys() == packed_gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(packed_gradient[name], value, atol=2e-6, rtol=1e-4)

    # Both controls would show: documents that are not told apart, and a window that is not applied.
    batch = collate(samples(), [[0, 1, 2]], [""], packed=True)
    second = torch.from_numpy(batch.sequence_ids == 1)
    with torch.no_grad():
        right, mixed = losses(policy, batch), losses(policy, batch, np.arange(72)[None])
        assert (right - mixed)[second].abs().max() > 1e-3
        wide = losses(windowed(family, tmp_path / "wide", 500), batch)
    assert ((right - wide).abs().max() > 1e-3) == (family != "qwen3_moe")
