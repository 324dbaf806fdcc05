"""The CUDA C++ backend for CUDA tensors: the kernels of `csrc/cuda`, compiled when the package was installed.

No compiler at run time and no warm-up. The operators with a matrix product (``linear_*``) have no CUDA C++ kernel and
are the Triton backend's; without the package triton they raise `BackendUnavailableError` when they are called, and the
others still serve.

``QTUNING_CUDA_EMULATOR`` names a library in which the same kernels and the same binding run on CPU tensors
(tests/cuda_emulator); it is then loaded instead.
"""

import json
import os
from pathlib import Path

import torch

from qtuning_kernels.kernels.dispatch import BackendUnavailableError

_RECORD = Path(__file__).parents[1] / "cuda_build.json"  # written by setup.py
_HOW = (
    "with a CUDA build of PyTorch and nvcc on the machine: QTUNING_CUDA=1 pip install --no-build-isolation "
    "--force-reinstall --no-deps qtuning-kernels"
)


def _load() -> None:
    if emulator := os.environ.get("QTUNING_CUDA_EMULATOR"):
        torch.ops.load_library(emulator)
        return
    record = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"built": False, "reason": None}
    if not record["built"]:
        reason = record["reason"] or "it was never compiled"
        raise BackendUnavailableError(f"the extension qtuning_kernels._cuda was left out: {reason}; get it {_HOW}")
    # PyTorch's C++ interface changes between minor versions, and an older extension crashes instead of failing
    built_for, running = (v.split("+")[0].rsplit(".", 1)[0] for v in (record["torch"], torch.__version__))
    if built_for != running:
        raise BackendUnavailableError(
            f"the extension qtuning_kernels._cuda was compiled for PyTorch {record['torch']}, "
            f"and this is {torch.__version__}; install again {_HOW}"
        )
    try:
        import qtuning_kernels._cuda  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the extension qtuning_kernels._cuda does not load: {error}; install again {_HOW}"
        ) from error


_load()
_operators = torch.ops.qtuning_cuda

token_stats = _operators.token_stats.default
token_stats_backward = _operators.token_stats_backward.default
token_stats_backward_ = _operators.token_stats_backward_.default
segment_means = _operators.segment_means.default
triage_rank = _operators.triage_rank.default
select_tokens = _operators.select_tokens.default

try:
    from qtuning_kernels.triton_kernels import (
        linear_cross_entropy,
        linear_token_stats,
        linear_token_stats_backward,
    )
except BackendUnavailableError as error:
    _without_triton = str(error)

    def _needs_triton(*_):
        raise BackendUnavailableError(
            f"the cuda backend takes its linear operators from the triton backend, but {_without_triton}"
        )

    linear_cross_entropy = linear_token_stats = linear_token_stats_backward = _needs_triton
