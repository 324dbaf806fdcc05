"""Times the GPU kernels against their peers. NOT YET RUN on a GPU: no figure from it exists so far.

    python -m benchmarks.gpu [--dry-run] [--rows 8192] [--vocabulary 128256] [--hidden 4096]

CUDA events around each call, the L2 cache flushed before it, cases interleaved, median of many; throughput is
given in GB/s and as a share of the copy bandwidth measured in the same run. Writes results/gpu.csv.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import qtuning_kernels as qk
from benchmarks.common import environment, write_rows
from qtuning_kernels.kernels.dispatch import unavailable_reason

RESULTS = Path(__file__).parent / "results"
SHARES = (0.06, 0.25, 1.0)  # of kept tokens
NOT_RUN = "NOT YET RUN: no GPU has executed this benchmark; what follows is its plan, not a result"


def eager_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """nll and entropy as they are written without a kernel."""
    log_p = functional.log_softmax(logits.float(), -1)
    nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return nll, -(log_p.exp() * log_p).sum(-1)


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Forward and backward of `loss` at x."""

    def run() -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)

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


def cases(rows: int, vocabulary: int, hidden: int, device: str) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed: a call, and the bytes that it must move at least (0 where the matrix product is the limit)."""
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=device)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    states = torch.randn(rows, hidden, dtype=torch.bfloat16, device=device)
    head = torch.randn(vocabulary, hidden, dtype=torch.bfloat16, device=device) / hidden**0.5
    size = logits.numel() * logits.element_size()
    compiled = torch.compile(eager_stats)
    found = {
        "copy": (lambda: torch.empty_like(logits).copy_(logits), 2 * size),
        "token_stats": (lambda: qk.token_stats(logits, labels), size),
        "eager": (lambda: eager_stats(logits, labels), size),
        "torch.compile": (lambda: compiled(logits, labels), size),
        "linear_token_stats": (lambda: qk.linear_token_stats(states, head, labels), 0),
        "head product alone": (lambda: states @ head.T, 0),
        "F.linear then F.cross_entropy": (
            gradient(lambda h: functional.cross_entropy(functional.linear(h, head).float(), labels), states),
            0,
        ),
    }
    for share in SHARES:
        weight = (torch.rand(rows, device=device) < share).float()
        found[f"token_stats, gradient of {share:.0%}"] = (
            gradient(lambda x, w=weight: (qk.token_stats(x, labels).nll * w).sum(), logits),
            size * (2 + 2 * share),
        )
        found[f"linear_cross_entropy, {share:.0%}"] = (
            gradient(lambda h, w=weight: qk.linear_cross_entropy(h, head, labels, token_weight=w), states),
            0,
        )
    if reason := unavailable_reason("cuda"):
        print(f"backend cuda: {reason}")
    else:
        for name in [name for name in found if name.startswith("token_stats")]:
            call, moved = found[name]
            found[f"{name}, CUDA C++"] = (served_by("cuda", call), moved)
    if hasattr(functional, "linear_cross_entropy"):
        call = functional.linear_cross_entropy
        found["F.linear_cross_entropy"] = (gradient(lambda h: call(h, head, labels), states), 0)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["liger-kernel"] = (gradient(lambda x: liger_cross_entropy(x * 1, labels), logits), 3 * size)
    except ImportError:
        print("liger-kernel: not installed")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = (gradient(lambda h: linear_cross_entropy(h, head, labels), states), 0)
    except ImportError:
        print("cut-cross-entropy: not installed")
    return found


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per call by CUDA events, in turn, each after 256 MiB have swept the cache."""
    sweep = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 3):
        for name, call in calls.items():
            sweep.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(end))
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and time nothing")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is present; --dry-run prints the plan")
    device = "meta" if options.dry_run else "cuda"
    found = cases(options.rows, options.vocabulary, options.hidden, device)
    if options.dry_run:
        print(NOT_RUN)
        for name, (_, size) in found.items():
            print(f"{name}: {f'at least {size / 1e9:.2f} GB' if size else 'bound by the matrix product'}")
        return
    times = measure({name: call for name, (call, _) in found.items()}, options.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy = found["copy"][1] / medians["copy"]
    rows = []
    for name, (_, size) in found.items():
        low, _, high = statistics.quantiles(times[name], n=4, method="inclusive")
        share = f"{size / medians[name] / copy:.3f}" if size else ""
        row = {"case": name, "rows": options.rows, "vocabulary": options.vocabulary, "hidden": options.hidden}
        row |= {"median_ms": f"{medians[name]:.4f}", "q1_ms": f"{low:.4f}", "q3_ms": f"{high:.4f}"}
        row |= {"gb_per_s": f"{size / medians[name] / 1e6:.0f}" if size else "", "share_of_copy": share}
        rows.append({**row, "gpu": torch.cuda.get_device_name(), **environment()})
        print(f"{name:45} {medians[name]:9.3f} ms  {row['gb_per_s']:>6} GB/s  {share} of copy")
    write_rows(RESULTS / "gpu.csv", rows)


if __name__ == "__main__":
    main()
