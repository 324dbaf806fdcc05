"""`qtuning score`: where every sample of a data set stands on the Error–Uncertainty plane of a model."""

import argparse
import json
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import options
from qtuning_kernels.commands.inputs import load_inputs
from qtuning_kernels.commands.scored import select_from_all
from qtuning_kernels.commands.terminal import log, quadrant_table
from qtuning_kernels.files import write_atomic


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "score",
        help="write the Error-Uncertainty plane of a data set",
        description="Score a data set with a model, without training, and write one row per sample as "
        "Parquet: sample_id (the record's number, from 0), ppl, entropy (nats), num_tokens, quadrant (1 to "
        "4, 0 in the middle), role (2: kept, tokens to be pruned; 4: kept whole; 0: not kept), nll (nats, of "
        "each trainable token), the tag column, and the beginnings of prompt and answer. The whole data "
        "set is one selection pool.",
        epilog="example: qtuning score --model HuggingFaceTB/SmolLM2-135M-Instruct my.jsonl --output plane.parquet",
    )
    options.add_config(parser)
    options.add_model_and_data(parser, positional=True)
    default = "plane.parquet"
    parser.add_argument("--output", type=Path, default=Path(default), metavar="FILE", help=f"default: {default}")
    group = parser.add_argument_group("selection and computation")
    options.add_settings(group, ("sample_ratio", "triage_method", *options.SCORING))
    return parser


def run(arguments: argparse.Namespace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rich.console import Console

    console = Console()
    config = options.qtuning_config(arguments)
    inputs = load_inputs(arguments, console, output=arguments.output)
    selection, scores = select_from_all(inputs, config, console)
    plane, triage = selection.plane, selection.triage
    assert scores and plane and triage  # noqa: PT018 - Q-Tuning has them
    ids = inputs.samples["sample_id"][:]
    tags = None if inputs.tags is None else [inputs.tags[i] for i in ids]
    limit, texts = inputs.text_limit(), list(inputs.texts())
    columns: dict[str, Any] = {
        "sample_id": pa.array(ids, pa.int64()),
        "ppl": plane.ppl.numpy(),
        "entropy": plane.entropy.numpy(),
        "num_tokens": plane.num_tokens.numpy(),
        "quadrant": triage.quadrant.numpy(),
        "role": triage.role.numpy(),
        "nll": pa.array([part.numpy() for part in scores.nll.split(plane.num_tokens.tolist())], pa.list_(pa.float32())),
    }
    if inputs.tag_field is not None:
        columns[inputs.tag_field] = tags
    columns |= {name: [text[name][:limit] for text in texts] for name in ("prompt", "answer")}
    with write_atomic(arguments.output) as temporary:
        made = {"alpha": float(triage.alpha), "tag_field": inputs.tag_field}  # what qtuning report draws besides
        pq.write_table(pa.table(columns).replace_schema_metadata({"qtuning": json.dumps(made)}), temporary)
    console.print(quadrant_table(triage.quadrant.tolist(), triage.keep.tolist(), tags))
    log(console, f"{len(ids)} samples in {arguments.output}")
