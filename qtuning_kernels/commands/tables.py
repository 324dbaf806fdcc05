"""The tables that commands end with."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

QUADRANTS = {1: "Q1", 2: "Q2", 3: "Q3", 4: "Q4", 0: "middle"}
_MEANING = "Q1 harmful noise, Q2 misconception, Q3 redundant, Q4 calibration"


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
    table = Table(title="samples seen / kept", title_justify="left", caption=_MEANING, caption_justify="left")
    table.add_column("")
    for title in (*QUADRANTS.values(), "all"):
        table.add_column(title, justify="right")

    def cell(name: str, wanted: Iterable[int]) -> str:
        number, of_them = (sum(c[name, q] for q in wanted) for c in (seen, trained))
        return f"{number} / {of_them}" if number else "-"

    for name in sorted(set(names)):
        table.add_row(name, *(cell(name, [q]) for q in QUADRANTS), cell(name, QUADRANTS))
    return table
