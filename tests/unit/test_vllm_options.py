"""What is read of vLLM's source is what vLLM has."""

from __future__ import annotations

import subprocess
import sys

from rollout.options import FIXED_OPTIONS, OWNED_OPTIONS, option_names
from teachers import options as of_teachers


def test_names_are_those_of_vllm() -> None:
    """Imported in a process of its own: the import sets the process up."""
    code = "from dataclasses import fields\nfrom vllm.engine.arg_utils import EngineArgs\nprint(*(f.name for f in fields(EngineArgs)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = option_names()
    assert names == set(found.stdout.splitlines()[-1].split())
    for own in (OWNED_OPTIONS, FIXED_OPTIONS, of_teachers.OWNED_OPTIONS, of_teachers.FIXED_OPTIONS):
        assert own.keys() <= names
