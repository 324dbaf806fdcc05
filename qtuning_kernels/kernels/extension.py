"""Loads a compiled extension of this package, or says why it is not there and how to get it."""

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from qtuning_kernels.kernels.contract import BackendUnavailableError

_SOURCE = Path(__file__).parents[2]  # the repository, where the package is installed from it in place
_WHAT = f"--editable '{_SOURCE}'" if (_SOURCE / "setup.py").exists() else "."
_INSTALL = f"{sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps {_WHAT}"


def load_extension(module: str, record: str, needs: str) -> None:
    """Load ``qtuning_kernels.<module>``, whose operators register themselves.

    Args:
        module: name of the extension module.
        record: name of the file beside the package in which setup.py noted what it built, or why not.
        needs: what a build of it takes, for the message.

    Raises:
        BackendUnavailableError: it was left out, was compiled for another PyTorch, or does not load.
    """
    path = Path(__file__).parents[1] / record
    build: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"built": False, "reason": None}
    how = f"with {needs} there, type in the folder of the sources: {_INSTALL}"
    if not build["built"]:
        reason = build["reason"] or "it was never compiled"
        raise BackendUnavailableError(f"the extension qtuning_kernels.{module} was left out: {reason}; {how}")
    # PyTorch's C++ interface changes between minor versions, and an extension for another one crashes
    built_for, running = (version.split("+")[0].rsplit(".", 1)[0] for version in (build["torch"], torch.__version__))
    if built_for != running:
        raise BackendUnavailableError(
            f"the extension qtuning_kernels.{module} was compiled for PyTorch {build['torch']}, "
            f"and this is {torch.__version__}; {how}"
        )
    try:
        torch.ops.load_library(path.with_name(f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"))
    except OSError as error:
        raise BackendUnavailableError(
            f"the extension qtuning_kernels.{module} does not load: {error}; {how}"
        ) from error
