"""The policy module gives the logprobs of a plain forward, packed or not, and refuses what it cannot do."""

from __future__ import annotations

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
