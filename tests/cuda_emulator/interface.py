"""csrc/cuda/qtuning_cuda.h for ctypes."""

import ctypes
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

OK, BAD_ARGUMENT, CUDA_ERROR = range(3)
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)


def _struct(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Logits = _struct(
    "Logits",
    data=c_void_p,
    dtype=c_int32,
    **dict.fromkeys(("size_a", "size_c", "vocabulary", "stride_a", "stride_c"), c_int64),
)
Labels = _struct("Labels", data=c_void_p, bytes=c_int32, ignore_index=c_int64)
Scaling = _struct("Scaling", logit_scale=c_double, softcap=c_double)
Target = _struct("Target", device=c_int32, stream=c_void_p)
Statistics = _struct("Statistics", **dict.fromkeys(("nll", "entropy", "row_max", "log_sum"), c_void_p))
Upstream = _struct(
    "Upstream",
    **dict.fromkeys(("entropy", "row_max", "log_sum", "grad_nll", "grad_entropy", "grad_lse"), c_void_p),
)

FUNCTIONS = {
    "qt_cuda_token_stats_workspace": (POINTER(Logits), Target, POINTER(c_int64)),
    "qt_cuda_token_stats": (
        *(POINTER(Logits), POINTER(Labels), Scaling, POINTER(Statistics)),
        *(c_void_p, Target),
    ),
    "qt_cuda_token_stats_backward": (
        *(POINTER(Logits), POINTER(Logits), POINTER(Labels), POINTER(Upstream)),
        *(Scaling, Target),
    ),
}


def load(path: Path) -> ctypes.CDLL:
    """The library with every function's signature declared."""
    library = ctypes.CDLL(str(path))
    library.qt_cuda_error_message.restype = ctypes.c_char_p
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int32
    return library
