"""From files and overrides to one typed, checked configuration object.

Hydra composes the primary config of the command with the groups and the experiment that were chosen; then the user's
own file (`--config`) and the `key=value` overrides are merged in, in this order, each checked against the schema, so
that a wrong key or value is one line that names it and what was probably meant. Refuses sweeps, `hydra.*` settings
and keys that no schema has. Nothing here touches a checkpoint, a data file or a process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config import RUNS, RunConfig, UserError
from posttrain.config.errors import require
from posttrain.schema import docs, expected, lookup, nearest, unknown_key

Tree = dict[str, Any]


def config_dir() -> Path:
    """`conf/`: package data in a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def compose(
    command: str, overrides: list[str], config_file: str | None = None, search_dir: str | None = None
) -> tuple[DictConfig, RunConfig]:
    """Resolve one command's configuration.

    Args:
        command: a key of `posttrain.config.RUNS`.
        overrides: `key=value`, `group=name` (such as `experiment=tiny`), `~key`; a leading `+` is accepted.
        config_file: the user's YAML, merged over defaults and groups and below the overrides.
        search_dir: a folder of the user's own groups, such as `experiment/mine.yaml`.

    Returns:
        The merged config as written (interpolations intact) and as the command's dataclass.

    Raises:
        UserError: a key that does not exist, a value of the wrong kind, a required key that is missing.
    """
    config = merge(command, overrides, config_file, search_dir)
    return config, to_object(command, config)


def merge(
    command: str, overrides: list[str], config_file: str | None = None, search_dir: str | None = None
) -> DictConfig:
    """As `compose`, without the last step: required keys may still be missing."""
    schema = RUNS[command]
    file_tree, file_groups = _read_user_file(config_file) if config_file else ({}, [])
    groups = available_groups(search_dir)
    parsed = [_parse(text) for text in overrides]
    chosen = [o for o in parsed if _is_group(o, groups)]
    config = _compose_groups(
        command, file_groups + [_group_text(command, o, groups) for o in chosen], search_dir
    )
    OmegaConf.set_struct(
        config, None
    )  # mappings take new names; every key is checked against the schema below
    if config_file:
        _apply(config, file_tree, schema, origin=f"{config_file}: ")
    for override in parsed:
        if override in chosen:
            continue
        if override.is_delete():
            _delete(config, override)
        else:
            _apply(config, _nest(override), schema)
    return config


def to_object(command: str, config: DictConfig) -> RunConfig:
    """The dataclass of a merged config. Raises `UserError` for missing keys and values that a schema refuses."""
    schema = RUNS[command]
    for key in _missing(config):
        raise UserError(f"{key} is missing: give {key}=VALUE ({_doc(schema, key)})")
    for prefix in [name for name in config if name in ("sft", "rl", "mopd")]:
        _to_object(config[prefix], prefix=f"{prefix}.")  # names the stage in the message
    cfg = cast(RunConfig, _to_object(config))
    require(0 <= cfg.seed < 2**31, "seed", cfg.seed, "give a whole number from 0 to 2147483647")
    return cfg


def available_groups(search_dir: str | None = None) -> dict[str, list[str]]:
    """Config groups and their options: `{"experiment": ["tiny", ...], ...}`."""
    groups: dict[str, list[str]] = {}
    for root in [config_dir(), *([Path(search_dir)] if search_dir else [])]:
        if not root.is_dir():
            raise UserError(f"--config-dir {root}: no such folder")
        for file in sorted(root.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def _missing(config: DictConfig) -> list[str]:
    try:  # interpolations of the user
        return sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _to_object(node: Any, prefix: str = "") -> Any:
    try:
        return OmegaConf.to_object(node)
    except UserError as error:  # omegaconf appends lines of its own
        raise UserError(prefix + str(error).splitlines()[0]) from None
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}") from error


def _doc(schema: type, key: str) -> str:
    *parents, name = key.split(".")
    owner = lookup(schema, parents) if parents else schema
    return docs(cast(type, owner)).get(name, "").rstrip(".") or "required"


# Groups -------------------------------------------------------------------------------------------------------


def _is_group(override: Override, groups: dict[str, list[str]]) -> bool:
    name = override.key_or_group.split("@")[0]
    return name in groups and (override.value() is None or isinstance(override.value(), str))


def command_groups(command: str) -> list[str]:
    """Groups that a command takes, as its primary config lists them: `["algorithm@rl.algorithm", ...]`."""
    primary = yaml.safe_load((config_dir() / f"{command}.yaml").read_text())
    return [next(iter(entry)) for entry in primary["defaults"] if isinstance(entry, dict)]


def group_options(command: str) -> dict[str, list[str]]:
    """Options of every group that a command takes; of the experiments those whose keys the command has."""
    options = available_groups()
    found = {
        place: [o for o in options.get(place.split("@")[0], []) if place != "experiment" or _fits(command, o)]
        for place in command_groups(command)
    }
    return {place: names for place, names in found.items() if names}


def _fits(command: str, experiment: str) -> bool:
    keys = yaml.safe_load((config_dir() / "experiment" / f"{experiment}.yaml").read_text())
    return set(keys) - {"defaults"} <= {field.name for field in dataclasses.fields(RUNS[command])}


def _group_text(command: str, override: Override, groups: dict[str, list[str]]) -> str:
    name, _, package = override.key_or_group.partition("@")
    choice = override.value()
    known = command_groups(command)
    place = f"{name}@{override.package or package}" if override.package or package else name
    if place not in known:
        raise UserError(
            f"{place}={choice}: `posttrain {command}` has no such group; it has {', '.join(known)}"
        )
    if choice is not None and choice not in groups[name]:
        guess = nearest(str(choice), groups[name])
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(groups[name])}"
        raise UserError(f"{name}={choice}: no such option; {hint}")
    return f"{place}={'null' if choice is None else choice}"


def _compose_groups(command: str, groups: list[str], search_dir: str | None) -> DictConfig:
    ConfigStore.instance().store(name=f"{command}_schema", node=RUNS[command])
    search = [f'hydra.searchpath=["file://{Path(search_dir).resolve()}"]'] if search_dir else []
    try:  # YAML files of the user
        with initialize_config_dir(config_dir=str(config_dir()), version_base=None):
            return hydra_compose(command, [*groups, *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain_composition(command, groups, error)) from error


def _explain_composition(command: str, groups: list[str], error: Exception) -> str:
    """One line from Hydra's account of a YAML file that does not fit the schema."""
    chosen = " ".join(groups) or "conf"
    text = str(error)
    if found := re.search(r"full_key: (\S+)", text + str(error.__cause__ or "")):
        key = found.group(1)
        path = key.split(".")
        why = unknown_key(RUNS[command], path) or _value_help(RUNS[command], path, "'False'" not in text)
        return f"{chosen}: {key}: {why}"
    return f"{chosen}: {' '.join(text.split())}"


def _read_user_file(path: str) -> tuple[Tree, list[str]]:
    """Keys of the user's YAML, and the groups that its `defaults` list chooses."""
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    try:  # a file of the user
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: a mapping of keys is needed")
    tree = {str(key): value for key, value in loaded.items()}
    groups = []
    for entry in tree.pop("defaults", None) or []:
        if entry == "_self_":
            continue
        if not (isinstance(entry, dict) and len(entry) == 1):
            raise UserError(f"--config {path}: defaults: {entry!r}: give `- group: option`")
        groups += [f"{group}={option}" for group, option in entry.items()]
    return tree, groups


# Keys and values ------------------------------------------------------------------------------------------------


def _parse(text: str) -> Override:
    stripped = text.lstrip("+")
    try:  # typed by the user
        override = OverridesParser.create().parse_override(stripped)
    except HydraException as error:
        way_out = "quote the value: 'key=\"value\"'" if "=" in text else "an override is key=value"
        raise UserError(f"{text}: cannot be read; {way_out}") from error
    if override.is_sweep_override():
        raise UserError(f"{text}: several values; one run takes one value, a list is key=[a,b]")
    if override.key_or_group.split(".")[0] == "hydra":
        raise UserError(f"{text}: Hydra's own settings are fixed; runs_dir and name choose the folder")
    return override


def _nest(override: Override) -> Tree:
    value = _plain(override.value())
    for part in reversed(override.key_or_group.split(".")):
        value = {part: value}
    return cast(Tree, value)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return value


def _apply(config: DictConfig, tree: Tree, schema: type, origin: str = "") -> None:
    """Merge a tree of keys into the config, leaf by leaf, so that an error names the leaf."""
    for path, value in _leaves(tree, schema, []):
        key = ".".join(path)
        if problem := unknown_key(schema, path):
            raise UserError(f"{origin}{key}={value!r}: {problem}")
        nested = value
        for part in reversed(path):
            nested = {part: nested}
        try:  # a value of the user
            config.merge_with(nested)
        except OmegaConfBaseException as error:
            raise UserError(f"{origin}{key}={_shown(value)}: {_value_help(schema, path, value)}") from error


def _leaves(tree: Tree, schema: type, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    for name, value in tree.items():
        here = [*path, str(name)]
        annotation = lookup(schema, here)
        if isinstance(value, dict) and value and annotation is not Any:
            yield from _leaves(value, schema, here)
        else:
            yield here, value


def _value_help(schema: type, path: list[str], value: Any) -> str:
    words = expected(lookup(schema, path))
    if words.startswith("choose") and value is False:
        return f'{words} (YAML reads a bare on/off as true/false: write "off" in quotes)'
    return words


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _delete(config: DictConfig, override: Override) -> None:
    *parents, name = override.key_or_group.split(".")
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    if (
        not isinstance(node, DictConfig)
        or name not in node
        or dataclasses.is_dataclass(OmegaConf.get_type(node))
    ):
        raise UserError(f"~{override.key_or_group}: only an entry of a mapping that is set can be removed")
    del node[name]
