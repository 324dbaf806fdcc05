"""The progress of a training run: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

_LINES = 10  # printed over a run where there is no terminal


class RichProgress(TrainerCallback):
    """Shows the step, the loss and the time that remains."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._loss = float("nan")
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, loss=self._loss
            )
            self._progress.start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self._loss = float(logs["loss"])
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, loss=self._loss)
        elif (
            state.global_step % max(1, state.max_steps // _LINES) == 0 or state.global_step == state.max_steps
        ):
            seconds = time.perf_counter() - self._started
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self._loss:.4f}  {seconds:.0f} s",
                highlight=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
