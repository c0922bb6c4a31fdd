"""What is read from a checkpoint's files before any engine: damage, fingerprints, and the refusal of a wrong teacher."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from posttrain.config import ModelConfig, TeacherConfig, TeacherWorkerConfig, UserError
from teachers.check import check_teachers
from teachers.checkpoint import INDEX_NAME, locate, read_tensors
from teachers.fingerprint import fingerprint, num_bytes
from teachers.gates import GateRow
from teachers.teacher import resolve

TENSORS = {
    "embed": np.arange(40, dtype=np.float32).reshape(10, 4),
    "head": np.ones((10, 4), np.float32),
    "norm": np.full(4, 2.0, np.float32),
}
VOCABULARY = {token: i for i, token in enumerate("abcdefgh")}


def checkpoint(folder: Path, *, tensors: dict[str, np.ndarray] = TENSORS, shards: int = 1) -> Path:
    """A folder with every file that preflight reads; the weights belong to no architecture."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10}))
    special = {"id": 8, "content": "<end>", "special": True}
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": VOCABULARY, "merges": []}, "added_tokens": [special]})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "bos_token": None}))
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return folder


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "student")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return checkpoint(
        tmp_path / "teacher", tensors={**TENSORS, "norm": np.full(4, 3.0, np.float32)}, shards=2
    )


def test_fingerprint_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one")
    two = checkpoint(tmp_path / "two", shards=2)
    assert fingerprint(str(one)) == fingerprint(str(two))
    assert num_bytes(str(one)) == num_bytes(str(two)) == 4 * (40 + 40 + 4)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": np.full(4, np.nextafter(np.float32(2), np.float32(3)), np.float32)},  # one bit
        {"head": np.ones((4, 10), np.float32)},  # same bytes, another shape
        {"norm": np.full(4, 2.0, np.float32).view(np.int32)},  # same bytes, another type
    ],
)
def test_fingerprint_sees_value_shape_and_type(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    one = checkpoint(tmp_path / "one")
    two = checkpoint(tmp_path / "two", tensors={**TENSORS, **change})
    assert fingerprint(str(one)) != fingerprint(str(two))


def test_fingerprint_cache_sees_a_rewritten_file(student: Path) -> None:
    before = fingerprint(str(student))
    save_file({**TENSORS, "norm": np.zeros(4, np.float32)}, student / "model.safetensors")
    assert fingerprint(str(student)) != before


def test_good_teachers_give_rows(student: Path, teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher, tmp_path / "copy")
    teachers = given(math=teacher, code=copy) | {"chat": TeacherConfig(path=str(student), self=True)}
    rows = check_given(student, teachers, ["math", "code", "chat", "math"])
    cells = {(row.domain, row.gate): row for row in rows}
    assert len(cells) == len(rows) and {domain for domain, _ in cells} == {"math", "code", "chat"}
    assert {key for key, row in cells.items() if row.verdict != "ok"} == {
        ("math", "shared"),
        ("code", "shared"),
    }
    assert (
        cells["math", "shared"].value == "also code" and cells["chat", "self_teacher"].value == "on purpose"
    )
    assert cells["math", "self_teacher"].value == fingerprint(str(teacher))[:8]


def given(**paths: Path | str | None) -> dict[str, TeacherConfig]:
    return {domain: TeacherConfig(path=path and str(path)) for domain, path in paths.items()}


def check(student: Path | str, *domains: str, **paths: Path | str | None) -> list[GateRow]:
    return check_given(student, given(**paths), domains)


def check_given(
    student: Path | str, teachers: dict[str, TeacherConfig], domains: Iterable[str]
) -> list[GateRow]:
    resolved = resolve(teachers, domains, str(student))
    return check_teachers(resolved, ModelConfig(path=str(student)), TeacherWorkerConfig(), 64)


def refusal(student: Path, teacher: Path) -> str:
    """The one line with which ``teacher`` is refused for domain math."""
    with pytest.raises(UserError) as caught:
        check(student, "math", math=teacher)
    message = str(caught.value)
    assert message.startswith("teachers.math.path=") and str(teacher) in message and "\n" not in message
    return message


def test_domain_without_teacher(student: Path, teacher: Path) -> None:
    with pytest.raises(
        UserError, match=r"^teachers\.code\.path=None: .*have no teacher; give teachers\.code\.path=DIR"
    ):
        check(student, "math", "code", math=teacher)
    with pytest.raises(UserError, match=r"^teachers\.code\.path=None"):
        check(student, "math", "code", math=teacher, code=None)


def test_teacher_without_domain(student: Path, teacher: Path) -> None:
    with pytest.raises(
        UserError, match=r"^teachers\.maths\.path=.*no prompt belongs to domain 'maths' \(there are math\)"
    ):
        check(student, "math", math=teacher, maths=teacher)


def test_other_vocabulary(student: Path, teacher: Path) -> None:
    swapped = VOCABULARY | {"a": 1, "b": 0}
    edit_json(teacher / "tokenizer.json", model={"type": "BPE", "vocab": swapped, "merges": []})
    assert "another vocabulary than the student's ('a' has id 1 against 0)" in refusal(student, teacher)


def test_longer_vocabulary(student: Path, teacher: Path) -> None:
    edit_json(teacher / "tokenizer.json", model={"vocab": VOCABULARY | {"z": 9}})
    assert "10 tokens against 9" in refusal(student, teacher)


def test_fewer_embedding_rows(student: Path, teacher: Path) -> None:
    edit_json(teacher / "config.json", vocab_size=9)
    assert "its vocab_size is 9, the student's 10" in refusal(student, teacher)


def test_other_end_mark(student: Path, teacher: Path) -> None:
    edit_json(teacher / "tokenizer_config.json", eos_token={"content": "h"})
    assert "its eos_token is 'h', the student's '<end>'" in refusal(student, teacher)


def test_token_special_in_one_only(student: Path, teacher: Path) -> None:
    edit_json(teacher / "tokenizer.json", added_tokens=[{"id": 8, "content": "<end>", "special": False}])
    assert "token ids [8] are special in only one" in refusal(student, teacher)


def test_other_chat_template(student: Path, teacher: Path) -> None:
    (teacher / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert "another chat template" in refusal(student, teacher)


def test_same_chat_template_in_tokenizer_config(student: Path, teacher: Path) -> None:
    (teacher / "chat_template.jinja").unlink()
    edit_json(teacher / "tokenizer_config.json", chat_template="{{ messages }}")
    assert {row.verdict for row in check(student, "math", math=teacher)} == {"ok"}


def test_missing_shard(student: Path, teacher: Path) -> None:
    (teacher / "model-00001.safetensors").unlink()
    assert "the shard model-00001.safetensors" in refusal(student, teacher)


def test_truncated_shard(student: Path, teacher: Path) -> None:
    file = teacher / "model-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated or damaged" in refusal(student, teacher)


@pytest.mark.parametrize(
    "content", [b"", b"\x01", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"{{"]
)
def test_damaged_header(student: Path, teacher: Path, content: bytes) -> None:
    (teacher / "model-00000.safetensors").write_bytes(content)
    assert "no readable header" in refusal(student, teacher)


def test_tensor_of_the_index_that_no_shard_holds(student: Path, teacher: Path) -> None:
    index = json.loads((teacher / INDEX_NAME).read_text())
    index["weight_map"]["lost"] = "model-00000.safetensors"
    (teacher / INDEX_NAME).write_text(json.dumps(index))
    assert "promises 1 tensors that no shard holds (first: lost)" in refusal(student, teacher)


def test_missing_config(student: Path, teacher: Path) -> None:
    (teacher / "config.json").unlink()
    assert "config.json is missing" in refusal(student, teacher)


def test_pickled_weights(student: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal(student, folder)


@pytest.mark.parametrize("path", ["nowhere", "no/where", "../no/where"])
def test_missing_directory(student: Path, path: str) -> None:
    with pytest.raises(UserError, match=rf"^teachers\.math\.path='{path}': no such directory"):
        check(student, "math", math=path)


def test_a_hub_id_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--model"
    (repo / "refs").mkdir(parents=True)
    other = {**TENSORS, "norm": np.zeros(4, np.float32)}
    for ref, commit, tensors in (("main", "a" * 40, TENSORS), ("v2", "b" * 40, other)):
        (repo / "refs" / ref).write_text(commit)
        checkpoint(repo / "snapshots" / commit, tensors=tensors)
    assert locate("owner/model", "model.path").name == "a" * 40
    assert locate("owner/model", "model.path", "v2").name == "b" * 40
    assert fingerprint("owner/model") != fingerprint("owner/model", "model.path", "v2")
    with pytest.raises(UserError, match=r"^model\.path='owner/model': .* not in .* at revision 'v3'"):
        locate("owner/model", "model.path", "v3")


def test_missing_student_names_its_own_key(teacher: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.path='gone': no such directory"):
        check("gone", "math", math=teacher)


def test_tensor_entries_point_at_the_bytes(teacher: Path) -> None:
    entry = read_tensors(teacher, "path")["norm"]
    assert np.frombuffer(entry.file.read_bytes()[entry.start : entry.end], np.float32).tolist() == [3.0] * 4


def test_driver_side_imports_no_torch() -> None:
    code = "import sys, teachers.preflight, teachers.pool; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
