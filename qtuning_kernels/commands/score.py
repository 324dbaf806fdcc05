"""`qtuning score`: where every sample of a data set stands on the Error–Uncertainty plane of a model."""

import argparse
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import options
from qtuning_kernels.commands.scored import score_data_set
from qtuning_kernels.commands.tables import quadrant_table


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "score",
        help="write the Error-Uncertainty plane of a data set",
        description="Score a data set with a model, without training, and write one row per sample as "
        "Parquet: sample_id (the record's number, from 0), ppl, entropy (nats), num_tokens, quadrant (1 to "
        "4, 0 in the middle), role (2: kept, tokens to be pruned; 4: kept whole; 0: not kept), the tag "
        "column, and the beginnings of prompt and answer. The whole data set is one selection pool.",
        epilog="example: qtuning score --model HuggingFaceTB/SmolLM2-135M-Instruct my.jsonl --output plane.parquet",
    )
    options.add_config(parser)
    options.add_model_and_data(parser, positional=True)
    parser.add_argument(
        "--output", type=Path, default=Path("plane.parquet"), metavar="FILE", help="default: plane.parquet"
    )
    group = parser.add_argument_group("selection and computation")
    options.add_sample_ratio(group)
    options.add_scoring(group)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    options.quiet_libraries()
    console = Console()
    source = options.model_source(arguments)
    records, samples, report = options.load_data(arguments, options.load_tokenizer(source))
    tags = options.tags(arguments, records)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    model = options.load_model(source)
    options.check_vocabulary(samples, model)
    table = score_table(model, samples, arguments, console)
    if tags is not None:
        name = arguments.tag_field or "planted"
        table = table.append_column(name, [[tags[i] for i in table["sample_id"].to_pylist()]])
    limit = options.text_limit(samples)
    texts = list(options.texts(arguments, records, samples))
    for name in ("prompt", "answer"):
        table = table.append_column(name, [[text[name][:limit] for text in texts]])
    _write(table, arguments.output)
    rows = table.drop_columns(["prompt", "answer"]).to_pylist()
    groups = None if tags is None else [tags[row["sample_id"]] for row in rows]
    console.print(quadrant_table([row["quadrant"] for row in rows], [row["role"] > 0 for row in rows], groups))
    console.print(f"{len(rows)} samples in {arguments.output}", highlight=False, soft_wrap=True)


def score_table(model: Any, samples: Any, arguments: argparse.Namespace, console: Any) -> Any:
    """The plane as a `pyarrow.Table`, in the order of `samples`."""
    import pyarrow as pa

    from qtuning_kernels import eu_plane, triage_samples

    ppl, entropy, num_tokens = eu_plane(*score_data_set(model, samples, arguments, console))
    triage = triage_samples(ppl, entropy, arguments.sample_ratio)
    return pa.table(
        {
            "sample_id": pa.array(samples["sample_id"][:], pa.int64()),
            "ppl": ppl.numpy(),
            "entropy": entropy.numpy(),
            "num_tokens": num_tokens.numpy(),
            "quadrant": triage.quadrant.numpy(),
            "role": triage.role.numpy(),
        }
    )


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)
