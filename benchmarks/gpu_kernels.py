"""Which kernels `gpu_static.py` compiles, with the arguments that their launchers would give: ours and the peers'."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

from benchmarks.machine_code import Kernel
from qtuning_kernels.kernels.contract import Scaling

VOCABULARY = {True: 128256, False: 50257}  # divisible by 16, and odd


@dataclass
class Entry:
    """A kernel as its launcher calls it for bfloat16 logits."""

    library: str
    name: str
    fn: Any
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    tile: int | None = None  # logits of a block, for kernels without a loop over them
    passes: int = 1  # loops over the logits
    matrix: bool = False  # what a loop loads does not tell how many logits it works on
    compiled: Kernel | None = None  # by another compiler than Triton
    compiler: str = f"triton {metadata.version('triton')}"


OURS = "qtuning-kernels"
LOGITS, LABELS, STAT = "*bf16:16", "*i64:16", "*fp32:16"
STATS = dict.fromkeys(("nll_ptr", "entropy_ptr", "row_max_ptr", "log_sum_ptr"), STAT)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"qtuning_kernels.triton_kernels.{name}")


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A launch configuration as (constants of the kernel, options of the compiler)."""
    options = {k: v for k, v in config.items() if k in ("num_warps", "num_stages")}
    return {k: v for k, v in config.items() if k not in options}, {**options, "enable_fp_fusion": True}


def _rows(vocabulary: int, softcap: float | None) -> dict[str, Any]:
    """Where the rows lie, and their scaling."""
    size, stride = ("i32:16", "i64:16") if vocabulary % 16 == 0 else ("i32", "i64")
    rows = {"shift": "i32:16", "stride_a": stride, "stride_c": stride, "size_c": "i32", "V": size}
    return rows | {"ignore_index": "i32", **_module("row_math").scaling_constants(Scaling(softcap=softcap))}


def token_stats(arch: str, vocabulary: int, softcap: float | None = None) -> Entry:
    module = _module("token_stats")
    constants, options = _split(module.forward_config(vocabulary, 2, arch))
    arguments = {"logits_ptr": LOGITS, "labels_ptr": LABELS, **STATS, **_rows(vocabulary, softcap), "VECTOR": 8}
    return Entry(OURS, "token_stats", module.token_stats_kernel, arguments | constants, options)


def token_stats_backward(
    arch: str,
    vocabulary: int,
    upstream: tuple[str, ...],
    softcap: float | None = None,
    same_lead: bool = True,
    dtype: str = "bf16",
    name: str = "",
) -> Entry:
    """The backward for these upstream gradients; in place unless the rows lie differently (`same_lead`)."""
    module = _module("token_stats_backward")
    itemsize = 4 if dtype == "fp32" else 2
    constants, options = _split(module.backward_config(vocabulary, itemsize, arch))
    rows, logits = _rows(vocabulary, softcap), f"*{dtype}:16"
    arguments = {"logits_ptr": logits, "grad_ptr": logits, "labels_ptr": LABELS, **STATS, **rows}
    arguments |= {"grad_shift": "i32:16", "grad_stride_a": rows["stride_a"], "grad_stride_c": rows["stride_c"]}
    for x in ("nll", "entropy", "lse"):
        arguments |= {f"grad_{x}_ptr": STAT if x in upstream else None, f"HAS_{x.upper()}": x in upstream}
    arguments |= {"SLOPE": 1.0, "VECTOR": 16 // itemsize, "SAME_LEAD": same_lead, **constants}
    name = name or f"token_stats_backward, {' '.join(upstream)}"
    return Entry(OURS, name, module.token_stats_backward_kernel, arguments, options)


def ours(arch: str, divisible: bool) -> Iterator[Entry]:
    """Every kernel of this package."""
    vocabulary = VOCABULARY[divisible]
    yield token_stats(arch, vocabulary)
    yield token_stats_backward(arch, vocabulary, ("nll",))
    yield token_stats_backward(arch, vocabulary, ("nll", "entropy", "lse"), name="token_stats_backward, all")


def liger(arch: str, divisible: bool) -> Iterator[Entry]:
    module = importlib.import_module("liger_kernel.ops.cross_entropy")
    size, stat = "i32:16" if divisible else "i32", "*fp32:16"
    arguments = {
        "X_ptr": "*bf16:16",
        "X_stride": size,
        "Y_ptr": "*i64:16",
        "Y_stride": 1,
        "weight_ptr": None,
        "loss_ptr": stat,
        "z_loss_ptr": None,
        "loss_stride": 1,
        "token_accuracy_ptr": None,
        "token_accuracy_stride": "i32:16",
        "predicted_tokens_ptr": None,
        "predicted_tokens_stride": "i32:16",
        "n_cols": size,
        "n_non_ignore": "i32",
        "sum_non_ignore_weight": "i32",
        "weight_sum": "fp32",
        "ignore_index": "i32",
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "softcap": None,
        "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False,
        "RETURN_PREDICTED_TOKENS": False,
        "BLOCK_SIZE": 32768,
        "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False,
        "HAS_GRADIENTS": True,
    }
    warps = 16 if arch.startswith("gfx") else 8 if arch == "sm_100" else 32
    yield Entry(
        "liger-kernel",
        "cross-entropy with gradient",
        module.liger_cross_entropy_kernel,
        arguments,
        {"num_warps": warps},
        passes=2,
    )


def flash_linear_attention(arch: str, divisible: bool) -> Iterator[Entry]:
    module = importlib.import_module("fla.modules.fused_cross_entropy.ops")
    vocabulary, stat = VOCABULARY[divisible], "*fp32:16"
    # the backward only: the forward takes 65536 logits as one tile, which ptxas works on for many minutes
    row = {"logits": "*bf16:16", "target": "*i64:16", "lse": stat, "label_smoothing": 0.0, "logit_scale": 1.0}
    row |= {"s_logits": "i32:16" if divisible else "i32", "lse_square_scale": 0.0, "logit_softcapping": None}
    row |= {"ignore_index": -100, "V": vocabulary, "V_TOTAL": vocabulary, "V_START": 0, "N": "i32"}
    backward = {**row, "dloss": stat, "dlogits": "*bf16:16", "s_dloss": 1, "s_dlogits": row["s_logits"], "BV": 4096}
    name = "cross-entropy backward"
    yield Entry("flash-linear-attention", name, module.cross_entropy_bwd_kernel, backward, {"num_warps": 8}, tile=4096)


def trl(arch: str, divisible: bool) -> Iterator[Entry]:
    """The log-probability and the entropy of logits [N, V], and their gradient."""
    module = importlib.import_module("trl.kernels.logprob_entropy")
    tile, row = module._BLOCK_SIZE, "i32:16" if divisible else "i32"
    arguments = {"logits_ptr": LOGITS, "index_ptr": LABELS, "row_mask_ptr": LABELS, "log_z_ptr": STAT}
    arguments |= {"logprobs_ptr": STAT, "entropy_ptr": STAT, "expected_logit_ptr": STAT}
    arguments |= {"logits_batch_stride": "i32:16", "logits_row_stride": row, "index_batch_stride": "i32:16"}
    arguments |= {"index_row_stride": 1, "mask_batch_stride": "i32:16", "mask_row_stride": "i32:16"}
    arguments |= {"n_cols": VOCABULARY[divisible], "rows_per_batch": "i32:16", "TEMPERATURE": 1.0, "HAS_MASK": False}
    arguments |= {"BLOCK_SIZE": tile, "grad_logits_ptr": LOGITS, "grad_logits_row_stride": row}
    arguments |= {"grad_logits_batch_stride": "i32:16", "grad_logprobs_ptr": STAT, "grad_entropy_ptr": STAT}
    arguments |= {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True}
    yield Entry("trl", "log-probability and entropy", module._forward_kernel, arguments)
    yield Entry("trl", "their gradient", module._backward_kernel, arguments, tile=tile)


LIBRARIES: dict[str, Callable[[str, bool], Iterator[Entry]]] = {
    OURS: ours,
    "liger-kernel": liger,
    "flash-linear-attention": flash_linear_attention,
    "trl": trl,
}
