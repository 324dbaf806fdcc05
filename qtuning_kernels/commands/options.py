"""Options that several commands share, and what they stand for: a tokenizer, a model, records."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtuning_kernels.config import MATMULS, SCORE_DTYPES
from qtuning_kernels.data.sources import reads_as_path
from qtuning_kernels.demo import assets as fetch

_EMBEDDED_SPLITS = ("train", "eval")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def positive(text: str) -> int:
    """argparse type: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> int:
    """argparse type: an integer from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON or YAML file of these same options; the command line wins",
    )


def add_model_and_data(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    if positional:
        parser.add_argument("dataset", nargs="?", metavar="DATA", help="the same as --data")
    group = parser.add_argument_group(
        "model and data",
        "Both default to the embedded ones (qtuning fetch): SmolLM2-135M-Instruct and 512 word problems "
        "with planted flaws.",
    )
    group.add_argument("--model", metavar="PATH|NAME", help="model folder, or its name on the Hugging Face hub")
    group.add_argument(
        "--data",
        metavar="PATH|NAME",
        help="JSON, JSON Lines or Parquet file, a folder of them, or a data set's name on the hub; records "
        "in one of four shapes: messages | conversations (ShareGPT) | prompt + completion | instruction + "
        "input + output (Alpaca)",
    )
    group.add_argument("--data-split", metavar="NAME", help="split to take (default: train)")
    group.add_argument("--data-config", metavar="NAME", help="configuration of a hub data set that has several")
    group.add_argument(
        "--prompt-field", metavar="COLUMN", help="column of the prompt, where the shape is none of these"
    )
    group.add_argument("--completion-field", metavar="COLUMN", help="column of the answer, likewise")
    group.add_argument("--cutoff", type=int, default=2048, metavar="TOKENS", help="longest sample (default: 2048)")
    group.add_argument(
        "--skip-without-answer",
        action="store_true",
        help="leave out records without an answer, and count them",
    )
    group.add_argument(
        "--tag-field",
        metavar="COLUMN",
        help="column whose values the summary counts by quadrant (default: planted, where there is one)",
    )


def add_sample_ratio(group: Any) -> None:
    group.add_argument(
        "--sample-ratio",
        type=float,
        default=0.125,
        metavar="R",
        help="share of the samples of a pool that is kept, in (0, 1] (default: 0.125)",
    )


def add_token_pruning(group: Any) -> None:
    group.add_argument(
        "--token-ratio",
        type=float,
        default=0.5,
        metavar="R",
        help="share of the answer tokens that is kept in samples of quadrant 2, in (0, 1] (default: 0.5)",
    )
    group.add_argument(
        "--neighbor-weight",
        type=float,
        default=0.5,
        metavar="W",
        help="how much a token's neighbours count in its score, in [0, 1] (default: 0.5)",
    )
    group.add_argument(
        "--token-mode",
        choices=("mask", "drop"),
        default="mask",
        help="take pruned tokens out of the loss (mask), or out of the sequence too (drop); default: mask",
    )


def add_scoring(group: Any) -> None:
    group.add_argument(
        "--score-dtype",
        choices=SCORE_DTYPES,
        default="auto",
        help="precision of the scoring pass; auto takes bfloat16 where it measures faster (CPU)",
    )
    group.add_argument(
        "--matmul",
        choices=MATMULS,
        default="auto",
        help="who multiplies float32 matrices on a CPU: as PyTorch is set (default), oneDNN, or the faster (auto)",
    )
    group.add_argument(
        "--score-batch-tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="most tokens in one forward of the scoring pass (default: 8192)",
    )


def model_source(arguments: argparse.Namespace) -> str:
    """The model that is asked for: a folder that exists, or a hub name.

    Raises:
        FileNotFoundError: no such folder, or the embedded model is not fetched.
    """
    if arguments.model is None:
        if not fetch.is_fetched(fetch.MODEL):
            raise FileNotFoundError("the embedded model is not here yet; run: qtuning fetch (or give --model)")
        return str(fetch.asset_folder(fetch.MODEL))
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
    if not fetch.is_fetched(fetch.DATA):
        raise FileNotFoundError("the embedded data is not here yet; run: qtuning fetch (or give --data)")
    file = fetch.asset_folder(fetch.DATA) / f"{split or 'train'}.jsonl"
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


def load_model(source: str) -> Any:
    """The model with float32 weights.

    Raises:
        ValueError: it cannot be loaded, or weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        result: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever a model's own code, its files or the network raise
        raise ValueError(f"model {source!r}: cannot be loaded: {first_line(error)}") from error
    model, loaded = result
    if missing := sorted(loaded["missing_keys"]):  # which transformers would leave at random
        raise ValueError(f"model {source!r}: {len(missing)} weights are not in its files, the first {missing[0]!r}")
    return model


def load_data(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, Any]:
    """(records, samples, report) of the data that is asked for."""
    from qtuning_kernels.data.sources import read_records
    from qtuning_kernels.data.tokenization import tokenize_records

    data, prompt_field, completion_field = data_source(arguments)
    records = read_records(data, split=arguments.data_split or "train", config=arguments.data_config)
    samples, report = tokenize_records(
        records,
        tokenizer,
        prompt_field=prompt_field,
        completion_field=completion_field,
        cutoff=arguments.cutoff,
        skip_without_answer=arguments.skip_without_answer,
    )
    return records, samples, report


def _shape(arguments: argparse.Namespace, records: Any) -> Any:
    from qtuning_kernels.data.conversations import detect_shape

    _, prompt_field, completion_field = data_source(arguments)
    return detect_shape(records.columns, prompt_field=prompt_field, completion_field=completion_field)


def answer_column(arguments: argparse.Namespace, records: Any) -> str:
    """The column that holds the answers."""
    return _shape(arguments, records).columns[-1]


def texts(arguments: argparse.Namespace, records: Any, samples: Any) -> Iterator[dict[str, Any]]:
    """``id``, ``prompt`` and ``answer`` of each sample, for people to read."""
    to_messages = _shape(arguments, records).to_messages
    for sample_id in samples["sample_id"][:]:
        contents = [message.get("content") or "" for message in to_messages(records.rows[sample_id])]
        yield {"id": sample_id, "prompt": "\n".join(contents[:-1]), "answer": contents[-1]}


def text_limit(samples: Any) -> int:
    """Characters of a text that a record keeps, so that those of all samples stay within 200 MB."""
    from qtuning_kernels.run_record.writer import TEXT_LIMIT

    return max(100, min(TEXT_LIMIT, 200_000_000 // (2 * len(samples))))


def tags(arguments: argparse.Namespace, records: Any) -> list[str] | None:
    """One tag per record, or None where there is no such column.

    Raises:
        ValueError: ``--tag-field`` names a column that is not there.
    """
    name = arguments.tag_field or "planted"
    if name in records.columns:
        return ["" if value is None else str(value) for value in records.column(name)]
    if arguments.tag_field:
        raise ValueError(f"--tag-field {name!r} is not a column; columns found: {', '.join(records.columns)}")
    return None


def check_vocabulary(samples: Any, model: Any) -> None:
    """Raise `ValueError` for a token that the model has no embedding for."""
    import pyarrow.compute as pc

    size = model.get_input_embeddings().weight.shape[0]
    largest = pc.max(pc.list_flatten(samples.data.column("input_ids"))).as_py()
    if largest >= size:
        raise ValueError(f"the tokenizer gives token {largest}, the model knows {size}; they do not belong together")


def quiet_libraries() -> None:
    """Leave the terminal to our own progress and errors."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
