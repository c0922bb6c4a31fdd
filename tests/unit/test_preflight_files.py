"""The preflight of teachers from their files: every kind of wrong checkpoint is caught by its gate, right ones pass them all.

Right teachers are made as real ones are: a start checkpoint that was trained on all domains, fine-tuned further on one.
Wrong ones are a right one that was broken in one way.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers

from posttrain.config import (
    TeacherConfig,
    UserError,
)
from teachers.check import key_of
from teachers.gates import Verdict, judge, stop_on_red
from teachers.teacher import Teacher
from tests.tiny_models import tiny_mimo, tiny_qwen3_moe, tiny_teacher
from tests.unit.teacher_family import check_files, file_gates
from tests.unit.wrong_teachers import (
    SHAPE,
    WRONG,
    edit,
    edit_json,
    padded,
    permuted_vocabulary,
    stack_experts,
    stale_revision,
)


@pytest.mark.parametrize(("spoil", "gate", "words"), WRONG, ids=lambda v: getattr(v, "__name__", None))
def test_a_wrong_teacher_is_caught_by_its_gate(
    student: Path,
    right: list[Path],
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
    gate: str,
    words: str,
) -> None:
    folder = Path(shutil.copytree(right[1], tmp_path / "teacher"))
    spoil(folder, student)
    teachers = {
        "math": TeacherConfig(path=str(folder), revision="b" * 40 if spoil is stale_revision else None)
    }
    rows = judge(file_gates(str(student), teachers, ["math"]), [])
    red = {row.gate: row for row in rows if row.verdict is Verdict.red}
    # The same text then gives other ids as well.
    found = [gate, "tokenizer"] if spoil is permuted_vocabulary else [gate]
    assert list(red) == found and words in red[gate].problem + red[gate].way_out
    with pytest.raises(UserError) as caught:
        check_files(str(student), teachers, ["math"])
    line = str(caught.value)
    assert line.startswith(f"teachers.math.path={str(folder)!r}: ") and "\n" not in line
    if gate == "files":
        assert "accept" not in line
        return
    more = "".join(f"; red as well: {other} of teachers.math" for other in found[1:])
    assert line.endswith(f"(accepted by name: teacher_workers.accept=[{gate}]){more}")
    accepted = {row.gate: row.verdict for row in check_files(str(student), teachers, ["math"], accept=found)}
    assert accepted[gate] is Verdict.accepted


def test_a_bias_of_zeros_is_missed_in_a_teacher_of_the_students_origin_alone(tmp_path: Path) -> None:
    student = tiny_mimo(tmp_path / "student", seed=1)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def set_bias(folder: Path, value: float) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = torch.full_like(tensors[name], value)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    set_bias(student, 0.1)
    own = tiny_teacher(student, tmp_path / "own")
    set_bias(own, 0.0)
    foreign = Path(shutil.copytree(student, tmp_path / "foreign"))
    other = tiny_mimo(tmp_path / "other", seed=2)
    shutil.copy(other / "model.safetensors", foreign / "model.safetensors")
    teachers = {"math": TeacherConfig(path=str(own)), "code": TeacherConfig(path=str(foreign))}
    rows = judge(file_gates(str(student), teachers, list(teachers)), [])
    red = {(row.domain, row.gate): row for row in rows if row.verdict is Verdict.red}
    assert set(red) == {("math", "weights"), ("code", "foreign")}
    assert f"{name} is all zero and the student's is not" in red["math", "weights"].problem
    with pytest.raises(UserError, match=r"^teachers\.code\.path=.* red as well: weights of teachers\.math$"):
        stop_on_red(rows)
    name = "model.norm.weight"  # zeros that no model starts with
    set_bias(foreign, 0.0)
    rows = judge(file_gates(str(student), {"code": teachers["code"]}, ["code"]), [])
    assert {row.gate for row in rows if row.verdict is Verdict.red} == {"weights", "foreign"}


def test_a_bias_that_is_another_is_warned_of(tmp_path: Path) -> None:
    student = tiny_mimo(tmp_path / "student", seed=1)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(student, lambda tensors: tensors | {name: torch.linspace(-0.1, 0.1, 8)})
    own = tiny_teacher(student, tmp_path / "own")
    teachers = {"math": TeacherConfig(path=str(own))}
    [row] = [r for r in file_gates(str(student), teachers, teachers) if r.gate == "weights"]
    assert row.verdict is Verdict.ok
    edit(own, lambda tensors: tensors | {name: tensors[name].flip(0)})
    [row] = [r for r in file_gates(str(student), teachers, teachers) if r.gate == "weights"]
    assert row.verdict is Verdict.warn
    assert row.problem == f"{name} (cosine -1.00) is not the student's, while the matrices are"


def test_a_teacher_of_another_size_is_not_compared(student: Path, tmp_path: Path) -> None:
    larger = tiny_qwen3_moe(tmp_path / "larger", seed=1, **SHAPE | {"hidden": 128})
    rows = {r.gate: r for r in check_files(str(student), {"math": TeacherConfig(path=str(larger))}, ["math"])}
    assert rows["foreign"].verdict is Verdict.warn and rows["foreign"].value == "not comparable"
    assert rows["tensors"].verdict is rows["weights"].verdict is Verdict.ok


def test_self_and_shared_teachers_are_told(student: Path, right: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(right[0], tmp_path / "copy"))
    paths = {"math": right[0], "code": copy, "tool": student}
    teachers = {d: TeacherConfig(path=str(p), self=d != "math") for d, p in paths.items()}
    rows = {(r.domain, r.gate): r for r in check_files(str(student), teachers, teachers)}
    assert rows["math", "shared"].problem == "the very teacher of code too"
    assert rows["tool", "self_teacher"].value == "on purpose"
    assert "it is another model than the student" in rows["code", "self_teacher"].problem


def test_equal_ids_in_other_words_pass(student: Path, right: list[Path], tmp_path: Path) -> None:
    """tokenizer.json may be written otherwise, as versions of the library do."""
    folder = Path(shutil.copytree(right[0], tmp_path / "teacher"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = {r.gate: r for r in check_files(str(student), {"math": TeacherConfig(path=str(folder))}, ["math"])}
    assert rows["tokenizer"].value.startswith("same ids on")


def right_with(folder: Path, source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, folder / name))


def test_right_teachers_in_other_files_give_no_alarm(
    student: Path, right: list[Path], tmp_path: Path
) -> None:
    """Shards, types, padding, layout of experts, template with a comment, a tokenizer written anew."""
    made = {
        name: right_with(tmp_path, right[3], name)
        for name in ("half", "shards", "pads", "stacks", "comments")
    }
    edit(made["half"], lambda tensors: {name: t.half() for name, t in tensors.items()})
    tensors = load_file(made["shards"] / "model.safetensors")
    (made["shards"] / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, made["shards"] / file)
    (made["shards"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    padded(made["pads"])
    stack_experts(made["stacks"])
    template = made["comments"] / "chat_template.jinja"
    template.write_text("{# version 2 #}" + template.read_text().replace(" -%}", "   -%}", 1))
    teachers = {name: TeacherConfig(path=str(path)) for name, path in made.items()}
    rows = file_gates(str(student), teachers, teachers)
    assert [row.line() for row in rows if row.verdict is not Verdict.ok and row.gate != "shared"] == []
    compared = {row.domain: row.number for row in rows if row.gate == "foreign"}
    assert all(value is not None and value > 0.9 for value in compared.values()), compared


def test_padding_rows_of_a_vocabulary_say_nothing(student: Path, right: list[Path], tmp_path: Path) -> None:
    """Random in the student, zero in the teacher: nobody samples them."""
    ours, theirs = (
        right_with(tmp_path, path, name) for path, name in ((student, "ours"), (right[3], "theirs"))
    )
    padded(theirs)
    padded(ours)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    edit(ours, lambda t: t | {n: torch.cat([t[n][:101], torch.randn(27, 64)]) for n in names})
    rows = file_gates(str(ours), {"math": TeacherConfig(path=str(theirs))}, ["math"])
    assert [row.line() for row in rows if row.verdict is not Verdict.ok] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda theirs, ours: {n: ours[n] if ".layers.1." in n else t for n, t in theirs.items()},
            "1 of 2 layers",
        ),
        (
            lambda theirs, ours: ours | {"model.norm.weight": theirs["model.norm.weight"]},
            "all tensors but model.norm",
        ),
    ],
    ids=["layer", "all_but_one"],
)
def test_parts_that_are_the_students_are_warned_of(
    student: Path, right: list[Path], tmp_path: Path, change: Any, words: str
) -> None:
    folder = right_with(tmp_path, right[3], "teacher")
    ours = load_file(student / "model.safetensors")
    edit(folder, lambda tensors: change(tensors, ours))
    rows = {r.gate: r for r in check_files(str(student), {"math": TeacherConfig(path=str(folder))}, ["math"])}
    assert rows["weights"].verdict is Verdict.warn and rows["weights"].problem.startswith(words)
    assert "bit by bit" in rows["weights"].problem


def test_stacked_experts_are_compared_one_by_one(student: Path, right: list[Path], tmp_path: Path) -> None:
    ours, theirs = (
        right_with(tmp_path, path, name) for path, name in ((student, "ours"), (right[3], "theirs"))
    )
    for folder in (ours, theirs):
        stack_experts(folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit(theirs, lambda t: t | {name: t[name][[0, 1, 3, 2]]})
    rows = {r.gate: r for r in file_gates(str(ours), {"math": TeacherConfig(path=str(theirs))}, ["math"])}
    assert rows["weights"].verdict is Verdict.red
    assert re.match(rf"expert [23] of {name} is not the student's \(cosine ", rows["weights"].problem)


def test_an_unknown_setting_is_a_warning(student: Path, right: list[Path], tmp_path: Path) -> None:
    folder = right_with(tmp_path, right[3], "teacher")
    edit_json(
        folder / "config.json", lambda c: c.update(head_gain=2.0, hidden_mode="b", rope_interleave=True)
    )
    ours = right_with(tmp_path, student, "student")
    edit_json(ours / "config.json", lambda c: c.update(hidden_mode="a"))
    rows = {r.gate: r for r in check_files(str(ours), {"math": TeacherConfig(path=str(folder))}, ["math"])}
    assert rows["config"].verdict is Verdict.warn
    assert rows["config"].problem.endswith(
        "hidden_mode=b (student a), rope_interleave=True (student not given)"
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None}, {}),
        (
            {"use_sliding_window": False, "sliding_window": 131072},
            {"use_sliding_window": False, "sliding_window": None},
        ),
        ({"num_local_experts": None, "num_experts": 4}, {"num_local_experts": 4}),
        ({"head_dim": None}, {"head_dim": 32}),
        ({"max_position_embeddings": 128}, {"max_position_embeddings": 4096}),
        ({"auto_map": {"AutoConfig": "a.B"}, "id2label": {"0": "a"}}, {"quantization_config": {"bits": 8}}),
    ],
    ids=["old_rope", "unused_window", "old_name", "default", "context", "not_of_the_forward"],
)
def test_one_config_in_other_words_is_no_alarm(
    student: Path, right: list[Path], tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """As other versions of the library write it."""
    folders = []
    for source, name, settings in ((student, "ours", ours), (right[3], "theirs", theirs)):
        folders.append(right_with(tmp_path, source, name))
        content = json.loads((folders[-1] / "config.json").read_text()) | settings
        content = {key: value for key, value in content.items() if value is not None}
        (folders[-1] / "config.json").write_text(json.dumps(content))
    rows = file_gates(str(folders[0]), {"math": TeacherConfig(path=str(folders[1]))}, ["math"])
    [row] = [r for r in rows if r.gate == "config"]
    assert row.verdict is Verdict.ok, row.problem


def test_equal_tensors_with_another_config_are_two_teachers(right: list[Path], tmp_path: Path) -> None:
    other = right_with(tmp_path, right[3], "other")
    edit_json(other / "config.json", lambda c: c.update(num_experts_per_tok=1, transformers_version="1"))
    same = right_with(tmp_path, right[3], "same")
    edit_json(same / "config.json", lambda c: c.update(dtype="bfloat16", use_cache=False))
    keys = [key_of(Teacher(key="teachers.math", path=str(path))) for path in (right[3], other, same)]
    assert keys[0] == keys[2] != keys[1]
