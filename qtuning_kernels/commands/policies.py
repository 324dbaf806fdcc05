"""`qtuning policies`: which policies there are, what they need, and where they run."""

import argparse
import inspect


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

    from rich.console import Console
    from rich.table import Table

    from qtuning_kernels.pruning.policies import POLICIES

    table = Table("policy", "what it keeps", "needs", "options", "trainers", "source")
    for name, policy in POLICIES.items():
        table.add_row(
            name,
            (inspect.getdoc(policy) or "").partition("\n\n")[0].replace("\n", " ").replace("`", ""),
            ", ".join(sorted(policy.needs)) or "nothing",
            ", ".join(field.name for field in fields(policy)),  # type: ignore[arg-type]
            "QTuningTrainer" if policy.weighted else "any",
            policy.source,
        )
    Console().print(table, highlight=False)
