"""`qtuning score`: where every sample of a data set stands on the Error–Uncertainty plane of a model."""

import argparse
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import options
from qtuning_kernels.commands.inputs import load_inputs
from qtuning_kernels.commands.scored import score_data_set
from qtuning_kernels.commands.terminal import log, quadrant_table
from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.files import write_atomic


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
    options.add_settings(group, ("sample_ratio", "triage_method", *options.SCORING))
    return parser


def run(arguments: argparse.Namespace) -> None:
    import pyarrow.parquet as pq
    from rich.console import Console

    console = Console()
    config = options.qtuning_config(arguments)
    inputs = load_inputs(arguments, console, output=arguments.output)
    table = score_table(inputs.model, inputs.samples, config, console)
    quadrants, kept = table["quadrant"].to_pylist(), [role > 0 for role in table["role"].to_pylist()]
    tags = None
    if inputs.tags is not None:
        tags = [inputs.tags[i] for i in table["sample_id"].to_pylist()]
        table = table.append_column(inputs.tag_field, [tags])
    limit, texts = inputs.text_limit(), list(inputs.texts())
    for name in ("prompt", "answer"):
        table = table.append_column(name, [[text[name][:limit] for text in texts]])
    with write_atomic(arguments.output) as temporary:
        pq.write_table(table, temporary)
    console.print(quadrant_table(quadrants, kept, tags))
    log(console, f"{len(kept)} samples in {arguments.output}")


def score_table(model: Any, samples: Any, config: QTuningConfig, console: Any) -> Any:
    """The plane as a `pyarrow.Table`, in the order of `samples`."""
    import pyarrow as pa

    from qtuning_kernels import eu_plane, triage_samples

    ppl, entropy, num_tokens = eu_plane(*score_data_set(model, samples, config, console))
    triage = triage_samples(ppl, entropy, config.sample_ratio, method=config.triage_method)
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
