"""The C interface of the CUDA kernels, without a GPU: symbols, argument checks, a launch without a driver.

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
        return library.qt_cuda_token_stats(
            *references, self.scaling, ctypes.byref(self.statistics), None, 0, self.target
        )

    def backward(self, library):
        references = map(ctypes.byref, (self.logits, self.grad, self.labels, self.upstream))
        return library.qt_cuda_token_stats_backward(*references, self.scaling, self.target)


def message(library) -> str:
    return library.qt_cuda_error_message().decode()


REFUSED = {  # change -> code, and what the message must name
    "logits.data": (None, c.NULL_POINTER, "logits is NULL"),
    "logits.dtype": (9, c.BAD_DTYPE, "logits.dtype is 9; accepted: 0 (float32)"),
    "logits.size_a": (-1, c.BAD_SIZE, "size_a is -1; accepted: 0 to"),
    "logits.size_c": (2**31, c.BAD_SIZE, "size_c is 2147483648"),
    "logits.vocabulary": (0, c.BAD_SIZE, "vocabulary is 0; accepted: 1 to"),
    "logits.stride_a": (-5, c.BAD_STRIDE, "strides -5, 50"),
    "labels.data": (None, c.NULL_POINTER, "labels is NULL"),
    "labels.bytes": (2, c.BAD_DTYPE, "labels.bytes is 2; accepted: 4 (int32), 8 (int64)"),
    "scaling.softcap": (-1.0, c.BAD_VALUE, "softcap is -1"),
    "scaling.logit_scale": (float("nan"), c.BAD_VALUE, "logit_scale is nan"),
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("function", [Call.forward, Call.backward], ids=["forward", "backward"])
def test_bad_arguments_are_refused(library, function, field):
    value, code, text = REFUSED[field]
    call = Call()
    owner, name = field.split(".")
    setattr(getattr(call, owner), name, value)
    assert function(call, library) == code
    assert text in message(library)


def test_misaligned_pointers_are_refused(library):
    call = Call()
    call.logits.data = call.address + 1
    assert call.forward(library) == c.BAD_ALIGNMENT
    assert "accepted: a multiple of 2 bytes" in message(library)
    call = Call()
    call.statistics.nll = call.address + 2
    assert call.forward(library) == c.BAD_ALIGNMENT
    assert message(library).startswith("nll is at")


def test_null_structures_are_refused(library):
    call = Call()
    references = [ctypes.byref(x) for x in (call.logits, call.labels, call.statistics)]
    for missing, name in enumerate(("logits", "labels", "out")):
        given = [None if i == missing else x for i, x in enumerate(references)]
        code = library.qt_cuda_token_stats(given[0], given[1], call.scaling, given[2], None, 0, call.target)
        assert code == c.NULL_POINTER
        assert message(library).startswith(f"{name} is NULL")


def test_gradients_must_match_the_logits(library):
    call = Call()
    call.grad.dtype = c.FLOAT32
    assert call.backward(library) == c.BAD_DTYPE
    call = Call()
    call.grad.vocabulary = 49
    assert call.backward(library) == c.BAD_SIZE
    assert "grad is [2, 3, 49]; accepted: the logits' [2, 3, 50]" in message(library)


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
