"""LoRA teachers of one base in common batches: every row as by its adapter alone, and only where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from posttrain.config import Dtype, ModelConfig, TeacherWorkerConfig, UserError
from posttrain.records import RolloutGroup, RolloutStatus, TeacherScores
from teachers.scorer import Scorer, TeacherScoreError
from teachers.teacher import Teacher
from teachers.worker import ScoringTask, TeacherWorker
from tests.tiny_models import tiny_dense, tiny_mimo, tiny_qwen3_moe
from tests.unit.test_teachers_lora import ATTENTION, BOTH, EXPERTS, TOLERANCE, largest, make_adapter
from tests.unit.test_teachers_scorer import make_group, sequences

KINDS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "all_attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 2, "use_rslora": True},
    "experts": EXPERTS,
    "both": BOTH,
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}
MIXED = ("attention", "all_attention")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("mixed") / "base", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {n: make_adapter(base, folder / n, i, **kind)[0] for i, (n, kind) in enumerate(KINDS.items())}


def by_hand(path: Path, adapter: str | None, ids: list[np.ndarray], **asked: Any) -> list[Any]:
    scorer = Scorer(str(path), ModelConfig(), Dtype.float32)
    scorer.adapters.use(adapter, adapter)
    return scorer.score(ids, 512, **asked)


def test_each_row_has_its_own_adapter(base: Path, adapters: dict[str, str]) -> None:
    """All signals, the bare base among the rows, adapters that cannot mix held beside them; then one for all again."""
    ids = sequences([30, 9, 31, 12, 30, 8, 25])
    rows: list[str | None] = [
        "attention",
        None,
        "all_attention",
        "attention",
        None,
        "all_attention",
        "attention",
    ]
    scorer = Scorer(str(base), ModelConfig(), Dtype.float32)
    for name, folder in adapters.items():
        scorer.adapters.hold(name, folder)
    scorer.adapters.use("both", None)  # on experts and on the head: neither may stay
    alone = {name: by_hand(base, name and adapters[name], ids) for name in (None, *MIXED)}
    for name in MIXED:
        assert largest([s.logprobs for s in alone[name]], [s.logprobs for s in alone[None]]) > 0.05
    for max_tokens in (512, 64):
        found = [s.logprobs for s in scorer.score(ids, max_tokens, adapters=rows)]
        assert largest(found, [alone[name][i].logprobs for i, name in enumerate(rows)]) < TOLERANCE
    full = scorer.score(ids, 512, signal="full", adapters=rows)
    top = scorer.score(ids, 512, signal="top_k", top_k=4, adapters=rows)
    torch.testing.assert_close(scorer.head(), Scorer(str(base), ModelConfig(), Dtype.float32).head())
    for i, name in enumerate(rows):
        adapter = name and adapters[name]
        [expected] = by_hand(base, adapter, [ids[i]], signal="full")
        np.testing.assert_allclose(full[i].hidden, expected.hidden, atol=1e-4)
        [expected] = by_hand(base, adapter, [ids[i]], signal="top_k", top_k=4)
        np.testing.assert_array_equal(top[i].topk_ids, expected.topk_ids)
    for name in ("both", None, "attention"):
        scorer.adapters.use(name, None)
        expected = by_hand(base, name and adapters[name], ids)
        assert (
            largest([s.logprobs for s in scorer.score(ids, 512)], [s.logprobs for s in expected]) < TOLERANCE
        )
    assert not any(p.requires_grad for p in scorer.model.parameters())


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_mimo])
def test_bfloat16_rounds_mixed_rows_as_alone(make: Any, tmp_path: Path) -> None:
    """Mean gap at most that of another cut of the same rows (measured: a tenth); PEFT's own mixing is at 0.005."""
    path = make(tmp_path / "base", seed=1)
    scorer = Scorer(str(path), ModelConfig(), Dtype.bfloat16)
    folders = [make_adapter(path, tmp_path / str(i), i, **ATTENTION)[0] for i in range(3)]
    for folder in folders:
        scorer.adapters.hold(folder, folder)
        assert scorer.adapters.can_mix(folder)
    ids = sequences(list(range(20, 50)))
    mixed = scorer.score(ids, 8192, adapters=[folders[i % 3] for i in range(30)])
    gaps = []
    for first, folder in enumerate(folders):
        scorer.adapters.use(folder, None)
        alone = scorer.score(ids[first::3], 8192)
        gaps += [np.abs(a.logprobs - m.logprobs) for a, m in zip(alone, mixed[first::3], strict=True)]
    assert np.concatenate(gaps).mean() < 3e-4


def test_what_can_mix(base: Path, adapters: dict[str, str]) -> None:
    scorer = Scorer(str(base), ModelConfig(), Dtype.float32)
    for name, folder in adapters.items():
        scorer.adapters.hold(name, folder)
    assert {name for name in adapters if scorer.adapters.can_mix(name)} == set(MIXED)
    scorer.adapters.keep({"experts"})
    scorer.adapters.hold("attention", adapters["attention"])  # another name in PEFT, asked anew
    assert scorer.adapters.can_mix("attention") and not scorer.adapters.can_mix("experts")


def test_layers_that_see_all_rows_in_a_line_do_not_mix(tmp_path: Path) -> None:
    """Qwen2-MoE feeds its shared expert [rows x tokens, H]; a dense MLP and MiMo's attention see rows."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2MoeConfig(
        **shape, vocab_size=96, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "qwen2")
    dense, mimo = tiny_dense(tmp_path / "dense"), tiny_mimo(tmp_path / "mimo")
    cases = [
        (tmp_path / "qwen2", ["q_proj", "o_proj"], True),
        (tmp_path / "qwen2", ["q_proj", "shared_expert.up_proj"], False),
        (dense, ["q_proj", "up_proj", "down_proj"], True),
        (mimo, ["q_proj", "o_proj"], True),
    ]
    ids = sequences([21, 5, 20])
    for i, (path, modules, mixes) in enumerate(cases):
        adapter, _ = make_adapter(path, tmp_path / str(i), i, target_modules=modules)
        scorer = Scorer(str(path), ModelConfig(), Dtype.float32)
        scorer.adapters.hold("a", adapter)
        assert scorer.adapters.can_mix("a") == mixes, (path.name, modules)
        if not mixes:
            with pytest.raises(
                ValueError, match=r"Linear was fed 63 rows, the batch has 3"
            ):  # were it asked for all the same
                scorer.score(ids, 512, adapters=["a", None, "a"])
            continue
        found = [s.logprobs for s in scorer.score(ids, 512, adapters=["a", None, "a"])]
        expected = [by_hand(path, adapter if i != 1 else None, ids)[i].logprobs for i in range(3)]
        assert largest(found, expected) < TOLERANCE


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> TeacherWorker:
    monkeypatch.setattr("teachers.worker.ray.get", lambda refs: refs)
    return TeacherWorker(TeacherWorkerConfig(cores_per_worker=1, max_tokens_per_batch=512), ModelConfig())


def make_task(base: Path, adapter: str | None, groups: list[RolloutGroup]) -> ScoringTask:
    teacher = Teacher(key="teachers.d", path=str(base), adapter=adapter)
    key = "base" if adapter is None else f"base+{adapter}"
    return ScoringTask(key=key, teacher=teacher, name=adapter or "bare", group_refs=groups)


def test_worker_mixes_what_it_can(
    base: Path, adapters: dict[str, str], worker: TeacherWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of tasks and rollouts, failed rollouts, tasks without any, another base: as one call each gives them."""
    other = tiny_qwen3_moe(base.parent / "other", seed=5)
    done, failed = RolloutStatus.completed, RolloutStatus.engine_error
    groups = [
        make_group(sequences([20, 9]), [failed, done]),
        make_group(sequences([11, 30]), [done, done]),
        make_group(sequences([7]), [failed]),
    ]
    tasks = [
        make_task(base, adapters["experts"], groups[:1]),
        make_task(base, adapters["attention"], groups[:2]),
        make_task(base, None, groups[1:]),
        make_task(base, adapters["all_attention"], groups[2:]),
        make_task(base, adapters["all_attention"], groups),
        ScoringTask(
            key="other", teacher=Teacher(key="teachers.d", path=str(other)), name="o", group_refs=groups
        ),
    ]
    expected = [worker.score(task) for task in tasks]
    calls: list[int] = []
    score = Scorer.score

    def counted(self: Scorer, token_ids: list[np.ndarray], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(token_ids))
        return score(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score", counted)
    found = worker.score_all(tasks)
    assert sorted(calls) == [1, 3, 8]  # experts; the other base; all the rest at once
    for task, ours, theirs in zip(tasks, found, expected, strict=True):
        assert [s.teacher for s in ours] == [task.name] * len(theirs)
        for one, other_score in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.logprobs, other_score.logprobs, atol=TOLERANCE)  # NaN like NaN


def test_worker_mixes_hidden_states(base: Path, adapters: dict[str, str], worker: TeacherWorker) -> None:
    group = make_group(sequences([9, 30]), [RolloutStatus.completed, RolloutStatus.truncated])
    for rollout in group.rollouts:
        rollout.turns[1].loss_mask[::2] = True
    tasks = [make_task(base, adapters[name], [group]) for name in ("attention", "head", "all_attention")]
    found: list[list[TeacherScores]] = worker.score_all(tasks, "full")
    for task, ours in zip(tasks, found, strict=True):
        for one, expected in zip(ours, worker.score(task, "full"), strict=True):
            np.testing.assert_allclose(one.hidden, expected.hidden, atol=1e-4)  # type: ignore[arg-type]
            np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=TOLERANCE)


def test_errors_name_the_rollout_and_leave_the_rest_usable(
    base: Path, adapters: dict[str, str], worker: TeacherWorker, tmp_path: Path
) -> None:
    group = make_group(sequences([9, 30]), [RolloutStatus.completed, RolloutStatus.completed])
    good = make_task(base, adapters["attention"], [group])
    broken = make_task(base, make_adapter(base, tmp_path, 3, **ATTENTION)[0], [group])
    worker.set_teachers({good.key: good.teacher, broken.key: broken.teacher})
    [backend] = worker.backends.values()
    for name, parameter in backend.model.named_parameters():  # type: ignore[attr-defined]
        if "lora_B.teacher_1" in name:
            parameter.data.fill_(torch.nan)
    with pytest.raises(TeacherScoreError, match=r"gave nan .*rollout '\S+' of domain"):
        worker.score_all([good, broken])
    worker.score(good)
    with pytest.raises(UserError, match="teacher adapter='/gone': PEFT cannot put it on"):
        worker.score_all([good, make_task(base, "/gone", [group])])
    assert np.isfinite(worker.score(good)[0].logprobs).all()  # loaded again
