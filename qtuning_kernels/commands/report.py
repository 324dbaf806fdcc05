"""`qtuning report`: one page that shows what a run, or the plane of a data set, looks like."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "report",
        help="draw a run, or the plane of a data set",
        description="Draw the record of a run, finished or not, or the Parquet file of qtuning score, as one "
        "HTML page that needs no network; its charts can be saved as SVG files.",
        epilog="example: qtuning report runs/mine",
    )
    text = "the page to write (default: report.html in the run's folder, or beside the Parquet file)"
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, or a Parquet file of qtuning score")
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from qtuning_kernels.report import build_report

    print(build_report(arguments.source, arguments.output))
