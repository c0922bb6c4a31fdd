"""Which of vLLM's own options a user may set, checked without importing vLLM, so that a dry run can refuse the others.

Owns what the config decides elsewhere and what must not change, for rollout engines. Values are vLLM's to check.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config import UserError

OWNED_OPTIONS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "rollout.dtype",
    "max_model_len": "rollout.max_model_len",
    "seed": "seed",
    "enable_return_routed_experts": "rollout.record_routes",
}
FIXED_OPTIONS: dict[str, Any] = {
    "logprobs_mode": "raw_logprobs",  # at temperature 1, whatever the sampling temperature
    "async_scheduling": False,  # a step in flight while weights change would carry the wrong version
    "skip_tokenizer_init": False,
    "enable_eplb": False,  # moves experts, so that routes would name physical ones
}


@cache
def option_names() -> frozenset[str] | None:
    """Fields of vLLM's `EngineArgs`, read from its source: the import takes 6 s and sets up the process. None where vLLM
    is not installed."""
    package = find_spec("vllm")
    if package is None or package.origin is None:
        return None
    source = (Path(package.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8")
    (declared,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    return frozenset(
        node.target.id
        for node in declared.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    )


def check_options(
    section: str, given: Mapping[str, Any], owned: Mapping[str, str], fixed: Mapping[str, Any]
) -> None:
    """``given`` are the options under the key ``section``; ``owned`` ones have a key of their own, ``fixed`` ones a value.

    Raises:
        UserError: for the first that vLLM does not have, or that is not the user's to set.
    """
    names = option_names() if given else None
    for name, value in given.items():
        key = f"{section}.{name}={value!r}"
        if names is not None and name not in names:
            raise UserError(f"{key}: vLLM has no such engine option; check its name")
        if name in owned:
            raise UserError(f"{key}: set {owned[name]} instead")
        if name in fixed and value != fixed[name]:
            raise UserError(f"{key}: must stay {fixed[name]!r}; remove the key")
