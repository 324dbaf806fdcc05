"""Compiles a Triton kernel for a GPU that is not there, as the just-in-time path would specialise it."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import Kernel, read_amdgcn, read_cubin

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


def compile_kernel(fn: Any, arch: str, arguments: dict[str, Any], **options: Any) -> Kernel:
    """Compile `fn` for `arch` and read its machine code.

    Args:
        fn: a ``@triton.jit`` function, autotuned or with heuristics or not, of this package or of another one.
        arch: one of `TARGETS`.
        arguments: per parameter: a type ("*bf16", "i64", "fp32"), with ":16" behind it where the value divides by
            16 and ":1" where it is 1 (the just-in-time path would make it a constant), or a constant.
        options: num_warps, num_stages, enable_fp_fusion and the like.

    Returns:
        The kernel's resources and loops; spills, registers and shared memory included.
    """
    while not isinstance(fn, JITFunction):
        fn = fn.fn
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        value = arguments[name]
        is_type = isinstance(value, str) and value.partition(":")[0].lstrip("*") in _TYPES
        if fn.params[index].is_constexpr or not is_type:
            signature[name], constants[name] = "constexpr", value
            continue
        kind, _, divisor = value.partition(":")
        signature[name] = kind
        if divisor == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=TARGETS[arch], options=options)
    threads = built.metadata.num_warps * TARGETS[arch].warp_size
    if "amdgcn" in built.asm:
        return read_amdgcn(built.asm["amdgcn"], arch, threads, built.metadata.shared)
    return read_cubin(built.asm["cubin"], arch, threads, built.metadata.shared)[0]


_TYPES = {"bf16", "fp16", "fp32", "fp64", "i1", "i8", "i16", "i32", "i64", "u8", "u32", "u64"}
