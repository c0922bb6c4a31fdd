"""Merges: float32 sums, the layout of the first checkpoint (or the base), whole or not at all; `posttrain merge`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain import run_folder
from posttrain.cli import main
from posttrain.config import UserError
from posttrain.merge import average, task_arithmetic
from posttrain.runs.pipeline import average_merge
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


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    """Codes and scales averaged apart are not the mean of the weights."""
    whole = checkpoint(tmp_path / "x", {"w": torch.ones(4, 4)})
    codes = checkpoint(tmp_path / "y", {"w": torch.ones(4, 4).to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match=r"^models\.1=.*/y': 'w' is of type F8_E4M3; quantized"):
        average([whole, codes], str(tmp_path / "out"))
    (tmp_path / "x" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(UserError, match=r"^models\.0=.*/x': config\.json has a quantization_config"):
        average([whole], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "x" / "config.json").write_text('{"quantization_config": null}')
    average([whole], str(tmp_path / "out"))


def test_checkpoints_that_compute_otherwise_are_refused(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / name, {"w": torch.ones(2)}) for name in "xyz"]
    for name, theta in (("x", 1e4), ("y", 1e6), ("z", 1e4)):
        content = {"model_type": "unknown", "rope_theta": theta, "use_cache": name == "x"}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError,
        match=r"^models\.1=.*/y': its config\.json has rope.rope_theta=1000000.0 \('.*/x' has 10000",
    ):
        average(paths, str(tmp_path / "out"))
    average([paths[0], paths[2]], str(tmp_path / "out"))


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", {"a": torch.zeros(3)})
    with pytest.raises(UserError, match=r"^out=.*is there already"):
        average([path], path)
    with pytest.raises(UserError, match=r"^models=\[\]"):
        average([], str(tmp_path / "out"))


def test_left_over_of_a_killed_average_is_replaced(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", {"a": torch.ones(3)})
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "junk.safetensors").write_text("half")
    average([path], str(tmp_path / "out"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def values(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def test_task_arithmetic_by_hand(tmp_path: Path) -> None:
    """base 1, models 3 and -1: 1 + 0.5 * 2 + 0.25 * (-2) = 1.5. An expert bias is merged like its router, integers stay."""
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"

    def tensors(w: float, b: float) -> Tensors:
        return {"w": torch.full((2, 2), w), bias: torch.tensor([b]), "n": torch.tensor([7])}

    base = checkpoint(tmp_path / "base", tensors(1.0, 0.0))
    models = [checkpoint(tmp_path / "x", tensors(3.0, 0.5)), checkpoint(tmp_path / "y", tensors(-1.0, 0.0))]
    task_arithmetic(base, models, [0.5, 0.25], str(tmp_path / "out"))
    merged = values(tmp_path / "out")
    assert merged["w"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert merged[bias].tolist() == [0.25] and merged["n"].tolist() == [7]


def test_task_arithmetic_at_its_ends(tmp_path: Path) -> None:
    """One model with coefficient 1 is that model, with 0 the base, bit by bit; in the base's type."""
    torch.manual_seed(0)
    base = checkpoint(tmp_path / "base", {"w": torch.randn(64)})
    model = checkpoint(tmp_path / "model", {"w": torch.randn(64)})
    for coefficient, expected in ((1.0, model), (0.0, base)):
        out = tmp_path / f"out{coefficient}"
        task_arithmetic(base, [model], [coefficient], str(out))
        assert values(out)["w"].equal(values(Path(expected))["w"])
    half = checkpoint(tmp_path / "half", {"w": values(Path(base))["w"].bfloat16()})
    task_arithmetic(half, [model], [0.3], str(tmp_path / "typed"))
    wanted = (0.7 * values(Path(half))["w"].float() + 0.3 * values(Path(model))["w"]).bfloat16()
    torch.testing.assert_close(values(tmp_path / "typed")["w"], wanted)


def test_task_arithmetic_refuses_what_the_average_refuses(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"w": torch.zeros(3), "n": torch.tensor([1])})
    shape = checkpoint(tmp_path / "shape", {"w": torch.zeros(4), "n": torch.tensor([1])})
    whole = checkpoint(tmp_path / "whole", {"w": torch.zeros(3), "n": torch.tensor([2])})
    with pytest.raises(UserError, match=r"^models.0=.*'w' is \[4\] there and \[3\]"):
        task_arithmetic(base, [shape], [0.5], str(tmp_path / "out"))
    with pytest.raises(UserError, match="integer tensor 'n' differs"):
        task_arithmetic(base, [whole], [0.5], str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"^base=.*no such directory"):
        task_arithmetic(str(tmp_path / "none"), [whole], [0.5], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A working directory with a base and two models of one number each: 1, 3 and -1."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 1.0), ("x", 3.0), ("y", -1.0)):
        checkpoint(tmp_path / name, {"w": torch.tensor([value])})
    yield tmp_path
    for path in list(run_folder._locks):
        run_folder._locks.pop(path).close()


ARITHMETIC = ("merge", "method=task_arithmetic", "base=base", "models=[x,y]")


def test_merge_command(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "models=[x,y]", "name=mean"]) == 0
    assert values(three / "runs/mean/model")["w"].tolist() == [1.0]
    assert main([*ARITHMETIC, "coefficients=[0.5,0.25]"]) == 0
    assert values(three / "runs/merge/model")["w"].tolist() == [1.5]
    record = json.loads((three / "runs/merge/manifest.json").read_text())
    assert set(record["fingerprints"]) == {"base", "models.0", "models.1"}
    capsys.readouterr()
    assert main([*ARITHMETIC, "coefficients=[0.5,0.25]"]) == 0
    assert "finished before" in capsys.readouterr().out


def test_merge_dry_run_writes_nothing(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARITHMETIC, "coefficient=0.4", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "task_arithmetic of x, y with weights [0.4, 0.4]" in out and "nothing started" in out
    assert "would start" not in out and not (three / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["models=[]"], "models=[]: give at least one checkpoint directory"),
        (["models=[x,none]"], "models.1='none': no such directory"),
        (["models=[x,y]", "base=base"], "base='base': only method=task_arithmetic has a base; remove it"),
        (
            ["models=[x,y]", "coefficients=[1,2]"],
            "coefficients=[1.0, 2.0]: only method=task_arithmetic weighs",
        ),
        (["models=[x,y]", "method=task_arithmetic"], "base=None: task arithmetic needs the checkpoint"),
        ([*ARITHMETIC[1:], "coefficients=[1]"], "coefficients=[1.0]: give one for each of the 2 models"),
        (["models=[x,y]", "method=mean"], "method=mean: choose average or task_arithmetic"),
        (["models=[x,y]", "model.path=x"], "model.path='x': give what is merged as models=[DIR,DIR]"),
        (["models=[x,runs/merge/model]"], "models.1='runs/merge/model': no such directory"),
    ],
)
def test_merge_refusals_are_one_line(
    three: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["merge", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {expected}") and err.count("\n") == 1
    assert not (three / "runs").exists()


def test_a_merge_with_another_coefficient_is_another_run(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARITHMETIC, "coefficient=0.4"]) == 0
    before = values(three / "runs/merge/model")["w"]
    assert main([*ARITHMETIC, "coefficient=0.7"]) == 2
    assert "coefficient=0.7: " in capsys.readouterr().err
    assert values(three / "runs/merge/model")["w"].equal(before)
    assert main([*ARITHMETIC, "coefficient=0.7", "fresh=true"]) == 0
    assert not values(three / "runs/merge/model")["w"].equal(before)


def test_a_merge_that_holds_nan_is_refused(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "x", {"w": torch.ones(3)})
    broken = checkpoint(tmp_path / "y", {"w": torch.tensor([1.0, torch.nan, 1.0])})
    with pytest.raises(
        UserError, match=r"^models: the merge of 'w' holds NaN or infinite values, of .*/x, .*/y"
    ):
        average([whole, broken], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    large = [checkpoint(tmp_path / name, {"w": torch.full((3,), 6e4).half()}) for name in "ab"]
    zero = checkpoint(tmp_path / "zero", {"w": torch.zeros(3).half()})
    with pytest.raises(UserError, match="NaN or infinite"):  # beyond what float16 holds
        task_arithmetic(zero, large, [1.0, 1.0], str(tmp_path / "out"))
    mask = [checkpoint(tmp_path / name, {"m": torch.tensor([0.0, -torch.inf])}) for name in "cd"]
    average(mask, str(tmp_path / "out"))
    assert load_file(tmp_path / "out" / "model.safetensors")["m"].tolist() == [0.0, -torch.inf]


def test_a_pipeline_goes_on_without_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teachers that were given may be of different kinds, which nobody wants to hear after days of training."""
    folder: Any = SimpleNamespace(
        path=tmp_path, read_json=lambda name: None, write_json=lambda name, content: None
    )
    alike = [checkpoint(tmp_path / name, {"w": torch.ones(2)}) for name in "ab"]
    other = checkpoint(tmp_path / "c", {"w": torch.ones(3)})
    for name, theta in (("a", 1e4), ("b", 1e6), ("c", 1e4)):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x", "rope_theta": theta}))
    numbers = [checkpoint(tmp_path / name, {"n": torch.tensor([i])}) for i, name in enumerate("de")]
    for paths in (alike, [alike[0], other], numbers):
        assert average_merge(folder, paths) is None
        assert "average_merge: left out, because the teachers have no average (" in capsys.readouterr().out
    assert average_merge(folder, [alike[0]] * 2) == str(tmp_path / "average_merge")
