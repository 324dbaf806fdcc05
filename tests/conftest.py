import os

import pytest
import torch

if not torch.cuda.is_available():
    # read by Triton when a kernel is defined: its backend then runs on CPU tensors, in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from qtuning_kernels.ops import BACKENDS, unavailable_reason

from .interpreter import quicken


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--backend", action="append", choices=BACKENDS, help="only these backends (repeatable)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or BACKENDS, indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    """Every operator call of the test is served by this backend."""
    if reason := unavailable_reason(request.param):
        pytest.skip(f"backend {request.param}: {reason}")
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("backend triton on CPU tensors needs TRITON_INTERPRET=1")
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        quicken()
    monkeypatch.setenv("QTUNING_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
