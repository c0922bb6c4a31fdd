"""Writes docs/configuration.md from the schemas: `python scripts/write_configuration_docs.py`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from posttrain.compose import group_options
from posttrain.config import RUNS
from posttrain.schema import Key, type_name, walk

HEAD = """\
# Configuration

Written from the schemas in `posttrain/config/` by `python scripts/write_configuration_docs.py`; a test keeps it
current.

A run's settings come from four places, later ones winning:

1. the defaults below;
2. groups and the experiment that were chosen: `experiment=tiny`, `learner=zero3`;
3. your own YAML file: `--config my.yaml`, same keys, nested; it may choose groups with `defaults: [{experiment: tiny}]`;
4. `key=value` on the command line, in order. Lists are `key=[a,b]`, null is `key=null`, a value with spaces or
   brackets is quoted twice: `'model.path="my (old) model"'`. `~teachers.math` removes an entry of a mapping.

`<name>` stands for a name of your own: a domain or a source. Below `rewards`, `environments`, `rollout.vllm` and
`learner.deepspeed` every key is passed on as it is. In YAML write `"off"` in quotes: a bare `off` means false there.
`${oc.env:NAME}` reads an environment variable; secrets are not written to the run folder. Relative paths start at the
working directory. `posttrain COMMAND ... --cfg job` prints what a command line resolves to.
"""


def page() -> str:
    """The whole page. A section that an earlier command has with the same defaults is named, not repeated."""
    shared = _common_keys()
    parts = [HEAD, "\n## Keys of every command\n\n"]
    parts.append(_table([k for k in walk(RUNS["sft"], RUNS["sft"]()) if k.name in shared]))
    shown: dict[str, dict[tuple[str, ...], tuple[str, str]]] = {}
    for command, schema in RUNS.items():
        keys = [k for k in walk(schema, schema()) if k.name not in shared]
        parts += [f"\n## `posttrain {command}`\n\n", _groups(command)]
        repeated = []
        for section in dict.fromkeys(_section(k.name) for k in keys):
            members = [k for k in keys if _section(k.name) == section]
            identity = tuple(f"{k.name[len(section) :]} {k.default}" for k in members)
            known = shown.setdefault(section.split(".")[-1], {})
            if len(members) > 1 and identity in known:
                first_command, first_section = known[identity]
                where = (
                    f"`{first_section}.*`" if first_command == command else f"in `posttrain {first_command}`"
                )
                repeated.append(f"`{section}.*` as {where}")
                keys = [k for k in keys if k not in members]
            known.setdefault(identity, (command, section))
        if repeated:
            parts.append("; ".join(repeated) + ".\n\n")
        parts.append(_table(keys))
    return "".join(parts)


def _section(name: str) -> str:
    """`learner` of `learner.lr`, `rl.learner` of `rl.learner.lr`; the key itself at the top."""
    return name.rpartition(".")[0] or name


def _common_keys() -> set[str]:
    sets = [{(k.name, str(k.default)) for k in walk(schema, schema())} for schema in RUNS.values()]
    return {name for name, _ in set.intersection(*sets)}


def _groups(command: str) -> str:
    shown = [f"`{place}=" + "\\|".join(options) + "`" for place, options in group_options(command).items()]
    return f"Groups: {', '.join(shown)}\n\n" if shown else ""


def _table(keys: list[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{key.name}` | {type_name(key.type)} | {_default(key.default)} | {key.doc.replace('|', chr(92) + '|')} |"
        for key in keys
    ]
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    if value == MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == {}:
        return "empty"
    if isinstance(value, dict):
        return ", ".join(f"`{key}: {item}`" for key, item in value.items())
    return f"`{value}`"


if __name__ == "__main__":
    (Path(__file__).resolve().parent.parent / "docs" / "configuration.md").write_text(page())
