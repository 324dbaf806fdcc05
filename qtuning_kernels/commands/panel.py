"""A live panel of a run in the terminal; plain lines where there is no terminal."""

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from qtuning_kernels.run_record.schema import PHASES, QUADRANT_LABELS, QUADRANTS

_LINES = 20  # printed over a run where there is no terminal


class RunPanel(TrainerCallback):
    """Shows progress, loss, tokens per second, quadrant shares, the time split and the time left.

    It reads what `QTuningTrainer` logs under ``qtuning/``, once per ``logging_steps``; a run without these
    shows progress and loss alone. `close` ends the display; call it when training may end with an error.

    Args:
        console: where to draw; default standard output. Anything but a terminal gets at most about 20 lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._logs: dict[str, float] = {}
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._began_at = (0, 0.0)  # step and time

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._began_at = (state.global_step, time.perf_counter())
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
        self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            text = f"step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}"
            self.console.print(text, highlight=False, soft_wrap=True)
        if "loss" not in logs:
            return
        self._logs = {
            name.removeprefix("qtuning/"): float(value)
            for name, value in logs.items()
            if isinstance(value, int | float)
        }
        if self._live is None and self._is_due(args, state):
            self.console.print(self.line(state), highlight=False, markup=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display and leaves its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = self._progress = None

    @staticmethod
    def _is_due(args: Any, state: Any) -> bool:
        interval = max(1, state.max_steps // _LINES)
        step = state.global_step
        # the first log after each multiple of the interval, and the last
        return step % interval < max(1, int(args.logging_steps)) or step == state.max_steps

    def line(self, state: Any) -> str:
        """The figures of the last log as one line of text."""
        parts = [f"step {state.global_step}/{state.max_steps}"]
        forms = {"loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s", "kept_tokens": "{:,.0f} tokens kept"}
        numbers = {name: self._number(name) for name in forms}
        parts += [forms[name].format(value) for name, value in numbers.items() if not math.isnan(value)]
        if "q1" in self._logs:
            shares = (f"{label} {self._number(f'q{q}'):.0%}" for q, label in QUADRANT_LABELS.items() if q)
            parts.append(" ".join(shares))
        if split := self._time_split():
            parts.append(" ".join(f"{phase} {share:.0%}" for phase, share in split.items() if share >= 0.005))
        first, began = self._began_at
        if state.global_step > first:
            left = (time.perf_counter() - began) / (state.global_step - first)
            seconds = round(left * (state.max_steps - state.global_step))
            parts.append(f"{timedelta(seconds=seconds)} left")
        return "  ".join(parts)

    def render(self) -> RenderableType:
        """The panel as it now is."""
        figures = {
            "loss": ("loss", ".4f"),
            "tokens/s": ("tokens_per_second", ",.0f"),
            "samples kept": ("kept_samples", ",.1f"),
            "tokens kept": ("kept_tokens", ",.0f"),
            "supplemented": ("supplemented", ".1f"),
        }
        cells = (f"[bold]{title}[/] {_text(self._number(name), form)}" for title, (name, form) in figures.items())
        parts: list[RenderableType] = [_wrapped(*cells)]
        if "q1" in self._logs:
            parts.append(_shares("quadrants", {name: self._number(f"q{q}") for q, name in QUADRANTS.items()}))
        if split := self._time_split():
            parts.append(_shares("time", split))
        if self._progress is not None:
            parts.append(self._progress)
        return Panel(Group(*parts), title="Q-Tuning", title_align="left")

    def _number(self, name: str) -> float:
        return self._logs.get(name, math.nan)

    def _time_split(self) -> dict[str, float]:
        seconds = {phase: self._logs.get(f"seconds_{phase}", 0.0) for phase in PHASES}
        total = sum(seconds.values())
        return {phase: value / total for phase, value in seconds.items()} if total > 0 else {}


def _text(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _shares(title: str, shares: Mapping[str, float]) -> RenderableType:
    named = (f"{name} [cyan]{_text(share, '.0%')}[/]" for name, share in shares.items())
    return _wrapped(f"[bold]{title}[/]", *named)


def _wrapped(*cells: str) -> RenderableType:
    """Cells side by side, as many on a line as the terminal is wide."""
    return Columns([Text.from_markup(cell) for cell in cells], padding=(0, 3))
