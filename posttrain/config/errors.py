"""The one error that users see, and the checks that raise it: "key=value: way out"."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Something that the user can mend. The message is one line: key, value, way out. The command exits with 2."""


def require(condition: bool, key: str, value: Any, way_out: str) -> None:
    """Raise `UserError` "key=value: way out" unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}={value!r}: {way_out}")


def require_at_least(low: float, section: str, values: Any, *names: str) -> None:
    """`require` that fields of ``values`` are ``low`` or more; None stands for "not given" and passes."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value >= low, f"{section}.{name}", value, f"give {low:g} or more")


def require_above(low: float, section: str, values: Any, *names: str) -> None:
    """`require` that fields of ``values`` are more than ``low``; None stands for "not given" and passes."""
    for name in names:
        value = getattr(values, name)
        require(value is None or value > low, f"{section}.{name}", value, f"give more than {low:g}")
