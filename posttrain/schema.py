"""Reads the dataclass schemas of `posttrain.config`: which keys exist, their types, defaults and documentation.

Used to explain a wrong key or value (`posttrain.compose`) and to write `docs/configuration.md`. It holds no key,
default or text of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import MISSING

ANY_NAME = "<name>"  # stands for the user's own key of a dict field


@dataclass(kw_only=True, slots=True, frozen=True)
class Key:
    """One documented key of a schema."""

    name: str  # dotted; `<name>` for a key that the user chooses
    type: Any
    default: Any
    doc: str


@cache
def hints(schema: type) -> dict[str, Any]:
    """Resolved field types of a dataclass."""
    return typing.get_type_hints(schema)


def strip_optional(annotation: Any) -> Any:
    """``X | None`` -> ``X``; everything else unchanged."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation


def dict_value_type(annotation: Any) -> Any | None:
    """Type of the values of a ``dict[str, V]``, else None."""
    annotation = strip_optional(annotation)
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def lookup(schema: type, path: list[str]) -> Any | None:
    """Type of the key at ``path``, or None where the schema has no such key. Below ``dict[str, Any]`` all is `Any`."""
    annotation: Any = schema
    for part in path:
        if annotation is Any:
            return Any
        annotation = strip_optional(annotation)
        value_type = dict_value_type(annotation)
        if value_type is not None:
            annotation = value_type
        elif dataclasses.is_dataclass(annotation) and part in hints(typing.cast(type, annotation)):
            annotation = hints(typing.cast(type, annotation))[part]
        else:
            return None
    return annotation


def nearest(name: str, candidates: list[str]) -> str | None:
    """The candidate that the user most likely meant, if any is close."""
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_key(schema: type, path: list[str]) -> str | None:
    """None if the key exists, else why not and what it may have been: "no such key; did you mean ...?"."""
    for depth in range(len(path)):
        if lookup(schema, path[: depth + 1]) is not None:
            continue
        parent = strip_optional(lookup(schema, path[:depth]) if depth else schema)
        siblings = list(hints(typing.cast(type, parent))) if dataclasses.is_dataclass(parent) else []
        guess = nearest(path[depth], siblings)
        if guess:
            return f"no such key; did you mean {'.'.join([*path[:depth], guess, *path[depth + 1 :]])}?"
        elsewhere = [key.name for key in walk(schema) if key.name.split(".")[-1] == path[-1]]
        if elsewhere:
            return f"no such key; did you mean {elsewhere[0]}?"
        where = ".".join(path[:depth]) or "this command"
        return (
            f"no such key; {where} has {', '.join(siblings)}"
            if siblings
            else f"no such key; {where} is a single value"
        )
    return None


def expected(annotation: Any) -> str:
    """What a value of this type may be, in words."""
    optional = strip_optional(annotation) is not annotation
    annotation = strip_optional(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        names = [member.name for member in annotation]
        words = "choose " + (" or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0])
    elif dataclasses.is_dataclass(annotation):
        first = ", ".join(list(hints(typing.cast(type, annotation)))[:3])
        words = f"this is a section, give its keys ({first}, ...)"
    elif typing.get_origin(annotation) is dict:
        words = "a mapping {name: value} is needed"
    elif typing.get_origin(annotation) is list:
        words = "a list such as [a,b] is needed"
    else:
        names_of = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        words = f"{names_of[annotation]} is needed"
    return words + (" (or null)" if optional else "")


def type_name(annotation: Any) -> str:
    """Short name of a type for the documentation."""
    optional = " or null" if strip_optional(annotation) is not annotation else ""
    annotation = strip_optional(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " / ".join(member.name for member in annotation) + optional
    origin = typing.get_origin(annotation)
    if origin is dict:
        return "mapping" + optional
    if origin is list:
        return f"list of {type_name(typing.get_args(annotation)[0])}{optional}"
    names_of = {int: "integer", float: "number", bool: "true / false", str: "text"}
    return names_of.get(annotation, getattr(annotation, "__name__", str(annotation))) + optional


@cache
def docs(schema: type) -> dict[str, str]:
    """The string under each field of a dataclass, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(base)).body[0]).body
        for statement, below in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            text = ""
            if (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                text = " ".join(below.value.value.split())
            found[statement.target.id] = text or found.get(statement.target.id, "")
    return found


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Default value of a field; omegaconf's MISSING ("???") where it must be given."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING


def walk(schema: type, instance: Any = None, prefix: str = "") -> Iterator[Key]:
    """Every leaf key of a schema, in the order of the source. ``instance`` supplies defaults that a parent set."""
    for field in dataclasses.fields(schema):
        annotation = hints(schema)[field.name]
        default = default_of(field) if instance is None else getattr(instance, field.name)
        name = prefix + field.name
        value_type = dict_value_type(annotation)
        if dataclasses.is_dataclass(strip_optional(annotation)):
            yield from walk(typing.cast(type, strip_optional(annotation)), default, name + ".")
        elif value_type is not None and dataclasses.is_dataclass(value_type):
            yield from walk(typing.cast(type, value_type), None, f"{name}.{ANY_NAME}.")
        else:
            yield Key(name=name, type=annotation, default=default, doc=docs(schema)[field.name])
