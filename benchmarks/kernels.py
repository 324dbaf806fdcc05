"""The CPU kernels against PyTorch and other packages: time, interleaved, and peak memory, in child processes.

    python -m benchmarks.kernels            all groups, a quarter of an hour on two cores
    python -m benchmarks.kernels --quick    small shapes, under a minute: does everything still run
    python -m benchmarks.kernels --plot     draws results/kernels_wall.png from results/kernels.csv

Bytes from logits: forward reads N·V elements, in-place backward reads and writes ρ·N·V and writes zeros to
the rest. Flops from hidden states: 2·N·H·V to score, 6·ρ·N·H·V to train (4·ρ·N·H·V with a frozen head).
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import qtuning_kernels as qk
from benchmarks import peers
from benchmarks.common import (
    RESULTS,
    ROOT,
    environment,
    fill,
    in_child,
    interleave,
    peak,
    processor,
    read_rows,
    spread,
    write_rows,
)
from benchmarks.kernels_pages import plot, tables
from qtuning_kernels.config import MATMULS
from qtuning_kernels.models.matmul import SMOLLM2_SHAPES, float32_matmul, time_products

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Shape:
    n: int = 2048
    h: int = 576
    v: int = 49152
    dtype: str = "float32"
    rho: float = 1.0

    def logits(self) -> Tensor:
        return torch.randn(self.n, self.v, dtype=DTYPES[self.dtype])

    def head(self) -> tuple[Tensor, Tensor]:
        dtype = DTYPES[self.dtype]
        return torch.randn(self.n, self.h, dtype=dtype), (torch.randn(self.v, self.h) * 0.05).to(dtype)

    def labels(self) -> Tensor:
        return torch.randint(self.v, (self.n,))

    def upstream(self) -> Tensor:
        """Ones for a random share ρ of the tokens, else zeros."""
        kept = torch.zeros(self.n)
        kept[torch.randperm(self.n)[: max(1, round(self.rho * self.n))]] = 1.0
        return kept


def forward(shape: Shape, rivals: bool = True) -> dict[str, Callable]:
    """nll and entropy from logits."""
    logits, labels = shape.logits(), shape.labels()
    cases = {"native": lambda: qk.token_stats(logits, labels), "read": logits.sum}
    if rivals:
        functions = {
            "eager": peers.eager_stats,
            "compile": peers.compiled_stats(),
            "cross_entropy": peers.cross_entropy_stats,
            "trl": peers.trl_stats(),
        }
        cases |= {name: lambda f=f: f(logits, labels) for name, f in functions.items()}
    return cases


def forward_backward(shape: Shape) -> dict[str, Callable]:
    """nll and entropy from logits, and the gradient of both."""
    logits, labels, ones = shape.logits().requires_grad_(), shape.labels(), torch.ones(shape.n)
    detached = logits.detach().clone()

    def native() -> None:
        x = detached.requires_grad_()
        stats = qk.token_stats(x, labels, inplace_backward=True)
        torch.autograd.grad((stats.nll, stats.entropy), x, (ones, ones))
        detached.requires_grad_(False)

    def rival(f: peers.Stats) -> Callable:
        return lambda: torch.autograd.grad(f(logits, labels), logits, (ones, ones))

    return {"native": native, "eager": rival(peers.eager_stats), "compile": rival(peers.compiled_stats())}


def backward(shape: Shape) -> dict[str, Callable]:
    """The in-place gradient alone; every share of kept rows against all rows."""
    logits, labels = shape.logits().unsqueeze(0), shape.labels().unsqueeze(0)
    scaling = (-100, 1.0, None)
    stats = torch.ops.qtuning_kernels.token_stats(logits, labels, *scaling)[1:]

    def run(rho: float) -> Callable:
        grad = replace(shape, rho=rho).upstream().unsqueeze(0)
        operator = torch.ops.qtuning_kernels.token_stats_backward_
        return lambda: operator(logits, labels, *stats, grad, None, None, *scaling)

    return {f"native rho={rho:g}": run(rho) for rho in (1.0, 0.5, 0.25, 0.125, 0.0625)}


def linear_stats(shape: Shape) -> dict[str, Callable]:
    """nll and entropy from hidden states; the bare GEMM with and without a fresh output is the limit."""
    (hidden, weight), labels = shape.head(), shape.labels()
    out = torch.empty(shape.n, shape.v, dtype=hidden.dtype)
    return {
        "native": lambda: qk.linear_token_stats(hidden, weight, labels),
        "gemm": lambda: hidden @ weight.T,
        "gemm into out": lambda: torch.mm(hidden, weight.T, out=out),
        "eager": lambda: peers.eager_stats(hidden @ weight.T, labels),
    }


LOSSES = {
    "native": lambda: lambda h, w, y: qk.linear_cross_entropy(h, w, y),
    "eager": lambda: peers.eager_loss,
    "compile": peers.compiled_loss,
    "F.linear_cross_entropy": peers.torch_linear_loss,
    "cut-cross-entropy": peers.cut_cross_entropy_loss,
    "TRL": peers.trl_linear_loss,
}


def _train(loss: peers.Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable:
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return lambda: torch.autograd.grad(loss(hidden, weight, labels), wanted)


def linear_loss(shape: Shape) -> dict[str, Callable]:
    """Loss and gradients of hidden states and head, each from its own fresh output."""
    (hidden, weight), labels = shape.head(), shape.labels()
    arguments = hidden.requires_grad_(), weight.requires_grad_(), labels
    frozen = hidden, weight.detach(), labels
    few = labels.masked_fill(replace(shape, rho=0.0625).upstream() == 0, -100)
    cases = {name: _train(make(), *arguments) for name, make in LOSSES.items()}
    cases["native frozen head"] = _train(qk.linear_cross_entropy, *frozen)
    cases["native rho=0.0625"] = _train(qk.linear_cross_entropy, hidden, weight, few)
    return cases


GROUPS = {
    "forward": forward,
    "forward_backward": forward_backward,
    "backward": backward,
    "linear_stats": linear_stats,
    "linear_loss": linear_loss,
}


def memory_case(kind: str, name: str, shape: Shape) -> Callable:
    (hidden, weight), labels = shape.head(), shape.labels()
    if kind == "linear_stats":
        if name == "native":
            return lambda: qk.linear_token_stats(hidden, weight, labels)
        return lambda: peers.eager_stats(hidden @ weight.T, labels)
    return _train(LOSSES[name](), hidden.requires_grad_(), weight.requires_grad_(), labels)


def time_group(group: str, shape: Shape, repeats: int, clock: str, **options: object) -> list[dict[str, object]]:
    torch.manual_seed(0)
    seconds = interleave(GROUPS[group](shape, **options), repeats, CLOCKS[clock])
    fields = {"n": shape.n, "h": shape.h, "v": shape.v, "dtype": shape.dtype}
    rows = []
    for name, samples in seconds.items():
        rows.append({"group": group, "what": name, **fields, "clock": clock, **spread(samples)})
        ratio = rows[-1]["median_ms"] and float(rows[-1]["median_ms"]) / float(rows[0]["median_ms"])
        print(
            f"{group:17}{shape.dtype:9} n={shape.n} v={shape.v} {name:24}"
            f"{rows[-1]['median_ms']:>10} ms [{rows[-1]['q1_ms']}, {rows[-1]['q3_ms']}]  {ratio:6.2f}x",
            flush=True,
        )
    return rows


def measure_memory(kind: str, name: str, shape: Shape) -> dict[str, object]:
    fields = {"n": shape.n, "h": shape.h, "v": shape.v, "dtype": shape.dtype}
    arguments = ["--peak", kind, name, *(str(value) for value in fields.values())]
    above = float(in_child("benchmarks.kernels", arguments))
    print(
        f"{kind:17}{shape.dtype:9} n={shape.n} v={shape.v} {name:24}{above:10.1f} MiB above its inputs",
        flush=True,
    )
    return {"group": f"{kind}_memory", "what": name, **fields, "clock": "", "peak_mib": f"{above:.1f}"}


def peak_in_this_process(kind: str, name: str, shape: Shape) -> float:
    call = memory_case(kind, name, shape)
    if name in ("compile", "cut-cross-entropy"):
        call()  # the compiler's own memory does not count
    else:  # threads, and the libraries' buffers
        memory_case(kind, name, Shape(n=64, h=64, v=512, dtype=shape.dtype))()
    return peak(call)[1]


def plan(quick: bool, sweeps: bool) -> list[tuple[str, Shape, dict]]:
    size = {"n": 128, "h": 64, "v": 4096} if quick else {}
    both = [Shape(dtype=dtype, **size) for dtype in ("float32", "bfloat16")]
    plans = [(group, shape, {}) for group in GROUPS for shape in both]
    if sweeps:
        shapes = [
            Shape(n=512, v=v, dtype=dtype)
            for v in (32000, 49152, 50257, 128256, 151936, 262144)
            for dtype in ("float32", "bfloat16")
        ]
        shapes += [Shape(n=n, dtype="float32") for n in (1, 8, 64, 512, 8192)] + [Shape(dtype="float16")]
        plans += [("forward", shape, {"rivals": False}) for shape in shapes]
    return plans


def memory_plan(quick: bool) -> list[tuple[str, str, Shape]]:
    if quick:
        return [("linear_stats", "native", Shape(n=256, h=64, v=4096))]
    both = [Shape(), Shape(dtype="bfloat16")]
    plans = [("linear_stats", "native", replace(shape, n=16384)) for shape in both]
    plans += [("linear_stats", "eager", shape) for shape in both]
    return plans + [("linear_loss", name, shape) for shape in both for name in LOSSES]


def replaced(row: dict[str, str], only: set[str], clock: str) -> bool:
    """Whether this run measures again what the row holds; those of other processors stay."""
    if not row["machine"].startswith(processor()):
        return False
    if row["group"].endswith("_memory"):
        return "memory" in only
    return row["group"] in only and row["clock"] == clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is stored")
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, "memory"], help="these groups; others keep their rows")
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: one thread, a quarter of the rows")
    parser.add_argument(
        "--matmul", choices=MATMULS, default="auto", help="who multiplies float32, for all that is timed"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--plot", action="store_true", help="only draw")
    parser.add_argument("--peak", nargs=6, metavar=("KIND", "NAME", "N", "H", "V", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot:
        return plot(options.clock)
    if options.peak:
        kind, name, n, h, v, dtype = options.peak
        print(peak_in_this_process(kind, name, Shape(int(n), int(h), int(v), dtype)))
        return None
    if qk.backend("cpu") != "native":
        sys.exit(f"the CPU backend is {qk.backend('cpu')!r}; this measures 'native'")
    only = set(options.only or [*GROUPS, "memory"])
    target, rows = options.output, []
    # the same for everything that is timed, so that no gain of PyTorch's own counts as this package's
    times = time_products(SMOLLM2_SHAPES, 512)
    matmul = times.matmul() if options.matmul == "auto" else options.matmul
    print(f"float32 products by {matmul} ({times})")
    if not options.quick and target.exists():
        rows = [row for row in read_rows(target) if not replaced(row, only, options.clock)]
    repeats = 2 if options.quick else options.repeats
    plans = plan(options.quick, not options.no_sweeps and not options.quick)
    if options.clock == "cpu":  # time that other processes take does not count, but threads that wait do
        torch.set_num_threads(1)
        plans = [(group, replace(shape, n=max(1, shape.n // 4)), more) for group, shape, more in plans]
    jobs = [lambda p=p: time_group(p[0], p[1], repeats, options.clock, **p[2]) for p in plans if p[0] in only]
    if "memory" in only:
        jobs += [lambda p=p: [measure_memory(*p)] for p in memory_plan(options.quick)]
    for job in jobs:
        with float32_matmul(matmul):
            rows += [{**row, "matmul": matmul, **environment()} for row in job()]
        if not options.quick:
            write_rows(target, rows)
    if not options.quick and target == RESULTS / "kernels.csv":
        plot(options.clock)
        fill(ROOT / "docs" / "benchmarks.md", tables())
    return None


if __name__ == "__main__":
    main()
