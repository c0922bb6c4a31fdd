"""From the `rewards` section of a config to reward objects. Owns the messages for what a user can get wrong there."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from typing import Any

from posttrain.config import UserError
from rewards.base import Reward

WAY_OUT = "give the dotted path of a class with score(rollout) -> (reward, breakdown)"


def resolve(rewards_cfg: dict[str, Any], domains: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Config of every domain's reward; imports the targets but builds nothing, so it can run before engines start.

    ``rewards_cfg`` is one reward for all domains (it has `_target_`) or a mapping domain -> reward; entries for
    domains that are not asked for are allowed.

    Raises:
        UserError: a domain without reward, an entry without `_target_`, or a target that cannot be imported, is no class,
            does not take the entry's arguments, or has no `score` of one argument.
    """
    shared = "_target_" in rewards_cfg
    resolved: dict[str, dict[str, Any]] = {}
    for domain in domains:
        key = "rewards" if shared else f"rewards.{domain}"
        entry = rewards_cfg if shared else rewards_cfg.get(domain)
        if entry is None:
            known = ", ".join(sorted(rewards_cfg)) or "none"
            raise UserError(
                f"{key}: domain {domain!r} without reward (rewards are given for: {known}); "
                f"set {key}._target_=MODULE.CLASS, or rewards._target_ for all domains"
            )
        if not isinstance(entry, dict) or not isinstance(entry.get("_target_"), str):
            raise UserError(f"{key}={entry!r}: no _target_; {WAY_OUT}")
        resolved[domain] = {str(name): value for name, value in entry.items()}
        _locate(resolved[domain], key)
    return resolved


def build(entry: dict[str, Any], key: str) -> Reward:
    """Instantiate one reward; UserError naming ``key`` if it cannot be built or has no `score`."""
    from hydra.utils import instantiate

    _locate(entry, key)
    try:  # code of a user
        reward = instantiate(entry, _convert_="all")
    except Exception as error:
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"{key}._target_={entry['_target_']!r}: it cannot be built ({reason})") from error
    if not callable(getattr(reward, "score", None)):
        raise UserError(f"{key}._target_={entry['_target_']!r}: it has no score method; {WAY_OUT}")
    return reward


def _locate(entry: dict[str, Any], key: str) -> None:
    """Import the module and check the class. Modules in the working directory count, as for `python -m`."""
    target = entry["_target_"]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    prefix = f"{key}._target_={target!r}"
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise UserError(f"{prefix}: no module in it; {WAY_OUT}")
    try:  # code of a user, run on import
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{prefix}: module {module_name!r} cannot be imported ({_first_line(error)}); "
            "put its folder on PYTHONPATH or start in that folder"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{prefix}: module {module_name!r} has no {attribute!r}; {WAY_OUT}")
    _check_class(getattr(module, attribute), entry, prefix)


def _check_class(found: Any, entry: dict[str, Any], prefix: str) -> None:
    if inspect.isroutine(found):
        raise UserError(f"{prefix}: a function, not a class; {WAY_OUT}")
    if not isinstance(found, type):
        return  # some other callable that makes rewards
    method = getattr(found, "score", None)
    if not callable(method):
        raise UserError(f"{prefix}: the class has no score method; {WAY_OUT}")
    given = {name: value for name, value in entry.items() if not name.startswith("_")}
    if problem := _unfit(found, *(entry.get("_args_") or ()), **given):
        raise UserError(
            f"{prefix}: it cannot be built ({problem}); give the arguments that its __init__ takes"
        )
    score = inspect.getattr_static(found, "score")
    bound = isinstance(score, (staticmethod, classmethod))
    if (bound or inspect.isfunction(score)) and _unfit(method, *([None] if bound else [None, None])):
        raise UserError(f"{prefix}: its score method does not take one argument, the rollout; {WAY_OUT}")


def _unfit(function: Any, /, *args: Any, **kwargs: Any) -> str | None:
    """Why a call would not fit the signature, None if it would or cannot be told."""
    try:  # builtins may have no signature
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:  # code of a user
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
