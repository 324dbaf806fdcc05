"""This package's kernels in two checkouts, each with its own environment, call by call in turn (A B A B …).

    python -m benchmarks.versions --before ../other/checkout [--repeats 7]

Each checkout's `.venv/bin/python` runs its own package in a process that stays; this one asks them for one call at a
time. Rows go to benchmarks/results/versions.csv: milliseconds of both, and the ratio call by call (after over before).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, environment, fill, markdown, read_rows, write_rows

CASES = (
    *("forward", "forward_backward", "backward rho=1", "backward rho=0.125", "forward softcap"),
    *("forward_backward softcap", "linear_stats", "linear_loss"),
)
# runs in both checkouts, so that it uses only what both have: the public functions
WORKER = """
import json, sys, time, contextlib
import torch
import qtuning_kernels as qk
torch.manual_seed(0)
try:
    from qtuning_kernels.models.matmul import float32_matmul, time_products
    switch = lambda: float32_matmul(time_products([(192, 576), (1536, 576), (4096, 576)], 512).matmul())
except ImportError:
    switch = contextlib.nullcontext
cases = {}
def prepare(name, n, dtype):
    dtype, h, v = getattr(torch, dtype), 576, 49152
    labels = torch.randint(v, (n,))
    if name.startswith("linear"):
        hidden, weight = torch.randn(n, h, dtype=dtype), (torch.randn(v, h) * 0.05).to(dtype)
        if name == "linear_stats":
            return lambda: qk.linear_token_stats(hidden, weight, labels)
        hidden.requires_grad_(), weight.requires_grad_()
        return lambda: torch.autograd.grad(qk.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    logits = torch.randn(n, v, dtype=dtype)
    softcap = 30.0 if name.endswith("softcap") else None
    if name.split()[0] == "forward":
        return lambda: qk.token_stats(logits, labels, softcap=softcap)
    upstream = torch.ones(n)
    if "rho" in name:
        upstream[torch.randperm(n)[round(float(name.split("=")[1]) * n):]] = 0
    def both():
        x = logits.detach().requires_grad_()
        stats = qk.token_stats(x, labels, softcap=softcap, inplace_backward=True)
        start = time.perf_counter()
        if "rho" in name:
            torch.autograd.grad(stats.nll, x, upstream)
            return time.perf_counter() - start
        torch.autograd.grad((stats.nll, stats.entropy), x, (upstream, upstream))
    return both
with switch():
    for line in sys.stdin:
        key = tuple(json.loads(line))
        if key not in cases:
            cases.clear()
            cases[key] = prepare(*key)
            cases[key]()
        start = time.perf_counter()
        inner = cases[key]()
        seconds = time.perf_counter() - start
        print(json.dumps(inner if isinstance(inner, float) else seconds), flush=True)
"""


def start(checkout: Path) -> subprocess.Popen:
    python = checkout / ".venv/bin/python"
    return subprocess.Popen(
        [str(python), "-c", WORKER], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen, *case: object) -> float:
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def table(rows: list[dict[str, str]]) -> str:
    """The newest row of each call on each machine."""
    newest = {(row["machine"], row["case"], int(row["n"]), row["dtype"]): row for row in rows}
    order = sorted(newest, key=lambda key: (key[0], CASES.index(key[1]), *key[2:]))
    lines = []
    for key in order:
        row = newest[key]
        ratio = f"{row['ratio']} ({row['q1']}–{row['q3']})"
        lines.append([*key[1:], row["before_ms"], row["after_ms"], ratio, row["machine"], row["commit"]])
    return markdown(["call", "N", "dtype", "before ms", "after ms", "after over before", "machine", "commit"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "versions.csv")
    options = parser.parse_args()
    pair = {"before": start(options.before.resolve()), "after": start(ROOT)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=options.before, capture_output=True, text=True)
    rows = read_rows(options.output) if options.output.exists() else []
    for case in options.cases:
        for n in options.rows:
            for dtype in ("float32", "bfloat16"):
                seconds: dict[str, list[float]] = {name: [] for name in pair}
                for _ in range(options.repeats + 1):  # the first of each warms up
                    for name, process in pair.items():
                        seconds[name].append(ask(process, case, n, dtype))
                times = {name: statistics.median(values[1:]) for name, values in seconds.items()}
                ratios = [a / b for a, b in zip(seconds["after"][1:], seconds["before"][1:], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
                row = {"case": case, "n": n, "dtype": dtype} | {f"{k}_ms": f"{1e3 * t:.2f}" for k, t in times.items()}
                row |= {"ratio": f"{middle:.3f}", "q1": f"{low:.3f}", "q3": f"{high:.3f}", "repeats": options.repeats}
                print(row, file=sys.stderr, flush=True)
                rows.append(row | {"before_commit": commit.stdout.strip()} | environment())
    write_rows(options.output, rows)
    if options.output == RESULTS / "versions.csv":
        fill(ROOT / "docs" / "benchmarks.md", {"versions": table(read_rows(options.output))})
    for process in pair.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
