"""What a command reads: a model with its tokenizer, and records with the samples made of them."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtuning_kernels.commands.terminal import log, program, quiet_libraries
from qtuning_kernels.data.sources import first_line, reads_as_path
from qtuning_kernels.demo import assets
from qtuning_kernels.files import refuse_overwrite
from qtuning_kernels.run_record.writer import TEXT_LIMIT

_EMBEDDED_SPLITS = ("train", "eval")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass
class Inputs:
    """The model, the tokenizer and the data that the options name.

    Attributes:
        shape: of the records, `data.conversations.Shape`.
        tag_field, tags: the column of tags and its value in each record; None where there is no such column.
    """

    model: Any
    tokenizer: Any
    records: Any
    samples: Any
    shape: Any
    tag_field: str | None
    tags: list[str] | None

    def texts(self) -> Iterator[dict[str, Any]]:
        """``id``, ``prompt``, ``answer`` and ``tag`` of each sample, for people to read."""
        for sample_id in self.samples["sample_id"][:]:
            contents = [m.get("content") or "" for m in self.shape.to_messages(self.records.rows[sample_id])]
            tag = self.tags[sample_id] if self.tags else None
            yield {"id": sample_id, "prompt": "\n".join(contents[:-1]), "answer": contents[-1], "tag": tag}

    def text_limit(self) -> int:
        """Characters of each text to keep, so that those of all samples stay within 200 MB."""
        return max(100, min(TEXT_LIMIT, 200_000_000 // (2 * len(self.samples))))


def load_inputs(arguments: argparse.Namespace, console: Any, *, output: Path | None = None) -> Inputs:
    """Load what the options name, and print what became of the records.

    Args:
        output: the file that the command is going to write.

    Raises:
        FileNotFoundError, ValueError: an input is missing, or cannot be used.
        FileExistsError: `output` is a file of an input.
    """
    from qtuning_kernels.data.conversations import detect_shape

    quiet_libraries()
    source, (data, prompt_field, completion_field) = model_source(arguments), data_source(arguments)
    if output is not None:
        others = (getattr(arguments, name, None) for name in ("config", "reference_scores", "reference_model"))
        refuse_overwrite(output, [data, source, *filter(None, others)])
    tokenizer = load_tokenizer(source)
    records, samples, report = load_data(arguments, tokenizer)
    shape = detect_shape(records.columns, prompt_field=prompt_field, completion_field=completion_field)
    tag_field, tags = _tags(arguments.tag_field, records)
    log(console, report)
    model = load_model(source, arguments.attn_implementation)
    _check_vocabulary(samples, model)
    return Inputs(model, tokenizer, records, samples, shape, tag_field, tags)


def model_source(arguments: argparse.Namespace) -> str:
    """The model that is asked for: a folder that exists, or a hub name.

    Raises:
        FileNotFoundError: no such folder, or the embedded model is not fetched.
    """
    if arguments.model is None:
        if not assets.is_fetched(assets.MODEL):
            raise FileNotFoundError(f"the embedded model is not fetched yet; run: {program()} fetch (or give --model)")
        return str(assets.asset_folder(assets.MODEL))
    path = Path(arguments.model).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or reads_as_path(arguments.model):
        raise FileNotFoundError(f"model {arguments.model!r}: no such folder")
    return arguments.model


def data_source(arguments: argparse.Namespace) -> tuple[str, str | None, str | None]:
    """(data, prompt field, completion field) that are asked for.

    Raises:
        FileNotFoundError: the embedded data is not fetched.
        ValueError: the data is given twice, or has no such split.
    """
    positional, split = getattr(arguments, "dataset", None), arguments.data_split
    if positional is not None and arguments.data is not None:
        raise ValueError(f"data is given twice: {positional!r} and --data {arguments.data!r}")
    data = arguments.data if positional is None else positional
    if data is not None:
        if split is not None and Path(data).expanduser().is_file():
            raise ValueError(f"--data-split {split!r}: {data} is one file, which has no splits")
        return data, arguments.prompt_field, arguments.completion_field
    if split not in (None, *_EMBEDDED_SPLITS):
        raise ValueError(f"--data-split {split!r}: the embedded data has {', '.join(_EMBEDDED_SPLITS)}")
    if not assets.is_fetched(assets.DATA):
        raise FileNotFoundError(f"the embedded data is not fetched yet; run: {program()} fetch (or give --data)")
    file = assets.asset_folder(assets.DATA) / f"{split or 'train'}.jsonl"
    return str(file), arguments.prompt_field or "question", arguments.completion_field or "answer"


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ValueError: the folder holds none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ValueError(f"model {source!r}: the folder holds no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a tokenizer's own code, its files or the network raise
        raise ValueError(f"model {source!r}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, attn_implementation: str | None = None) -> Any:
    """The model with float32 weights, and the attention of this name or its own.

    Raises:
        ValueError: it cannot be loaded, or weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        given = {"attn_implementation": attn_implementation} if attn_implementation else {}  # None is a choice, too
        result: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **given
        )
    except Exception as error:  # whatever a model's own code, its files or the network raise
        raise ValueError(f"model {source!r}: cannot be loaded: {first_line(error)}") from error
    model, loaded = result
    if missing := sorted(loaded["missing_keys"]):  # which transformers would leave at random
        raise ValueError(f"model {source!r}: {len(missing)} weights are not in its files, the first {missing[0]!r}")
    return model


def load_reference(arguments: argparse.Namespace) -> dict[str, Any]:
    """``reference_model`` and ``reference_nll`` as the trainers take them.

    Raises:
        FileNotFoundError, ValueError: what the options name is missing, or cannot be loaded.
    """
    name, file = arguments.reference_model, arguments.reference_scores
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"--reference-scores {file}: no such file")
    model = load_model(model_source(argparse.Namespace(model=name))) if name else None
    return {"reference_model": model, "reference_nll": file}


def held_out(arguments: argparse.Namespace, inputs: Inputs, console: Any) -> Any:
    """The samples that are evaluated and not trained on: of --eval-data, or a share taken out of `inputs`; or None."""
    if arguments.eval_data is not None:
        own = {"data": arguments.eval_data, "data_split": None, "data_config": None}
        _, samples, report = load_data(argparse.Namespace(**vars(arguments) | own), inputs.tokenizer)
        log(console, f"evaluation: {report}")
        _check_vocabulary(samples, inputs.model)
        return samples
    if not arguments.eval_share:
        return None
    try:
        parts = inputs.samples.train_test_split(arguments.eval_share, seed=arguments.seed)
    except ValueError as error:
        raise ValueError(f"--eval-share {arguments.eval_share}: {first_line(error)}") from None
    inputs.samples = parts["train"].sort("sample_id")
    log(console, f"{len(parts['test'])} samples are held out for evaluation, {len(inputs.samples)} trained on")
    return parts["test"].sort("sample_id")


def load_data(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, Any]:
    """(records, samples, report) of the data that is asked for."""
    from qtuning_kernels.data.sources import read_records
    from qtuning_kernels.data.tokenization import tokenize_records

    data, prompt_field, completion_field = data_source(arguments)
    records = read_records(data, split=arguments.data_split or "train", config=arguments.data_config)
    fields: dict[str, Any] = {"prompt_field": prompt_field, "completion_field": completion_field}
    limits = {"cutoff": arguments.cutoff, "skip_unusable": arguments.skip_unusable}
    samples, report = tokenize_records(records, tokenizer, **fields, **limits)
    return records, samples, report


def _tags(asked: str | None, records: Any) -> tuple[str, list[str]] | tuple[None, None]:
    """The column of tags, ``planted`` if none is asked for, and one tag per record."""
    name = asked or "planted"
    if name in records.columns:
        return name, ["" if value is None else str(value) for value in records.column(name)]
    if asked:
        raise ValueError(f"--tag-field {name!r} is not a column; columns found: {', '.join(records.columns)}")
    return None, None


def _check_vocabulary(samples: Any, model: Any) -> None:
    """Raise `ValueError` for a token that the model has no embedding for."""
    import pyarrow.compute as pc

    size = model.get_input_embeddings().num_embeddings  # of all of it, also where the weight is in parts
    largest = pc.max(pc.list_flatten(samples.data.column("input_ids"))).as_py()
    if largest >= size:
        raise ValueError(f"the tokenizer gives token {largest}, the model knows {size}; they do not belong together")
