import pytest


@pytest.fixture(autouse=True)
def _reference(request, monkeypatch):
    """Properties are shown on the reference; `test_policy_operators.py` ties the other backends to it."""
    if "backend" not in request.fixturenames:
        monkeypatch.setenv("QTUNING_BACKEND", "reference")
