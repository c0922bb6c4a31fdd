"""The preflight of a run's teachers: the gates that need scores, and the table of all gates.

Owns what is measured on the student's own samples with the engines that are up: scores against a direct forward, the
noise of scoring, the initial distance of every teacher, domains that look swapped, lengths, speed. What files tell is
in `teachers.check`. A red row that `teacher_workers.accept` does not name stops the run before its first update.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from rich.markup import escape
from rich.table import Table

from posttrain import disk
from posttrain.config import Dtype, TeacherWorkerConfig
from posttrain.records import Prompt, Rollout, RolloutGroup, RolloutStatus, Turn
from teachers.gates import GATES, GateRow, Subject, Verdict, judge, stop_on_red
from teachers.pool import TeacherPool
from teachers.scores import TeacherScoreError
from teachers.teacher import Teacher

if TYPE_CHECKING:
    from teachers.direct import Examination

SCORED_GATES = ("scoring", "noise", "initial_kl", "domain_swap", "lengths", "cost")
MAX_GAP = 5.0  # nat that one token adds to the mean |log-ratio|, at most
NUM_TEXTS = 32  # samples of a domain that every teacher scores
MAX_TEXT_TOKENS = 1024  # of each; longer samples are cut, which changes no score before the cut
NUM_EXAMINED = 4  # texts of the direct forward
EXAMINED_TOKENS = 128

# Largest mean |difference| to the direct forward, and p99 of two scorings, nat. In float32 only the order of sums
# differs; in bfloat16 a router may choose another expert.
MAX_SCORE_GAP = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.05}
MAX_NOISE = {Dtype.float32: 0.01, Dtype.bfloat16: 0.3}
FOREIGN_KL = 0.12  # between the published 0.04 of one origin and 0.19 of a foreign teacher; only where weights say nothing
LEAST_GAP = 1e-3  # mean |log-ratio| below which a teacher says what the student says
SELF_GAP = 0.1  # a teacher that is the student differs by the engine's rounding alone
SWAP_LOG_RATIO = -0.7  # pairs of domains below this look swapped
MAX_TRUNCATED = 0.5

MARKS = {
    Verdict.ok: "green",
    Verdict.warn: "yellow",
    Verdict.red: "red",
    Verdict.accepted: "magenta",
    Verdict.unmeasured: "dim",
}
Gaps = dict[str, dict[str, np.ndarray]]  # teacher's domain -> domain of the texts -> log-ratios [N]


@dataclass(kw_only=True, slots=True)
class Scored:
    """What one teacher said of the texts of all domains, twice."""

    first: dict[str, list[np.ndarray]]  # by domain of the text, [T] each
    noise: np.ndarray  # |difference| of the two scorings, all tokens
    tokens_per_s: float


class Preflight:
    """The gates of one run. ``record(new, all)`` gets the rows, each time that there are new ones."""

    def __init__(
        self,
        file_rows: Sequence[GateRow],
        teachers: Mapping[str, Teacher],
        cfg: TeacherWorkerConfig,
        record: Callable[[list[GateRow], list[GateRow]], None],
    ) -> None:
        self.rows = list(file_rows)
        self._recorded: set[tuple[str, str]] = set()
        self._teachers, self._cfg, self._record = dict(teachers), cfg, record
        self._samples: dict[str, list[Rollout]] = {}
        self._gaps: Gaps = {}

    def replace(self, domain: str, teacher: Teacher, file_rows: Sequence[GateRow]) -> None:
        """From now on ``teacher`` is that of ``domain``; it is measured by the next `check`."""
        self._teachers[domain] = teacher
        self.rows = [row for row in self.rows if row.domain != domain] + list(file_rows)
        self._recorded = {cell for cell in self._recorded if cell[0] != domain}
        self._samples.pop(domain, None)
        self._gaps.pop(domain, None)
        for others in self._gaps.values():
            others.pop(domain, None)

    def rows_of(self, domain: str) -> list[GateRow]:
        """Rows of one domain's teacher that were not measured on samples."""
        return [row for row in self.rows if row.domain == domain and row.gate not in SCORED_GATES]

    def check(self, pool: TeacherPool, samples: Mapping[str, list[Rollout]], is_start: bool = True) -> None:
        """Measure the teachers of the domains of ``samples``, once each, and record all rows. ``is_start``: the samples
        are those of the student's first weights, which a teacher that is the student must agree with.

        Raises:
            UserError: the first red row that is not accepted.
        """
        new = {domain: found for domain, found in samples.items() if found and domain not in self._samples}
        if not new:
            return
        self._samples |= new
        rows = score_gates(
            pool, self._samples, self._teachers, self._cfg, origins(self.rows), new, self._gaps, is_start
        )
        self.rows = judge([*self.rows, *rows], self._cfg.accept)
        self._record([r for r in self.rows if (r.domain, r.gate) not in self._recorded], self.rows)
        self._recorded = {(row.domain, row.gate) for row in self.rows}
        stop_on_red(self.rows)


def origins(rows: Sequence[GateRow]) -> dict[str, float | None]:
    """Cosine of every teacher's weights to the student's, as the gate `foreign` found it; None: not comparable."""
    return {row.domain: row.number for row in rows if row.gate == "foreign"}


def score_gates(
    pool: TeacherPool,
    samples: Mapping[str, list[Rollout]],
    teachers: Mapping[str, Teacher],
    cfg: TeacherWorkerConfig,
    cosines: Mapping[str, float | None],
    new: Collection[str] | None = None,
    gaps: Gaps | None = None,
    is_start: bool = True,
) -> list[GateRow]:
    """Rows of every gate that needs scores, for the teachers of the domains ``new`` (None: of all ``samples``).

    Args:
        samples: the student's own rollouts, by domain.
        gaps: what former calls found, which is not scored again; added to.
        is_start: the student that sampled has the weights of its start.
    """
    chosen = {domain: rollouts[:NUM_TEXTS] for domain, rollouts in samples.items()}
    gaps = {} if gaps is None else gaps
    rows: list[GateRow] = []
    for domain in chosen if new is None else sorted(new):
        subject = Subject(domain=domain, teacher=teachers[domain])
        try:  # a broken teacher gives NaN
            result = _score(pool, domain, chosen)
        except ScoresNotFinite as error:
            rows.append(subject.red("scoring", "not finite", str(error), "give a whole teacher"))
            continue
        gaps[domain] = {d: _log_ratios(chosen[d], result.first[d]) for d in chosen}
        own = gaps[domain][domain]
        examined = [ids[:EXAMINED_TOKENS] for ids in _texts(chosen[domain])[:NUM_EXAMINED]]
        given = [s[:EXAMINED_TOKENS] for s in result.first[domain][:NUM_EXAMINED]]
        rows += [
            scoring_row(subject, pool.examine(domain, examined, given), cfg.dtype),
            noise_row(subject, result.noise, own, cfg.dtype),
            kl_row(subject, own, cfg.max_initial_kl, cosines.get(domain), is_start),
            lengths_row(subject, samples[domain]),
            cost_row(subject, result.tokens_per_s),
        ]
    for teacher in list(gaps):  # those of former calls, on the domains that are new
        if todo := {d: _texts(chosen[d]) for d in chosen if d not in gaps[teacher]}:
            try:
                scores = _by_domain(todo, _ask(pool, teacher, [[ids for d in todo for ids in todo[d]]]))
            except ScoresNotFinite:  # of texts that training never asks it for: no hint then
                del gaps[teacher]
                continue
            gaps[teacher] |= {d: _log_ratios(chosen[d], scores[d]) for d in todo}
    subjects = {domain: Subject(domain=domain, teacher=teachers[domain]) for domain in gaps}
    return rows + [row for row in swap_rows(gaps, subjects) if new is None or row.domain in new]


# One gate each ----------------------------------------------------------------------------------------------------


def scoring_row(subject: Subject, found: Examination | None, dtype: Dtype) -> GateRow:
    """``found``: None where there is no checkpoint that could be loaded for a direct forward."""
    if found is None:
        why = "a server does not tell its weights" if subject.is_server else "too large to load once more"
        return subject.unmeasured("scoring", why)
    value = f"{found.mean_abs:.1e}"
    if found.mean_abs <= MAX_SCORE_GAP[dtype]:  # false for NaN
        return subject.ok("scoring", value, found.mean_abs)
    problem = f"its scores differ from a direct forward by {found.mean_abs:.3f} nat per token"
    if found.explanation is not None:
        problem += f": they are {found.explanation}"
    way_out = "mend the scoring back end; a direct forward of this checkpoint gives other numbers"
    return subject.red("scoring", value, problem, way_out, found.mean_abs)


def noise_row(subject: Subject, noise: np.ndarray, gaps: np.ndarray, dtype: Dtype) -> GateRow:
    """Design invariant 8: the 99th percentile of |difference| between two scorings of the same text. A server does not
    say its type: bfloat16, which is vLLM's choice for what is released today."""
    p99, signal = float(np.quantile(noise, 0.99)), float(np.abs(gaps).mean())
    value = f"p99 {p99:.1e}"
    if not p99 <= MAX_NOISE[Dtype.bfloat16 if subject.is_server else dtype]:
        problem = f"two scorings of the same text differ by {p99:.3f} nat (p99)"
        way_out = "scores must not depend on the batch: look at dropout, padding and the type of the teacher"
        return subject.red("noise", value, problem, way_out, p99)
    if p99 > signal and not subject.teacher.is_student:
        problem = f"scoring noise of {p99:.4f} nat (p99) covers the teacher's signal of {signal:.4f} nat"
        key = (
            "start the server with --dtype float32" if subject.is_server else "teacher_workers.dtype=float32"
        )
        return subject.warn("noise", value, problem, f"{key}, or a teacher that has learned more", p99)
    return subject.ok("noise", value, p99)


def kl_row(subject: Subject, gaps: np.ndarray, limit: float, cosine: float | None, is_start: bool) -> GateRow:
    """Per-token KL(student || teacher) and mean |log-ratio| on the student's own samples; ``gaps`` [N] are teacher minus
    student, of which the mean takes MAX_GAP at most: RL makes a right teacher sure, and what it would never say stands at
    -10 to -40. ``limit`` is `teacher_workers.max_initial_kl`; ``is_start``: the student has the weights of its start."""
    kl, mean = float(-gaps.mean()), float(np.minimum(np.abs(gaps), MAX_GAP).mean())
    value = f"KL {kl:.3f}, abs {mean:.3f}"
    if subject.teacher.is_student and is_start and mean > SELF_GAP:
        problem = (
            f"it is the student itself, and its scores are {mean:.3f} nat per token away from the student's"
        )
        way_out = "teacher and engine do not compute the same model; run `posttrain doctor replay` on it"
        return subject.red("initial_kl", value, problem, way_out, mean)
    if not mean <= limit:
        problem = (
            f"mean |log-ratio| (each at most {MAX_GAP:g}) to the student on its own samples is {mean:.3f}"
            f" ({gaps.size:,} tokens), above teacher_workers.max_initial_kl={limit:g}"
        )
        way_out = "choose a teacher of this student's family or raise the limit"
        return subject.red("initial_kl", value, problem, way_out, mean)
    if mean < LEAST_GAP and is_start and not subject.teacher.is_student:
        problem = f"it agrees with the student to {mean:.1e} nat per token on its own samples: nothing to teach there"
        way_out = f"see that it is the trained model; a teacher that is the student on purpose is {subject.teacher.key}.self=true"
        return subject.warn("initial_kl", value, problem, way_out, mean)
    if cosine is None and kl > FOREIGN_KL:
        problem = f"KL {kl:.3f} nat per token is that of a foreign teacher (about 0.19; 0.04 for one origin)"
        way_out = "watch length, truncation and entropy of the first 30 steps"
        return subject.warn("initial_kl", value, problem, way_out, mean)
    return subject.ok("initial_kl", value, mean)


def swap_rows(gaps: Mapping[str, Mapping[str, np.ndarray]], subjects: Mapping[str, Subject]) -> list[GateRow]:
    """Whether two teachers have moved most on each other's domain; ``gaps[teacher][domain]`` are log-ratios [N].

    A teacher that was trained on a domain has moved away from the student there. For domains a and b with their
    teachers, log(M_aa M_bb / (M_ab M_ba)) of the mean |log-ratio| is free of how far each teacher moved at all and of
    how easy each domain is; it is negative when the two are swapped. A hint, never a red line.
    """
    means = {t: {d: float(np.abs(g).mean()) + 1e-6 for d, g in row.items()} for t, row in gaps.items()}
    rows = []
    for a in means:
        scores = {
            b: float(np.log(means[a][a] * means[b][b] / (means[a][b] * means[b][a]))) for b in means if b != a
        }
        if not scores:
            continue
        other = min(scores, key=lambda b: scores[b])
        value = f"{scores[other]:+.1f} with {other}"
        if scores[other] > SWAP_LOG_RATIO:
            rows.append(subjects[a].ok("domain_swap", value, scores[other]))
            continue
        problem = (
            f"the teachers of {a} and {other} have moved most on each other's prompts: {other}'s is"
            f" {means[other][a]:.3f} nat from the student on {a}, {a}'s own {means[a][a]:.3f}"
        )
        way_out = f"see that teachers.{a} and teachers.{other} are not swapped"
        rows.append(subjects[a].warn("domain_swap", value, problem, way_out, scores[other]))
    return rows


def lengths_row(subject: Subject, rollouts: Sequence[Rollout]) -> GateRow:
    """Mean sampled tokens and the share that was cut off."""
    mean = float(np.mean([r.loss_mask.sum() for r in rollouts]))
    cut = float(np.mean([r.status is RolloutStatus.truncated for r in rollouts]))
    value = f"{mean:.0f} tokens, {cut:.0%} cut"
    if cut <= MAX_TRUNCATED:
        return subject.ok("lengths", value, mean)
    problem = f"{cut:.0%} of the student's samples are cut off after {mean:.0f} tokens on average"
    way_out = "raise rollout.max_new_tokens, or give a student that ends its answers"
    return subject.warn("lengths", value, problem, way_out, mean)


def cost_row(subject: Subject, tokens_per_s: float) -> GateRow:
    return subject.ok("cost", f"{tokens_per_s:,.0f} tokens/s", tokens_per_s)


# Scoring ----------------------------------------------------------------------------------------------------------


class ScoresNotFinite(RuntimeError):
    """A teacher gave a score that is not a number."""


def _score(pool: TeacherPool, teacher: str, chosen: Mapping[str, list[Rollout]]) -> Scored:
    """All texts by the teacher of one domain, and again in two parts, so that batches differ."""
    texts = {domain: _texts(rollouts) for domain, rollouts in chosen.items()}
    flat = [ids for domain in texts for ids in texts[domain]]
    first = _ask(pool, teacher, [flat])
    begin = time.perf_counter()  # the first call pays for warming up
    halves = _ask(pool, teacher, [flat[0::2], flat[1::2]])
    spent = time.perf_counter() - begin
    second = [halves[i // 2 + (i % 2) * len(flat[0::2])] for i in range(len(flat))]
    noise = np.concatenate([np.abs(a - b)[1:] for a, b in zip(first, second, strict=True)])
    return Scored(first=_by_domain(texts, first), noise=noise, tokens_per_s=sum(map(len, flat)) / spent)


def _by_domain(texts: Mapping[str, list[np.ndarray]], flat: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Scores of all texts in their order, cut by domain."""
    scores, start = {}, 0
    for domain, members in texts.items():
        scores[domain] = flat[start : start + len(members)]
        start += len(members)
    return scores


def _ask(pool: TeacherPool, domain: str, parts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """Scores of every text of every part; one call a part, by the way that rollouts take."""
    try:  # the teacher's process found NaN
        refs = [pool.score(domain, [ray.put(_as_group(part))]) for part in parts if part]
        return [score.logprobs for scores in ray.get(refs) for score in scores]
    except TeacherScoreError as error:
        lines = [line for line in str(error).splitlines() if "TeacherScoreError: " in line]
        raise ScoresNotFinite(
            lines[-1].partition("TeacherScoreError: ")[2] if lines else str(error)
        ) from error


def _texts(rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    return [rollout.token_ids[:MAX_TEXT_TOKENS] for rollout in rollouts]


def _log_ratios(rollouts: Sequence[Rollout], scores: Sequence[np.ndarray]) -> np.ndarray:
    """Teacher minus student logprob [N] of the sampled tokens."""
    parts = [
        (score - rollout.rollout_logprobs[: len(score)])[rollout.loss_mask[: len(score)]]
        for rollout, score in zip(rollouts, scores, strict=True)
    ]
    return np.concatenate(parts)


def _as_group(texts: Sequence[np.ndarray]) -> RolloutGroup:
    """Texts in the form in which teachers take rollouts."""
    prompt = Prompt(
        prompt_id="preflight", source="preflight", domain="preflight", messages=[], token_ids=texts[0]
    )
    rollouts = [
        Rollout(
            group_id="preflight",
            rollout_id=f"preflight-{i}",
            prompt=prompt,
            turns=[
                Turn(
                    author="prompt",
                    token_ids=ids,
                    loss_mask=np.zeros(len(ids), bool),
                    rollout_logprobs=np.zeros(len(ids), np.float32),
                    policy_versions=np.full(len(ids), -1, np.int32),
                )
            ],
            messages=[],
            routed_experts=None,
            finish_reason="stop",
            status=RolloutStatus.completed,
        )
        for i, ids in enumerate(texts)
    ]
    return RolloutGroup(group_id="preflight", prompt=prompt, rollouts=rollouts)


# Report -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[GateRow]) -> Table:
    """Gates down, domains across, then what to do about every cell that is not ok."""
    domains = list(dict.fromkeys(row.domain for row in rows))
    cells = {(row.gate, row.domain): row for row in rows}
    found = Table(title="preflight of the teachers", title_justify="left")
    found.add_column("gate")
    for domain in domains:
        found.add_column(escape(domain))
    for gate in GATES:
        if any((gate, domain) in cells for domain in domains):
            found.add_row(gate, *(_cell(cells.get((gate, domain))) for domain in domains))
    return found


def _cell(row: GateRow | None) -> str:
    if row is None:
        return ""
    colour = MARKS[row.verdict]
    mark = "" if row.verdict is Verdict.ok else f"{row.verdict.value}: "
    return f"[{colour}]{mark}{escape(row.value)}[/{colour}]"


def remarks(rows: Sequence[GateRow]) -> list[str]:
    """One line for every cell that has something to do."""
    return [f"{row.verdict.value} {row.gate}: {row.line()}" for row in rows if row.problem]


def as_json(rows: Sequence[GateRow]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [
        {
            **asdict(row),
            "number": row.number if row.number is None or np.isfinite(row.number) else str(row.number),
        }
        for row in rows
    ]


def write(folder: Path, rows: Sequence[GateRow]) -> None:
    """``folder``/preflight.json: all rows."""
    disk.write_atomic(folder / "preflight.json", json.dumps(as_json(rows), indent=1) + "\n")
