"""The `posttrain` command: reads arguments, composes and validates the configuration, hands over to one run.

Owns exit codes and what a user sees of an error: 0 done, 1 a defect (with traceback), 2 something that the user can
mend (one line; traceback only with --debug), 130 interrupted. Imports engines only once a run starts, so help and
config errors come at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from posttrain.config import RUNS, RunConfig, UserError
from posttrain.usage import COMMANDS, TOPICS, USAGE

MODULES = {name: name for name in RUNS} | {"eval": "evaluate"}
TRAINING = ("sft", "rl", "mopd")  # runs that end with one model
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DS_LOG_LEVEL": "error",
    "WANDB_SILENT": "true",
    "PYTHONWARNINGS": "ignore",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _interrupted(arguments, debug)
    except BrokenPipeError:  # `posttrain --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        problem = user_problem(error)
        if problem is None:
            traceback.print_exception(error)
            return 1
        if debug:
            traceback.print_exception(error)
        print(f"error: {problem}", file=sys.stderr)
        return 2


def user_problem(error: BaseException) -> str | None:
    """The one line of a `UserError`, also of one that was raised in a Ray worker, or None if this is a defect."""
    for link in _links(error):
        # Ray's own errors that copy a UserError are instances of it too, but their text is a traceback.
        if type(link) is UserError:
            return " ".join(str(link).split())
        if isinstance(link, OSError) and link.errno == errno.ENOSPC:
            return f"{link.filename or 'disk'}: the disk is full; free space and start the same command again to resume"
        # Of an error in an actor's start Ray keeps only the text.
        text = str(link) if getattr(link, "actor_init_failed", False) else ""
        if found := re.findall(r"^(?:posttrain\.config\.)?UserError: (.+)$", text, re.MULTILINE):
            return str(found[-1])
    return None


def _links(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from: Ray's `cause`, `__cause__`, `__context__`."""
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        for origin in (getattr(link, "cause", None), link.__cause__):
            if isinstance(origin, BaseException):
                waiting.append(origin)


def _run(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.version:
        print(f"posttrain {_version()}")
        return 0
    if options.command is None or (options.help and options.command not in RUNS):
        print(USAGE)
        return 0 if options.help else 2
    if options.command not in RUNS:
        from posttrain.schema import nearest

        guess = nearest(options.command, list(RUNS))
        hint = f"did you mean {guess}?" if guess else f"choose {', '.join(RUNS)}"
        raise UserError(f"{options.command}: no such command; {hint}")
    topic = _take_topic(options)
    if options.help:
        print(_command_help(options.command, topic))
        return 0
    return _run_command(options, topic)


def _take_topic(options: argparse.Namespace) -> str | None:
    """The word among the overrides that names a topic of the command, taken out of them."""
    topics = TOPICS.get(options.command, {})
    words = [o for o in options.overrides if "=" not in o and not o.startswith("~")] if topics else []
    for word in words:
        if word not in topics:
            from posttrain.schema import nearest

            guess = nearest(word, list(topics))
            hint = f"did you mean {guess}?" if guess else f"choose {', '.join(topics)}, or none"
            raise UserError(f"{options.command} {word}: no such topic; {hint}")
    if len(words) > 1:
        raise UserError(f"{options.command} {' '.join(words)}: give one topic")
    options.overrides = [o for o in options.overrides if o not in words]
    return words[0] if words else None


def _run_command(options: argparse.Namespace, topic: str | None) -> int:
    from posttrain.compose import merge, to_object

    _prepare_process()
    config = merge(options.command, options.overrides, options.config, options.config_dir)
    if options.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")  # printed first: it helps to find what is wrong with it
        to_object(options.command, config)
        return 0
    cfg = to_object(options.command, config)
    if options.command == "doctor":
        from posttrain.doctor import run as run_doctor

        return run_doctor(cfg, topic)
    return _start(options.command, cfg)


def _start(command: str, cfg: RunConfig) -> int:
    from posttrain.plan import print_plan
    from posttrain.run_folder import check_folder
    from posttrain.validate import validate

    report = validate(cfg)
    if cfg.dry_run:
        print_plan(command, cfg, report, check_folder(cfg))
        return 0
    made = import_module(f"posttrain.runs.{MODULES[command]}").run(cfg)
    if command in TRAINING:
        print(f"model: {made}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="posttrain", add_help=False, allow_abbrev=False, usage=USAGE)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("command", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--config-dir", metavar="DIR")
    return parser.parse_intermixed_args(arguments)


def _refuse(message: str) -> Any:
    raise UserError(f"{message}; see `posttrain --help`. Settings are key=value, without dashes")


def _prepare_process() -> None:
    """Modules in the working directory import, and libraries keep quiet unless the user's environment says else."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _interrupted(arguments: list[str], debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("\ninterrupted; the same command resumes from the last checkpoint:", file=sys.stderr)
    print(f"  posttrain {' '.join(a for a in arguments if 'fresh=' not in a)}", file=sys.stderr)
    return 130


def _command_help(command: str, topic: str | None) -> str:
    from posttrain.compose import group_options

    lines = [f"  {place}={'|'.join(options)}" for place, options in group_options(command).items()]
    text = TOPICS[command][topic] if topic else COMMANDS[command]
    groups = ["", "Groups:", *lines] if lines else []
    return "\n".join([text.rstrip("\n"), *groups, "", "Every key: docs/configuration.md"]) + "\n"


def _version() -> str:
    from importlib.metadata import version

    return version("posttrain")


if __name__ == "__main__":
    sys.exit(main())
