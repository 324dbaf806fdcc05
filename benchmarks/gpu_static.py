"""What compiled code says about the GPU kernels, ours and the peers', without a GPU.

    python -m benchmarks.gpu_static [--arch sm_90 …] [--library qtuning-kernels …]

compiles every kernel for each architecture, for a vocabulary that 16 divides and for an odd one, and writes
results/gpu_static.csv, results/gpu_static.png and results/gpu_traffic.csv. Nothing here is a timing. Rows of a library
and an architecture that are not compiled now stay as they are. Peers are compiled where they are installed:
the extra "bench" has them.
"""

import argparse
import os

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined; interpreted kernels cannot be compiled

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks import gpu_static_cuda, gpu_static_quack
from benchmarks.common import fill, markdown, read_rows, write_rows
from benchmarks.compile_ahead import TARGETS, compile_kernel
from benchmarks.gpu_kernels import LIBRARIES as TRITON_LIBRARIES
from benchmarks.gpu_kernels import OURS, Entry

LIBRARIES = TRITON_LIBRARIES | {x.LIBRARY: x.entries for x in (gpu_static_quack, gpu_static_cuda)}
RESULTS = Path(__file__).parent / "results"
# clocks in which DRAM delivers 2 bytes for each of 32 lanes of one of a multiprocessor's four partitions
READ_CLOCKS = {"sm_80": 19.6, "sm_90": 17.7, "sm_100": 8.8}
TRAFFIC_ARCH = "sm_90"


def inspect(entry: Entry, arch: str, divisible: bool) -> dict[str, object]:
    """One CSV row: what the compiled kernel holds, per element of the logits where it loops over them."""
    kernel = entry.compiled or compile_kernel(entry.fn, arch, entry.arguments, **entry.options)
    # the loops over the logits are those with most exponentials
    loops = sorted((x for x in kernel.loops if x.load_bytes), key=lambda x: -x.exponentials)[: entry.passes]
    loops = [kernel.code] if entry.tile else [kernel.main_loop()] if entry.passes == 1 else loops
    loop = loops[0] if loops else None
    row = {
        "library": entry.library,
        "version": metadata.version(entry.library.partition(",")[0]),
        "kernel": entry.name,
        "arch": arch,
        "vocabulary": "divisible by 16" if divisible else "odd",
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared,
        "threads": kernel.threads,
        "blocks_per_multiprocessor": kernel.blocks_per_multiprocessor or "",
        "code_instructions": len(kernel.code.instructions),
        "compiler": entry.compiler,
    }
    if loop is None:
        return row
    row |= {
        "load_bits": " ".join(f"{bits}x{n}" for bits, n in sorted(loop.load_widths.items())),
        "store_bits": " ".join(f"{bits}x{n}" for bits, n in sorted(loop.store_widths.items())),
        "barriers_in_loop": "" if entry.tile else sum(x.barriers for x in loops),
    }
    if not entry.matrix and loop.exponentials:
        counts = [entry.tile / kernel.threads if entry.tile else x.load_bytes / 2 for x in loops]
        per_element = list(zip(loops, counts, strict=True))
        instructions = sum(len(x.instructions) / n for x, n in per_element)
        # of a tile the logits alone: what else it loads is of the row, and the same for every thread
        moved = sum(((2 * n if entry.tile else x.load_bytes) + x.store_bytes) / n for x, n in per_element)
        row |= {
            "instructions_per_element": f"{instructions:.2f}",
            "exponentials_per_element": f"{sum(x.exponentials / n for x, n in per_element):.4f}",
            "bytes_per_element": f"{moved:.2f}",
        }
        if arch in READ_CLOCKS:
            row["memory_clocks_per_instruction"] = f"{READ_CLOCKS[arch] * moved / 2 / instructions:.2f}"
    return row


def compile_library(library: str, arch: str) -> Iterator[dict[str, object]]:
    """The rows of one library for one architecture.

    Raises:
        ImportError: the library is not installed.
    """
    for divisible in (True, False):
        for entry in LIBRARIES[library](arch, divisible):
            try:
                row = inspect(entry, arch, divisible)
            except Exception as error:  # a peer that does not compile for a target is a result
                if library == OURS:
                    raise
                print(f"{arch} {library} {entry.name}: does not compile ({type(error).__name__})", flush=True)
                continue
            fields = ("registers", "spill_bytes", "blocks_per_multiprocessor", "load_bits")
            fields += ("instructions_per_element", "exponentials_per_element")
            details = ", ".join(f"{name} {row[name]}" for name in fields if row.get(name) not in (None, ""))
            print(f"{arch:6} {row['vocabulary']:15} {library}: {entry.name}: {details}", flush=True)
            yield row


def replaced(
    rows: list[dict[str, object]], library: str, arch: str, measured: list[dict[str, object]]
) -> list[dict[str, object]]:
    """`rows` with those of one library and architecture exchanged, in the order of `LIBRARIES` and `TARGETS`."""
    kept = [row for row in rows if (row["library"], row["arch"]) != (library, arch) and row["library"] in LIBRARIES]
    order = [*LIBRARIES, *TARGETS]
    return sorted([*kept, *measured], key=lambda row: (order.index(row["library"]), order.index(row["arch"])))


def traffic(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Global bytes per logit of one step, forward and gradient, from the counted loads and stores.

    Three shares ρ of kept tokens. "zeroed": the pruned rows stay and get zeros; "compacted": they were left out.
    """

    def counted(library: str, kernel: str) -> float:
        for row in rows:
            if (row["library"], row["kernel"], row["arch"], row["vocabulary"]) == (
                library,
                kernel,
                TRAFFIC_ARCH,
                "divisible by 16",
            ):
                return float(row["bytes_per_element"])
        raise KeyError(kernel)

    forward = counted(OURS, "token_stats")
    backward = counted(OURS, "token_stats_backward, nll")
    steps = {
        "qtuning-kernels, pruned rows zeroed": lambda rho: forward + rho * backward + (1 - rho) * 2,
        "qtuning-kernels, rows compacted": lambda rho: forward + rho * backward,
    }
    if any(row["library"] == "liger-kernel" for row in rows):
        peer = counted("liger-kernel", "cross-entropy with gradient")
        steps["liger-kernel (no entropy; gradient of every row)"] = lambda rho: peer
    return [
        {"step": name, **{f"bytes_per_logit_at_{100 * rho:g}_percent": f"{step(rho):.2f}" for rho in (0.06, 0.25, 1.0)}}
        for name, step in steps.items()
    ]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Instructions per element against what the memory leaves time for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in rows if r.get("instructions_per_element") and r["arch"] in READ_CLOCKS]
    order = [*LIBRARIES, *TARGETS]
    shown.sort(key=lambda r: (order.index(r["arch"]), not r["library"].startswith(OURS), order.index(r["library"])))
    labels = [f"{r['arch']}  {r['library']}: {r['kernel']} ({r['vocabulary']})" for r in shown]
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.3 * len(shown)))
    colors = ["tab:blue" if r["library"].startswith(OURS) else "tab:gray" for r in shown]
    axes.barh(labels, [float(r["instructions_per_element"]) for r in shown], color=colors)
    limits = [READ_CLOCKS[r["arch"]] * float(r["bytes_per_element"]) / 2 for r in shown]
    axes.scatter(limits, labels, marker="|", s=200, color="tab:red", label="memory-bound below")
    axes.set_xlabel("instructions per logit (counted in compiled code, not timed)")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, str]], arch: str) -> str:
    """The rows of one architecture as Markdown."""
    columns = {
        "library": "library",
        "version": "version",
        "kernel": "kernel",
        "vocabulary": "vocabulary",
        "registers": "registers",
        "spill_bytes": "spills (B)",
        "blocks_per_multiprocessor": "blocks per SM",
        "load_bits": "loads",
        "instructions_per_element": "instr./logit",
        "exponentials_per_element": "exp/logit",
        "bytes_per_element": "bytes/logit",
        "memory_clocks_per_instruction": "memory time / issue time",
    }
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        if row["arch"] == arch:
            lines.append("| " + " | ".join(row.get(name, "") or "–" for name in columns) + " |")
    return "\n".join(lines)


def tables(results: Path) -> dict[str, str]:
    """The tables of docs/kernels.md, from the CSV files."""
    rows = read_rows(results / "gpu_static.csv")
    steps = [row.values() for row in read_rows(results / "gpu_traffic.csv")]
    traffic_table = markdown(["step", "ρ = 6 %", "ρ = 25 %", "ρ = 100 %"], steps)
    return {arch: table(rows, arch) for arch in TARGETS} | {"traffic": traffic_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.output / "gpu_static.csv"
    for library in options.library:
        for arch in options.arch:
            try:
                measured = list(compile_library(library, arch))
            except ImportError as error:
                print(f"{library}: not installed ({error})")
                break
            write_rows(path, replaced(read_rows(path) if path.exists() else [], library, arch, measured))
    rows = read_rows(path)
    if any((row["library"], row["arch"]) == (OURS, TRAFFIC_ARCH) for row in rows):
        write_rows(options.output / "gpu_traffic.csv", traffic(rows))
    if options.output == RESULTS:
        fill(RESULTS.parent.parent / "docs" / "kernels.md", tables(RESULTS))
    plot(rows, options.output / "gpu_static.png")


if __name__ == "__main__":
    main()
