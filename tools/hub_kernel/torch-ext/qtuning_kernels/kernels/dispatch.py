"""The row operators, which Triton alone serves here."""

from .. import triton_kernels as row_operators

__all__ = ["row_operators"]
