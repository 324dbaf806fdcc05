"""Which checkpoint a run goes on from."""

import json
import warnings
from pathlib import Path


def latest_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run. One that a kill left half-written is passed over.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = sorted(
        (f for f in Path(output_dir).glob("checkpoint-*") if f.name.split("-")[-1].isdigit()),
        key=lambda f: int(f.name.split("-")[-1]),
        reverse=True,
    )
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())  # Trainer writes it last
        except (OSError, ValueError):
            warnings.warn(f"{folder} is incomplete and passed over", stacklevel=2)
            continue
        return folder
    raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from")
