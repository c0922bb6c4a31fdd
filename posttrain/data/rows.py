"""Rows of a source with the place where each was found, and what happens to bad ones.

Owns files: JSONL, Parquet, directories of both, and `datasets`. A bad row ends the run with file, line, field and
reason, or is skipped and named (`data.on_bad_row`). Refuses a file without rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config import BadRow, SourceConfig, UserError

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".jsonl", ".parquet")
NUM_NAMED = 10  # skipped rows that the log names one by one


class RowError(ValueError):
    """What is wrong with one row: the field and the reason."""

    def __init__(self, field_name: str, reason: str) -> None:
        super().__init__(f"{field_name}: {reason}")


@dataclass(kw_only=True, slots=True)
class Row:
    """One row and where it stands: `file.jsonl:12`."""

    where: str
    values: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class BadRows:
    """Applies `data.on_bad_row`; ``skipped`` names every row that was dropped, `file:line: field: reason`."""

    policy: BadRow
    skipped: list[str] = field(default_factory=list)

    def reject(self, where: str, error: RowError) -> None:
        """Raise UserError, or note the row, as the policy says."""
        line = f"{where}: {error}"
        if self.policy is BadRow.fail:
            raise UserError(f"{line}; mend the row, or drop such rows with data.on_bad_row=skip")
        self.skipped.append(line)

    def log(self, num_kept: int) -> None:
        """One line with the count, and the first rows by name."""
        if not self.skipped:
            return
        logger.warning(
            "data.on_bad_row=skip: dropped %d of %d rows", len(self.skipped), len(self.skipped) + num_kept
        )
        for line in self.skipped[:NUM_NAMED]:
            logger.warning("  %s", line)
        if len(self.skipped) > NUM_NAMED:
            logger.warning("  and %d more", len(self.skipped) - NUM_NAMED)


def read_rows(source: SourceConfig, key: str, bad: BadRows) -> Iterator[Row]:
    """All rows of a source in file order; ``key`` is the config key for messages.

    Raises:
        UserError: path not there, nothing readable in it, no rows, or a bad row under `fail`.
    """
    path = Path(source.path)
    if not path.exists():
        yield from _dataset_rows(source, key)
        return
    for file in _files(path, key):
        num_rows = 0
        reader = _parquet_rows(file, key) if file.suffix == ".parquet" else _jsonl_rows(file, bad)
        for row in reader:
            num_rows += 1
            yield row
        if not num_rows:
            raise UserError(
                f"{key}={str(file)!r}: the file holds no usable rows; give a file with at least one"
            )


def _files(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
        if not files:
            raise UserError(f"{key}={str(path)!r}: the directory holds no .jsonl or .parquet file")
        return files
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(f"{key}={str(path)!r}: unknown file type; give a .jsonl or .parquet file")
    return [path]


def _jsonl_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    blank = None  # where a blank line stands; at the end of the file it is no row
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if blank:
                bad.reject(blank, RowError("row", "the line is empty"))
            where = f"{file}:{number}"
            blank = where if not line.strip() else None
            if blank:
                continue
            try:
                yield Row(where=where, values=_parse(line))
            except RowError as error:
                bad.reject(where, error)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        raise RowError("row", f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        half = "" if line.endswith(b"\n") else ", the line looks half-written"
        raise RowError("row", f"not valid JSON ({error.msg} at column {error.colno}{half})") from error
    except (RecursionError, ValueError) as error:  # nested or with digits beyond what Python reads
        raise RowError("row", f"not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise RowError("row", f"expected a JSON object, found {type(values).__name__}")
    return values


def _parquet_rows(file: Path, key: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:  # a user's file
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}={str(file)!r}: not a readable Parquet file ({reason}); write it again"
        ) from error
    number = 0
    for batch in table.iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield Row(where=f"{file}:{number}", values=_without_nulls(values))


def _dataset_rows(source: SourceConfig, key: str) -> Iterator[Row]:
    looks_like_file = source.path.startswith(("/", ".", "~")) or source.path.endswith(
        (*FILE_SUFFIXES, ".json")
    )
    if looks_like_file or source.path.count("/") > 1:
        raise UserError(f"{key}={source.path!r}: no such file or directory")
    import datasets

    try:  # the network, and whatever it returns
        dataset = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={source.path!r}: no such file, and no dataset of that name could be loaded ({reason})"
        ) from error
    if not len(dataset):
        raise UserError(f"{key}={source.path!r}: split {source.split!r} holds no rows")
    for number, values in enumerate(dataset, start=1):
        yield Row(where=f"{source.path}[{source.split}]:{number}", values=_without_nulls(values))


def _without_nulls(value: Any) -> Any:
    """Columnar formats give every field to every row; an absent one is null there and absent in JSONL."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
