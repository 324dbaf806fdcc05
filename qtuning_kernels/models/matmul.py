"""Which library and precision multiplies a model's matrices fastest on this CPU, measured on the spot.

PyTorch gives float32 products to MKL. Its switch `torch.backends.mkldnn.matmul.fp32_precision` at ``"bf16"`` gives
them to oneDNN instead, which is more than twice as fast on some processors and slower on others. It may round to
bfloat16, and does where the processor has matrix units for it; so its error is measured too. Whether scoring in
bfloat16 is faster than in float32 depends on the processor as well, and no flag tells.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# oneDNN keeps a compiled kernel for each shape it has met, about half a megabyte each and 1024 of them. Lengths of text
# hardly ever meet again, and compiling one costs little beside a product; both caches read this at their first use.
for _capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "128")

MOST_ERROR = 4.0  # of oneDNN's float32 product, in errors of the default one
_REPEATS = 7
_HEAD_PART = 4096  # rows of a head that are multiplied with: enough to stand for all, a third of a second
SMOLLM2_SHAPES = [(192, 576), (1536, 576), (_HEAD_PART, 576)]  # `layer_shapes` of the embedded model
_LEAST_GAIN = 0.97  # a choice has to beat PyTorch's default by more than noise


@contextmanager
def float32_matmul(choice: str) -> Iterator[None]:
    """Within it, float32 products on CPUs go to ``"onednn"``, or where PyTorch sends them (``"default"``)."""
    if choice == "default":
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # PyTorch puts the switch there at run time
    switch = mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@dataclass(frozen=True)
class MatmulTimes:
    """What was measured: milliseconds of the same products, and the largest error of each as a share of the result.

    Keys: ``"default"`` and ``"onednn"`` are float32 products, ``"bfloat16"`` ones in that precision.
    """

    milliseconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def is_exact(self, name: str) -> bool:
        return name in self.error and self.error[name] <= MOST_ERROR * self.error["default"]

    def matmul(self) -> str:
        """The faster library for float32 products, of those whose error is that of float32."""
        return "onednn" if self.is_faster("onednn", "default") and self.is_exact("onednn") else "default"

    def is_faster(self, name: str, than: str) -> bool:
        times = self.milliseconds
        return name in times and times[name] < _LEAST_GAIN * times[than]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1f} ms" for name, value in self.milliseconds.items())


def layer_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of the model's widest and narrowest linear layer, and of a part of its head: a product that wide can be
    faster elsewhere than those."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shapes = {
        (module.weight.shape[0], module.weight.shape[1])
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.dim() == 2
    }
    ordered = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
    layers = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    size: tuple[int, ...] = getattr(getattr(head, "weight", None), "shape", ())
    return layers if len(size) != 2 else [*layers, (min(size[0], _HEAD_PART), size[1])]


def time_products(shapes: list[tuple[int, int]], rows: int) -> MatmulTimes:
    """Times the products of `rows` hidden states with weights of these shapes, in turn; a second for a small model."""
    generator = torch.Generator().manual_seed(0)
    operands = [
        (torch.randn(rows, size, generator=generator), torch.randn(out, size, generator=generator) * size**-0.5)
        for out, size in shapes
    ]
    halves = [(x.bfloat16(), w.bfloat16()) for x, w in operands]

    def multiply(pairs: list[tuple[Tensor, Tensor]], choice: str) -> list[Tensor]:
        with float32_matmul(choice):
            return [nn.functional.linear(x, w) for x, w in pairs]

    calls: dict[str, Callable[[], list[Tensor]]] = {"default": lambda: multiply(operands, "default")}
    if hasattr(torch.backends.mkldnn, "matmul") and torch.backends.mkldnn.is_available():
        calls["onednn"] = lambda: multiply(operands, "onednn")
    calls["bfloat16"] = lambda: multiply(halves, "default")

    with torch.no_grad():
        truth = [(x.double() @ w.double().T) for x, w in operands]
        results = {name: call() for name, call in calls.items()}  # warms up as well
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(_REPEATS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    errors = {
        name: max(((y - t).abs().max() / t.abs().max()).item() for y, t in zip(products, truth, strict=True))
        for name, products in results.items()
    }
    # the shortest: what else runs on the machine only ever adds
    return MatmulTimes({name: 1e3 * min(s) for name, s in seconds.items()}, errors)


@dataclass(frozen=True)
class Precision:
    """How a run multiplies: float32 products by `matmul`, scoring in `score_dtype`; and what was measured for that.

    `matmul` is ``"default"`` or ``"onednn"``, `score_dtype` ``"model"`` (the weights as they are), ``"float32"`` or
    ``"bfloat16"``.
    """

    matmul: str
    score_dtype: str
    times: MatmulTimes = MatmulTimes()

    def __str__(self) -> str:
        parts = [f"float32 products by {self.matmul}", f"scores in {self.score_dtype}"]
        return ", ".join(parts) + (f" ({self.times})" if self.times.milliseconds else "")


def choose_precision(
    model: nn.Module, *, matmul: str = "auto", score_dtype: str = "auto", rows: int = 512, autocast: bool = False
) -> Precision:
    """What `QTuningConfig.matmul` and `QTuningConfig.score_dtype` mean for this model on this machine.

    Measures only where something is to be chosen: for a float32 model on a CPU.

    Args:
        model: the `transformers` model.
        matmul: ``"auto"``, ``"default"`` or ``"onednn"``.
        score_dtype: ``"auto"``, ``"model"``, ``"float32"`` or ``"bfloat16"``.
        rows: positions in a forward.
        autocast: whether the run computes under autocast, in which scoring then takes part.

    Raises:
        ValueError: ``"onednn"`` is asked for where there is none, or where its error is not that of float32.
    """
    parameter = next(model.parameters())
    as_is = "model" if score_dtype == "auto" else score_dtype
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        if matmul == "onednn":
            raise ValueError(
                f"matmul is 'onednn' and the model {parameter.dtype} on {parameter.device}; "
                "accepted: 'auto' or 'default', since it concerns float32 models on CPUs"
            )
        return Precision("default", as_is)
    shapes = layer_shapes(model)
    if not shapes or (matmul == "default" and (score_dtype != "auto" or autocast)):
        return Precision("default", as_is)
    times = time_products(shapes, rows)
    if matmul == "onednn" and not times.is_exact("onednn"):
        found = times.error.get("onednn")
        raise ValueError(
            "matmul is 'onednn', whose float32 products "
            + ("PyTorch does not offer here" if found is None else f"have an error of {found:.1e} on this processor")
            + f"; accepted: at most {MOST_ERROR:g} times the default's, {times.error['default']:.1e} (or 'default')"
        )
    chosen = times.matmul() if matmul == "auto" else matmul
    if score_dtype == "auto" and not autocast and times.is_faster("bfloat16", chosen):
        as_is = "bfloat16"
    return Precision(chosen, as_is, times)
