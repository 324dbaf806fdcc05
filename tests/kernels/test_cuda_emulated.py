"""What is particular to the CUDA kernels, run by the emulator on the CPU; test_token_stats.py holds them to float64.

Alignment: rows begin anywhere within 16 bytes, and end anywhere. Several blocks per row: the emulator has four
multiprocessors, so that one wave is 32 blocks. Races: threads run in another order.
"""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import qtuning_kernels as qk
from qtuning_kernels.kernels import dispatch
from tests import cuda_emulator

from . import truth

ROOT = Path(__file__).parents[2]


@pytest.fixture
def emulated(monkeypatch):
    cuda_emulator.serve_cpu(monkeypatch)
    monkeypatch.setenv("QTUNING_BACKEND", "cuda")
    importlib.import_module("qtuning_kernels.kernels.cuda")  # registers the operators


def run(x, labels, upstream, inplace=False):
    x = x.detach().requires_grad_()
    stats = qk.token_stats(x, labels, inplace_backward=inplace)
    truth.objective(stats, upstream).backward()
    return [s.detach() for s in stats], x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_alignment(emulated, dtype):
    """Each start within 16 bytes with each length around a vector, for logits and gradients that lie differently: the
    gradient of a view is contiguous, so its rows begin elsewhere. Dense copies of the same rows are the truth."""
    width = 16 // torch.empty((), dtype=dtype).element_size()
    base = (torch.randn(3, 8 * width, dtype=torch.float64) * 3).to(dtype)
    upstream = list(torch.randn(3, 3, dtype=torch.float64))
    for start in range(width):
        for length in (1, width - 1, width, width + 1, 2 * width, 5 * width + 1):
            view = base[:, start : start + length]
            labels = torch.randint(0, length, (3,))
            stats, grad = run(view, labels, upstream)
            expected = truth.stats(view.double(), labels)
            for a, e in zip(stats, expected, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)
            (expected,) = truth.grads(lambda x, y=labels: truth.stats(x, y), [view.double()], upstream)
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("labels", [(7,), (99_999,), (50_000,), (-100,)], ids=str)
def test_several_blocks_per_row(emulated, labels):
    """One row of 100,001 float32 logits is shared by 12 blocks (one wave would give it 32, but each is to read 32 KiB):
    the label's entry belongs to the first, the last or an inner block."""
    x, labels = torch.randn(1, 100_001) * 4, torch.tensor(labels)
    upstream = [torch.tensor([value]).double() for value in (0.7, -0.3, 0.2)]
    stats, grad = run(x, labels, upstream)
    (expected,), (same,) = (truth.grads(lambda z: truth.stats(z, labels), [y], upstream) for y in (x.double(), x))
    truth.assert_no_worse("grad", grad, same, expected)
    expected = truth.stats(x.double(), labels)
    same = truth.stats(x, labels)
    for name, a, s, e in zip(qk.TokenStats._fields, stats, same, expected, strict=True):
        truth.assert_no_worse(name, a, s, e)


def test_statistics_do_not_depend_on_the_other_rows(emulated):
    x = torch.randn(5, 3001).bfloat16()
    labels = torch.randint(0, 3001, (5,))
    together = qk.token_stats(x, labels)
    for row in range(5):
        alone = qk.token_stats(x[row : row + 1].clone(), labels[row : row + 1])
        assert all(torch.equal(a, t[row : row + 1]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_threads_does_not_matter(emulated, monkeypatch, dtype):
    """Between barriers threads run in any order. Written in place, the logit at the label is gone as soon as the
    thread that handles it has passed: one that reads it for another thread would find it, or not, by luck."""
    x = (torch.randn(24, 4099) * 3).to(dtype)
    labels = torch.randint(0, 4099, (24,))
    labels[:4] = torch.tensor([0, 1, 4097, 4098])
    upstream = list(torch.randn(3, 24, dtype=torch.float64))
    results = []
    for last_first in (False, True):
        if last_first:
            monkeypatch.setenv("QTUNING_EMULATOR_REVERSED", "1")
        stats, grad = run(x.clone(), labels, upstream, inplace=True)
        results.append((*stats, grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scaling", [(-100, 1.0, None), (-100, -2.0, None), (-100, 1.0, 30.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [3, 5000, 70_001])
def test_no_finite_maximum(emulated, dtype, size, scaling):
    """Edges, vectors and, for 70,001 logits, several blocks per row find them."""
    truth.assert_no_finite_maximum(torch.ops.qtuning_cuda, dtype, size, scaling)


@pytest.mark.parametrize("name", dispatch.SCHEMAS)
def test_operators_have_the_schemas_of_the_dispatcher(emulated, name):
    """token_stats_backward_ was registered without a schema, and so declared no mutation of the logits."""
    schema = getattr(torch.ops.qtuning_cuda, name).default._schema
    assert str(schema) == str(torch._C.parse_schema(f"qtuning_cuda::{name}{dispatch.SCHEMAS[name]}"))
    assert schema.is_mutable == name.endswith("_")


GUARDED = """
import ctypes, mmap, torch
from tests.cuda_emulator import interface as c, library
lib = c.load(library())
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 4 * page)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for guard in (0, 3):  # the first and the last page can be neither read nor written
    assert libc.mprotect(ctypes.c_void_p(base + guard * page), page, 0) == 0
out = torch.zeros(8)
labels = torch.tensor([3])
address = out.data_ptr()
ones = torch.ones(1)
for dtype, size in ((c.FLOAT32, 4), (c.BFLOAT16, 2)):
    # a guarded page in front of the row's first element, or right behind its last one
    for elements in (5, 33, 2 * page // size - 3, 2 * page // size):
        for start in (base + page, base + 3 * page - elements * size):
            logits = c.Logits(start, dtype, 1, 1, elements, 0, 0)
            label = c.Labels(labels.data_ptr(), 8, -100)
            target, scaling = c.Target(0, None), c.Scaling(1.0, 0.0)
            stats = c.Statistics(*[address] * 4)
            p = ctypes.byref
            assert lib.qt_cuda_token_stats(p(logits), p(label), scaling, p(stats), None, target) == 0
            for shift in range(0, 16, size):
                copy = torch.zeros(elements * size + 64, dtype=torch.uint8)
                for a, b in (((start, start),) if shift else ()) + ((start, copy.data_ptr() + shift),
                             (copy.data_ptr() + shift, start)):
                    x = c.Logits(a, dtype, 1, 1, elements, 0, 0)
                    g = c.Logits(b, dtype, 1, 1, elements, 0, 0)
                    up = c.Upstream(*[ones.data_ptr()] * 6)
                    assert lib.qt_cuda_token_stats_backward(p(x), p(g), p(label), p(up), scaling, target) == 0
print("untouched")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect of Linux")
def test_nothing_outside_a_row_is_touched():
    """Rows that end right before, or begin right behind, a page that may not be accessed: aligned reading that rounds
    down or up to 16 bytes would end the process. In place, out of place, and with other alignments."""
    if reason := cuda_emulator.why_not():
        pytest.skip(reason)
    cuda_emulator.library()  # not within the time that the child has
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GUARDED)], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:] or f"ended by signal {-done.returncode}"
    assert "untouched" in done.stdout
