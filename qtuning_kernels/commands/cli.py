"""The `qtuning` command line: which commands there are, the configuration file, and how a failure ends."""

import argparse
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from qtuning_kernels.commands import evaluate, fetch, info, options, policies, report, score, select, train
from qtuning_kernels.models.collectives import world_size

# one module per command: `add_parser(subparsers)` declares it, `run(arguments)` performs it
COMMANDS = (train, evaluate, report, score, select, policies, fetch, info)
_TRACEBACK = "--traceback"
_SECONDS_BEHIND_THE_FIRST = 60
# what torch.save and safetensors say of a full disk
_DISK_FULL = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")


class UsageError(ValueError):
    """Options that cannot be used as they were given."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="qtuning",
        description="Fine-tune language models on the samples and tokens that teach (Q-Tuning, "
        "arXiv 2509.23873). Start with: qtuning fetch, then qtuning train.",
    )
    parser.add_argument("--version", action="version", version=f"qtuning-kernels {metadata.version('qtuning-kernels')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = command.add_parser(subparsers)
        given = (str(action.metavar) for action in subparser._get_positional_actions())
        subparser.usage = " ".join([f"{subparser.prog} [options]", *given])
        subparser.formatter_class = partial(argparse.HelpFormatter, max_help_position=30)  # of 80 columns
        subparser.set_defaults(run=command.run)
        subparser.add_argument(_TRACEBACK, action="store_true", help="show the traceback of an error")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; what the command line leaves out is taken from the ``--config`` file, or from the options
    of the run that is resumed.

    Raises:
        UsageError: the file cannot be read, or holds a name or value that the command does not have.
    """
    argv = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), text) for text in argv]  # as fields are spelt
    parser = build_parser()
    if {"-h", "--help"} & set(argv):
        for subparser in _subparsers(parser).values():
            options.shorten(subparser)
    elif argv[:1] == ["train"]:  # whose import takes seconds
        options.add_training_arguments(_subparsers(parser)["train"], shown="--help-all" in argv)
    arguments = parser.parse_args(argv)
    config = _config_file(arguments)
    if config is None:
        return arguments
    subparser = _subparsers(parser)[arguments.command]
    subparser.set_defaults(**_config_values(config, subparser))
    return parser.parse_args(argv)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


def _config_file(arguments: argparse.Namespace) -> Path | None:
    given, output = getattr(arguments, "config", None), getattr(arguments, "output", None)
    if given is None and output is not None and getattr(arguments, "resume", False):
        written = output / train.OPTIONS_FILE
        return written if written.is_file() else None
    return given


def _config_values(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    accepted = {
        text.removeprefix("--"): option
        for option in parser._actions
        for text in option.option_strings
        if option.dest not in ("help", "config") and not text.startswith("--no-")
    }
    values = {}
    for name, value in _read_config(path).items():
        option = accepted.get(str(name).replace("_", "-"))
        if option is None:
            names = ", ".join(sorted(text for text, option in accepted.items() if option.help != argparse.SUPPRESS))
            raise UsageError(f"{path}: unknown key {name!r}; accepted: {names}")
        if option.dest in values:
            raise UsageError(f"{path}: {name} is a second value of --{option.dest.replace('_', '-')}; accepted: one")
        if value is not None:
            values[option.dest] = _config_value(path, name, value, option)
    return values


def _config_value(path: Path, name: str, value: Any, option: argparse.Action) -> Any:
    """`value` as the command line would have it."""
    structured = isinstance(value, bool | list | dict)
    if option.nargs == 0 and not isinstance(value, bool):
        raise UsageError(f"{path}: {name} is {value!r}; accepted: true, false")
    if option.nargs == 0 or value is option.const is True or (structured and option.type in options.STRUCTURED):
        return value
    if option.nargs == "+":
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    if structured:
        raise UsageError(f"{path}: {name} is {value!r}; accepted: one text or number")
    try:  # through text, because YAML reads 1e-4 as text
        converted = option.type(str(value)) if callable(option.type) else str(value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{path}: {name} is {value!r}: {error}") from None
    if option.choices is not None and converted not in option.choices:
        raise UsageError(f"{path}: {name} is {value!r}; accepted: {', '.join(map(str, option.choices))}")
    return converted


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: must hold names and values, not {type(content).__name__}")
    return content


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line of a warning that is meant for users; libraries' deprecations are not."""
    if issubclass(category, UserWarning) and _process("RANK") == 0:
        print(f"qtuning: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _process(name: str) -> int:
    """The number of this process in the run (RANK) or on its machine (LOCAL_RANK), as torchrun and accelerate say."""
    return int(os.environ.get(name, "0"))


def _let_the_first_speak() -> None:
    """Until the processes of a run meet, all of a machine fail alike; the launcher ends this one once the first has."""
    if _process("LOCAL_RANK") and world_size() == 1:
        time.sleep(_SECONDS_BEHIND_THE_FIRST)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _let_the_first_speak()
        super().error(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, `train` also as one process of many: the first speaks, another only of a failure of its own.

    Returns:
        0 after success, 1 after a failure, whose cause is one line on stderr (and a traceback with
        ``--traceback``). Wrong usage exits with 2, as argparse does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = parse(argv)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.run is not train.run:
            raise UsageError(f"{arguments.command} runs in one process; accepted in several: train")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe had enough; nothing is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _let_the_first_speak()
        if _TRACEBACK in argv:
            traceback.print_exc()
        cause = " ".join(str(error).split()) or type(error).__name__
        if any(sign in cause for sign in _DISK_FULL):
            cause = (
                f"no space is left on the disk; what was complete stays, and train --resume goes on with it ({cause})"
            )
        where = f"process {_process('RANK')}: " if _process("RANK") else ""
        print(f"qtuning: error: {where}{cause}", file=sys.stderr)
        return 1
    return 0
