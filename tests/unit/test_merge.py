"""Parameter average: float32 sums, the layout of the first checkpoint, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.config import UserError
from posttrain.merge import average
from teachers.checkpoint import INDEX_NAME
from tests.tiny_models import tiny_mimo

Tensors = dict[str, torch.Tensor]


def checkpoint(folder: Path, tensors: Tensors, shards: list[list[str]] | None = None) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shards is None:
        save_file(tensors, folder / "model.safetensors")
    else:
        for i, names in enumerate(shards):
            save_file({name: tensors[name] for name in names}, folder / f"part-{i}.safetensors")
        weight_map = {name: f"part-{i}.safetensors" for i, names in enumerate(shards) for name in names}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)


def test_mean_of_three_with_other_shards(tmp_path: Path) -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, 2.0]), "n": torch.tensor([7, 8])}
    paths = [
        checkpoint(tmp_path / "x", base, [["a"], ["b", "n"]]),
        checkpoint(tmp_path / "y", {**base, "a": base["a"] + 3}),
        checkpoint(tmp_path / "z", {**base, "b": base["b"] * 4}, [["a", "b"], ["n"]]),
    ]
    average(paths, str(tmp_path / "out"))
    first, second = (load_file(tmp_path / "out" / f"part-{i}.safetensors") for i in range(2))
    torch.testing.assert_close(first, {"a": base["a"] + 1})
    torch.testing.assert_close(second, {"b": base["b"] * 2, "n": base["n"]})
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["weight_map"] == {
        "a": "part-0.safetensors",
        "b": "part-1.safetensors",
        "n": "part-1.safetensors",
    }
    assert index["metadata"]["total_size"] == 6 * 4 + 2 * 4 + 2 * 8
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out.partial").exists()
    assert load_file(Path(paths[1]) / "model.safetensors")["a"].equal(base["a"] + 3), (
        "an input was written to"
    )


def test_bfloat16_is_summed_in_float32(tmp_path: Path) -> None:
    """In bfloat16 256 + 1 is 256, so summing in that type would give 64.0."""
    values = [256.0, 1.0, 1.0, 1.0]
    paths = [
        checkpoint(tmp_path / str(i), {"w": torch.tensor([value], dtype=torch.bfloat16)})
        for i, value in enumerate(values)
    ]
    average(paths, str(tmp_path / "out"))
    result = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert (
        result.dtype == torch.bfloat16 and result.item() == torch.tensor(259 / 4, dtype=torch.bfloat16).item()
    )
    assert result.item() != 64.0


def test_average_of_tiny_models_loads(tmp_path: Path) -> None:
    paths = [str(tiny_mimo(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    average(paths, str(tmp_path / "out"))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in [*paths, str(tmp_path / "out")]]
    for name, mean in models[2].state_dict().items():
        one, two = (model.state_dict()[name].float() for model in models[:2])
        np.testing.assert_allclose(mean.float().numpy(), ((one + two) / 2).numpy(), atol=1e-7)
    assert (tmp_path / "out" / "tokenizer.json").exists() and (
        tmp_path / "out" / "chat_template.jinja"
    ).exists()


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"a": torch.zeros(3)}, r"'b' and 0 other tensors are in only one"),
        ({"a": torch.zeros(3), "c": torch.zeros(1)}, r"'b' and 1 other tensors are in only one"),
        ({"a": torch.zeros(4), "b": torch.zeros(1)}, r"'a' is \[4\] there and \[3\]"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, other: Tensors, complaint: str) -> None:
    paths = [
        checkpoint(tmp_path / "x", {"a": torch.zeros(3), "b": torch.zeros(1)}),
        checkpoint(tmp_path / "y", other),
    ]
    with pytest.raises(UserError, match=complaint):
        average(paths, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_types_may_differ_and_the_first_decides(tmp_path: Path) -> None:
    paths = [
        checkpoint(tmp_path / "x", {"a": torch.tensor([1.0, 2.0])}),
        checkpoint(tmp_path / "y", {"a": torch.tensor([2.0, 5.0]).bfloat16()}),
    ]
    average(paths, str(tmp_path / "out"))
    mean = load_file(tmp_path / "out" / "model.safetensors")["a"]
    assert mean.dtype == torch.float32 and mean.tolist() == [1.5, 3.5]


def test_integer_tensors_must_agree(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / str(i), {"n": torch.tensor([i])}) for i in range(2)]
    with pytest.raises(UserError, match="integer tensor 'n' differs"):
        average(paths, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", {"a": torch.zeros(3)})
    with pytest.raises(UserError, match=r"^out=.*is there already"):
        average([path], path)
    with pytest.raises(UserError, match=r"^paths=\[\]"):
        average([], str(tmp_path / "out"))


def test_left_over_of_a_killed_average_is_replaced(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", {"a": torch.ones(3)})
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "junk.safetensors").write_text("half")
    average([path], str(tmp_path / "out"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
