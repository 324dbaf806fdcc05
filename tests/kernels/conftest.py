import pytest
import torch

from qtuning_kernels.kernels.linear_chunks import _Head


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Uninitialised memory holds NaN (integers their largest value), so that an entry which nobody wrote shows.

    It reaches every allocation of ATen: `torch.empty`, `new_empty` and `empty_like`, and those of C++ operators. A test
    that asks for gigabytes which it never touches switches `fill_uninitialized_memory` off. The workspace of logits,
    which a thread keeps between calls, is poisoned at each of them.
    """
    workspace = _Head.workspace
    monkeypatch.setattr(_Head, "workspace", lambda head, elements: workspace(head, elements).fill_(torch.nan))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
