"""Which kernels `gpu_static.py` compiles, with the arguments that their launchers would give: ours and the peers'."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.machine_code import Kernel

VOCABULARY = {True: 128256, False: 50257}  # divisible by 16, and odd
HIDDEN = 4096


@dataclass
class Entry:
    """A kernel as its launcher calls it for bfloat16 logits or hidden states."""

    library: str
    name: str
    fn: Any
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    tile: int | None = None  # logits of a block, for kernels without a loop over them
    passes: int = 1  # loops over the logits
    matrix: bool = False
    compiled: Kernel | None = None  # by another compiler than Triton


def _split(config: dict[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A launch configuration as (constants of the kernel, options of the compiler)."""
    options = {k: v for k, v in config.items() if k in ("num_warps", "num_stages", "maxnreg")}
    return {k: v for k, v in config.items() if k not in options}, {**options, "enable_fp_fusion": True}


def ours(arch: str, divisible: bool) -> Iterator[Entry]:
    """Every kernel of this package."""
    modules = {
        name: importlib.import_module(f"qtuning_kernels.triton_kernels.{name}")
        for name in (
            "token_stats",
            "token_stats_backward",
            "linear_token_stats",
            "linear_token_stats_backward",
            "gemm",
            "segment_means",
            "select_tokens",
            "triage_rank",
            "row_math",
        )
    }
    scale = modules["row_math"].scaling(1.0, None)
    vocabulary = VOCABULARY[divisible]
    size, stride = ("i32:16", "i64:16") if divisible else ("i32", "i64")
    logits, labels, stat = "*bf16:16", "*i64:16", "*fp32:16"
    stats = dict.fromkeys(("nll_ptr", "entropy_ptr", "row_max_ptr", "log_sum_ptr"), stat)
    row = {"shift": "i32:16", "stride_a": stride, "stride_c": stride, "size_c": "i32", "V": size, "ignore_index": "i32"}

    constants, options = _split(modules["token_stats"].forward_config(vocabulary, 2, arch))
    arguments = {"logits_ptr": logits, "labels_ptr": labels, **stats, **row, **scale, "VECTOR": 8, **constants}
    yield Entry("qtuning-kernels", "token_stats", modules["token_stats"].token_stats_kernel, arguments, options)

    constants, options = _split(modules["token_stats_backward"].backward_config(vocabulary, 2, arch))
    pointers = dict.fromkeys(("grad_nll_ptr", "grad_entropy_ptr", "grad_lse_ptr"), stat)
    for name, entropy in (("token_stats_backward, nll", False), ("token_stats_backward, all", True)):
        given = {"HAS_NLL": True, "HAS_ENTROPY": entropy, "HAS_LSE": entropy}
        if not entropy:
            pointers = {**pointers, "grad_entropy_ptr": None, "grad_lse_ptr": None}
        else:
            pointers = dict.fromkeys(pointers, stat)
        arguments = {
            "logits_ptr": logits,
            "grad_ptr": logits,
            "labels_ptr": labels,
            **stats,
            **pointers,
            "count_ptr": None,
            **row,
            "grad_shift": "i32:16",
            "grad_stride_a": stride,
            "grad_stride_c": stride,
            **scale,
            **given,
            "SLOPE": 1.0,
            "HAS_COUNT": False,
            "VECTOR": 8,
            "SAME_LEAD": True,
            **constants,
        }
        kernel = modules["token_stats_backward"].token_stats_backward_kernel
        yield Entry("qtuning-kernels", name, kernel, arguments, options)

    linear = modules["linear_token_stats"]
    constants, options = _split(linear.tile_config(8192, HIDDEN, 2, arch))
    shapes = {"N": "i32:16", "V": size, "H": "i32:16", "EVEN_H": True, "PRECISION": "ieee"}
    operands = {"hidden_ptr": logits, "weight_ptr": logits, "bias_ptr": None, "HAS_BIAS": False, "labels_ptr": labels}
    for name, storing in (("linear_token_stats", False), ("linear_token_stats, logits stored", True)):
        arguments = {
            **operands,
            **shapes,
            **scale,
            "partial_ptr": stat,
            "x_label_ptr": stat,
            "columns_per_split": "i32:16",
            "logits_ptr": logits if storing else None,
            "HAS_LOGITS": storing,
            "stride": "i32:16" if storing else 0,
            "count_ptr": "*i32:16" if storing else None,
            "HAS_COUNT": storing,
            **constants,
        }
        limit = {k: v for k, v in options.items() if not (storing and k == "maxnreg")}
        yield Entry("qtuning-kernels", name, linear.linear_token_stats_kernel, arguments, limit, matrix=True)
    combine = {"partial_ptr": stat, "x_label_ptr": stat, "labels_ptr": labels, **stats, "N": "i32:16", "V": size}
    combine |= {"splits": "i32", "ignore_index": "i32", "UNIT": scale["UNIT"], "SPLITS": 32, "BLOCK": 32}
    yield Entry(
        "qtuning-kernels", "combine", linear.combine_kernel, combine, {"num_warps": 4, "enable_fp_fusion": True}
    )

    backward = modules["linear_token_stats_backward"].linear_gradient_kernel
    pointers = dict.fromkeys(("grad_nll_ptr", "grad_entropy_ptr", "grad_lse_ptr"), stat)
    arguments = {
        **operands,
        **shapes,
        **scale,
        **stats,
        **pointers,
        "count_ptr": "*i32:16",
        "out_ptr": logits,
        "first_chunk_column": "i32:16",
        "last_chunk_column": size,
        "stride": "i32:16",
        "SLOPE": 1.0,
        "HAS_NLL": True,
        "HAS_ENTROPY": True,
        "HAS_LSE": True,
        **constants,
    }
    yield Entry("qtuning-kernels", "linear_gradient", backward, arguments, options, matrix=True)

    gemm = modules["gemm"]
    constants, options = _split(gemm.gemm_config(8192, HIDDEN, 4096, 2, arch))
    for name, by_rows in (("gemm, gradient of hidden", True), ("gemm, gradient of weight", False)):
        arguments = {
            "a_ptr": logits,
            "b_ptr": logits,
            "c_ptr": stat,
            "count_ptr": "*i32:16",
            "M": "i32:16",
            "N": "i32:16",
            "K": size,
            "stride_am": "i32:16" if by_rows else 1,
            "stride_ak": 1 if by_rows else "i32:16",
            "stride_bk": "i32:16",
            "stride_cm": "i32:16",
            "LIMIT_M": by_rows,
            "ADD": True,
            "PADDED": True,
            "PRECISION": "ieee",
            "dtype": importlib.import_module("triton.language").float32,
            **constants,
        }
        yield Entry("qtuning-kernels", name, gemm.gemm_kernel, arguments, options, matrix=True)
    sums = {"x_ptr": logits, "out_ptr": stat, "count_ptr": "*i32:16", "rows": "i32:16", "columns": size}
    sums |= {"stride": "i32:16", "ADD": True, "BLOCK_R": 32, "BLOCK_C": 128}
    yield Entry("qtuning-kernels", "column_sums", gemm.column_sums_kernel, sums, {"num_warps": 4})

    if divisible:  # the policy does not know the vocabulary
        yield from policy(modules)


def policy(modules: dict[str, Any]) -> Iterator[Entry]:
    off = {"num_warps": 4, "enable_fp_fusion": False}
    stat, integer, cu_seqlens = "*fp32:16", "*i32:16", "*i32:16"
    arguments = {"values_ptr": stat, "cu_seqlens_ptr": cu_seqlens, "means_ptr": stat, "stride": "i32:16", "BLOCK": 512}
    yield Entry("qtuning-kernels", "segment_means", modules["segment_means"].segment_means_kernel, arguments, off)
    arguments = {"ppl_ptr": stat, "cu_seqlens_ptr": cu_seqlens, "num_keep_ptr": "*i64:16", "keys_ptr": "*u32:16"}
    arguments |= {"keep_ptr": "*i1:16", "OWN": 0.5, "AROUND": 0.5, "KEEP_HIGH": False, "NEIGHBOR_MEAN": False}
    arguments |= {"PAIRS": 128, "BLOCK": 1024}
    kernel = modules["select_tokens"].select_tokens_kernel
    yield Entry("qtuning-kernels", "select_tokens", kernel, arguments, {**off, "num_warps": 8})
    triage = modules["triage_rank"]
    blocks = {"B": "i32", "BLOCK": 16, "OTHERS": 128}
    shared = {"keys_ptr": integer, "score_ptr": stat, "corner_ptr": "*i8:16", "count_ptr": integer, **blocks}
    shared |= {"keep_ptr": "*i1:16", "last_key_ptr": integer}
    arguments = {**shared, "ppl_ptr": stat, "entropy_ptr": stat}
    yield Entry("qtuning-kernels", "triage_rank, keys", triage.keys_kernel, arguments, off)
    yield Entry("qtuning-kernels", "triage_rank, rank", triage.rank_kernel, {**shared, "k": "i32"}, off)
    arguments = {**shared, "quadrant_ptr": "*i8:16", "role_ptr": "*i8:16", "kept_index_ptr": "*i64:16"}
    arguments |= {"supplemented_ptr": "*i1:16", "alpha_ptr": stat}
    yield Entry("qtuning-kernels", "triage_rank, place", triage.place_kernel, arguments, off)


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


def cut_cross_entropy(arch: str, divisible: bool) -> Iterator[Entry]:
    module = importlib.import_module("cut_cross_entropy.cce_lse_forward")
    size = "i32:16" if divisible else "i32"
    arguments = {
        "E": "*bf16:16",
        "C": "*bf16:16",
        "LSE": "*fp32:16",
        "LA": None,
        "Locks": "*i32:16",
        "Valids": None,
        "softcap": None,
        "B": "i32:16",
        "V": size,
        "D": "i32:16",
        "stride_eb": "i32:16",
        "stride_ed": 1,
        "stride_cv": "i32:16",
        "stride_cd": 1,
        "stride_lse_b": 1,
        "stride_vb": 1,
        "num_locks": "i32",
        "B_BIN": "i32",
        "HAS_VALIDS": False,
        "BLOCK_B": 256,
        "BLOCK_V": 128,
        "BLOCK_D": 32,
        "GROUP_B": 8,
        "EVEN_D": True,
        "HAS_SOFTCAP": False,
        "HAS_LA": False,
        "DOT_PRECISION": "ieee",
    }
    options = {"num_warps": 8, "num_stages": 3}
    kernel = module._cce_lse_forward_kernel
    yield Entry("cut-cross-entropy", "linear forward", kernel, arguments, options, matrix=True)


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


LIBRARIES: dict[str, Callable[[str, bool], Iterator[Entry]]] = {
    "qtuning-kernels": ours,
    "liger-kernel": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "flash-linear-attention": flash_linear_attention,
}
