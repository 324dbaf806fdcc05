"""Reads the Parquet file that ``qtuning score`` writes."""

import json
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet

from qtuning_kernels.run_record.reader import RecordError
from qtuning_kernels.run_record.schema import SAMPLE_COLUMNS, STEP_COLUMNS, TEXT_COLUMNS

_REQUIRED = ("sample_id", "ppl", "entropy", "num_tokens", "quadrant", "role")


def read_plane_file(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The samples of a plane as those of a step 0, the step with its `α` if the file has it, and texts (maybe none).

    A file holds no choice of samples; where it has no ``keep``, those with a role count as kept, and as supplemented
    outside Q2 and Q4.

    Raises:
        RecordError: the file is no Parquet, or a required column is missing.
    """
    try:
        stored = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RecordError(f"{path} cannot be read as Parquet: {error}") from error
    table = stored.to_pandas()
    made = json.loads((stored.schema.metadata or {}).get(b"qtuning", b"{}"))
    if missing := [name for name in _REQUIRED if name not in table.columns]:
        raise RecordError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "qtuning score writes such a file."
        )
    outside = (table.role != 0) & ~table.quadrant.isin([2, 4])
    absent = {"keep": table.role != 0, "supplemented": outside, "kept_tokens": float("nan")}
    samples = table.rename(columns={"sample_id": "id"}).assign(
        step=0, **{name: value for name, value in absent.items() if name not in table}
    )[[*SAMPLE_COLUMNS]]
    steps = pd.DataFrame([{"step": 0, "alpha": made.get("alpha")}], columns=list(STEP_COLUMNS))
    names = {"sample_id": "id", made.get("tag_field"): "tag"}
    texts = table.rename(columns=names).reindex(columns=list(TEXT_COLUMNS))
    return samples, steps, texts[texts.prompt.notna() | texts.tag.notna()]
