"""The report of a run or of a scored data set: one page that works offline."""

from pathlib import Path

from qtuning_kernels.files import require

NEEDED = ("jinja2", "plotly")


def build_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Draws a run's record, or the plane that ``qtuning score`` wrote.

    Args:
        run: the output folder of a run, its record's folder, or a Parquet file of ``qtuning score``.
        output: the page to write; by default ``report.html`` in the run's folder, or beside the file under
            its name.

    Returns:
        The path of the page.

    Raises:
        RecordError: there is nothing to draw at `run`, or this version cannot read it.
        ModuleNotFoundError: the libraries of the ``report`` extra are missing.
    """
    require("qtuning report", "report", *NEEDED)
    from qtuning_kernels.report.page import write_page

    return write_page(Path(run), None if output is None else Path(output))
