"""`qtuning policies`: which policies there are, what they need, and where they run."""

import argparse
import inspect
import textwrap


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        "policies",
        help="list the selection policies",
        description="List the selection policies: what each keeps, what it needs of the model (nothing: no scoring "
        "pass), its options (defaults as in qtuning train), where it runs, and its source. Use one with "
        "--policy NAME of train and select.",
    )


def run(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from qtuning_kernels.pruning.policies import POLICIES

    width = max(map(len, POLICIES)) + 2
    for name, policy in POLICIES.items():
        needs = ", ".join(sorted(policy.needs)) or "nothing"
        options = ", ".join(field.name for field in fields(policy)) or "none"  # type: ignore[arg-type]
        lines = [
            (inspect.getdoc(policy) or "").partition("\n\n")[0].replace("`", ""),
            f"needs {needs}; {'QTuningTrainer only' if policy.weighted else 'any trainer'}; options: {options}",
            policy.source,
        ]
        for index, line in enumerate(filter(None, lines)):
            first = " " * width if index else name.ljust(width)
            print(textwrap.fill(line, 100, initial_indent=first, subsequent_indent=" " * width))
