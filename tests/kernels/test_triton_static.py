"""The GPU kernels' compiled code, read without a GPU: registers, spills, access widths, instructions per element.

Bars have 5 % slack, for the pinned compiler. Compilation happens in another process, because kernels that were
defined for the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from benchmarks.gpu_kernels import ours
from benchmarks.compile_ahead import compile_kernel
arch, divisible, names = sys.argv[1], sys.argv[2] == "True", sys.argv[3:]
rows = {}
for entry in ours(arch, divisible):
    if names and not any(entry.name.startswith(name) for name in names):
        continue
    kernel = compile_kernel(entry.fn, arch, entry.arguments, **entry.options)
    loop = kernel.main_loop()
    elements = loop.load_bytes / 2 if loop else 0
    rows[entry.name] = {
        "registers": kernel.registers,
        "spills": kernel.spill_bytes,
        "blocks": kernel.blocks_per_multiprocessor,
        "instructions": len(loop.instructions) / elements if elements else None,
        "exponentials": loop.exponentials / elements if elements else None,
        "loads": sorted(loop.load_widths) if loop else [],
        "stores": sorted(loop.store_widths) if loop else [],
        "barriers": loop.barriers if loop else 0,
        "matrix": loop.matrix if loop else 0,
        "store_only": [sorted(x.store_widths) for x in kernel.store_only_loops()],
    }
print(json.dumps(rows))
"""
SLACK = 1.05
STATISTICS = ("token_stats",)


def inspect(arch, divisible, *names):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, arch, str(divisible), *names]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("divisible", [True, False], ids=["divisible", "odd"])
@pytest.mark.parametrize(("arch", "instructions", "backward"), [("sm_90", 9.5, 6.0), ("sm_100", 8.8, 6.0)])
def test_token_stats(arch, instructions, backward, divisible):
    """An odd vocabulary must not narrow the loads; a label's fix or a pruned row must not enter the loop."""
    rows = inspect(arch, divisible, *STATISTICS)
    forward = rows["token_stats"]
    assert forward["instructions"] <= instructions * SLACK
    assert forward["exponentials"] <= 1.13
    assert forward["barriers"] == 0
    assert forward["loads"] == [128]
    if arch == "sm_90":
        assert forward["registers"] <= 32
        assert forward["blocks"] == 8
    nll, everything = rows["token_stats_backward, nll"], rows["token_stats_backward, all"]
    assert nll["instructions"] <= backward * SLACK
    assert nll["exponentials"] == everything["exponentials"] == 1.0
    for row in (nll, everything):
        assert row["loads"] == row["stores"] == [128]
        assert row["barriers"] == 0
        assert [128] in row["store_only"], "pruned rows are written without a load"
    assert all(row["spills"] == 0 for row in rows.values())


def test_linear_token_stats():
    rows = inspect("sm_90", True, "linear", "gemm")
    assert rows["linear_token_stats"]["registers"] <= 200
    assert all(row["matrix"] > 0 for row in rows.values()), "matrix instructions in the loop"
    assert all(row["spills"] == 0 for row in rows.values())
    assert all(row["loads"] == [128] for row in rows.values())


def test_amd():
    rows = inspect("gfx942", False, *STATISTICS)
    assert all(row["spills"] == 0 for row in rows.values()), "no scratch"
    assert all(row["loads"] == [128] for row in rows.values())
    assert rows["token_stats"]["exponentials"] <= 1.13


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_nothing_spills(arch):
    for divisible in (True, False):
        rows = inspect(arch, divisible)
        assert {name: row["spills"] for name, row in rows.items() if row["spills"]} == {}
