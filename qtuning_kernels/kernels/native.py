"""The C++ backend for CPU tensors: the functions of `csrc/`, if they were built."""

import json
from pathlib import Path

import torch

from qtuning_kernels.kernels.dispatch import BackendUnavailableError

_RECORD = Path(__file__).parents[1] / "native_build.json"  # written by setup.py
_HOW = "with a C++ compiler: pip install --no-build-isolation --force-reinstall --no-deps qtuning-kernels"


def _load() -> None:
    record = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"built": False, "reason": None}
    if not record["built"]:
        reason = record["reason"] or "it was never compiled"
        raise BackendUnavailableError(f"the extension qtuning_kernels._C was left out: {reason}; install {_HOW}")
    # PyTorch's C++ interface changes between minor versions, and an extension for another one crashes
    built_for, running = (version.split("+")[0].rsplit(".", 1)[0] for version in (record["torch"], torch.__version__))
    if built_for != running:
        raise BackendUnavailableError(
            f"the extension qtuning_kernels._C was compiled for PyTorch {record['torch']}, "
            f"and this is {torch.__version__}; install again {_HOW}"
        )
    try:
        import qtuning_kernels._C  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the extension qtuning_kernels._C does not load: {error}; install again {_HOW}"
        ) from error


_load()
_operators = torch.ops.qtuning_native

token_stats = _operators.token_stats.default
token_stats_backward = _operators.token_stats_backward.default
token_stats_backward_ = _operators.token_stats_backward_.default
linear_token_stats = _operators.linear_token_stats.default
linear_token_stats_backward = _operators.linear_token_stats_backward.default
linear_cross_entropy = _operators.linear_cross_entropy.default
segment_means = _operators.segment_means.default
triage_rank = _operators.triage_rank.default
select_tokens = _operators.select_tokens.default

vector_exp = _operators.exp.default  # float32 in and out; for tests
workspace_bytes_held = _operators.workspace_bytes_held.default  # for tests


def instruction_set() -> str:
    """The instruction set that the kernels run with here: baseline, avx2 or avx512.

    Raises:
        ValueError: ``QTUNING_CPU_ISA`` names one that this processor lacks.
    """
    return _operators.instruction_set()
