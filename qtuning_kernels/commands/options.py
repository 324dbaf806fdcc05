"""Options that several commands share: what they are called, and the settings that they make."""

import argparse
import dataclasses
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, cast

from qtuning_kernels.config import QTuningConfig, check_settings

POLICY = ("policy", "policy_options", "sample_ratio", "triage_method")
TOKEN_PRUNING = ("token_ratio", "neighbor_weight", "token_mode", "token_order", "neighbor_reduction")
SCORING = ("score_dtype", "matmul", "score_batch_tokens")
_METAVARS = {int: "N", float: "X"}
DEFAULT_TEXT = "(default: %(default)s)"  # which argparse fills in
FLAG: Any = argparse.BooleanOptionalAction
# what --help leaves to --help-all
RARE = {
    *("data_split", "data_config", "tag_field", "skip_unusable", "policy_options", "triage_method", "neighbor_weight"),
    *("token_mode", "token_order", "neighbor_reduction", "reference_model", "reference_scores", "rescore_every"),
    *("selection_scope", "micro_batch_tokens", *SCORING, "record", "record_tokens", "report_to", "save_steps"),
}
# fields of TrainingArguments that the command refuses, and what to give instead
_REFUSED = dict.fromkeys(("do_train", "do_eval", "do_predict"), "--eval-data, --eval-share, and qtuning eval") | {
    "hub_token": "HF_TOKEN in the environment, since options are written to the output folder",
    "resume_from_checkpoint": "--resume and the run's --output",
}
# the command's own defaults of fields of TrainingArguments
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "remove_unused_columns": False,  # sample_id is no argument of the model
}


def above(least: int, kind: type = int) -> Callable[[str], Any]:
    """argparse type: a finite number above `least`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not least < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {'a finite number ' * (value > least)}above {least}")
        return value

    convert.__name__ = kind.__name__  # which argparse's message has
    return convert


def text_or_json(text: str) -> Any:
    """argparse type: the list, mapping, true or false that the text spells in JSON, else the text."""
    return json.loads(text) if text[:1] in ("[", "{") else {"true": True, "false": False}.get(text, text)


STRUCTURED = (json.loads, text_or_json)  # which take lists, mappings, true and false


def shorten(parser: argparse.ArgumentParser) -> None:
    """Leave out of the help what few need, and second names. The parser does not parse afterwards."""
    for option in parser._actions:
        option.option_strings = option.option_strings[: 2 if option.dest == "help" else 1]
        if option.dest in RARE:
            option.help = argparse.SUPPRESS


def add_config(parser: argparse.ArgumentParser) -> None:
    text = "JSON or YAML file of options; those here win"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)


def add_model_and_data(parser: argparse.ArgumentParser, *, positional: bool = False) -> Any:
    """The group of these options."""
    if positional:
        parser.add_argument("dataset", nargs="?", metavar="[DATA]", help="the same as --data")
    parser.add_argument("--help-all", action="help", help="show the rest of the options too")
    group = parser.add_argument_group("model and data, by default the embedded ones (qtuning fetch)")
    texts = {
        "--model PATH|NAME": "folder, or name on the Hugging Face hub",
        "--attn-implementation NAME": "eager, sdpa, ... (default: the model's)",
        "--data PATH|NAME": "file, folder or name on the hub, of messages, prompt + completion, question + answer, ...",
        "--data-split NAME": "split to take (default: train)",
        "--data-config NAME": "configuration of a hub data set that has several",
        "--prompt-field COLUMN": "of the prompt, where it is another; A,B: two",
        "--completion-field COLUMN": "of the answer, where it is another",
        "--tag-field COLUMN": "column whose values the summary counts by quadrant (default: planted, if there is one)",
    }
    for option, text in texts.items():
        name, metavar = option.split()
        group.add_argument(name, metavar=metavar, help=text)
    group.add_argument("--cutoff", type=int, default=2048, metavar="TOKENS", help=f"longest sample {DEFAULT_TEXT}")
    group.add_argument("--skip-unusable", action="store_true", help="leave out unusable records, and count them")
    return group


def option_name(field: str) -> str:
    """``sample_ratio`` as ``--sample-ratio``."""
    return f"--{field.replace('_', '-')}"


def argument_texts(cls: type) -> dict[str, str]:
    """The Args section of a class by argument, as texts for argparse."""
    section = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    plain = (re.sub(r"`| \((decision|eq\.) \w+\)", "", " ".join(entry.split())) for entry in entries)
    return dict(entry.replace("%", "%%").removesuffix(".").split(": ", 1) for entry in plain)


def add_settings(group: Any, names: Iterable[str]) -> None:
    """Options of fields of `QTuningConfig`, which has their types, defaults, choices and help."""
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(QTuningConfig)}
    texts, defaults = argument_texts(QTuningConfig), QTuningConfig()
    for name in names:
        field, default = fields[name], getattr(defaults, name)
        if name == "policy":
            kind: dict[str, Any] = {"metavar": "NAME"}
        elif name == "policy_options":
            kind = {"type": json.loads, "metavar": "JSON"}
        elif field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is str:
            kind = {"choices": field.metadata["accepted"][0]}
        else:
            kind = {"type": field.type, "metavar": _METAVARS[cast(type, field.type)]}
        text = f"{texts.get(name, '')} (default: {default or 'none'})"
        group.add_argument(option_name(name), default=default, help=text, **kind)


def add_reference(group: Any) -> None:
    """Options of a policy that compares with another model."""
    group.add_argument("--reference-model", metavar="PATH|NAME", help="of policies that compare with one, like --model")
    text = "its scores, a file that qtuning score --output wrote of the same data"
    group.add_argument("--reference-scores", type=Path, metavar="FILE", help=text)


def qtuning_config(arguments: argparse.Namespace) -> QTuningConfig:
    """The settings that the options make; a field without an option has its default.

    Raises:
        ValueError: a value that `QTuningConfig` or its policy does not accept, or a reference that is missing or that
            nothing reads; the message names the option.
    """
    from qtuning_kernels.pruning.policies import make_policy

    values = _given(arguments, QTuningConfig)
    check_settings(values, option_name)
    config = QTuningConfig(**values)
    needed = "reference_nll" in make_policy(config).needs
    given = [getattr(arguments, name, None) for name in ("reference_model", "reference_scores")]
    if needed != any(given):
        what = "needs the scores of another model" if needed else "reads no scores of another model"
        accepted = "--reference-model or --reference-scores" if needed else "neither reference option"
        raise ValueError(f"--policy {config.policy} {what}; accepted: {accepted}")
    return config


def add_training_arguments(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    """Options of the fields of `transformers.TrainingArguments` that have none yet, by their own names."""
    from transformers import TrainingArguments

    group = parser.add_argument_group("all other fields of transformers.TrainingArguments")
    hints = typing.get_type_hints(TrainingArguments)
    for field in dataclasses.fields(TrainingArguments):
        option, default = option_name(field.name), DEFAULTS.get(field.name, field.default)
        if option in parser._option_string_actions:
            continue
        kind = _kind(hints[field.name])
        if "choices" in field.metadata:
            kind["choices"] = list(field.metadata["choices"])
        if "const" in field.metadata and "action" not in kind:  # --fsdp alone
            kind |= {"nargs": field.metadata["nargs"], "const": field.metadata["const"]}
        text = field.metadata.get("help", "") + f" (default: {default})" * (default is not dataclasses.MISSING)
        shows = shown and field.name not in _REFUSED
        group.add_argument(option, default=argparse.SUPPRESS, help=text if shows else argparse.SUPPRESS, **kind)


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse takes a value of this type: a choice, text, a flag, a list, a number, else JSON."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not types.NoneType]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return {"metavar": "NAME", "choices": [member.value for member in kind]}
    if str in kinds:
        return {"metavar": "TEXT"} | ({"type": text_or_json} if len(kinds) > 1 else {})
    if typing.get_origin(kinds[0]) is list:
        return {"nargs": "+", "metavar": "TEXT"}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    number = next((kind for kind in _METAVARS if kind in kinds), None)
    return {"type": number, "metavar": _METAVARS[number]} if number else {"type": json.loads, "metavar": "JSON"}


def training_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `transformers.TrainingArguments` that the options give under the same name."""
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import TrainingArguments

    given = _given(arguments, TrainingArguments)
    for name in _REFUSED.keys() & given.keys():
        raise ValueError(f"{option_name(name)} is not taken; accepted: {_REFUSED[name]}")
    if given.get("parallelism_config"):
        given["parallelism_config"] = ParallelismConfig(**given["parallelism_config"])
    return given


def _given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(cls))
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
