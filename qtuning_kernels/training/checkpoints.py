"""Which checkpoint a run goes on from."""

import json
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def latest_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run. One that is half-written or lacks a file is passed over, with a warning.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = sorted(
        (f for f in Path(output_dir).glob("checkpoint-*") if f.name.split("-")[-1].isdigit()),
        key=lambda f: int(f.name.split("-")[-1]),
        reverse=True,
    )
    for folder in folders:
        defect = _defect(folder)
        if defect is None:
            return folder
        warnings.warn(f"{folder} is incomplete and passed over: {defect}", stacklevel=2)
    raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from")


def _defect(folder: Path) -> str | None:
    """What keeps a run from going on from this checkpoint: a file that is missing or cut short."""
    if not (folder / "trainer_state.json").exists():  # Trainer writes it last
        return "trainer_state.json is missing"
    if not any(folder.glob("global_step*")):  # DeepSpeed's optimizer and schedule
        for name in ("optimizer.pt", "scheduler.pt"):
            if not any(folder.glob(f"{Path(name).stem}*")):  # FSDP's have other endings
                return f"{name} is missing"
    if not any(folder.glob("rng_state*.pth")):  # Trainer would go on with other random numbers
        return "rng_state.pth is missing"
    for file in sorted(folder.rglob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # compares the length with the header
                    pass
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # whose directory is its end
                return f"{file.name} is cut short"
        except (OSError, ValueError, SafetensorError):
            return f"{file.name} is cut short"
    return None
