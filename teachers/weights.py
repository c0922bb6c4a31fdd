"""A teacher's tensors against the student's, from the files alone: same origin or foreign, broken or whole.

Models of one origin stay close in their weights whatever they were trained on (fine-tuning moves a matrix by percents
of its length), and two initialisations are orthogonal in a space of that many dimensions: the cosine of matching
matrices is near 1 or near 0, with nothing between. It needs no forward and does not depend on the size of the model,
unlike the KL, so it decides what is foreign. Large tensors are sampled (`SLICES` spread slices, the same in both):
a lone NaN elsewhere is found by the first score. Stacked experts are compared one by one, and of embedding and head only
the rows of real tokens: how far they are padded does not matter. Imports no torch.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from teachers.checkpoint import DTYPE_BITS, TensorEntry
from teachers.tensor_values import READABLE, read_experts, read_rows, read_slices, rounded, unit

NUM_THREADS = 4
MAX_ROWS = 4096  # of a vocabulary tensor, whose rows are compared one by one
MAX_SEARCHED_ROWS = 32  # of those that differ: looked for among all rows of the student
CHUNK_BYTES = 64 * 2**20

FOREIGN_COSINE = 0.5  # median over the matrices; below: another origin
ROW_COSINE = 0.5  # below: another row than the student's
SAME_COSINE = 0.9  # above: the same tensor or row, further trained
ODD = 10.0  # times the distance of the median matrix: with a cosine below SAME_COSINE not the student's, further trained
UNLIKE_COSINE = 0.25  # a row of the vocabulary that has nothing of the student's
UNLIKE_SHARE = 0.02  # of the rows, above which they were replaced
EXPERT_ELEMENTS = 2**10  # read of each expert of a stacked tensor
SCALE = (0.8, 1.25)  # of a tensor's length; training moves it by percents
NORM_DISTANCE = 0.03  # of its length, which a norm moves at most where its matrices move less
MIN_CONSTANT = 64  # equal elements; scales of quantized tensors are fewer
MIN_COUNT = 8  # elements, below which a share says nothing
ZERO_SHARE = 0.005  # more zeros than in the student's tensor: a cast flushed small values
TOP_SHARE = 0.001  # elements at the largest |value|: a cast clipped large values
FINAL_NORMS = ("model.norm.weight", "final_layernorm.weight", "norm_f.weight", "ln_f.weight")
SINGLE_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
LAYER = re.compile(r"(.*\.(?:layers|h|blocks)\.\d+)\.")


@dataclass(kw_only=True, slots=True)
class TensorGap:
    """One tensor of teacher and student, over the sampled elements. Shares are of all of them."""

    name: str
    is_matrix: bool
    num_read: int
    num_bad: int  # NaN or infinite
    norm: float
    spread: float  # largest minus smallest value
    zero_share: float
    top_share: float
    # The same of the student and both together; None without a student's tensor of this shape.
    cosine: float | None = None
    ratio: float | None = None  # norm / student's norm; None too where that is 0
    student_spread: float | None = None
    student_zero_share: float | None = None
    student_top_share: float | None = None
    is_equal: bool = False  # after a cast to the narrower of the two types, or to that it was rounded to
    worst_expert: tuple[int, float] | None = None  # of a stacked tensor: index and cosine


@dataclass(kw_only=True, slots=True)
class WeightReport:
    """What the tensors tell. ``cosine`` is None where too few shapes agree to compare."""

    gaps: list[TensorGap]
    cosine: float | None
    is_student: bool = False  # every tensor equals the student's, in whatever type
    missing: list[str] = field(default_factory=list)  # the student has them; only told where shapes agree
    extra: list[str] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)  # of quantized types
    broken: str | None = None  # the first tensor that is wrong, in words
    untouched: str | None = None  # parts that are the student's, in words, where others are not
    unlike: str | None = None  # a vector that is not the student's, in words, where the matrices are


def compare_weights(
    teacher: dict[str, TensorEntry],
    student: dict[str, TensorEntry],
    vocab_size: int,
    num_tokens: int | None = None,
) -> WeightReport:
    """Compare all tensors that have one name and shape.

    Args:
        vocab_size: tells embedding and head, whose rows are also compared one by one.
        num_tokens: rows of them that are tokens; None: all.
    """
    num_tokens = vocab_size if num_tokens is None else min(num_tokens, vocab_size)
    teacher = {
        name: _without_padding(entry, student.get(name), vocab_size, num_tokens)
        for name, entry in teacher.items()
    }
    student = {
        name: _without_padding(entry, entry, vocab_size, num_tokens) for name, entry in student.items()
    }
    readable = {name: entry for name, entry in teacher.items() if entry.dtype in READABLE}
    twins = {
        name: student[name]
        for name, entry in readable.items()
        if name in student and student[name].shape == entry.shape and student[name].dtype in READABLE
    }
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        gaps = list(threads.map(lambda name: _gap(readable[name], twins.get(name)), readable))
    report = WeightReport(gaps=gaps, cosine=None, not_read=sorted(set(teacher) - set(readable)))
    matrices = [gap.cosine for gap in gaps if gap.is_matrix and gap.cosine is not None]
    missing, extra, other_layout = absent(set(teacher), set(student))
    num_matrices = sum(len(entry.shape) > 1 for name, entry in student.items() if name not in other_layout)
    if matrices and 2 * len(matrices) >= num_matrices:
        report.cosine = float(np.median(matrices))
        report.missing, report.extra = missing, extra
        all_read = not missing and not other_layout and not report.not_read
        report.is_student = all_read and all(gap.is_equal for gap in gaps if gap.name in student)
        report.untouched = None if report.is_student else _untouched([g for g in gaps if g.name in twins])
    is_foreign = report.cosine is not None and report.cosine < FOREIGN_COSINE
    report.broken = next((words for gap in gaps if (words := _broken(gap, is_foreign))), None)
    if report.broken is None and report.cosine is not None and report.cosine >= FOREIGN_COSINE:
        for name, twin in twins.items():
            if len(twin.shape) == 2 and twin.shape[0] == num_tokens and report.broken is None:
                report.broken = _other_rows(readable[name], twin)
        matrix_gaps = [gap for gap in gaps if gap.is_matrix and gap.ratio is not None]
        distance = float(np.median([_distance(gap) for gap in matrix_gaps]))
        report.broken = report.broken or _temperature(gaps)
        report.broken = report.broken or next(
            (w for gap in gaps if (w := _strange(gap, report.cosine, distance))), None
        )
        if report.cosine >= SAME_COSINE:
            report.unlike = next((words for gap in gaps if (words := _unlike(gap))), None)
    return report


def _without_padding(
    entry: TensorEntry, twin: TensorEntry | None, vocab_size: int, num_tokens: int
) -> TensorEntry:
    """The rows of real tokens of embedding and head; any other tensor as it is."""
    is_vocabulary = (
        twin is not None and len(twin.shape) == len(entry.shape) == 2 and twin.shape[0] == vocab_size
    )
    if not is_vocabulary or entry.shape[0] < num_tokens or entry.dtype not in READABLE:
        return entry
    num_bytes = num_tokens * entry.shape[1] * DTYPE_BITS[entry.dtype] // 8
    return replace(entry, shape=(num_tokens, entry.shape[1]), end=entry.start + num_bytes)


def absent(teacher: set[str], student: set[str]) -> tuple[list[str], list[str], set[str]]:
    """(missing, extra, in another layout) names: experts that one of the two stacks and the other has one by one."""
    missing, extra = student - teacher, teacher - student
    other: set[str] = set()
    for names, others in ((missing, extra), (extra, missing)):
        for name in names:
            if (found := SINGLE_EXPERT.fullmatch(name)) is None:
                continue
            stacked = f"{found[1]}.{'down_proj' if found[2] in ('down_proj', 'w2') else 'gate_up_proj'}"
            if stacked in others:
                other |= {name, stacked}
    return sorted(missing - other), sorted(extra - other), other


def _untouched(gaps: list[TensorGap]) -> str | None:
    """Whole layers that are the student's, bit by bit, while others are not; or all but a few tensors."""
    layers: dict[str, list[bool]] = {}
    for gap in gaps:
        if found := LAYER.match(gap.name):
            layers.setdefault(found[1], []).append(gap.is_equal)
    equal = [name for name, flags in layers.items() if all(flags)]
    if equal and len(equal) < len(layers):
        return f"{len(equal)} of {len(layers)} layers (first: {equal[0]}) are"
    moved = [gap.name for gap in gaps if not gap.is_equal]
    if equal and len(equal) == len(layers):
        return f"all tensors but {', '.join(moved[:3])}{' ...' if len(moved) > 3 else ''} are"
    return None


def _temperature(gaps: list[TensorGap]) -> str | None:
    """Head and final norm scale the logits together."""
    ratios = {
        gap.name: gap.ratio
        for gap in gaps
        if gap.ratio is not None and gap.cosine is not None and gap.cosine >= SAME_COSINE
    }
    head = next((name for name in ratios if name.endswith("lm_head.weight")), None)
    norm = next((name for name in ratios if name.endswith(FINAL_NORMS)), None)
    if head is None or norm is None:
        return None
    product = ratios[head] * ratios[norm]
    if (
        any(not SCALE[0] <= ratios[name] <= SCALE[1] for name in (head, norm))
        or SCALE[0] <= product <= SCALE[1]
    ):
        return None  # one alone is told by its own name
    return (
        f"{head} and {norm} together are the student's times {product:.3g}: a temperature of {1 / product:.3g} in the"
        " weights"
    )


def _broken(gap: TensorGap, is_foreign: bool) -> str | None:
    """What is wrong with the values themselves. A bias of zeros (of experts, of an attention) is where a model starts, so
    only one of the student's own origin must not have lost it."""
    if gap.num_bad:
        return f"{gap.name} holds NaN or infinite values ({gap.num_bad} of those read)"
    if gap.norm == 0 and (gap.is_matrix if gap.student_spread is None else gap.ratio is not None):
        if gap.is_matrix:
            return f"{gap.name} is all zero"
        if not (is_foreign and gap.name.endswith("bias")):
            return f"{gap.name} is all zero and the student's is not"
    if (
        gap.is_matrix
        and gap.spread == 0
        and gap.norm > 0
        and gap.student_spread != 0
        and gap.num_read >= MIN_CONSTANT
    ):
        return f"{gap.name} is constant"
    if not gap.is_matrix or gap.student_zero_share is None or gap.student_top_share is None:
        return None
    few = MIN_COUNT / gap.num_read
    if gap.zero_share - gap.student_zero_share > max(ZERO_SHARE, few):
        return (
            f"{gap.name} has {gap.zero_share:.1%} zeros and the student's {gap.student_zero_share:.1%}: zeroed in part,"
            " or a cast to a narrow type flushed small values"
        )
    if gap.top_share - gap.student_top_share > max(TOP_SHARE, few):
        return (
            f"{gap.top_share:.1%} of {gap.name} sit at its largest value: a cast to a narrow type clipped it"
        )
    return None


def _strange(gap: TensorGap, cosine: float, distance: float) -> str | None:
    """One tensor that is not the student's, further trained, where the others are; ``cosine`` and ``distance`` are the
    medians of the matrices, beside which norms hardly move."""
    if gap.cosine is None or gap.ratio is None:
        return None
    is_norm = not gap.is_matrix and "norm" in gap.name and gap.name.endswith(".weight")
    scaled = gap.is_matrix or gap.name.endswith("norm.weight")
    if scaled and gap.cosine >= SAME_COSINE and not SCALE[0] <= gap.ratio <= SCALE[1]:
        text = f"{gap.name} is the student's times {gap.ratio:.3g}"
        at_end = "lm_head" in gap.name or gap.name.endswith(FINAL_NORMS)
        return text + (f": a temperature of {1 / gap.ratio:.3g} in the weights" if at_end else "")
    if cosine < SAME_COSINE:
        return None
    rest = f"while the other tensors are (median {cosine:.2f})"
    if gap.worst_expert is not None and _is_odd(gap.worst_expert[1], cosine):
        index, value = gap.worst_expert
        return f"expert {index} of {gap.name} is not the student's (cosine {value:.2f}) {rest}"
    if gap.is_matrix and _is_odd(gap.cosine, cosine):
        return f"{gap.name} is not the student's (cosine {gap.cosine:.2f}) {rest}"
    if is_norm and gap.num_read >= MIN_COUNT and (moved := _moved(gap)) > max(NORM_DISTANCE, distance):
        return f"{gap.name} is not the student's (moved by {moved:.2f} of its length) {rest}"
    return None


def _unlike(gap: TensorGap) -> str | None:
    """A bias, of experts or of an attention, or sinks: training may move them far, so that this is a doubt and no proof."""
    if gap.is_matrix or "norm" in gap.name or gap.cosine is None or gap.num_read < MIN_COUNT:
        return None
    return f"{gap.name} (cosine {gap.cosine:.2f})" if gap.cosine < ROW_COSINE else None


def _moved(gap: TensorGap) -> float:
    """`_distance` of a norm; of one that is centred at zero (1 + weight), relative to ones."""
    assert gap.ratio is not None
    length = gap.norm / gap.ratio if gap.ratio else 0.0
    return _distance(gap) * min(1.0, length / math.sqrt(gap.num_read))


def _distance(gap: TensorGap) -> float:
    """|teacher - student| / |student|."""
    assert gap.cosine is not None and gap.ratio is not None
    return math.sqrt(max(0.0, gap.ratio**2 + 1 - 2 * gap.ratio * gap.cosine))


def _is_odd(cosine: float, median: float) -> bool:
    """Whether a matrix is too far from the student's to be one more that was trained."""
    return cosine < ROW_COSINE or (cosine < SAME_COSINE and 1 - cosine > ODD * (1 - median))


def _other_rows(teacher: TensorEntry, student: TensorEntry) -> str | None:
    """Rows of the vocabulary that sit at other ids than in the student: a row that is unlike the student's at its id and
    like the student's at another id, which has itself another row. Or many rows that are like none of the student's."""
    rows = np.unique(np.linspace(0, teacher.shape[0] - 1, MAX_ROWS).round().astype(int))
    ours, theirs = read_rows(student, rows), read_rows(teacher, rows)
    alike = (unit(ours) * unit(theirs)).sum(1)
    our_mean, their_mean = ours.mean(0), theirs.mean(0)  # a direction that all rows share says nothing
    ours, theirs = unit(ours - our_mean), unit(theirs - their_mean)
    centred = (ours * theirs).sum(1)
    differ = np.flatnonzero(centred < ROW_COSINE)
    if len(differ) < 2:
        return None
    searched = differ[np.linspace(0, len(differ) - 1, min(len(differ), MAX_SEARCHED_ROWS)).astype(int)]
    best = np.full(len(searched), -1.0)
    place = np.zeros(len(searched), int)
    step = max(1, CHUNK_BYTES // (4 * student.shape[1]))
    for start in range(0, student.shape[0], step):
        block = np.arange(start, min(start + step, student.shape[0]))
        cosines = theirs[searched] @ unit(read_rows(student, block) - our_mean).T
        nearest = cosines.argmax(1)
        value = cosines[np.arange(len(searched)), nearest]
        place = np.where(value > best, start + nearest, place)
        best = np.maximum(best, value)
    moved = [
        (int(rows[i]), int(j))
        for i, j, cosine in zip(searched, place, best, strict=True)
        if cosine > SAME_COSINE and (j not in rows or j in rows[differ])
    ]
    share = len(differ) / len(rows)
    if len({j for _, j in moved}) < 2:
        unlike = int((np.maximum(alike, centred) < UNLIKE_COSINE).sum())
        if unlike < max(MIN_COUNT, UNLIKE_SHARE * len(rows)) or float(np.median(centred)) < SAME_COSINE:
            return None
        return f"{unlike / len(rows):.0%} of the rows of {teacher.name} are not the student's, while the others are"
    return (
        f"{teacher.name} is permuted: {share:.0%} of its rows are elsewhere in the student"
        f" (token id {moved[0][0]} has the student's row {moved[0][1]})"
    )


def _gap(teacher: TensorEntry, student: TensorEntry | None) -> TensorGap:
    values = read_slices(teacher)
    bad = int((~np.isfinite(values)).sum())
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) if bad else values
    norm, spread, zero_share, top_share = _numbers(values)
    gap = TensorGap(
        name=teacher.name,
        is_matrix=len(teacher.shape) > 1 and values.size > 1,
        num_read=values.size,
        num_bad=bad,
        norm=norm,
        spread=spread,
        zero_share=zero_share,
        top_share=top_share,
    )
    if student is not None:
        other = np.nan_to_num(read_slices(student), nan=0.0, posinf=0.0, neginf=0.0)
        narrow = min(teacher.dtype, student.dtype, key=lambda dtype: DTYPE_BITS[dtype])
        gap.is_equal = np.array_equal(rounded(values, narrow), rounded(other, narrow)) or any(
            np.array_equal(values, rounded(other, dtype)) for dtype in ("BF16", "F16")
        )
        length, gap.student_spread, gap.student_zero_share, gap.student_top_share = _numbers(other)
        # A rounding lets many values of an even distribution meet at the largest.
        gap.student_top_share = max(gap.student_top_share, _numbers(rounded(other, "BF16"))[3])
        if length > 0:
            gap.ratio = norm / length
            gap.cosine = float(values @ other) / (norm * length) if norm > 0 else 0.0
        if len(teacher.shape) > 2 and ".experts" in teacher.name:
            gap.worst_expert = _worst_expert(teacher, student)
    return gap


def _worst_expert(teacher: TensorEntry, student: TensorEntry) -> tuple[int, float]:
    """Index and cosine of the expert of a stacked tensor that is least like the student's, by values spread over it."""
    count = min(EXPERT_ELEMENTS, math.prod(teacher.shape[1:]))
    theirs, ours = (
        np.nan_to_num(read_experts(entry, count), nan=0.0, posinf=0.0, neginf=0.0)
        for entry in (teacher, student)
    )
    cosines = np.where((ours != 0).any(1), (unit(theirs) * unit(ours)).sum(1), 1.0)
    index = int(cosines.argmin())
    return index, float(cosines[index])


def _numbers(values: np.ndarray) -> tuple[float, float, float, float]:
    """Norm, spread, share of zeros, share of elements at the largest |value|."""
    if not values.size:
        return 0.0, 0.0, 0.0, 0.0
    top = float(np.abs(values).max())
    return (
        float(np.linalg.norm(values)),
        float(values.max() - values.min()),
        float((values == 0).mean()),
        float((np.abs(values) == top).mean()) if top > 0 else 0.0,
    )
