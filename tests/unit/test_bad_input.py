"""Every line of "bad input" that needs no engine: one clear line, exit code 2, and nothing lost on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.cli import main
from posttrain.compose import compose
from posttrain.run_folder import RunFolder, _locks
from tests.tiny_models import tiny_mimo, tiny_teacher

USER = {"role": "user", "content": "1+1=?"}
REPLY = {"role": "assistant", "content": "2"}
GOOD = {"messages": [USER], "domain": "math", "answer": "2"}
REWARD = "rewards._target_=rewards.exact_match.ExactMatch"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_mimo(root / "student")
    tiny_teacher(root / "student", root / "teacher")
    return root


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A working directory with the student, a teacher, good prompts, and a former run that must stay as it is."""
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.open(compose("rl", [*base(), "name=former"])[1])
    folder.save(1, lambda aside: (aside / "weights.bin").write_text("one"), {"cursor": 1})
    folder.close()
    yield tmp_path
    for path in list(_locks):
        _locks.pop(path).close()


def base() -> list[str]:
    room = ["rollout.max_new_tokens=16", "rollout.max_model_len=64"]
    return ["model.path=models/student", "data.path=good.jsonl", REWARD, *room]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def refused(capsys, command: str, *arguments: str) -> str:
    """Run the command; it must end in one line with exit code 2 and leave runs/ as it was. Returns the line."""
    before = snapshot(Path("runs"))
    assert main([command, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert snapshot(Path("runs")) == before
    assert main([command, *arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    return err.removeprefix("error: ").strip()


def rl(capsys, *overrides: str) -> str:
    return refused(capsys, "rl", *base(), "name=new", *overrides)


def mopd(capsys, *overrides: str) -> str:
    return refused(capsys, "mopd", *base(), "name=new", "teachers.math.path=models/teacher", *overrides)


def with_rows(*rows: object) -> str:
    Path("bad.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return "data.path=bad.jsonl"


def numbered(n: int) -> dict:
    return {**GOOD, "messages": [{"role": "user", "content": f"{n}+1=?"}]}


def test_the_place_is_good(place, capsys):
    """Without a mistake all of it passes, so each test below fails for its own reason."""
    assert main(["rl", *base(), "dry_run=true"]) == 0
    assert main(["mopd", *base(), "teachers.math.path=models/teacher", "dry_run=true"]) == 0
    assert not Path("runs/rl").exists() and not Path("runs/mopd").exists()


def test_missing_key(place, capsys):
    arguments = [a for a in base() if not a.startswith("model.path")]
    assert refused(capsys, "rl", *arguments).startswith("model.path is missing: give model.path=VALUE")


def test_mistyped_key_and_value(place, capsys):
    assert rl(capsys, "learner.lrr=1") == "learner.lrr=1: no such key; did you mean learner.lr?"
    assert rl(capsys, "learner.lr=fast") == "learner.lr=fast: a number is needed"
    assert rl(capsys, "seed=-1") == "seed=-1: give a whole number from 0 to 2147483647"
    assert rl(capsys, "algorithm.advantage=gppo").startswith(
        "algorithm.advantage=gppo: choose grpo, dr_grpo or rloo"
    )


def test_options_of_vllm(place, capsys):
    assert rl(capsys, "rollout.vllm.max_num_seq=4") == (
        "rollout.vllm.max_num_seq=4: vLLM has no such engine option; check its name"
    )
    assert rl(capsys, "rollout.vllm.seed=4") == "rollout.vllm.seed=4: set seed instead"
    assert rl(capsys, "rollout.vllm.enable_eplb=true").endswith("must stay False; remove the key")
    found = mopd(capsys, "teachers.math.backend=vllm", "teacher_workers.vllm.tensor_parallel=2")
    assert found.startswith("teacher_workers.vllm.tensor_parallel=2: vLLM has no such engine option")


def test_what_is_wrong_is_what_is_named(place, capsys):
    assert rl(capsys, "algorithm.ratio_high=0.1").startswith("algorithm.ratio_high=0.1: the band must hold 1")
    assert rl(capsys, "algorithm.ratio_low=9").startswith("algorithm.ratio_low=9.0: the band must hold 1")
    assert mopd(capsys, "algorithm.beta=-1").startswith("algorithm.beta=-1.0: a weight of less than 0")
    found = mopd(capsys, "algorithm.target_shares.maths=0.5")
    assert found == "algorithm.target_shares.maths=0.5: no prompt belongs to domain 'maths'; there are math"
    two = [{**GOOD, "domain": "math"}, {**numbered(3), "domain": "code"}]
    found = rl(capsys, with_rows(*two), "algorithm.target_shares.math=1")
    assert found == "algorithm.target_shares.code=None: has prompts but no share; give it one"
    assert (
        main(
            [
                "rl",
                *base(),
                with_rows(*two),
                "domain=math",
                "algorithm.target_shares={math: 1, code: 1}",
                "dry_run=true",
            ]
        )
        == 0
    )
    assert mopd(capsys, "algorithm.beta=0").startswith("algorithm.alpha and algorithm.beta=0.0: nothing")


def test_weight_of_a_held_out_source(place, capsys):
    found = rl(capsys, "data.eval_sources.math.path=good.jsonl", "data.eval_sources.math.weight=2")
    assert found.startswith("data.eval_sources.math.weight=2.0: held-out rows are all asked once; remove")


def test_weights_of_sources(place, capsys):
    sources = ["data.path=null", "data.sources.a.path=good.jsonl", "data.sources.b.path=good.jsonl"]
    found = rl(capsys, *sources, "data.sources.b.weight=-1")
    assert found == "data.sources.b.weight=-1.0: give a weight of 0 or more"
    found = rl(capsys, *sources, "data.sources.a.weight=0", "data.sources.b.weight=0")
    assert found == "data.sources.a.weight=0.0: no source has rows to draw; give one of them a weight above 0"


def test_domain_without_reward(place, capsys):
    found = rl(capsys, "~rewards._target_", "rewards.code._target_=rewards.exact_match.ExactMatch")
    assert "rewards.math: domain 'math' without reward" in found and "rewards.math._target_" in found


def test_domain_without_teacher_and_teacher_without_domain(place, capsys):
    assert "teachers.math.path=None: prompts of domain 'math' have no teacher" in mopd(
        capsys, "~teachers.math"
    )
    assert "no prompt belongs to domain 'law'" in mopd(capsys, "teachers.law.path=models/teacher")


def test_teacher_with_another_vocabulary(place, capsys):
    file = place / "models" / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    found = mopd(capsys)
    assert found.startswith("teachers.math.path='models/teacher': another vocabulary than the student's")


def test_teacher_with_another_chat_template(place, capsys):
    file = place / "models" / "teacher" / "chat_template.jinja"
    file.write_text(file.read_text() + "x")
    assert "teachers.math.path='models/teacher': another chat template" in mopd(capsys)


def test_teacher_with_a_missing_shard(place, capsys):
    folder = place / "models" / "teacher"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = mopd(capsys)
    assert "teachers.math.path='models/teacher'" in found and "model-00002-of-00002.safetensors" in found


def test_student_with_a_truncated_shard(place, capsys):
    file = place / "models" / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.path='models/student': model.safetensors has" in rl(capsys)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"messages": [', "bad.jsonl:2"),
        ("", "bad.jsonl:2"),
        ("[" * 100_000, "bad.jsonl:2: row: not readable as JSON (maximum recursion depth exceeded"),
        ('{"answer": ' + "1" * 5000 + "}", "bad.jsonl:2: row: not readable as JSON (Exceeds the limit"),
        ({"domain": "math"}, "bad.jsonl:2: messages"),
        ({**GOOD, "messages": []}, "bad.jsonl:2: messages"),
        ({**GOOD, "messages": [{"role": "robot", "content": "x"}]}, "bad.jsonl:2: messages"),
        (
            {**GOOD, "messages": [USER, REPLY]},
            "bad.jsonl:2: messages: a prompt must not end with an assistant",
        ),
        ({**GOOD, "messages": [{"role": "user", "content": "1" * 80}]}, "the context leaves room for"),
    ],
)
def test_malformed_rows_name_line_and_field(place, capsys, row, expected):
    assert expected in rl(capsys, with_rows(numbered(5), row, numbered(3)))


def test_empty_file(place, capsys):
    assert "bad.jsonl" in rl(capsys, with_rows())


def test_half_written_last_line(place, capsys):
    whole = json.dumps(numbered(5))
    assert "bad.jsonl:2" in rl(capsys, with_rows(whole, whole[:40]))


def test_bad_rows_can_be_skipped(place, capsys):
    bad = with_rows(numbered(5), {"domain": "math"})
    assert main(["rl", *base(), bad, "data.on_bad_row=skip", "dry_run=true"]) == 0
    assert "math 1" in capsys.readouterr().out


def test_duplicate_prompt_ids(place, capsys):
    found = rl(capsys, with_rows({**numbered(1), "id": "a"}, {**numbered(2), "id": "a"}))
    assert "bad.jsonl:2: id: " in found and "bad.jsonl:1" in found


def test_answer_field_missing(place, capsys):
    row = {key: value for key, value in numbered(2).items() if key != "answer"}
    assert "bad.jsonl:2: answer" in rl(capsys, with_rows(numbered(1), row))


def test_a_sft_row_without_a_reply(place, capsys):
    found = refused(capsys, "sft", "model.path=models/student", with_rows(GOOD), "name=new")
    assert "bad.jsonl:1: messages: a conversation to train on must end with an assistant message" in found


def test_folder_of_another_run(place, capsys):
    found = refused(
        capsys,
        "sft",
        "model.path=models/student",
        with_rows({**GOOD, "messages": [USER, REPLY]}),
        "name=former",
    )
    assert "is the folder of another run (`posttrain rl`)" in found and "fresh=true" in found
    with_rows(numbered(1))
    found = refused(capsys, "rl", *base(), "data.path=bad.jsonl", "name=former")
    assert found.startswith("data.path='bad.jsonl': ") and "data.path='good.jsonl'" in found


def test_a_dry_run_refuses_the_folder_of_another_run(place, capsys):
    with_rows(numbered(1))
    found = refused(capsys, "rl", *base(), "data.path=bad.jsonl", "name=former", "dry_run=true")
    assert found.startswith("data.path='bad.jsonl': ") and "is the folder of a run with" in found
    assert "give a plain name" in refused(capsys, "rl", *base(), "name=../x", "dry_run=true")
    assert main(["rl", *base(), "data.path=bad.jsonl", "name=former", "dry_run=true", "fresh=true"]) == 0
    assert main(["rl", *base(), "name=former", "dry_run=true"]) == 0
    assert not Path("x").exists() and Path("runs/former/checkpoints/step_1").is_dir()


def test_checkpoint_of_another_model(place, capsys):
    shutil.copy("models/teacher/model.safetensors", "models/student/model.safetensors")
    found = refused(capsys, "rl", *base(), "name=former")
    assert found.startswith("model.path='models/student': its weights changed since this run began")


def test_teacher_whose_weights_changed_since_the_run_began(place, capsys):
    teacher = "teachers.math.path=models/teacher"
    folder = RunFolder.open(compose("mopd", [*base(), "name=distil", teacher])[1])
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    folder.close()
    tiny_teacher(place / "models/student", place / "models/later", seed=1)
    shutil.copy("models/later/model.safetensors", "models/teacher/model.safetensors")
    found = refused(capsys, "mopd", *base(), "name=distil", teacher)
    assert found.startswith("teachers.math.path='models/teacher': its weights changed since this run began")


def test_the_student_as_its_own_teacher(place, capsys):
    shutil.copy("models/student/model.safetensors", "models/teacher/model.safetensors")
    found = mopd(capsys)
    assert found.startswith(
        "teachers.math.path='models/teacher': its tensors are the student's, byte for byte"
    )
    assert found.endswith("(accepted by name: teacher_workers.accept=[self_teacher])")
    arguments = [*base(), "teachers.math.path=models/teacher", "dry_run=true"]
    assert main(["mopd", *arguments, "teachers.math.self=true"]) == 0
    assert main(["mopd", *arguments, "teacher_workers.accept=[self_teacher]"]) == 0


def test_gpu_that_is_not_there(place, capsys):
    found = rl(capsys, "rollout.num_gpus_per_worker=1", "rollout.num_workers=64")
    assert found.startswith("rollout.num_gpus_per_worker=1: 64 workers need 64 GPUs and this machine has")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "not an address"])
def test_port_that_is_not_there(place, capsys, monkeypatch, address):
    from posttrain import cluster
    from posttrain.config import RayConfig

    monkeypatch.setattr(cli, "_start", lambda command, cfg: cluster.start(RayConfig(address=address)))
    assert rl(capsys).startswith(f"ray.address={address!r}: cannot be joined")


def test_no_shared_memory(place, capsys, monkeypatch):
    from posttrain import cluster
    from posttrain.config import RayConfig

    monkeypatch.setattr(cli, "_start", lambda command, cfg: cluster.start(RayConfig(object_store_gb=1e6)))
    assert rl(capsys).startswith("ray.object_store_gb=1000000.0: /dev/shm has")


def test_disk_full_while_saving(place, capsys, monkeypatch):
    def start(command, cfg):
        folder = RunFolder.open(cfg)

        def fill(aside: Path) -> None:
            (aside / "weights.bin").write_text("half")
            raise OSError(28, "No space left on device")

        folder.save(2, fill, {"cursor": 2})

    monkeypatch.setattr(cli, "_start", start)
    before = snapshot(Path("runs/former/checkpoints"))
    assert main(["rl", *base(), "name=former"]) == 2
    err = capsys.readouterr().err
    assert (
        "the disk is full, step 2 was not saved; the last checkpoint is whole" in err and err.count("\n") == 1
    )
    assert snapshot(Path("runs/former/checkpoints")) == before
