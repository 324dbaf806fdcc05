"""The output folder of a run: refused if in use, or resumed; the final model is written whole or not at all."""

import atexit
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qtuning_kernels.commands.inputs import load_model
from qtuning_kernels.commands.options import DEFAULTS
from qtuning_kernels.files import share
from qtuning_kernels.models.collectives import gather

OPTIONS_FILE = "options.json"  # in the output folder; what a resumed run goes on with
SUMMARY_FILE = "summary.json"
# what a resumed run may have otherwise: how far it goes, what it writes on the way, and where its memory goes
_MAY_CHANGE = {
    *("epochs", "max_steps", "save_steps", "save_total_limit", "report", "report_to", "record", "tag_field"),
    *("eval_steps", "eval_strategy", "logging_steps", "logging_strategy", "logging_first_step", "log_level"),
    *("run_name", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("dataloader_num_workers", "dataloader_pin_memory"),
}
_LOCK_FILE, _DIGEST_FILE = ".lock", "samples.sha256"
_held: list[tuple[Path, int]] = []  # the lock on the output folder of this process, for as long as it lives


def prepare_output(
    output: Path, resume: bool, *, given: bool = True, asked: Mapping[str, Any] | None = None
) -> str | None:
    """The checkpoint to go on from, or None to start from the beginning. The folder is this process's from then on.

    Args:
        output: the output folder.
        resume: whether to go on with the run in it.
        given: whether the caller named the folder; without a name nothing can be resumed.
        asked: the options of the run.

    Raises:
        FileExistsError: the folder is in use and `resume` is not asked for, or another process runs in it.
        FileNotFoundError: `resume` is asked for and there is no such folder, or no run in it.
        ValueError: the run in it has other options that decide what is trained.
    """
    if resume:
        if not given or not output.is_dir():
            named = f"{output} is no folder" if given else "--output must name the folder of the run"
            raise FileNotFoundError(f"nothing to resume: {named}")
        if not (output / OPTIONS_FILE).exists() and not any(output.glob("checkpoint-*")):
            raise FileNotFoundError(f"nothing to resume: {output} has neither {OPTIONS_FILE} nor a checkpoint of a run")
        _refuse_other_options(output / OPTIONS_FILE, asked or {})
        _lock(output)
        from qtuning_kernels.training.checkpoints import latest_checkpoint

        try:
            return str(latest_checkpoint(output))
        except FileNotFoundError:  # killed before the first one
            return None
    if output.exists() and (not output.is_dir() or any(f.name != _LOCK_FILE for f in output.iterdir())):
        raise FileExistsError(
            f"output {str(output)!r} is not empty; give another --output, or --resume to go on with that run"
        )
    _lock(output)
    return None


def _refuse_other_options(file: Path, asked: Mapping[str, Any]) -> None:
    """Raise ValueError if the run was started with other options than `asked`, but for those that may change."""
    if not file.exists():
        return
    from transformers import TrainingArguments

    # of which a run that was not given them has the defaults
    defaults = {field.name: DEFAULTS.get(field.name, field.default) for field in fields(TrainingArguments)}
    started = _as_json(defaults) | json.loads(file.read_text(encoding="utf-8"))
    for name, value in _as_json(asked).items():
        if name in started and name not in _MAY_CHANGE and value != started[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value!r}, and the run in {str(file.parent)!r} has {started[name]!r}; "
                "accepted: the same, or another --output"
            )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


def refuse_other_samples(output: Path, samples: Any) -> None:
    """Raise ValueError if the run in `output` began with other samples, as when a file of its data was edited since.

    Args:
        samples: a dataset with ``input_ids`` and ``labels``, whose digest is written where there is none yet.
    """
    digest = hashlib.sha256()
    for table in samples.with_format("arrow").iter(1000):
        for column in (table[name].combine_chunks() for name in ("input_ids", "labels")):
            digest.update(column.value_lengths().to_numpy())
            digest.update(column.flatten().to_numpy())
    file = output / _DIGEST_FILE
    if not file.exists():
        file.write_text(digest.hexdigest() + "\n")
    elif file.read_text().strip() != digest.hexdigest():
        raise ValueError(
            f"the data gives other samples than those that the run in {str(output)!r} began with; accepted: the data "
            "as it was, or another --output"
        )


def is_finished(output: Path, checkpoint: str | None, asked: Mapping[str, Any]) -> bool:
    """Whether the run ended with a summary, and no more epochs or steps are asked for than it has.

    Raises:
        FileNotFoundError: more is asked for, or may be, and the checkpoints are gone.
    """
    if not (output / SUMMARY_FILE).exists():
        return False
    if checkpoint is None:
        started = json.loads((output / OPTIONS_FILE).read_text(encoding="utf-8"))
        if all(asked[name] == started[name] for name in ("max_steps", "epochs")):
            return True
        raise FileNotFoundError(f"the run in {str(output)!r} is finished, and has no checkpoint to go on from")
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    if asked["max_steps"]:
        return state["global_step"] >= asked["max_steps"]
    return state["epoch"] >= asked["epochs"]


def _lock(output: Path) -> None:
    """Keep other processes out of the folder, as long as this one lives; the file has its process id."""
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    _release()
    path = output / _LOCK_FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        owner = path.read_text().strip()
        raise FileExistsError(f"output {str(output)!r} is in use by process {owner}; give another --output") from None
    os.truncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    _held.append((path, file))


@atexit.register
def _release() -> None:
    """Give up the lock of an earlier run in this process, or of the run that ends."""
    while _held:
        path, file = _held.pop()
        path.unlink(missing_ok=True)
        os.close(file)


def save_final(trainer: Any, tokenizer: Any, output: Path, *, base: str | None = None) -> Path:
    """Write model and tokenizer to ``<output>/final``, whole or not at all; called by every process.

    Adapters are merged into `base`, if that is given.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    final, temporary = output / "final", output / ".final"
    writes = trainer.is_world_process_zero()
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    gather(None)  # nobody saves before that
    trainer.save_model(str(temporary))
    if writes:
        if base is not None:
            _merge(base, temporary)
        _refuse_not_finite(temporary)
        tokenizer.save_pretrained(str(temporary))
        if final.exists():  # of a run that goes on
            shutil.rmtree(final)
        temporary.rename(final)
    return final


def _merge(base: str, folder: Path) -> None:
    """The plain model in place of the adapters: read back, since the trained model may lie in parts."""
    from peft import PeftModel
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under which loading takes every process
    merged: Any = PeftModel.from_pretrained(load_model(base), str(folder)).merge_and_unload()
    shutil.rmtree(folder)
    merged.save_pretrained(str(folder))
    share(folder)


def _refuse_not_finite(folder: Path) -> None:
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if not file.get_tensor(name).isfinite().all():
                    shutil.rmtree(folder)
                    raise FloatingPointError(
                        f"the trained weights are not finite (the first is {name}), so no final model is written; "
                        "use a lower --learning-rate, or float32"
                    )
