"""Where time, tokens and arithmetic go: per step, and in total."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.run_record.schema import PHASES


class Clock:
    """Seconds per phase of one step. A GPU marks in its own queue when a phase begins and ends; nothing waits for it
    until `seconds` is read, which a step does once, at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[tuple[str, Any, Any]] = []
        self.data = 0.0  # seconds in which the host got the step's batches

    def now(self) -> Any:
        """A mark in the device's queue where it can make one, else the host's time."""
        if self._device.type not in ("cuda", "xpu"):
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def since(self, start: Any, name: str) -> None:
        """Gives the time from `start` until now to a phase."""
        self._times.append((name, start, self.now()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.since(start, name)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; waits for the device to pass the last mark."""
        found = dict.fromkeys(PHASES, 0.0) | {"data": self.data}
        for name, start, end in self._times:
            if not isinstance(end, float):
                end.synchronize()
            found[name] += end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
        return found


@dataclass
class Totals:
    """Sums over the steps of a run, resumed parts included. Tokens are trainable tokens."""

    steps: int = 0
    samples_seen: int = 0
    samples_kept: int = 0
    tokens_seen: int = 0
    tokens_kept: int = 0
    tokens_scored: int = 0
    supplemented: int = 0
    ineligible: int = 0
    empty_steps: int = 0
    quadrant: dict[str, int] = field(default_factory=lambda: dict.fromkeys("01234", 0))
    kept_by_quadrant: dict[str, int] = field(default_factory=lambda: dict.fromkeys("01234", 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    flops_spent: float = 0.0
    flops_full: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None

    @classmethod
    def of_step(cls, parts: Iterable["Totals"], loss: float, seconds: dict[str, float]) -> "Totals":
        """Those of one step, from its parts in each process."""
        totals = cls()
        for part in parts:
            totals.add(part)
        totals.steps, totals.empty_steps, totals.seconds = 1, int(totals.tokens_kept == 0), seconds
        if totals.tokens_kept:
            totals.loss_first = totals.loss_last = loss
        return totals

    def add(self, step: "Totals") -> None:
        """Adds a step, or another part of the run."""
        for name, value in asdict(step).items():
            if isinstance(value, dict):
                own = getattr(self, name)
                for key, item in value.items():
                    own[key] += item
            elif name == "loss_first":
                self.loss_first = value if self.loss_first is None else self.loss_first
            elif name == "loss_last":
                self.loss_last = self.loss_last if value is None else value
            else:
                setattr(self, name, getattr(self, name) + value)


class Flops:
    """Estimated floating-point operations: 2 per weight and token forward, 4 more backward.

    Backward through a frozen weight costs 2 only. The quadratic part of attention is left out, for the step
    and for the full-data step that it is compared with alike.
    """

    def __init__(self, causal_lm: CausalLM) -> None:
        embedding = causal_lm.base.get_input_embeddings()
        skip = {id(p) for p in embedding.parameters()}
        weights = [p for p in causal_lm.decoder.parameters() if id(p) not in skip]
        self.body = sum(map(_elements, weights))
        self.body_trained = sum(_elements(p) for p in weights if p.requires_grad)
        self.head = _elements(causal_lm.head.weight)
        self.head_trained = self.head if causal_lm.head.weight.requires_grad else 0

    def forward(self, positions: int, head_rows: int) -> float:
        return 2.0 * (self.body * positions + self.head * head_rows)

    def train(self, positions: int, head_rows: int) -> float:
        """Forward, gradients of activations, gradients of the trained weights."""
        weights = 2.0 * (self.body_trained * positions + self.head_trained * head_rows)
        return 2 * self.forward(positions, head_rows) + weights


def _elements(parameter: torch.Tensor) -> int:
    """Of the whole parameter, also where this process holds a part (DeepSpeed ZeRO-3)."""
    return getattr(parameter, "ds_numel", parameter.numel())
