"""Reads the Parquet file that ``qtuning score`` writes."""

from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet

from qtuning_kernels.run_record.reader import RecordError
from qtuning_kernels.run_record.schema import SAMPLE_COLUMNS

_REQUIRED = ("sample_id", "ppl", "entropy", "num_tokens", "quadrant", "role")


def read_plane_file(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples of a plane, with the columns of a record's samples, and their texts (maybe none).

    A file holds no choice of samples; where it has no ``keep``, those with a role count as kept.

    Raises:
        RecordError: the file is no Parquet, or a required column is missing.
    """
    try:
        table = pyarrow.parquet.read_table(path).to_pandas()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RecordError(f"{path} cannot be read as Parquet: {error}") from error
    if missing := [name for name in _REQUIRED if name not in table.columns]:
        raise RecordError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "qtuning score writes such a file."
        )
    absent = {"keep": table.role != 0, "supplemented": False, "kept_tokens": float("nan")}
    samples = table.rename(columns={"sample_id": "id"}).assign(
        step=0, **{name: value for name, value in absent.items() if name not in table}
    )[[*SAMPLE_COLUMNS]]
    if not {"prompt", "answer"} <= set(table.columns):
        return samples, pd.DataFrame(columns=["id", "prompt", "answer"])
    return samples, table[["sample_id", "prompt", "answer"]].rename(columns={"sample_id": "id"})
