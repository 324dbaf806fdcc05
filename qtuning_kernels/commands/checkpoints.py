"""The output folder of a run: refused if in use, or resumed; the final model is written whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

from qtuning_kernels.models.collectives import gather


def prepare_output(output: Path, resume: bool, *, given: bool = True) -> str | None:
    """The checkpoint to go on from, or None to start from the beginning.

    Args:
        output: the output folder.
        resume: whether to go on with the run in it.
        given: whether the caller named the folder; without a name nothing can be resumed.

    Raises:
        FileExistsError: the folder is in use and `resume` is not asked for.
        FileNotFoundError: `resume` is asked for and there is no such folder.
    """
    if resume:
        if not given or not output.is_dir():
            named = f"{output} is no folder" if given else "--output must name the folder of the run"
            raise FileNotFoundError(f"nothing to resume: {named}")
        from qtuning_kernels.training.checkpoints import latest_checkpoint

        try:
            return str(latest_checkpoint(output))
        except FileNotFoundError:  # killed before the first one
            return None
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"output {str(output)!r} is not empty; give another --output, or --resume to go on with that run"
        )
    return None


def save_final(trainer: Any, tokenizer: Any, output: Path) -> Path:
    """Write model and tokenizer to ``<output>/final``, whole or not at all; called by every process."""
    final, temporary = output / "final", output / ".final"
    writes = trainer.is_world_process_zero()
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    gather(None)  # nobody saves before that
    trainer.save_model(str(temporary))
    if writes:
        tokenizer.save_pretrained(str(temporary))
        if final.exists():  # of a finished run that was resumed
            shutil.rmtree(final)
        temporary.rename(final)
    return final
