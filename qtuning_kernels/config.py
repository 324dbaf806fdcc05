"""The settings of Q-Tuning: one frozen dataclass, checked on creation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qtuning_kernels.arguments import check_choice, check_count, check_flag, check_ratio, check_weight

TRIAGE_METHODS = ("rank", "bisect")
TOKEN_ORDERS = ("keep_low", "keep_high")
NEIGHBOR_REDUCTIONS = ("sum", "mean")
MATMULS = ("auto", "default", "onednn")
# of pruning/policies/registry.py, where they are made
POLICY_NAMES = (
    *("full", "random", "longest", "entropy", "infobatch", "ppl", "ppl_reversed", "rho1", "token_cleaning", "stm"),
    *("profit", "dft", "beyond_ll", "eaft", "tailsft", "qtuning", "qtuning_residual"),
)


def check_policy(name: str, value: Any) -> None:
    """Raise unless `value` is a policy's name, ``module:object``, or something callable."""
    if isinstance(value, str) and value not in POLICY_NAMES and not all(value.partition(":")):
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(POLICY_NAMES)}, or module:object")
    if not isinstance(value, str) and not callable(value):
        raise TypeError(f"{name} is {value!r}; accepted: a name, module:object, or a Policy")


def check_options(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} is {value!r}; accepted: a mapping from names to values")


def setting(default: Any, check: Callable[..., None], *accepted: Any) -> Any:
    """A field whose values pass ``check(name, value, *accepted)``."""
    metadata = {"check": check, "accepted": accepted}
    return (
        field(default_factory=default, metadata=metadata)
        if default is dict
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True, kw_only=True)
class QTuningConfig:
    """How samples and tokens are pruned, and how a training step goes about it.

    The defaults are the paper's smallest budget, 12.5 % of the samples and 50 % of the tokens; other than there, the
    tokens with the low scores go.

    Args:
        policy: what decides: a name of ``qtuning policies``, ``module:object``, or a `Policy`.
        policy_options: its options that are no settings of this class, by name.
        sample_ratio: share of a selection pool that is kept, in (0, 1] (decision a).
        token_ratio: share of the tokens of a kept Q2 sample that is trained on, in (0, 1] (decision e).
        neighbor_weight: λ in [0, 1], how much the two neighbours count in a token's score (eq. 7).
        token_mode: ``"mask"`` takes pruned tokens out of the loss, ``"drop"`` out of the sequence too.
        token_order: tokens of ``"keep_high"`` scores stay, or of ``"keep_low"``, as in the paper (decision e).
        neighbor_reduction: a token's score takes its neighbours' ``"sum"`` or ``"mean"`` (decision g).
        triage_method: ``"rank"``, the closed form, or ``"bisect"``, the paper's loop.
        micro_batch_tokens: most tokens, prompts and padding included, in one training forward and backward. A
            longer sample goes alone.
        score_batch_tokens: most tokens, prompts and padding included, in one forward of the scoring pass.
        score_dtype: precision of the scoring pass: ``"model"`` as the weights are, ``"float32"``,
            ``"bfloat16"``, or ``"auto"``, which takes bfloat16 for a float32 model on a CPU where a measurement at
            the start says that it is faster.
        matmul: what multiplies float32 matrices on a CPU: ``"default"`` as PyTorch is set, ``"onednn"``, or
            ``"auto"``, the faster one of those as exact as float32, by a measurement at the start. A resumed run
            keeps what was chosen; two runs that shall agree bit by bit fix `matmul` and `score_dtype`.
        rescore_every: epochs from one scoring of a sample to the next. Above 1 the recorded scores of an
            earlier epoch select in between.
        selection_scope: with several processes, the pools of all are one (``"global"``), or each process
            selects from its own (``"rank"``).
        record: one row per sample and step is written next to the checkpoints.
        record_tokens: number of samples per run, a seeded choice, whose tokens are recorded one by one.

    Raises:
        TypeError, ValueError: a value that is not accepted, or two that exclude each other; the message names
            them.
    """

    policy: Any = setting("qtuning", check_policy)  # noqa: RUF009 - as the others, but for its type
    policy_options: Mapping[str, Any] = setting(dict, check_options)
    sample_ratio: float = setting(0.125, check_ratio)
    token_ratio: float = setting(0.5, check_ratio)
    neighbor_weight: float = setting(0.5, check_weight)
    token_mode: str = setting("mask", check_choice, ("mask", "drop"))
    token_order: str = setting("keep_high", check_choice, TOKEN_ORDERS)
    neighbor_reduction: str = setting("sum", check_choice, NEIGHBOR_REDUCTIONS)
    triage_method: str = setting("rank", check_choice, TRIAGE_METHODS)
    micro_batch_tokens: int = setting(4096, check_count, 1)
    score_batch_tokens: int = setting(8192, check_count, 1)
    score_dtype: str = setting("auto", check_choice, ("auto", "float32", "bfloat16", "model"))
    matmul: str = setting("auto", check_choice, MATMULS)
    rescore_every: int = setting(1, check_count, 1)
    selection_scope: str = setting("global", check_choice, ("global", "rank"))
    record: bool = setting(True, check_flag)
    record_tokens: int = setting(64, check_count, 0)

    def __post_init__(self):
        check_settings(vars(self))

    def as_record(self) -> dict[str, Any]:
        """The settings as JSON holds them; an object as the text of it."""
        plain = self.policy if isinstance(self.policy, str) else repr(self.policy)
        return vars(self) | {"policy": plain, "policy_options": dict(self.policy_options)}


def check_settings(values: Mapping[str, Any], label: Callable[[str], str] = str, of: type | None = None) -> None:
    """Raise unless every value is one that `QTuningConfig` accepts, and those of the dataclass `of` besides.

    Args:
        values: by the name of the field.
        label: the name of the field as the message gives it.
        of: a dataclass; of a field that it shares with `QTuningConfig` the latter's check holds.

    Raises:
        TypeError, ValueError: the message has the name, the value and what is accepted.
    """
    for each in {each.name: each for each in (*(fields(of) if of else ()), *fields(QTuningConfig))}.values():
        if each.name in values and "check" in each.metadata:
            each.metadata["check"](label(each.name), values[each.name], *each.metadata["accepted"])
