"""The settings of Q-Tuning: one frozen dataclass, validated on creation."""

from dataclasses import dataclass

from qtuning_kernels.arguments import check_choice, check_count, check_flag, check_ratio, check_weight

TRIAGE_METHODS = ("rank", "bisect")
TOKEN_ORDERS = ("keep_low", "keep_high")
NEIGHBOR_REDUCTIONS = ("sum", "mean")
TOKEN_MODES = ("mask", "drop")
MATMULS = ("auto", "default", "onednn")
SCORE_DTYPES = ("auto", "float32", "bfloat16", "model")
SELECTION_SCOPES = ("global", "rank")


@dataclass(frozen=True, kw_only=True)
class QTuningConfig:
    """How samples and tokens are pruned, and how a training step goes about it.

    The defaults are the paper's smallest budget, 12.5 % of the samples and 50 % of the tokens.

    Args:
        sample_ratio: share of a selection pool that is kept, in (0, 1] (decision a).
        token_ratio: share of the tokens of a kept Q2 sample that is trained on, in (0, 1] (decision e).
        neighbor_weight: λ in [0, 1], how much the two neighbours count in a token's score (eq. 7).
        token_mode: what becomes of pruned tokens: ``"mask"`` takes them out of the loss, ``"drop"`` out of
            the sequence too.
        token_order: ``"keep_low"`` scores, or ``"keep_high"`` for the reversed ablation (decision e).
        neighbor_reduction: the neighbours' ``"sum"`` or ``"mean"`` (decision g).
        triage_method: ``"rank"``, the closed form, or ``"bisect"``, the paper's loop.
        micro_batch_tokens: most tokens, prompts and padding included, in one training forward and backward. A
            longer sample goes alone.
        score_batch_tokens: the same for one forward of the scoring pass, which keeps no graph.
        score_dtype: precision of the scoring pass: ``"model"`` as the weights are, ``"float32"``,
            ``"bfloat16"``, or ``"auto"``, which takes bfloat16 for a float32 model on a CPU where a measurement at
            the start says that it is faster.
        matmul: who multiplies float32 matrices on a CPU: ``"default"`` as PyTorch is set, ``"onednn"``, or
            ``"auto"``, the faster one of those as exact as float32, by a measurement at the start. A resumed run
            keeps what was chosen; two runs that shall agree bit by bit fix `matmul` and `score_dtype`.
        rescore_every: epochs from one scoring of a sample to the next. Above 1 the recorded scores of an
            earlier epoch select in between.
        selection_scope: with several processes, whether the pools of all are one (``"global"``), or each
            process selects from its own (``"rank"``).
        record: write one row per sample and step next to the checkpoints.
        record_tokens: number of samples per run, a seeded choice, whose tokens are recorded one by one.

    Raises:
        TypeError, ValueError: a value that is not accepted, or two that exclude each other; the message names
            them.
    """

    sample_ratio: float = 0.125
    token_ratio: float = 0.5
    neighbor_weight: float = 0.5
    token_mode: str = "mask"
    token_order: str = "keep_low"
    neighbor_reduction: str = "sum"
    triage_method: str = "rank"
    micro_batch_tokens: int = 4096
    score_batch_tokens: int = 8192
    score_dtype: str = "auto"
    matmul: str = "auto"
    rescore_every: int = 1
    selection_scope: str = "global"
    record: bool = True
    record_tokens: int = 64

    def __post_init__(self):
        check_ratio("sample_ratio", self.sample_ratio)
        check_ratio("token_ratio", self.token_ratio)
        check_weight("neighbor_weight", self.neighbor_weight)
        check_choice("token_mode", self.token_mode, TOKEN_MODES)
        check_choice("token_order", self.token_order, TOKEN_ORDERS)
        check_choice("neighbor_reduction", self.neighbor_reduction, NEIGHBOR_REDUCTIONS)
        check_choice("triage_method", self.triage_method, TRIAGE_METHODS)
        check_count("micro_batch_tokens", self.micro_batch_tokens, 1)
        check_count("score_batch_tokens", self.score_batch_tokens, 1)
        check_choice("score_dtype", self.score_dtype, SCORE_DTYPES)
        check_choice("matmul", self.matmul, MATMULS)
        check_count("rescore_every", self.rescore_every, 1)
        check_choice("selection_scope", self.selection_scope, SELECTION_SCOPES)
        check_flag("record", self.record)
        check_count("record_tokens", self.record_tokens, 0)
