"""What the benchmarks share: interleaved timing, peak memory, and CSV rows that say where they come from."""

import contextlib
import csv
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def interleave(
    cases: dict[str, Callable[[], object]], repeats: int = 9, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call of each case, called in turn (A B A B …) so that all meet the same noise.

    The first round warms up and is not returned. With one thread, ``clock=time.process_time`` leaves out the
    time that other processes took.
    """
    seconds = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, call in cases.items():
            start = clock()
            call()
            if round_:
                seconds[name].append(clock() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, object]:
    """Median and quartiles in milliseconds, as CSV fields."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    fields = {"median_ms": median, "q1_ms": low, "q3_ms": high, "min_ms": min(seconds)}
    return {**{name: f"{1e3 * value:.3f}" for name, value in fields.items()}, "repeats": len(seconds)}


def processor() -> str:
    """Name, family and model: clouds name a whole line of processors alike."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    if "cpu family" not in fields:
        return fields["model name"]
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _versions() -> str:
    """Of what is measured beside this package, and of what makes data."""
    names = ("transformers", "trl", "cut-cross-entropy", "liger-kernel", "quack-kernels", "triton", "reasoning-gym")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return " ".join(f"{name} {version}" for name, version in found.items())


def machine_name() -> str:
    """The machine as the rows name it."""
    return f"{processor()}, {os.cpu_count()} cores"


def environment() -> dict[str, object]:
    """Machine, versions and commit, as CSV fields."""
    import torch  # here, so that what only reads rows needs nothing but Python

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "machine": machine_name(),
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: others may have been at work
        "threads": torch.get_num_threads(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "torch": torch.__version__,
        "versions": _versions(),
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes the rows as one CSV, under a temporary name first."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stored_rows(path: Path) -> list[dict[str, str]]:
    """As `read_rows`; none where there is no file yet."""
    return read_rows(path) if path.exists() else []


def beside(path: Path, kind: str) -> Path:
    """The CSV of that kind that belongs to another."""
    return path.with_name(f"{path.stem}_{kind}.csv")


def markdown(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(document: Path, parts: dict[str, str]) -> None:
    """Puts each part between its marks, ``<!-- name -->`` and ``<!-- end name -->``, in a Markdown page."""
    text = document.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in text:
            text = text[: text.index(begin) + len(begin)] + f"\n{part}\n" + text[text.index(end) :]
    document.write_text(text)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Lets the peak of resident memory begin at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """MiB resident at the peak since `reset_peak`, or since the process began (Linux)."""
    return _status_kib("VmHWM") / 1024


def peak(call: Callable[[], object]) -> tuple[float, float]:
    """MiB resident at the peak of `call`, and by how much that exceeds what was resident before it (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed and the allocator kept is not in use
    reset_peak()
    before = _status_kib("VmRSS") / 1024
    result = call()
    highest = peak_mib()
    del result
    return highest, highest - before


def in_child(module: str, arguments: Iterable[str]) -> str:
    """The last line that ``python -m module arguments`` prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]
