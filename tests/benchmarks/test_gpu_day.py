"""`make gpu` without a GPU: how it finds one, what it runs in which order, and that a report always comes out."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_day, gpu_environment
from benchmarks.common import ROOT, write_rows
from benchmarks.gpu_day import Part, run_parts
from benchmarks.gpu_environment import Device
from benchmarks.gpu_pages import NONE
from benchmarks.gpu_pages import parts as page_parts

CPU = Device("CPU", "rehearsal")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(parts, folder, seconds=60.0):
    reports = []

    def report():
        gpu_day.write_report(CPU, parts, folder)
        reports.append([part.state for part in parts])

    run_parts(parts, folder, time.monotonic() + seconds, report, time.monotonic)
    return reports, (folder / "gpu-report.md").read_text()


def tool(folder, name, output):
    path = folder / name
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)


ROCM = """*******
Agent 1
*******
  Name:                    AMD EPYC 9534
  Marketing Name:          AMD EPYC 9534 64-Core Processor
  Device Type:             CPU
*******
Agent 2
*******
  Name:                    gfx942
  Marketing Name:          AMD Instinct MI300X
  Device Type:             GPU"""


@pytest.mark.parametrize(
    ("name", "output", "expected"),
    [
        ("nvidia-smi", "NVIDIA H100 80GB HBM3, 9.0, 580.159.04", Device("CUDA", "NVIDIA H100 80GB HBM3", "9.0", 580)),
        ("nvidia-smi", "A, B, 8.0, [N/A]", Device("CUDA", "A, B", "8.0")),
        ("rocminfo", ROCM, Device("ROCm", "AMD Instinct MI300X")),
        ("rocminfo", ROCM.partition("Agent 2")[0], None),
        ("neither", "", None),
    ],
)
def test_finds_the_device(tmp_path, monkeypatch, name, output, expected):
    tool(tmp_path, name, output)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_environment.find_device() == expected


def test_says_in_one_line_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "find_device", lambda: None)
    assert gpu_day.main(["--output", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        "no GPU is here: neither nvidia-smi nor rocminfo names one (--rehearse runs on the CPU)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_finds_tools_off_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "cuda/bin").mkdir(parents=True)
    tool(tmp_path / "cuda/bin", "compute-sanitizer", "")
    assert gpu_environment.find_tool("compute-sanitizer") == str(tmp_path / "cuda/bin/compute-sanitizer")
    assert gpu_environment.find_tool("no such tool") is None


@pytest.mark.parametrize("offline", [False, True])
def test_the_environment(tmp_path, monkeypatch, offline):
    """A peer that cannot be had is left out, and no command may bring another torch than the pinned one."""
    ran = []

    def fake(command, check, env, **_):
        ran.append((command, env))
        if "quack-kernels" in command:
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake)
    for name in ("TORCH_CUDA_ARCH_LIST", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    wheels = [tmp_path / "wheels"] if offline else []
    gpu_environment.make(Device("CUDA", "H100", "9.0"), tmp_path / "env", "torch==2.13.0", *wheels)
    pip = [command for command, _ in ran if "pip" in command]
    assert [command[-1] for command in pip] == ["torch==2.13.0", "hypothesis>=6.100", ".[lora,demo]",
                                                *gpu_environment.PEERS]  # fmt: skip
    assert all("--constraint" in command for command in pip[1:])
    assert all(("--no-index" in command) == offline for command in pip)
    assert ran[-1][0][-1] == "fetch"
    assert ran[-1][1].get("PIP_FIND_LINKS") == (str(tmp_path / "wheels") if offline else None)
    assert ran[-1][1]["TORCH_CUDA_ARCH_LIST"] == "9.0"


@pytest.mark.parametrize(("driver", "index"), [(550, "/cu126"), (580, None), (0, None)])
def test_a_driver_before_cuda_13_gets_wheels_for_cuda_12(driver, index):
    """PyPI's torch is built for CUDA 13, and would say that the driver is too old."""
    made = gpu_environment.commands(Device("CUDA", "H100", "9.0", driver), Path("env"), "torch==2.13.0")
    (command,) = [command for command, _ in made if command[-1] == "torch==2.13.0"]
    given = command[command.index("--index-url") + 1] if "--index-url" in command else None
    assert given is None if index is None else given.endswith(index)


def test_the_environment_of_this_python(tmp_path, monkeypatch):
    """Its packages are seen from the new environment and by pip there, which installs none of them again; and a Python
    without ensurepip lends its own pip."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    made = gpu_environment.commands(Device("CUDA", "H100"), tmp_path / "env", "here", tmp_path)
    venv, here, _, tests, *_ = [command for command, _ in made]
    for command in (venv, here):
        subprocess.run(command, check=True)
    version = metadata.version("torch")
    (tmp_path / "env/pins.txt").write_text("torch==" + version.partition("+")[0])
    subprocess.run(tests, check=True)  # --no-index, of an empty folder
    code = "import site; from importlib import metadata; print(metadata.version('torch'), site.getsitepackages()[0])"
    said = subprocess.run([tmp_path / "env/bin/python", "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == version
    assert [path.name for path in Path(said.split()[1]).iterdir()] == ["here.pth"]


@pytest.fixture
def interruptible():
    """As `gpu_day.main` makes itself: a job in the background ignores SIGINT, and so do all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_order_limits_and_report(tmp_path):
    """In order of worth; what fails, hangs, cannot be begun or has no time left is named, and the rest runs."""
    alive = tmp_path / "alive"
    grandchild = f"import time\nwhile True: open({str(alive)!r}, 'w').write(str(time.time())); time.sleep(0.05)"
    begin = f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], stderr=subprocess.DEVNULL)"  # it is told, too
    hangs = f"import subprocess, sys, time; {begin}\n"
    hangs += "try: time.sleep(60)\nexcept KeyboardInterrupt: print('1 failed so far')"
    parts = [
        Part("first", "passes", python("print('5 passed')"), 20),
        Part("second", "fails", python("print('trace', flush=True); raise SystemExit('wrong | number')"), 20),
        Part("third", "hangs", python(hangs), 3, ends="out of time after 3 s"),
        Part("fourth", "cannot", ["none"], 20, reason="no such tool"),
        Part("fifth", "takes too long", ["none"], 900, least=500),
        Part("sixth", "fits", python("print(6)"), 900, least=1),
    ]
    reports, text = run(parts, tmp_path)
    assert [part.state for part in parts] == [
        "passed", "failed", "out of time after 3 s", "left out", "not begun", "passed",
    ]  # fmt: skip
    assert [states.count("not begun") for states in reports] == [5, 4, 3, 1, 1]  # one after each that ran
    last = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == last  # nothing that a part started outlives it
    assert "| first | passes | passed |" in text
    assert "5 passed" in text
    assert "## third: out of time after 3 s\n```\n" in text
    assert "\n1 failed so far\n" in text  # pytest, interrupted, tells its failures
    assert "## second: failed\n```\ntrace\nwrong | number\n```" in text
    assert "wrong \\| number" in text
    assert "no such tool" in text
    assert [part.as_expected() for part in parts] == [True, False, True, True, True, True]


def test_nothing_is_begun_without_what_is_required(tmp_path):
    parts = [
        Part("environment", "fails", python("raise SystemExit(1)"), 20, required=True),
        Part("next", "cannot", ["none"], 20),
    ]
    _, text = run(parts, tmp_path)
    assert parts[1].state == "left out"
    assert "environment did not pass" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_finished(tmp_path, number):
    code = f"""if True:
        import sys
        from benchmarks import gpu_day
        from benchmarks.gpu_day import Part
        gpu_day.rehearsal_parts = lambda python, folder: [
            Part("first", "passes", [python, "-c", "print('done')"], 20, 0),
            Part("second", "goes on", [python, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 60, 0),
            Part("third", "waits", [python, "-c", "0"], 20, 0),
        ]
        sys.exit(gpu_day.main(["--rehearse", "--output", {str(tmp_path)!r}]))
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "second.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    text = (tmp_path / "gpu-report.md").read_text()
    assert "| first | passes | passed |" in text
    assert "| second | goes on | interrupted |" in text
    assert "| third | waits | not begun |" in text
    assert process.returncode == 1
    assert output.strip().endswith("gpu-report.md")


def test_pages_say_so_until_there_are_rows(tmp_path):
    assert page_parts([tmp_path])["gpu timed"] == NONE["gpu timed"]
    row = {"group": "rows", "case": "token_stats", "rows": 8, "vocabulary": 64, "hidden": "", "error": ""}
    row |= {"median_ms": "2.5", "q1_ms": "2.4", "q3_ms": "2.6", "gb_per_s": "1000", "share": "0.9", "gpu": "H100"}
    old = row | {"median_ms": "9.9"}
    failed = row | {"case": "quack-kernels, gradient", "error": "TypeError: no", "median_ms": ""}
    write_rows(tmp_path / "gpu.csv", [old, row, failed])
    made = page_parts([tmp_path])
    assert "| H100 | token_stats | 8 × 64 | 2.5 (2.4–2.6) | 1000 GB/s | 0.9 |" in made["gpu timed"]
    assert "9.9" not in made["gpu kernels"]
    assert "TypeError: no" in made["gpu kernels"]
    assert "TypeError" not in made["gpu timed"]


def test_a_kernel_that_does_not_end_is_named(monkeypatch):
    """And so is one that was not measured when the group was ended; what was measured stands."""
    before, calls = signal.getsignal(signal.SIGALRM), []

    def third():
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "MOST_SECONDS", 1)
    cases = {"first": lambda: None, "hangs": lambda: time.sleep(60), "fails": lambda: 1 / 0, "third": third}
    made = {name: gpu.Case(call, 1.0) for name, call in cases.items()}
    times, _, failed = gpu.measure(made, 5, "cpu")
    assert [len(times[name]) for name in ("first", "third")] == [4, 3]
    assert failed == {"hangs": "TimeoutError: not done after 1 s", "fails": "ZeroDivisionError: division by zero"}
    calls[:] = [1] * 2
    assert gpu.measure({"third": made["third"]}, 5, "cpu")[2] == {"third": "ended early"}
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rehearsal(tmp_path):
    """Every part on the CPU, interpreted and emulated; the two that go wrong on purpose are named."""
    from qtuning_kernels.demo import assets

    if not (assets.is_fetched(assets.MODEL) and assets.is_fetched(assets.DATA)):
        pytest.skip("the embedded model is not fetched: qtuning fetch")
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    text = (tmp_path / "gpu-report.md").read_text()
    assert done.returncode == 0, text
    assert "## fails: failed\n```\non purpose\n```" in text
    assert "## hangs: out of time after 2 s" in text
    for name in ("a-rows", "b-step", "c-kernels", "d-suite", "e-memcheck", "f-step", "g-profile"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert "| passed |" in line
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
    assert "token_stats, gradient of 25%" in text
    assert "| tiny | float32 | ours |" in text
