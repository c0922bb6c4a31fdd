"""The preflight on scores of real tiny checkpoints, and its part of a run. The scores come from `Scorer` without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from examples.tiny.domains import WORLDS
from posttrain import preflight
from posttrain.config import (
    ACCEPTABLE,
    Dtype,
    ModelConfig,
    TeacherBackend,
    TeacherConfig,
    TeacherWorkerConfig,
    UserError,
)
from posttrain.records import Rollout, RolloutGroup, RolloutStatus, TeacherScores
from teachers.direct import Examination, examine
from teachers.gates import GATES, NEVER_RED, UNLOADABLE, GateRow, Subject, Verdict, judge, stop_on_red
from teachers.pool import TeacherPool, _Worker
from teachers.scorer import Scorer
from teachers.teacher import Teacher, build, resolve
from teachers.worker import TeacherWorker
from tests.tiny_models import tiny_qwen3_moe
from tests.unit.teacher_family import WORKERS, check_files, file_gates
from tests.unit.wrong_teachers import SHAPE, edit, fine_tune

STRONG = TeacherWorkerConfig(max_initial_kl=4.0)  # small models move far from their start


class LocalPool:
    """The teacher pool's two questions, answered in this process; ``spoil`` changes the scores as a broken back end would."""

    def __init__(
        self, spoil: Callable[[np.ndarray], np.ndarray] = lambda scores: scores, **paths: Path
    ) -> None:
        self.scorers = {d: Scorer(str(path), ModelConfig(), Dtype.float32) for d, path in paths.items()}
        self.spoil = spoil
        self.asked: list[tuple[str, int]] = []  # domain, texts

    def score(self, domain: str, groups: list[RolloutGroup]) -> list[TeacherScores]:
        self.asked.append((domain, sum(len(group.rollouts) for group in groups)))
        texts = [rollout.token_ids for group in groups for rollout in group.rollouts]
        scores = self.scorers[domain].score(texts, 256)
        return [TeacherScores(teacher=domain, logprobs=self.spoil(row.logprobs)) for row in scores]

    def examine(self, domain: str, texts: list[np.ndarray], scores: list[np.ndarray]) -> Examination:
        return examine(self.scorers[domain].model, texts, scores)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("posttrain.preflight.ray.get", lambda refs: refs)
    monkeypatch.setattr("posttrain.preflight.ray.put", lambda value: value)
    yield


def score(
    pool: Any, samples: dict[str, list[Rollout]], cosine: float | None = 1.0, **own: Any
) -> dict[Any, GateRow]:
    """Rows of the gates that need scores, by (domain, gate)."""
    cfg = own.pop("cfg", WORKERS)
    given = {domain: own.get(domain, TeacherConfig(path=f"/{domain}")) for domain in samples}
    teachers = {domain: build(domain, teacher, None) for domain, teacher in given.items()}
    rows = preflight.score_gates(pool, samples, teachers, cfg, dict.fromkeys(samples, cosine))
    return {(row.domain, row.gate): row for row in judge(rows, cfg.accept)}


# Right ones -------------------------------------------------------------------------------------------------------


def test_right_teachers_give_no_alarm(
    student: Path, right: list[Path], samples: dict[str, list[Rollout]]
) -> None:
    teachers = {path.name: TeacherConfig(path=str(path)) for path in right}
    rows = check_files(str(student), teachers, teachers)
    assert len(teachers) == 20 and len({row.domain for row in rows}) == 20
    assert [row.line() for row in rows if row.verdict is not Verdict.ok] == []
    assert min(row.number for row in rows if row.gate == "foreign" and row.number) > 0.9
    for seed, path in enumerate(right):
        domain = list(WORLDS)[seed % 4]
        found = score(LocalPool(**{domain: path}), {domain: samples[domain]})
        bad = [
            row.line() for row in found.values() if row.verdict is not Verdict.ok and row.gate != "lengths"
        ]
        assert bad == [], path
        assert {gate for _, gate in found} == {"scoring", "noise", "initial_kl", "lengths", "cost"}


# Wrong ones, from scores ------------------------------------------------------------------------------------------


def late(scores: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], scores[:-1]]).astype(np.float32)


def early(scores: np.ndarray) -> np.ndarray:
    return np.concatenate([scores[1:], [0.0]]).astype(np.float32)


class OtherTemperature(LocalPool):
    """A back end that applies a sampling temperature to its logits."""

    def score(self, domain: str, groups: list[RolloutGroup]) -> list[TeacherScores]:
        scorer = self.scorers[domain]
        head = scorer.lm_head.weight
        try:
            head.div_(0.8)
            return super().score(domain, groups)
        finally:
            head.mul_(0.8)


@pytest.mark.parametrize(
    ("pool_class", "spoil", "words"),
    [
        (LocalPool, late, "they are the score of the token before (shifted by one)"),
        (LocalPool, early, "they are the score of the token after (shifted by one)"),
        (OtherTemperature, lambda s: s, "they are taken at temperature 0.80 instead of 1"),
        (LocalPool, lambda s: s - 0.01, "its scores differ from a direct forward by 0.010 nat per token"),
    ],
    ids=["late", "early", "temperature", "offset"],
)
def test_a_wrong_back_end_is_named(
    right: list[Path], samples: dict[str, list[Rollout]], pool_class: Any, spoil: Any, words: str
) -> None:
    found = score(pool_class(spoil, math=right[3]), {"math": samples["math"]})["math", "scoring"]
    assert found.verdict is Verdict.red and found.problem.endswith(words), found.problem


def test_scores_of_the_own_position_are_named(right: list[Path], samples: dict[str, list[Rollout]]) -> None:
    """log p(token t | tokens up to t), as a back end gives that forgets to shift its targets."""
    scorer = Scorer(str(right[3]), ModelConfig(), Dtype.float32)
    texts = [rollout.token_ids for rollout in samples["math"][:3]]
    with torch.no_grad():
        logits = [
            scorer.model(input_ids=torch.from_numpy(t).long()[None], use_cache=False).logits[0] for t in texts
        ]
    wrong = [
        row.log_softmax(-1).gather(1, torch.from_numpy(ids).long()[:, None])[:, 0].numpy()
        for row, ids in zip(logits, texts, strict=True)
    ]
    found = examine(scorer.model, texts, wrong)
    assert found.explanation == "read from the token's own position (shifted by one)"
    exact = examine(scorer.model, texts, [s.logprobs for s in scorer.score(texts, 256)])
    assert exact.explanation is None and exact.max_abs < 1e-4


def test_noise_of_dropout_is_seen(right: list[Path], samples: dict[str, list[Rollout]]) -> None:
    generator = np.random.default_rng(0)
    pool = LocalPool(lambda s: s + generator.normal(0, 0.02, len(s)).astype(np.float32), math=right[3])
    found = score(pool, {"math": samples["math"]}, cfg=TeacherWorkerConfig(accept=["scoring"]))
    assert found["math", "noise"].verdict is Verdict.red
    assert found["math", "scoring"].verdict is Verdict.accepted


def test_nan_scores_are_red(right: list[Path], samples: dict[str, list[Rollout]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(right[3], tmp_path / "teacher"))
    edit(
        folder,
        lambda t: (
            t["model.embed_tokens.weight"][samples["math"][0].token_ids[3]].fill_(torch.nan) is None or None
        ),
    )
    found = score(LocalPool(math=folder), {"math": samples["math"]})
    assert list(found) == [("math", "scoring")] and "gave nan for token" in found["math", "scoring"].problem


def test_a_foreign_teacher_is_far_on_the_students_samples(
    student: Path, samples: dict[str, list[Rollout]], tmp_path: Path
) -> None:
    start = tiny_qwen3_moe(tmp_path / "init", seed=5, **SHAPE)
    foreign = fine_tune(start, tmp_path / "foreign", list(WORLDS), seed=0, lr=3e-3, steps=60)
    pool = LocalPool(math=foreign)
    math = {"math": samples["math"]}
    row = score(pool, math, cosine=None)["math", "initial_kl"]
    assert row.verdict is Verdict.warn and "that of a foreign teacher" in row.problem
    strict = TeacherWorkerConfig(max_initial_kl=row.number * 0.9)
    row = score(pool, math, cfg=strict)["math", "initial_kl"]
    assert row.verdict is Verdict.red and "above teacher_workers.max_initial_kl=" in row.line()
    with pytest.raises(UserError, match=r"accepted by name: teacher_workers\.accept=\[initial_kl\]"):
        stop_on_red([row])


def test_a_self_teacher_is_at_the_noise_floor(
    student: Path, samples: dict[str, list[Rollout]], right: list[Path]
) -> None:
    own = {"math": TeacherConfig(path="/student", self=True)}
    row = score(LocalPool(math=student), {"math": samples["math"]}, **own)["math", "initial_kl"]
    assert row.verdict is Verdict.ok and row.number < 1e-4
    moved = LocalPool(instruct=right[19])
    own = {"instruct": own["math"]}
    far = score(moved, {"instruct": samples["instruct"]}, **own)["instruct", "initial_kl"]
    assert far.verdict is Verdict.red and "it is the student itself" in far.problem


def test_swapped_domains_are_warned_of(
    specialists: dict[str, Path], samples: dict[str, list[Rollout]]
) -> None:
    found = score(LocalPool(**specialists), samples)
    verdicts = {domain: found[domain, "domain_swap"].verdict for domain in WORLDS}
    assert set(verdicts.values()) == {Verdict.ok}, [found[d, "domain_swap"].value for d in WORLDS]
    swapped = specialists | {"math": specialists["code"], "code": specialists["math"]}
    found = score(LocalPool(**swapped), samples)
    verdicts = {domain: found[domain, "domain_swap"].verdict for domain in WORLDS}
    assert verdicts["math"] is verdicts["code"] is Verdict.warn
    assert "teachers.math and teachers.code are not swapped" in found["math", "domain_swap"].way_out


def test_cut_answers_are_warned_of(samples: dict[str, list[Rollout]]) -> None:
    subject = Subject(domain="math", teacher=Teacher(key="teachers.math", path="/t"))
    assert preflight.lengths_row(subject, samples["math"]).number > 0
    cut = [r for r in samples["math"] if r.status is RolloutStatus.truncated]
    whole = [r for r in samples["math"] if r.status is RolloutStatus.completed]
    assert whole and preflight.lengths_row(subject, whole).verdict is Verdict.ok
    for rollout in whole[: len(whole) // 2 + 1]:
        cut.append(
            Rollout(
                **{n: getattr(rollout, n) for n in Rollout.__slots__} | {"status": RolloutStatus.truncated}
            )
        )
    assert "raise rollout.max_new_tokens" in preflight.lengths_row(subject, cut).way_out


# The run's side ---------------------------------------------------------------------------------------------------


def test_rows_are_recorded_once_and_red_ones_stop(
    student: Path, specialists: dict[str, Path], samples: dict[str, list[Rollout]]
) -> None:
    teachers = {d: TeacherConfig(path=str(specialists[d])) for d in ("math", "code")}
    calls: list[tuple[list[GateRow], list[GateRow]]] = []
    files = check_files(str(student), teachers, teachers)
    resolved = resolve(teachers, teachers, str(student))
    checks = preflight.Preflight(files, resolved, STRONG, lambda new, rows: calls.append((new, list(rows))))
    pool = LocalPool(**{d: specialists[d] for d in teachers})
    checks.check(pool, {"math": samples["math"]})
    checks.check(pool, {"math": samples["math"], "code": []})
    assert pool.asked == [("math", 32), ("math", 16), ("math", 16)], "once"
    assert len(calls) == 1 and calls[0][0] == calls[0][1]
    checks.check(pool, {"code": samples["code"]})
    new, rows = calls[1]
    assert {row.domain for row in new} == {"code"} and {row.gate for row in new} >= {"scoring", "domain_swap"}
    assert len({(row.domain, row.gate) for row in rows}) == len(rows)

    strict = TeacherWorkerConfig(max_initial_kl=1e-6)
    stopping = preflight.Preflight(files, resolved, strict, lambda new, rows: calls.append((new, rows)))
    with pytest.raises(UserError, match=r"^teachers\.math\.path=.*max_initial_kl=1e-06"):
        stopping.check(pool, {"math": samples["math"]})
    assert len(calls) == 3, "what stops the run is on the disk before"


def test_table_and_json(
    student: Path, right: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from rich.console import Console

    teachers = {"math": TeacherConfig(path=str(right[0])), "code": TeacherConfig(path=str(student))}
    rows = judge(file_gates(str(student), teachers, teachers), ["self_teacher"])
    Console(width=200).print(preflight.table(rows))
    out = capsys.readouterr().out
    assert "gate" in out and "math" in out and "accepted: is the student" in out and "cosine 1.000" in out
    assert [line.split(":")[0] for line in preflight.remarks(rows)] == ["accepted self_teacher"]
    preflight.write(tmp_path, rows)
    content = json.loads((tmp_path / "preflight.json").read_text())
    assert {row["gate"] for row in content} >= {"files", "vocabulary", "weights", "foreign"}


def test_a_teacher_that_comes_later_is_measured_alone_and_can_go_again(
    student: Path, specialists: dict[str, Path], right: list[Path], samples: dict[str, list[Rollout]]
) -> None:
    """Its rows take the place of the former's; the others are asked for its domain's new texts alone."""
    both = {d: samples[d] for d in ("math", "code")}
    given = {d: TeacherConfig(path=str(specialists[d])) for d in both}
    files = check_files(str(student), given, given)
    recorded: list[list[GateRow]] = []
    resolved = resolve(given, given, str(student))
    checks = preflight.Preflight(files, resolved, STRONG, lambda new, rows: recorded.append(new))
    pool = LocalPool(**{d: specialists[d] for d in both})
    checks.check(pool, both)
    former = checks.rows_of("math")
    assert {row.gate for row in former} == {row.gate for row in files}

    new = build("math", TeacherConfig(path=str(right[3])), None)
    rows = check_files(str(student), {"math": TeacherConfig(path=str(right[3]))}, ["math"])
    checks.replace("math", new, rows)
    pool.scorers["math"] = Scorer(str(right[3]), ModelConfig(), Dtype.float32)
    pool.asked.clear()
    checks.check(pool, {"math": samples["math"][:8]}, is_start=False)
    assert pool.asked == [("math", 40), ("math", 20), ("math", 20), ("code", 8)]
    assert {row.domain for row in recorded[1]} == {"math"}
    assert {row.path for row in recorded[1]} == {str(right[3])}
    assert {row.gate for row in recorded[1]} >= {*preflight.SCORED_GATES, "files", "weights", "foreign"}

    checks.replace("math", resolved["math"], former)
    checks.check(pool, {"math": samples["math"][:8]}, is_start=False)
    assert {row.path for row in checks.rows if row.domain == "math"} == {str(specialists["math"])}
    assert len({(row.domain, row.gate) for row in checks.rows}) == len(checks.rows)


def test_the_start_model_teaches_a_student_that_has_moved(samples: dict[str, list[Rollout]]) -> None:
    """A resumed run, or a swap to the start model: only at the start must both agree."""
    subject = Subject(domain="math", teacher=Teacher(key="teachers.math", path="/s", is_student=True))
    gaps = np.full(10, -0.5)
    assert preflight.kl_row(subject, gaps, 2.0, 1.0, is_start=True).verdict is Verdict.red
    assert preflight.kl_row(subject, gaps, 2.0, 1.0, is_start=False).verdict is Verdict.ok
    assert preflight.kl_row(subject, 5 * gaps, 2.0, 1.0, is_start=False).verdict is Verdict.red


def test_what_cannot_be_measured_is_said() -> None:
    server = Teacher(key="teachers.math", path="http://h:1", model="m", backend=TeacherBackend.server)
    large = Teacher(key="teachers.math", path="/large", backend=TeacherBackend.vllm)
    for teacher, words in ((server, "a server does not tell its weights"), (large, "too large to load")):
        row = preflight.scoring_row(Subject(domain="math", teacher=teacher), None, Dtype.float32)
        assert row.verdict is Verdict.unmeasured and row.value.startswith(words)
        assert preflight.remarks([row]) == [] and "not measured" in preflight._cell(row)


def test_the_direct_forward_of_every_back_end(
    student: Path, samples: dict[str, list[Rollout]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool asks the worker that scores, or one of its own that it ends, or nobody; the workers are in this process."""
    killed: list[Any] = []
    monkeypatch.setattr("teachers.pool.ray.get", lambda value: value)
    monkeypatch.setattr("teachers.pool.ray.kill", killed.append)

    class Actor(TeacherWorker):
        @property
        def examine(self) -> Any:
            return SimpleNamespace(remote=super().examine)

    def start(num_gpus: float, has_engine: bool = False) -> _Worker:
        assert num_gpus == 0.0 and not has_engine
        return _Worker(actor=Actor(WORKERS, ModelConfig()))

    pool = TeacherPool(WORKERS, ModelConfig())
    monkeypatch.setattr(pool, "_start", start)
    scoring = start(0.0)
    texts = [rollout.token_ids for rollout in samples["math"][:3]]
    right = [score.logprobs for score in Scorer(str(student), ModelConfig(), Dtype.float32).score(texts, 256)]
    for backend in TeacherBackend:
        teacher = Teacher(key="teachers.math", path=str(student), backend=backend)
        pool._keys, pool._teachers = {"math": f"{backend}:x"}, {f"{backend}:x": teacher}
        pool._places = {
            f"{backend}:x": [scoring if backend is TeacherBackend.transformers else _Worker(actor=None)]
        }
        found = pool.examine("math", texts, right)
        if backend is TeacherBackend.server:
            assert found is None
            continue
        assert found is not None and found.mean_abs < 1e-5
        assert killed == [] if backend is TeacherBackend.transformers else len(killed) == 1
        assert killed != [scoring.actor]
    monkeypatch.setattr("teachers.pool.MAX_DIRECT_BYTES", 1000)
    vllm = Teacher(key="teachers.math", path=str(student), backend=TeacherBackend.vllm)
    pool._keys, pool._teachers = {"math": "vllm:x"}, {"vllm:x": vllm}
    assert pool.examine("math", texts, right) is None and len(killed) == 1


def test_every_gate_can_be_accepted_or_has_a_reason_not_to() -> None:
    assert {*ACCEPTABLE} | {*UNLOADABLE} | {*NEVER_RED} == set(GATES)
    assert len(ACCEPTABLE) + len(UNLOADABLE) + len(NEVER_RED) == len(GATES)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"^teacher_workers\.accept='forein': .*choose among vocabulary"):
        TeacherWorkerConfig(accept=["forein"])


def test_a_teacher_that_says_what_the_student_says_is_warned_of() -> None:
    math = Teacher(key="teachers.math", path="/t")
    gaps = np.full(100, 5e-4)
    row = preflight.kl_row(Subject(domain="math", teacher=math), gaps, 2.5, 1.0, is_start=True)
    assert row.verdict is Verdict.warn and "5.0e-04 nat per token" in row.problem
    own = Teacher(key="teachers.math", path="/t", is_student=True)
    assert preflight.kl_row(Subject(domain="math", teacher=own), gaps, 2.5, 1.0, True).verdict is Verdict.ok


def test_a_sure_teacher_is_not_hopeless() -> None:
    """RL on one domain leaves -10 to -40 on what the teacher would never say; a wrong vocabulary is far on every token."""
    subject = Subject(domain="tool", teacher=Teacher(key="teachers.tool", path="/t"))
    limit = TeacherWorkerConfig().max_initial_kl
    sure = np.where(np.arange(100) < 30, -30.0, 0.0)
    row = preflight.kl_row(subject, sure, limit, 1.0, is_start=True)
    assert row.verdict is Verdict.ok and row.number == pytest.approx(1.5) and "KL 9.000" in row.value
    hopeless = np.full(100, -4.0)
    row = preflight.kl_row(subject, hopeless, limit, 1.0, is_start=True)
    assert (
        row.verdict is Verdict.red
        and "(each at most 5) to the student on its own samples is 4.000 (100 tokens)" in row.problem
    )
    assert preflight.kl_row(subject, hopeless * np.nan, limit, 1.0, is_start=True).verdict is Verdict.red
