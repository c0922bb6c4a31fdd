"""Remembers what was loaded in this process, so that validation, the run and the stages of a pipeline read a file once.

Owns no data format. What it returns is shared: treat the records as read-only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from posttrain.config import DataConfig

MAX_ENTRIES = 8

P = ParamSpec("P")
R = TypeVar("R")


def remembered(load: Callable[P, list[R]]) -> Callable[P, list[R]]:
    """Decorates ``load(data, tokenizer, max_tokens, **options)``.

    The key holds the data section, the size and time of every file it names, and the tokenizer's name and template.
    Calls that ask for ``skipped`` rows, and sources that are not files here, are always loaded.
    """
    memo: OrderedDict[Any, list[R]] = OrderedDict()

    @wraps(load)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> list[R]:
        data, tokenizer, *rest = args
        files = _files(data)  # type: ignore[arg-type]
        if files is None or kwargs.get("skipped") is not None:
            return load(*args, **kwargs)
        model = (getattr(tokenizer, "name_or_path", ""), getattr(tokenizer, "chat_template", ""))
        key = repr((data, files, model, rest, sorted(kwargs.items())))
        if key not in memo:
            memo[key] = load(*args, **kwargs)
            if len(memo) > MAX_ENTRIES:
                memo.popitem(last=False)
        return list(memo[key])

    return wrapper


def _files(data: DataConfig) -> list[tuple[str, int, int]] | None:
    """(path, size, mtime_ns) of every file behind the section; None if one of its sources is not a file or folder."""
    sources = [*data.sources.values(), *data.eval_sources.values()]
    found = []
    for name in [data.path, data.eval_path, *(source.path for source in sources)]:
        if name is None:
            continue
        path = Path(name)
        if not path.exists():
            return None
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            stat = file.stat()
            found.append((str(file.absolute()), stat.st_size, stat.st_mtime_ns))
    return found
