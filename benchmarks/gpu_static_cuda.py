"""The CUDA C++ kernels as entries of `gpu_static.py`'s table."""

from collections.abc import Iterator

from benchmarks import compile_cuda
from benchmarks.gpu_kernels import Entry

LIBRARY = "qtuning-kernels, CUDA C++"


def entries(arch: str, divisible: bool) -> Iterator[Entry]:
    """Every kernel for bfloat16 logits without a softcap.

    One instance serves every vocabulary and stride, so that the rows for odd ones show the same code.

    Raises:
        ImportError: there is no nvcc.
    """
    if not arch.startswith("sm_"):
        return
    if compile_cuda.nvcc() is None:
        raise ImportError("there is no nvcc")
    compiler = f"nvcc {compile_cuda.nvcc_version()}"
    for name, kernel in compile_cuda.table(arch):
        per_logit = name.startswith("token_stats")
        if divisible or per_logit:
            # where alignments differ a logit is loaded twice, so that loads do not count logits
            countable = per_logit and "other alignment" not in name
            yield Entry(LIBRARY, name, None, {}, compiled=kernel, compiler=compiler, matrix=not countable)
