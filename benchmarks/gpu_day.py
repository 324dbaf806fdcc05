"""Everything that only a GPU can show, in order of worth, within the minutes that there are.

    make gpu MINUTES=25                 or: python -m benchmarks.gpu_day --minutes 25
    make gpu ARGS='--offline wheels'    takes every package from a folder
    make gpu ARGS='--torch here'        with the torch and the other packages of this Python
    make gpu ARGS=--rehearse            the same on this machine's CPU, in tiny sizes

Needs nothing but Python and a driver: the first part makes an environment. Each part is a process with a time limit.
The page ``gpu-report.md`` is written again after each, so that an interrupted run leaves what it finished. All goes to
one folder per device, ``benchmarks/results/gpu/NAME``; `make docs-figures` puts its rows into the pages.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_environment import ROOT, Device, find_device, find_tool
from benchmarks.gpu_pages import tables

TAIL = 25  # lines of a part's output that the report shows where it went wrong
GRACE = 5  # seconds from asking a process to end to ending it
ROWS, LINEAR = "tests/kernels/test_token_stats.py", "tests/kernels/test_linear.py"
IN_PLACE = "((test_backward or layouts) and True or inplace)"  # of the tests in ROWS


@dataclass
class Part:
    """A command, how many seconds it may take, and in `state` and `seconds` what became of it.

    `least` is how many seconds have to be left for it to be begun; `reason` why it is not begun; `ends` how it should
    end; what comes after a `required` one is begun only if that passed.
    """

    name: str
    what: str
    command: list[str]
    limit: float
    least: float = 20
    environ: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    ends: str = "passed"
    required: bool = False
    state: str = "not begun"
    seconds: float = 0.0

    def log(self, folder: Path) -> Path:
        return folder / f"{self.name}.log"

    def as_expected(self) -> bool:
        return self.state in (self.ends, "not begun") or (self.state == "left out" and not self.required)


def run_part(part: Part, folder: Path, limit: float) -> None:
    """Run it in a session of its own, of which nothing is left when it ends, is too late, or is interrupted."""
    begun = time.monotonic()
    with part.log(folder).open("w") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=os.environ | part.environ, stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        part.state = "interrupted"
        try:
            part.state = "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            part.state = f"out of time after {limit:.0f} s"
        finally:
            part.seconds = time.monotonic() - begun
            _end(process)


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):  # first as by a person: pytest then tells what failed so far
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_parts(
    parts: list[Part], folder: Path, deadline: float, report: Callable[[], None], clock: Callable[[], float]
) -> None:
    """Run what there is time for, in the order given; `report` is called after each, however it ends."""
    missing = ""
    for part in parts:
        left = deadline - clock()
        part.reason = part.reason or missing
        if part.reason:
            part.state = "left out"
        elif left < part.least:
            part.reason = f"{max(left, 0):.0f} s were left, and it takes {part.least:.0f}"
        else:
            print(f"{part.name}: {part.what}, at most {min(part.limit, left):.0f} s", flush=True)
            try:
                run_part(part, folder, min(part.limit, left))
            finally:
                report()
        print(f"{part.name}: {part.state}, {part.seconds:.0f} s {part.reason}", flush=True)
        if part.required and part.state != "passed":
            missing = f"{part.name} did not pass"
    report()


def gpu_parts(environment: Path, folder: Path, settings: list[str]) -> list[Part]:
    """The environment, then the parts (a) to (g), most telling first: the suite's tests and the benchmarks."""
    python = str(environment / "bin/python")
    make = [sys.executable, "-m", "benchmarks.gpu_environment", str(environment), *settings]
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "--timeout", "120"]
    spread = [*pytest, "-n", "4", "--dist", "worksteal"]  # compiling takes longer than the tests
    step = [python, "-m", "benchmarks.step", "--device", "cuda", "--allocators", "default"]
    step += ["--output", str(folder / "step.csv")]
    variants = ["--variants", "full data", "full data, TRL", "eager Q-Tuning", "ours"]
    # Every tensor an allocation of its own, where nothing outside of a row is read. Triton's kernels read the 16 bytes
    # that hold its end, which are the allocation's where PyTorch keeps memory, and nobody has written.
    one = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checks = [("memcheck", "cuda", one), ("memcheck", "triton", {}), ("racecheck", "cuda", {}),
              ("racecheck", "triton", {}), ("initcheck", "cuda", one)]  # fmt: skip
    sanitizer = find_tool("compute-sanitizer")
    missing = "" if sanitizer else "no compute-sanitizer is here (CUDA's toolkit has it)"
    check = [sanitizer or "", "--error-exitcode", "1", "--tool"]
    in_place = [*pytest, "--timeout", "0", ROWS, "-k", IN_PLACE, "--backend"]
    large = ["--random", "1.7B", "--groups", "autocast", "--repeats", "3"]
    return [
        Part("environment", "torch, this package and its peers", make, 900, required=True),
        Part("a-rows", "row operators against float64", [*spread, ROWS, LINEAR], 300, 60),
        Part("b-step", "three steps against the reference backend", [*pytest, "tests/training/test_backends.py"], 120),
        Part("c-kernels", "kernels against peers", [python, "-m", "benchmarks.gpu", "--output", str(folder)], 360, 60),
        Part("d-suite", "the suite's tests for a GPU", spread, 420, 60),
        *(
            Part(
                f"e-{tool}-{name}",
                f"{tool} on the in-place backward of {name}",
                [*check, tool, *in_place, name],
                150,
                60,
                environ,
                missing,
            )
            for tool, name, environ in checks
        ),
        Part("f-step", "the step at 135M", [*step, *variants, "--groups", "float32", "autocast"], 300, 60),
        Part("f-large", "the step at 1.7B, random weights", [*step, *variants, *large], 300, 90),
        Part("g-profile", "a profile of one step", [*step, "--profile", str(folder / "trace.json.gz")], 90, 30),
    ]


def rehearsal_parts(python: str, folder: Path) -> list[Part]:
    """The same parts on the CPU, interpreted or emulated, in tiny sizes; and two that go wrong on purpose."""
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    rows = [*pytest, "--backend", "triton", "--backend", "cuda", ROWS, "-k"]
    step = [python, "-m", "benchmarks.step", "--device", "cpu", "--allocators", "default", "--random", "tiny"]
    step += ["--output", str(folder / "step.csv"), "--groups", "float32", "--pool", "4", "--repeats", "1"]
    tiny = ["--device", "cpu", "--rows", "8", "--vocabulary", "64", "--hidden", "16", "--repeats", "2"]
    backends = ["tests/training/test_backends.py", "--backend", "triton"]
    return [
        Part("fails", "fails on purpose", [python, "-c", "raise SystemExit('on purpose')"], 60, 0, ends="failed"),
        Part("hangs", "hangs on purpose", [python, "-c", "import time; time.sleep(600)"], 2, 0,
             ends="out of time after 2 s"),
        Part("a-rows", "row operators, interpreted and emulated", [*rows, "each_upstream or all_rows"], 300),
        Part("b-step", "three steps against the reference backend", [*pytest, *backends], 300),
        Part("c-kernels", "kernels against peers", [python, "-m", "benchmarks.gpu", *tiny, "--output", str(folder)],
             120),
        Part("d-suite", "the suite's tests for a GPU", [*pytest, "-m", "gpu", LINEAR], 120),
        Part("e-memcheck", "the in-place backward, without compute-sanitizer",
             [*rows, f"{IN_PLACE} and not 4097 and not 50257"], 300),
        Part("f-step", "the step", [*step, "--variants", "full data", "ours"], 120),
        Part("g-profile", "a profile of one step", [*step, "--profile", str(folder / "trace.json.gz")], 120),
    ]  # fmt: skip


def last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    return next((line for line in reversed(lines) if line), "")


def page(device: Device, parts: list[Part], folder: Path) -> str:
    """The report: what became of each part, what went wrong, and the rows so far."""
    lines = [f"# {device.name} ({device.kind})", "", f"nvcc: {find_tool('nvcc') or 'none'}", ""]
    lines += ["| part | what | outcome | seconds | last line |", "|---|---|---|---|---|"]
    for p in parts:
        words = (p.reason or last_words(p.log(folder))).replace("|", "\\|")[:120]
        lines.append(f"| {p.name} | {p.what} | {p.state} | {p.seconds:.0f} | {words} |")
    for part in parts:
        if part.state not in ("passed", "left out", "not begun"):
            tail = part.log(folder).read_text(errors="replace").splitlines()[-TAIL:]
            lines += ["", f"## {part.name}: {part.state}", "```", *tail, "```"]
    return "\n".join([*lines, "", *tables(folder)]).rstrip() + "\n"


def write_report(device: Device, parts: list[Part], folder: Path) -> None:
    """Under a temporary name first."""
    temporary = folder / "gpu-report.tmp"
    temporary.write_text(page(device, parts, folder))
    temporary.replace(folder / "gpu-report.md")


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="for everything, the environment included")
    parser.add_argument("--offline", type=Path, metavar="FOLDER", help="take every package from this folder of wheels")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with this Python, in tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these, by the first letters of their names")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/gpu/NAME)")
    parser.add_argument("--torch", default="torch==2.13.0", help='requirement, or "here"')
    options = parser.parse_args(arguments)
    device = Device("CPU", "rehearsal") if options.rehearse else find_device()
    if device is None:
        print("no GPU is here: neither nvidia-smi nor rocminfo names one (--rehearse runs on the CPU)", file=sys.stderr)
        return 2
    if options.offline and not options.offline.is_dir():
        parser.error(f"--offline is {options.offline}; accepted: a folder of wheels")
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    folder = (options.output or ROOT / "benchmarks/results/gpu" / slug).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background would ignore
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if options.rehearse:
        parts = rehearsal_parts(sys.executable, folder)
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or the trainers would spread over all
        settings = [options.torch, *([str(options.offline.resolve())] if options.offline else [])]
        parts = gpu_parts(ROOT / ".venv-gpu", folder, settings)
    if options.only:
        parts = [part for part in parts if part.required or part.name.startswith(tuple(options.only))]

    def report() -> None:
        write_report(device, parts, folder)

    try:
        run_parts(parts, folder, begun + 60 * options.minutes, report, time.monotonic)
    except KeyboardInterrupt:
        print("interrupted; what was finished is in the report", flush=True)
    print(folder / "gpu-report.md")
    return 0 if all(part.as_expected() for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
