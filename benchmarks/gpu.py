"""Times the GPU kernels against their peers.

    python -m benchmarks.gpu [--dry-run] [--rows 8192] [--vocabulary 128256] [--hidden 4096]

CUDA events around each call, the L2 cache flushed before it, the cases of a group interleaved, median of many. Row
operators: GB/s of the bytes that they must move, and their share of the bandwidth of a copy measured in the same run.
From hidden states: TFLOP/s of the products that they must make, and their share of the head's product alone. What a
peer cannot do here stands in its row. Rows are added to gpu.csv in --output as each group ends; a group that is
interrupted is written as far as it came.
"""

import argparse
import contextlib
import functools
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import qtuning_kernels as qk
from benchmarks.common import RESULTS, environment, read_rows, write_rows
from benchmarks.peers import eager_stats, trl_linear_loss
from qtuning_kernels.kernels.dispatch import unavailable_reason

SHARES = (0.06, 0.25, 1.0)  # of kept tokens
BASELINES = {"rows": "copy", "linear": "head product alone"}
MOST_SECONDS = 60  # of a call: the first compiles, and some peers try many kernels


class Case(NamedTuple):
    """A call, and what it must at least do: move bytes (row operators), or multiply (from hidden states)."""

    call: Callable[[], object]
    work: float


def gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward of `loss` at these inputs."""

    def run() -> object:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(loss(*leaves), leaves)

    return run


def served_by(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, with every operator served by `backend`."""

    def run() -> object:
        before = os.environ.get("QTUNING_BACKEND")
        os.environ["QTUNING_BACKEND"] = backend
        try:
            return call()
        finally:
            del os.environ["QTUNING_BACKEND"]
            if before is not None:
                os.environ["QTUNING_BACKEND"] = before

    return run


# imported where they are called, so that one that is missing or broken fails by itself


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits * 1, labels, reduction="sum")  # it overwrites its input


def trl(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, labels)


def quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, labels, reduction="sum")


def liger_linear(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(states, head, labels, reduction="sum")


def quack_linear(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(states, head, labels, reduction="sum")


def cut_cross_entropy(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(states, head, labels, reduction="sum")


def row_cases(rows: int, vocabulary: int, device: str) -> dict[str, Case]:
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=device)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    size = logits.numel() * logits.element_size()
    compiled = functools.cache(lambda: torch.compile(eager_stats))  # where it is called: a plan needs no compiler

    def of_stats(stats: Callable[..., tuple]) -> Callable[[], object]:
        return gradient(lambda x: stats(x, labels)[0].sum(), logits)

    def of_kept(share: float, copies: bool = False) -> Callable[[], object]:
        weight = (torch.rand(rows, device=device) < share).float()
        if copies:  # as a peer that overwrites its input is called
            return gradient(lambda x: (qk.token_stats(x * 1, labels, inplace_backward=True).nll * weight).sum(), logits)
        return gradient(lambda x: (qk.token_stats(x, labels).nll * weight).sum(), logits)

    found = {
        "copy": Case(lambda: torch.empty_like(logits).copy_(logits), 2 * size),
        "token_stats": Case(lambda: qk.token_stats(logits, labels), size),
        "eager": Case(lambda: eager_stats(logits, labels), size),
        "torch.compile": Case(lambda: compiled()(logits, labels), size),
        # a read; a read of what is kept and a write of everything
        **{f"token_stats, gradient of {s:.0%}": Case(of_kept(s), size * (2 + s)) for s in SHARES},
        "token_stats, gradient in place, of a copy": Case(of_kept(1.0, copies=True), size * 5),
        "eager, gradient": Case(of_stats(eager_stats), size * 3),
        "torch.compile, gradient": Case(of_stats(lambda x, y: compiled()(x, y)), size * 3),
        "trl": Case(lambda: trl(logits, labels), size),
        "trl, gradient": Case(of_stats(trl), size * 3),
        "liger-kernel, gradient, of a copy": Case(gradient(lambda x: liger(x, labels), logits), size * 5),
        "quack-kernels, gradient": Case(gradient(lambda x: quack(x, labels), logits), size * 3),
    }
    if reason := unavailable_reason("cuda"):
        print(f"backend cuda: {reason}")
    else:
        ours = {name: case for name, case in found.items() if name.startswith("token_stats")}
        found |= {f"{name}, CUDA C++": Case(served_by("cuda", c.call), c.work) for name, c in ours.items()}
    return found


def linear_cases(rows: int, vocabulary: int, hidden: int, device: str) -> dict[str, Case]:
    states = torch.randn(rows, hidden, dtype=torch.bfloat16, device=device)
    head = torch.randn(vocabulary, hidden, dtype=torch.bfloat16, device=device) / hidden**0.5
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    product = 2.0 * rows * hidden * vocabulary

    def of_kept(share: float) -> Callable[[], object]:
        weight = (torch.rand(rows, device=device) < share).float()
        return gradient(lambda h, w: qk.linear_cross_entropy(h, w, labels, token_weight=weight), states, head)

    def of(loss: Callable[..., Tensor]) -> Case:
        return Case(gradient(lambda h, w: loss(h, w, labels), states, head), 3 * product)

    found = {
        "head product alone": Case(lambda: states @ head.T, product),
        "linear_token_stats": Case(lambda: qk.linear_token_stats(states, head, labels), product),
        **{f"linear_cross_entropy, {s:.0%}": Case(of_kept(s), 3 * product * s) for s in SHARES},
        "F.linear then F.cross_entropy": of(
            lambda h, w, y: functional.cross_entropy(functional.linear(h, w).float(), y, reduction="sum")
        ),
        "trl": of(lambda *x: trl_linear_loss()(*x)),
        "liger-kernel": of(liger_linear),
        "cut-cross-entropy": of(cut_cross_entropy),
        "quack-kernels": of(quack_linear),
    }
    if hasattr(functional, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = of(lambda *x: functional.linear_cross_entropy(*x, reduction="sum"))
    return found


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Of one call: by CUDA events, or by the host's clock on a CPU."""
    if device == "cpu":
        begun = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A TimeoutError after so many; between the steps of what is called, not within one."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure(
    cases: dict[str, Case], repeats: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """(milliseconds of each case, in turn, each after 256 MiB have swept the cache; MiB at the peak above its operands;
    why others have none)."""
    sweep = torch.empty(2**28 if device == "cuda" else 1, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    try:
        for round_ in range(repeats + 3):
            for name in [name for name in cases if name not in failed]:
                sweep.zero_()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                try:
                    with at_most(MOST_SECONDS):
                        taken = milliseconds(cases[name].call, device)
                except Exception as error:  # whatever a peer, its compiler or a memory that is too small raise
                    failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                    print(f"{name}: {failed[name]}", flush=True)
                    continue
                if round_ >= 3:
                    times[name].append(taken)
                if device == "cuda":
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    except KeyboardInterrupt:
        print("ended early", flush=True)
    failed |= {name: "ended early" for name in cases if name not in failed and len(times[name]) < 2}
    return {name: taken for name, taken in times.items() if name not in failed}, peaks, failed


def rows_of(group: str, cases: dict[str, Case], options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure a group, and print and return a row per case."""
    times, peaks, failed = measure(cases, options.repeats, options.device)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    baseline = BASELINES[group]
    unit, scale = ("gb_per_s", 1e6) if group == "rows" else ("tflop_per_s", 1e9)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "none (CPU)"
    common = {"gpu": gpu, **environment()}
    rows = []
    for name, case in cases.items():
        row = {"group": group, "case": name, "rows": options.rows, "vocabulary": options.vocabulary}
        row |= {"hidden": options.hidden if group == "linear" else "", "error": failed.get(name, "")}
        if name in medians:
            low, _, high = statistics.quantiles(times[name], n=4, method="inclusive")
            rate = case.work / medians[name]
            row |= {"median_ms": f"{medians[name]:.4f}", "q1_ms": f"{low:.4f}", "q3_ms": f"{high:.4f}"}
            row |= {unit: f"{rate / scale:.1f}", "peak_mib": f"{peaks[name]:.0f}" if name in peaks else ""}
            if baseline in medians:
                row["share"] = f"{rate * medians[baseline] / cases[baseline].work:.3f}"
        print(f"{name:45}", row.get("median_ms", ""), row.get(unit, ""), row.get("share", ""), row["error"], flush=True)
        rows.append({**row, **common})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and time nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearses, and tells nothing")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder")
    options = parser.parse_args(arguments)
    if not options.dry_run and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is present; --dry-run prints the plan")
    device = "meta" if options.dry_run else options.device
    shape = options.rows, options.vocabulary
    for group in BASELINES:
        cases = row_cases(*shape, device) if group == "rows" else linear_cases(*shape, options.hidden, device)
        if options.dry_run:
            for name, case in cases.items():
                unit = f"{case.work / 1e9:.2f} GB" if group == "rows" else f"{case.work / 1e12:.2f} TFLOP"
                print(f"to be timed: {name}, at least {unit}")
            continue
        path = options.output / "gpu.csv"
        write_rows(path, [*(read_rows(path) if path.exists() else []), *rows_of(group, cases, options)])
        del cases


if __name__ == "__main__":
    main()
