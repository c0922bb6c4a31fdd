"""A teacher's tensors against the student's, from the files alone: same origin or foreign, broken or whole.

Models of one origin stay close in their weights whatever they were trained on (fine-tuning moves a matrix by percents
of its length), and two initialisations are orthogonal in a space of that many dimensions: the cosine of matching
matrices is near 1 or near 0, with nothing between. It needs no forward and does not depend on the size of the model,
unlike the KL, so it decides what is foreign. Large tensors are sampled (`SLICES` spread slices, the same in both):
a lone NaN elsewhere is found by the first score. Imports no torch.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from teachers.checkpoint import DTYPE_BITS, TensorEntry

SLICES, SLICE_ELEMENTS = 16, 2**12
NUM_THREADS = 4
READABLE = (
    "F64",
    "F32",
    "F16",
    "BF16",
)  # quantized types need their scales, which every format names otherwise

MAX_ROWS = 4096  # of a vocabulary tensor, whose rows are compared one by one
MAX_SEARCHED_ROWS = 32  # of those that differ: looked for among all rows of the student
CHUNK_BYTES = 64 * 2**20

FOREIGN_COSINE = 0.5  # median over the matrices; below: another origin
ROW_COSINE = 0.5  # below: another row than the student's
SAME_COSINE = 0.9  # above: the same tensor or row, further trained
SCALE = (0.8, 1.25)  # of a tensor's length; training moves it by percents
MIN_COUNT = 8  # elements, below which a share says nothing
ZERO_SHARE = 0.005  # more zeros than in the student's tensor: a cast flushed small values
TOP_SHARE = 0.001  # elements at the largest |value|: a cast clipped large values


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
    is_equal: bool = False  # after a cast to the narrower of the two types


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


def compare_weights(
    teacher: dict[str, TensorEntry], student: dict[str, TensorEntry], vocab_size: int
) -> WeightReport:
    """Compare all tensors that have one name and shape; ``vocab_size`` tells embedding and head, whose rows are also
    compared one by one."""
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
    num_matrices = sum(len(entry.shape) > 1 for entry in student.values())
    if matrices and 2 * len(matrices) >= num_matrices:
        report.cosine = float(np.median(matrices))
        report.missing = sorted(set(student) - set(teacher))
        report.extra = sorted(set(teacher) - set(student))
        all_read = not report.missing and not report.not_read
        report.is_student = all_read and all(gap.is_equal for gap in gaps if gap.name in student)
    report.broken = next((words for gap in gaps if (words := _broken(gap))), None)
    if report.broken is None and report.cosine is not None and report.cosine >= FOREIGN_COSINE:
        for name, twin in twins.items():
            if len(twin.shape) == 2 and twin.shape[0] == vocab_size and report.broken is None:
                report.broken = _permuted(readable[name], twin)
        report.broken = report.broken or next(
            (w for gap in gaps if (w := _strange(gap, report.cosine))), None
        )
    return report


def _broken(gap: TensorGap) -> str | None:
    """What is wrong with the values themselves."""
    if gap.num_bad:
        return f"{gap.name} holds NaN or infinite values ({gap.num_bad} of those read)"
    if gap.norm == 0 and (gap.is_matrix if gap.student_spread is None else gap.ratio is not None):
        return f"{gap.name} is all zero"
    if gap.is_matrix and gap.spread == 0 and gap.norm > 0 and gap.student_spread != 0:
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


def _strange(gap: TensorGap, cosine: float) -> str | None:
    """One tensor that is not the student's, further trained, where the others are."""
    if gap.cosine is None or gap.ratio is None:
        return None
    scaled = gap.is_matrix or gap.name.endswith("norm.weight")
    if scaled and gap.cosine >= SAME_COSINE and not SCALE[0] <= gap.ratio <= SCALE[1]:
        text = f"{gap.name} is the student's times {gap.ratio:.3g}"
        at_end = "lm_head" in gap.name or gap.name.endswith(("model.norm.weight", "final_layernorm.weight"))
        return text + (f": a temperature of {1 / gap.ratio:.3g} in the weights" if at_end else "")
    if gap.is_matrix and cosine >= SAME_COSINE and gap.cosine < ROW_COSINE:
        return f"{gap.name} is not the student's (cosine {gap.cosine:.2f}) while the other tensors are (median {cosine:.2f})"
    return None


def _permuted(teacher: TensorEntry, student: TensorEntry) -> str | None:
    """Rows of the vocabulary that sit at other ids than in the student: a row that is unlike the student's at its id and
    like the student's at another id, which has itself another row."""
    rows = np.unique(np.linspace(0, teacher.shape[0] - 1, MAX_ROWS).round().astype(int))
    ours, theirs = _read_rows(student, rows), _read_rows(teacher, rows)
    our_mean, their_mean = ours.mean(0), theirs.mean(0)  # a direction that all rows share says nothing
    ours, theirs = _unit(ours - our_mean), _unit(theirs - their_mean)
    differ = np.flatnonzero((ours * theirs).sum(1) < ROW_COSINE)
    if len(differ) < 2:
        return None
    searched = differ[np.linspace(0, len(differ) - 1, min(len(differ), MAX_SEARCHED_ROWS)).astype(int)]
    best = np.full(len(searched), -1.0)
    place = np.zeros(len(searched), int)
    step = max(1, CHUNK_BYTES // (4 * student.shape[1]))
    for start in range(0, student.shape[0], step):
        block = np.arange(start, min(start + step, student.shape[0]))
        cosines = theirs[searched] @ _unit(_read_rows(student, block) - our_mean).T
        nearest = cosines.argmax(1)
        value = cosines[np.arange(len(searched)), nearest]
        place = np.where(value > best, start + nearest, place)
        best = np.maximum(best, value)
    moved = [
        (int(rows[i]), int(j))
        for i, j, cosine in zip(searched, place, best, strict=True)
        if cosine > SAME_COSINE and (j not in rows or j in rows[differ])
    ]
    if len({j for _, j in moved}) < 2:
        return None
    share = len(differ) / len(rows)
    return (
        f"{teacher.name} is permuted: {share:.0%} of its rows are elsewhere in the student"
        f" (token id {moved[0][0]} has the student's row {moved[0][1]})"
    )


def _gap(teacher: TensorEntry, student: TensorEntry | None) -> TensorGap:
    values = _read(teacher)
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
        other = np.nan_to_num(_read(student), nan=0.0, posinf=0.0, neginf=0.0)
        narrow = min(teacher.dtype, student.dtype, key=lambda dtype: DTYPE_BITS[dtype])
        gap.is_equal = np.array_equal(_cast(values, narrow), _cast(other, narrow))
        length, gap.student_spread, gap.student_zero_share, gap.student_top_share = _numbers(other)
        if length > 0:
            gap.ratio = norm / length
            gap.cosine = float(values @ other) / (norm * length) if norm > 0 else 0.0
    return gap


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


def read_whole(entry: TensorEntry) -> np.ndarray:
    """All values, flat, in their own type (bfloat16 as float32). For `READABLE` types."""
    with entry.file.open("rb") as stream:
        return _decode(_at(stream, entry.start, entry.end - entry.start), entry.dtype)


def _read(entry: TensorEntry) -> np.ndarray:
    """Values [n] float64: the whole tensor, or its spread slices."""
    count = math.prod(entry.shape)
    width = DTYPE_BITS[entry.dtype] // 8
    if count <= SLICES * SLICE_ELEMENTS:
        starts, length = [0], count
    else:
        starts = np.linspace(0, count - SLICE_ELEMENTS, SLICES).astype(int).tolist()
        length = SLICE_ELEMENTS
    with entry.file.open("rb") as stream:
        parts = []
        for start in starts:
            stream.seek(entry.start + start * width)
            parts.append(_decode(stream.read(length * width), entry.dtype))
    return np.concatenate(parts).astype(np.float64)


def _read_rows(entry: TensorEntry, rows: np.ndarray) -> np.ndarray:
    """Rows [len(rows), H] float32 of a matrix."""
    width = entry.shape[1] * DTYPE_BITS[entry.dtype] // 8
    with entry.file.open("rb") as stream:
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # neighbours
            stream.seek(entry.start + int(rows[0]) * width)
            raw = stream.read(len(rows) * width)
        else:
            raw = b"".join(_at(stream, entry.start + int(row) * width, width) for row in rows)
    return _decode(raw, entry.dtype).astype(np.float32).reshape(len(rows), entry.shape[1])


def _at(stream: BinaryIO, start: int, length: int) -> bytes:
    stream.seek(start)
    return stream.read(length)


def _decode(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` rounded to the nearest value of ``dtype``."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return values.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
