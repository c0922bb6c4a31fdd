"""LoRA teachers: each scores like the checkpoint with its adapter merged in, and many share one base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig, UserError
from teachers.adapter import adapter_fingerprint, check_adapter
from teachers.check import check_teachers, teacher_fingerprint
from teachers.gates import GateRow, Verdict
from teachers.scorer import Scorer
from teachers.teacher import Teacher
from teachers.worker import TeacherWorker
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe

ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
BOTH: dict[str, Any] = {
    "target_modules": ["o_proj", "lm_head"],
    "target_parameters": EXPERTS["target_parameters"],
}
# nat. Largest of 6 seeds and two architectures: 1.9e-6 with LoRA on plain weights, where float32 sums have another order
# than with the merged matrix (in float64 2.6e-7 are left), and 0 on experts, which PEFT merges for each forward.
TOLERANCE = 1e-5
KINDS = {"attention": ATTENTION, "experts": EXPERTS, "both": BOTH}


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> tuple[str, str]:
    """(adapter directory, checkpoint with the adapter merged in), as PEFT saves and merges them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return str(folder / "adapter"), str(folder / "merged")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("lora") / "base", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("adapters")
    return {n: make_adapter(base, folder / n, i, **kind) for i, (n, kind) in enumerate(KINDS.items())}


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60, n).astype(np.int32) for n in (40, 7, 25)]


def scores(path: str | Path, dtype: Dtype = Dtype.float32) -> list[np.ndarray]:
    return [s.logprobs for s in Scorer(str(path), ModelConfig(), dtype).score(texts(), 512)]


def largest(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def test_every_adapter_scores_like_its_merged_checkpoint(
    base: Path, adapters: dict[str, tuple[str, str]]
) -> None:
    """Interleaved on one model, the bare base among them; freeing some leaves the others as they were."""
    scorer = Scorer(str(base), ModelConfig(), Dtype.float32)
    num_base = sum(p.numel() for p in scorer.model.parameters())
    expected = {name: scores(merged) for name, (_, merged) in adapters.items()} | {None: scores(base)}

    def check(name: str | None) -> None:
        scorer.adapters.use(name, adapters[name][0] if name else None)
        found = [s.logprobs for s in scorer.score(texts(), 512)]
        assert largest(found, expected[name]) < TOLERANCE, name

    for name in (None, "attention", None, "experts", "attention", "both", "experts", None, "both"):
        check(name)
    assert sum(p.numel() for n, p in scorer.model.named_parameters() if "lora_" not in n) == num_base
    for one in ("attention", "experts", "both"):
        assert largest(expected[one], expected[None]) > 0.05
    scorer.adapters.keep({"attention"})
    assert scorer.adapters.keys == ["attention"]
    for name in (None, "attention", "both", "attention"):
        check(name)
    scorer.adapters.keep(set())
    for name in (None, "experts"):
        check(name)
    check("attention")
    scorer.adapters.keep({"experts"})  # none is left on the layers that come first
    for name in ("both", "experts", None, "attention"):
        check(name)


def test_head_is_that_of_the_merged_checkpoint(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """Hidden states times the head give the very scores, also with DoRA, which scales the base's weight."""
    dora = make_adapter(base, tmp_path, 7, target_modules=["lm_head"], use_dora=True)
    scorer = Scorer(str(base), ModelConfig(), Dtype.float32)
    bare = scorer.head().clone()
    torch.testing.assert_close(bare, Scorer(str(base), ModelConfig(), Dtype.float32).head(), rtol=0, atol=0)
    for name, (adapter, merged) in ({"dora": dora} | adapters | {"dora_again": dora}).items():
        scorer.adapters.use(name, adapter)
        head = scorer.head()
        torch.testing.assert_close(
            head, Scorer(merged, ModelConfig(), Dtype.float32).head(), rtol=0, atol=1e-6
        )
        assert (float((head - bare).abs().max()) > 0.05) == (name not in ("attention", "experts"))
        for ids, found in zip(texts(), scorer.score(texts(), 512, signal="full"), strict=True):
            states = torch.from_numpy(found.hidden[1:])  # type: ignore[index]
            own = (states @ head.T).log_softmax(-1).gather(1, torch.from_numpy(ids[1:, None]).long())[:, 0]
            np.testing.assert_allclose(own, found.logprobs[1:], atol=1e-5)
        scorer.adapters.use(None, None)
        torch.testing.assert_close(scorer.head(), bare, rtol=0, atol=0)
    half = Scorer(str(base), ModelConfig(), Dtype.bfloat16)
    for name in ("both", "dora", "attention", "both"):
        half.adapters.use(name, (adapters | {"dora": dora})[name][0])
        head, [state] = half.head(), half.score(texts()[:1], 512, signal="full")
        assert head.dtype is (
            torch.bfloat16 if name == "attention" else torch.float32
        )  # merged heads are not rounded
        states = torch.from_numpy(state.hidden[1:]).view(torch.bfloat16).float()  # type: ignore[index]
        own = (
            (states @ head.float().T).log_softmax(-1).gather(1, torch.from_numpy(texts()[0][1:, None]).long())
        )
        np.testing.assert_allclose(own[:, 0], state.logprobs[1:], atol=1e-5)
    expected = Scorer(adapters["both"][1], ModelConfig(), Dtype.float32).head()
    torch.testing.assert_close(head.float(), expected, rtol=0, atol=2**-8)


def test_bfloat16(base: Path, adapters: dict[str, tuple[str, str]]) -> None:
    scorer = Scorer(str(base), ModelConfig(), Dtype.bfloat16)
    for adapter, merged in adapters.values():
        scorer.adapters.use(adapter, adapter)
        found = [s.logprobs for s in scorer.score(texts(), 512)]
        gaps = np.concatenate([np.abs(a - b) for a, b in zip(found, scores(merged), strict=True)])
        assert gaps.mean() < 0.02


def test_experts_of_a_sigmoid_router(tmp_path: Path) -> None:
    base = tiny_mimo(tmp_path / "base", seed=1)
    adapter, merged = make_adapter(base, tmp_path, 5, **EXPERTS)
    scorer = Scorer(str(base), ModelConfig(), Dtype.float32)
    scorer.adapters.use("a", adapter)
    found = [s.logprobs for s in scorer.score(texts(), 512)]
    assert largest(found, scores(merged)) < TOLERANCE and largest(found, scores(base)) > 0.05


def test_worker_holds_one_base_for_all(base: Path, adapters: dict[str, tuple[str, str]]) -> None:
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())
    teachers = [Teacher(key="teachers.d", path=str(base), adapter=a) for a, _ in adapters.values()]
    teachers.append(Teacher(key="teachers.d", path=str(base)))
    keys = {teacher_fingerprint(t): t for t in teachers}
    assert len(keys) == 4
    row = worker.set_teachers(keys)
    assert row["paths"] == [str(base)] and len(row["adapters"]) == 3
    assert len(worker.backends) == 1
    row = worker.set_teachers(dict(list(keys.items())[:1]))
    assert len(row["adapters"]) == 1
    [held] = worker.backends.values()
    assert held.adapters.keys == [next(iter(keys))]  # type: ignore[attr-defined]


def copy_of(adapter: str, folder: Path, **changes: Any) -> str:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


def refusal(adapter: str, base: Path) -> str:
    with pytest.raises(UserError) as error:
        check_adapter(adapter, str(base), "teachers.math")
    text = str(error.value)
    assert text.startswith(f"teachers.math.adapter={adapter!r}: ") and "\n" not in text
    return text


def test_good_adapters_pass(base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    for adapter, _ in adapters.values():
        check_adapter(adapter, str(base), "teachers.math")
    moved = copy_of(adapters["attention"][0], tmp_path / "moved", base_model_name_or_path="/another/machine")
    check_adapter(moved, str(base), "teachers.math")
    assert adapter_fingerprint(moved) == adapter_fingerprint(adapters["attention"][0])
    scaled = copy_of(moved, tmp_path / "scaled", lora_alpha=16)
    assert adapter_fingerprint(scaled) != adapter_fingerprint(moved)


def test_bad_adapters_are_refused(base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    good = adapters["attention"][0]
    assert "no such directory" in refusal(str(tmp_path / "gone"), base)
    assert "no adapter_config.json" in refusal(str(base), base) and "belongs in path" in refusal(
        str(base), base
    )
    assert "has rank 4 (lora_A) and 4 (lora_B), adapter_config.json says [8]" in refusal(
        copy_of(good, tmp_path / "r", r=8), base
    )
    assert "peft_type is 'IA3'" in refusal(copy_of(good, tmp_path / "ia3", peft_type="IA3"), base)
    saved = copy_of(good, tmp_path / "saved", modules_to_save=["lm_head"])
    assert "modules_to_save changes the base itself" in refusal(saved, base)
    pickled = Path(copy_of(good, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "pickled weights are not read" in refusal(str(pickled), base)
    whole = Path(copy_of(good, tmp_path / "whole"))
    weights = load_file(whole / "adapter_model.safetensors")
    weights["base_model.model.lm_head.base_layer.weight"] = torch.ones(2, 2)
    save_file(weights, whole / "adapter_model.safetensors")
    assert "lm_head.base_layer.weight is a weight of the base itself" in refusal(str(whole), base)
    half = Path(copy_of(good, tmp_path / "half"))
    weights = load_file(half / "adapter_model.safetensors")
    del weights[next(name for name in weights if "lora_A" in name)]
    save_file(weights, half / "adapter_model.safetensors")
    assert "only one of lora_A and lora_B" in refusal(str(half), base)
    uneven = Path(copy_of(good, tmp_path / "uneven"))
    weights = load_file(uneven / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    weights[name] = weights[name][:2].contiguous()
    save_file(weights, uneven / "adapter_model.safetensors")
    assert "has rank 2 (lora_A) and 4 (lora_B)" in refusal(str(uneven), base)


def test_an_adapter_of_another_base_is_refused(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """By the weights of the base that it names (a red line that can be accepted: names are relative, folders move); by its
    shapes where that base is not here; and at load at the latest."""
    adapter = adapters["attention"][0]
    sibling = tiny_qwen3_moe(tmp_path / "sibling", seed=2)
    wrong = Teacher(key="teachers.math", path=str(sibling), adapter=adapter)
    with pytest.raises(UserError, match=r"whose weights are not those of .*accept=\[adapter\]"):
        gates(sibling, math=wrong)
    accepted = gates(sibling, TeacherWorkerConfig(accept=["adapter"]), math=wrong)
    assert accepted["math", "adapter"].verdict is Verdict.accepted
    moved = copy_of(adapter, tmp_path / "moved", base_model_name_or_path="/another/machine")
    wide = tiny_qwen3_moe(tmp_path / "wide", hidden=192)
    assert "it is an adapter of another base" in refusal(moved, wide)
    experts = copy_of(
        adapters["experts"][0], tmp_path / "experts", base_model_name_or_path="/another/machine"
    )
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())
    for other in (tiny_dense(tmp_path / "dense"), tiny_qwen3_moe(tmp_path / "more", num_experts=4)):
        good = {"b": Teacher(key="teachers.d", path=str(other))}
        worker.set_teachers(good)
        with pytest.raises(UserError, match=r"teacher adapter='.*experts': PEFT cannot put it on Qwen3"):
            worker.set_teachers(good | {"b+e": Teacher(key="teachers.d", path=str(other), adapter=experts)})
        assert worker.backends == {}, "part of the adapter may be on the base"


def test_the_base_in_another_type_is_the_base(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    half = Path(shutil.copytree(base, tmp_path / "half"))
    tensors = {name: t.half() for name, t in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    for name, words in ((str(half), "tensors"), ("/another/machine", "base not compared")):
        adapter = copy_of(adapters["attention"][0], tmp_path / words, base_model_name_or_path=name)
        row = gates(base, math=Teacher(key="teachers.math", path=str(base), adapter=adapter))[
            "math", "adapter"
        ]
        assert row.verdict is Verdict.ok and row.value.endswith(words)


def test_a_layer_that_the_base_lacks_is_refused_from_the_files(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    adapter = copy_of(adapters["attention"][0], tmp_path / "adapter")
    file = Path(adapter) / "adapter_model.safetensors"
    tensors = {name.replace(".layers.1.", ".layers.9."): t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "layers.9.self_attn.q_proj.lora_A.weight is for layer 9, which" in refusal(adapter, base)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_an_adapter_that_rewrites_its_base_is_refused(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path, init: str
) -> None:
    adapter = copy_of(adapters["attention"][0], tmp_path / "adapter", init_lora_weights=init)
    assert f"init_lora_weights is '{init}', which rewrites the base" in refusal(adapter, base)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alora_invocation_tokens", [3, 4]),  # without their place in the text PEFT computes the bare base
        ("kasa_config", {}),
        ("kasa_config", {"beta": 1e-4}),  # cuts small singular values out of the base
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 3}),
        ("a_kind_of_the_future", True),
        ("a_kind_of_the_future", [0]),
    ],
)
def test_kinds_of_lora_that_compute_something_else_are_refused(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path, name: str, value: Any
) -> None:
    adapter = copy_of(adapters["attention"][0], tmp_path / "adapter", **{name: value})
    off = copy_of(adapter, tmp_path / "off", **{name: None})
    check_adapter(off, str(base), "teachers.math")
    assert f"{name}={value!r} in adapter_config.json: a kind of LoRA that is not scored" in refusal(
        adapter, base
    )


def gates(base: Path, workers: TeacherWorkerConfig | None = None, **teachers: Teacher) -> dict[Any, GateRow]:
    student = ModelConfig(path=str(base))
    rows = check_teachers(teachers, student, workers or TeacherWorkerConfig(), 64)
    return {(row.domain, row.gate): row for row in rows}


def test_preflight_names_what_shares_a_teacher(base: Path, adapters: dict[str, tuple[str, str]]) -> None:
    """The student as a base is no self-teacher."""
    adapter = adapters["attention"][0]
    rows = gates(
        base,
        math=Teacher(key="teachers.math", path=str(base), adapter=adapter),
        code=Teacher(key="teachers.code", path=str(base), is_student=True),
        law=Teacher(key="teachers.law", path=str(base), adapter=adapter),
    )
    assert {d: rows[d, "shared"].value for d in ("math", "code", "law")} == {
        "math": "also law",
        "code": "its own model",
        "law": "also math",
    }
    assert rows["math", "self_teacher"].value == "an adapter on the student"
    assert rows["code", "self_teacher"].value == "on purpose"
    assert {row.verdict for (_, gate), row in rows.items() if gate != "shared"} == {Verdict.ok}
    assert rows["math", "adapter"].path == adapter and ("code", "adapter") not in rows


def test_every_kind_of_adapter_passes(base: Path, adapters: dict[str, tuple[str, str]]) -> None:
    for adapter, _ in adapters.values():
        rows = gates(base, math=Teacher(key="teachers.math", path=str(base), adapter=adapter))
        assert {row.verdict for row in rows.values()} == {Verdict.ok}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_are_broken_or_do_nothing(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path, dtype: torch.dtype
) -> None:
    """The gate `adapter` names them, and it can be accepted; as PEFT makes them, lora_B is zero."""
    folder = Path(copy_of(adapters["attention"][0], tmp_path / "adapter"))
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    teacher = Teacher(key="teachers.math", path=str(base), adapter=str(folder))

    def save(change: dict[str, torch.Tensor]) -> None:
        save_file(tensors | change, file, metadata={"format": "pt"})

    halves = {name: torch.zeros_like(t) for name, t in tensors.items() if ".lora_B." in name}
    first = sorted(halves)[0]
    save({first: halves[first]})
    assert gates(base, math=teacher)["math", "adapter"].verdict is Verdict.ok, "one matrix may stay as it was"
    save(halves)
    with pytest.raises(UserError) as error:
        gates(base, math=teacher)
    line = str(error.value)
    assert line.startswith(
        f"teachers.math.adapter={str(folder)!r}: lora_alpha, or lora_A or lora_B of every module, is"
    )
    assert line.endswith("(accepted by name: teacher_workers.accept=[adapter])")
    accepted = gates(base, TeacherWorkerConfig(accept=["adapter"]), math=teacher)
    assert accepted["math", "adapter"].verdict is Verdict.accepted
    meant = Teacher(key="teachers.math", path=str(base), adapter=str(folder), is_student=True)
    assert gates(base, math=meant)["math", "adapter"].value == "no effect, on purpose"
    others = {name: torch.zeros_like(t) for name, t in tensors.items() if ".lora_A." in name}
    for half in (
        others,
        {n: t for i, (n, t) in enumerate(sorted((halves | others).items())) if i % 4 in (0, 3)},
    ):
        save(half)  # all of one kind; one of the two in every module
        with pytest.raises(UserError, match="it computes what its base"):
            gates(base, math=teacher)
    save({})
    silent = copy_of(str(folder), tmp_path / "silent", lora_alpha=0)
    with pytest.raises(UserError, match="it computes what its base"):
        gates(base, math=Teacher(key="teachers.math", path=str(base), adapter=silent))
    for wrong in (None, "16", True):
        text = copy_of(str(folder), tmp_path / f"text-{wrong}", lora_alpha=wrong)
        assert f"lora_alpha={wrong!r} in adapter_config.json: a number is needed" in refusal(text, base)
    for change in ({"lora_alpha": -8}, {"alpha_pattern": {"q_proj": -1}}):
        against = copy_of(str(folder), tmp_path / f"against-{len(str(change))}", **change)
        with pytest.raises(UserError, match=r"=-\d: it would teach the opposite"):
            gates(base, math=Teacher(key="teachers.math", path=str(base), adapter=against))
    name = sorted(tensors)[0]
    broken = tensors[name].clone()
    broken[0, 0] = torch.nan
    save({name: broken})
    with pytest.raises(UserError, match=r"holds NaN or infinite values \(1\)"):
        gates(base, math=teacher)


def test_worker_examines_with_the_adapter_on(base: Path, adapters: dict[str, tuple[str, str]]) -> None:
    """The direct forward is that of the base with the adapter, whatever was scored in between."""
    adapter, merged = adapters["both"]
    worker = TeacherWorker(TeacherWorkerConfig(cores_per_worker=1), ModelConfig())
    plain = Teacher(key="teachers.code", path=str(base))
    adapted = Teacher(key="teachers.math", path=str(base), adapter=adapter)
    worker.set_teachers({"b": plain, "b+a": adapted})
    for _ in range(2):
        assert worker.examine("b+a", adapted, texts(), scores(merged)).mean_abs < 1e-5
        assert worker.examine("b", plain, texts(), scores(merged)).mean_abs > 0.05
        assert worker.examine("b", plain, texts(), scores(base)).mean_abs < 1e-5


def test_adapters_of_other_experts_do_not_share_a_base(
    base: Path, adapters: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    other, _ = make_adapter(base, tmp_path, 9, target_modules=[], target_parameters=["experts.down_proj"])
    teachers = {
        domain: Teacher(key=f"teachers.{domain}", path=str(base), adapter=adapter)
        for domain, adapter in (
            ("code", adapters["experts"][0]),
            ("law", adapters["both"][0]),
            ("math", other),
        )
    }
    with pytest.raises(
        UserError, match=r"^teachers\.math\.adapter=.*target_parameters are \['experts\.down_proj'\]"
    ):
        check_teachers(teachers, ModelConfig(path=str(base)), TeacherWorkerConfig(), 64)
