"""Which backend serves, and that nothing is replaced silently."""

import sys
import warnings

import pytest

import qtuning_kernels as qk
from qtuning_kernels.kernels import dispatch as ops
from qtuning_kernels.kernels import reference


def test_forced_backend(monkeypatch):
    monkeypatch.setenv("QTUNING_BACKEND", "reference")
    assert qk.backend("cpu") == "reference"
    assert qk.backend("cuda") == "reference"


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("QTUNING_BACKEND", "cublas")
    with pytest.raises(ValueError, match="QTUNING_BACKEND='cublas' is not a backend; accepted: reference"):
        qk.backend()


def test_backend_that_does_not_serve_the_device(monkeypatch):
    if reason := ops.unavailable_reason("native"):
        pytest.skip(reason)
    monkeypatch.setenv("QTUNING_BACKEND", "native")
    with pytest.raises(qk.BackendUnavailableError, match="does not serve device 'cuda'; accepted"):
        qk.backend("cuda")


@pytest.mark.filterwarnings("ignore:.*slow 'reference' backend")
@pytest.mark.parametrize("there", [True, False])
def test_other_gpus(monkeypatch, there):
    """Intel's are served by Triton where it is installed, Apple's by the reference, which is no reason to warn."""
    pick = ops._choose.__wrapped__
    monkeypatch.setattr(ops, "unavailable_reason", lambda name: None if there or name == "reference" else "not there")
    assert pick("xpu", "") == ("triton" if there else "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("mps", "") == "reference"


@pytest.fixture
def no_native(monkeypatch):
    """A process in which the native extension was not built."""

    def module(name):
        return qk.BackendUnavailableError("not built: no compiler") if name == "native" else reference

    monkeypatch.setattr(ops, "_module", module)
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


def test_missing_backend_is_an_error_when_forced(no_native, monkeypatch):
    monkeypatch.setenv("QTUNING_BACKEND", "native")
    with pytest.raises(qk.BackendUnavailableError, match="QTUNING_BACKEND=native cannot be used: not built"):
        qk.backend("cpu")


def test_missing_backend_is_said_when_not_forced(no_native, monkeypatch):
    monkeypatch.delenv("QTUNING_BACKEND", raising=False)
    with pytest.warns(UserWarning, match="slow 'reference' backend, because 'native' is not available"):
        assert qk.backend("cpu") == "reference"


def test_every_backend_has_every_operator():
    for name in ops.BACKENDS:
        if ops.unavailable_reason(name) is None:
            assert all(callable(getattr(ops._module(name), operator)) for operator in ops.SCHEMAS)


def test_import_does_not_pull_in_the_trainer():
    """A kernel user pays for torch only."""
    import subprocess

    code = "import sys, qtuning_kernels; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
