"""The C interface of the CUDA kernels, without a GPU: symbols, limits of sizes, a launch without a driver.

The library is compiled by nvcc where it is there, and by the host compiler for the emulator; both must refuse the same.
"""

import ctypes
import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from tests import cuda_emulator
from tests.cuda_emulator import interface as c

_ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def built_by_nvcc() -> Path:
    from benchmarks import compile_cuda

    if compile_cuda.nvcc() is None:
        pytest.skip("there is no nvcc")
    text = b"".join(p.read_bytes() for p in (*compile_cuda.SOURCES, *compile_cuda._HEADERS))
    target = _ROOT / "build/cuda_interface" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++17", "-O1", "-arch=sm_90", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static"]
        options += ["--threads", "2", "-o", str(target)]
        subprocess.run([compile_cuda.nvcc(), *options, *map(str, compile_cuda.SOURCES)], check=True)
    return target


@pytest.fixture(scope="module", params=["nvcc", "emulator"])
def library(request):
    if request.param == "nvcc":
        return c.load(built_by_nvcc())
    if reason := cuda_emulator.why_not():
        pytest.skip(reason)
    return c.load(cuda_emulator.library())


class Call:
    """Valid arguments for every function, on host memory that a refused call never touches."""

    def __init__(self):
        self.memory = torch.zeros(4096, dtype=torch.float64)
        self.address = self.memory.data_ptr()
        self.logits = c.Logits(self.address, c.BFLOAT16, 2, 3, 50, 150, 50)
        self.grad = c.Logits(self.address, c.BFLOAT16, 2, 3, 50, 150, 50)
        self.labels = c.Labels(self.address, 8, -100)
        self.scaling = c.Scaling(1.0, 0.0)
        self.statistics = c.Statistics(*[self.address] * 4)
        self.upstream = c.Upstream(*[self.address] * 6)
        self.target = c.Target(0, None)

    def forward(self, library):
        references = map(ctypes.byref, (self.logits, self.labels))
        return library.qt_cuda_token_stats(*references, self.scaling, ctypes.byref(self.statistics), None, self.target)

    def backward(self, library):
        references = map(ctypes.byref, (self.logits, self.grad, self.labels, self.upstream))
        return library.qt_cuda_token_stats_backward(*references, self.scaling, self.target)


def message(library) -> str:
    return library.qt_cuda_error_message().decode()


LIMITS = {  # change -> what the message must say
    "size_c": (2**31, "logits has shape [2, 2147483648, 50]; accepted: at most 2147483647 rows of at most 2147475455"),
    "size_a": (2**30, "logits has shape [1073741824, 3, 50]"),
    "vocabulary": (2**31 - 8192, "logits has shape [2, 3, 2147475456]"),
    "data": (3, "logits is at 0x3; accepted: a multiple of 2 bytes"),
}


@pytest.mark.parametrize("field", LIMITS)
@pytest.mark.parametrize("function", [Call.forward, Call.backward], ids=["forward", "backward"])
def test_what_a_kernel_cannot_index_is_refused(library, function, field):
    value, text = LIMITS[field]
    call = Call()
    setattr(call.logits, field, value)
    assert function(call, library) == c.BAD_ARGUMENT
    assert text in message(library)


def test_nothing_to_do_needs_no_device(library):
    call = Call()
    call.logits.size_a = call.grad.size_a = 0
    call.logits.data = call.grad.data = None
    assert call.forward(library) == c.OK
    assert call.backward(library) == c.OK


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_a_launch_without_a_driver_says_so():
    library = c.load(built_by_nvcc())
    for function in (Call.forward, Call.backward):
        assert function(Call(), library) == c.CUDA_ERROR
        assert "CUDA says: " in message(library)
        assert "driver" in message(library) or "no CUDA-capable device" in message(library)
