"""What commands print: lines as they are, and tables of samples by quadrant."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from qtuning_kernels.run_record.schema import QUADRANT_LABELS, QUADRANTS


def log(console: Any, text: object) -> None:
    """Print text as it is: neither marked up nor wrapped, so that a path in it can be copied."""
    console.print(str(text), highlight=False, markup=False, soft_wrap=True)


def program() -> str:
    """This command line as it can be typed again, also where its folder is not on the path."""
    return "qtuning" if shutil.which("qtuning") else f"{sys.executable} -m qtuning_kernels"


def quiet_libraries() -> None:
    """Leave the terminal to our own progress and errors."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def quadrant_table(quadrants: Sequence[int], kept: Sequence[bool], groups: Iterable[str] | None = None) -> Any:
    """Samples by group (rows) and quadrant (columns), how many were kept behind a slash where any were.

    Args:
        quadrants: 0..4 per sample and step.
        kept: whether the sample was kept.
        groups: the tag of each, or None for a single row.
    """
    from rich.table import Table

    names = ["samples"] * len(quadrants) if groups is None else list(groups)
    seen = Counter(zip(names, quadrants, strict=True))
    trained = Counter((n, q) for n, q, k in zip(names, quadrants, kept, strict=True) if k)
    meaning = ", ".join(name for quadrant, name in QUADRANTS.items() if quadrant)
    table = Table(title="samples seen / kept", title_justify="left", caption=meaning, caption_justify="left")
    table.add_column("")
    for title in (*QUADRANT_LABELS.values(), "all"):
        table.add_column(title, justify="right")

    def cell(name: str, wanted: Iterable[int]) -> str:
        number, of_them = (sum(c[name, q] for q in wanted) for c in (seen, trained))
        return f"{number} / {of_them}" if number else "-"

    for name in sorted(set(names)):
        table.add_row(name, *(cell(name, [q]) for q in QUADRANTS), cell(name, QUADRANTS))
    return table
