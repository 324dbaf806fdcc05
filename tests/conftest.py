import contextlib
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by PyTorch, here and in the processes that tests launch

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # read by Triton when a kernel is defined: its backend then runs on CPU tensors, in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from qtuning_kernels.kernels.dispatch import BACKENDS, unavailable_reason
from tests.interpreter import speed_up_interpreter

from . import cuda_emulator

hypothesis.settings.register_profile("any speed", deadline=None)  # by default an example of 0.2 s is a failure
hypothesis.settings.load_profile("any speed")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--backend", action="append", choices=BACKENDS, help="only these backends (repeatable)")


# seconds each where a program's operations are interpreted one by one, or its threads emulated
EMULATED_SLOWLY = ("test_gradcheck", "test_many_chunks", "test_head_gradient_accumulates_in_float32")


def _slow_when_emulated(item) -> bool:
    """bfloat16 stays for GPT-2's vocabulary: two blocks of 4097 logits do not fill its loop."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") not in ON_GPU:
        return False
    large = 50257 in (parameters.get("vocabulary"), *parameters.get("shape", ()))
    return item.originalname in EMULATED_SLOWLY or (large and parameters["dtype"] != torch.bfloat16)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if _slow_when_emulated(item):
            item.add_marker(pytest.mark.slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


# backends that serve a GPU: run on its tensors where there is one, and interpreted or emulated on the CPU elsewhere
ON_GPU = ("triton", "cuda")


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    names = metafunc.config.getoption("--backend") or BACKENDS
    on_gpu = [pytest.param(f"{n}@gpu", marks=pytest.mark.gpu) for n in names if n in ON_GPU]
    metafunc.parametrize("backend", [*names, *on_gpu], indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    """Every operator call of the test is served by this backend; ``NAME@gpu`` makes all tensors CUDA tensors."""
    name, _, device = request.param.partition("@")
    if name in ON_GPU and not device and torch.cuda.is_available():
        pytest.skip(f"backend {name}: its tests run on the GPU that is here")
    if name == "cuda" and not device:
        cuda_emulator.serve_cpu(monkeypatch)
    if reason := unavailable_reason(name):
        pytest.skip(f"backend {name}: {reason}")
    if name == "triton" and not device and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("backend triton on CPU tensors needs TRITON_INTERPRET=1")
    if name == "triton" and not device:
        speed_up_interpreter()
    monkeypatch.setenv("QTUNING_BACKEND", name)
    with torch.device("cuda") if device else contextlib.nullcontext():
        yield name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Matrices of 32 columns are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
