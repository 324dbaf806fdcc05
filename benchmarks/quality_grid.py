"""Which runs the quality benchmark makes, in which order, and what each takes by the time of those like it."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

RATES = (5e-5, 1e-4, 2e-4)
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)  # where a default depends on the answer
GENERATED = "tasks"  # the name of the generated data
RECORDS = 1024  # of training, for one epoch
FEW_RECORDS = 256  # for four


@dataclass(frozen=True)
class Inputs:
    """What a run is fed, the same for all runs on one data set.

    Attributes:
        model: a folder.
        data: a file, or None for the generated tasks; `prompt_field`, `completion_field` and `result_mark`, which
            stands before the final result of an answer, describe it.
        other: a text file, for what is forgotten; None: a story that reasoning-gym brings.
        cutoff: most tokens of a sample.
        tasks: YAML files of lm-evaluation-harness, whose accuracy is measured once.
    """

    model: str
    data: str | None = None
    prompt_field: str = "question"
    completion_field: str = "answer"
    result_mark: str = ""
    other: str | None = None
    cutoff: int = 512
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What tells one run from another.

    Attributes:
        records, held_out: how many, of training and of evaluation.
        options: fields of `QTuningConfig` and options of the policy by name, as JSON.
    """

    data: str
    condition: str
    policy: str
    sample_ratio: float
    token_ratio: float
    seed: int
    learning_rate: float
    steps: int
    pool: int = 16
    records: int = RECORDS
    held_out: int = 96
    options: str = "{}"

    @property
    def run(self) -> str:
        """A short name, the same in every file of results."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        of_policy = "" if self.options == "{}" else f" {self.options}"
        data = self.data if self.records == RECORDS else f"{self.data} of {self.records}"
        return (
            f"{data} {self.condition} {self.policy}{of_policy} {self.sample_ratio:g} × {self.token_ratio:g}, "
            f"seed {self.seed}, rate {self.learning_rate:g}, {self.steps} steps of {self.pool}"
        )


class Variant(NamedTuple):
    """A policy at the smallest budget. Of those that score nothing the steps are cheap, so that they make more: their
    points of evaluation are to be compared at equal steps and at equal time."""

    policy: str
    sample_ratio: float = 0.125
    token_ratio: float = 1.0
    steps: int = 60
    options: str = "{}"


FULL = Variant("full", 1.0)
RANDOM = Variant("random", steps=120)
LONGEST = Variant("longest", steps=120)
ENTROPY = Variant("entropy")
INFOBATCH = Variant("infobatch", 1.0)
DFT = Variant("dft", 1.0)
EAFT = Variant("eaft", 1.0)
QTUNING = Variant("qtuning", token_ratio=0.5, options='{"token_order": "keep_low"}')  # as published
QTUNING_SAMPLES = Variant("qtuning")
RESIDUAL = QTUNING._replace(policy="qtuning_residual")
KEEP_HIGH = QTUNING._replace(options='{"token_order": "keep_high"}')
DROP = QTUNING._replace(options='{"token_order": "keep_low", "token_mode": "drop"}')
FLOAT32_SCORES = QTUNING_SAMPLES._replace(options='{"score_dtype": "float32"}')
RESCORE = tuple(QTUNING_SAMPLES._replace(options=f'{{"rescore_every": {epochs}}}') for epochs in (2, 4))
PRUNING = (RANDOM, QTUNING, QTUNING_SAMPLES, RESIDUAL, LONGEST, ENTROPY)


class Stage(NamedTuple):
    """Runs of equal value: every variant × condition × seed, at that share of the samples or the variant's own, at the
    rate that was chosen or at the others, and on that many records or as many as the data has."""

    variants: tuple[Variant, ...]
    conditions: tuple[str, ...]
    sample_ratio: float | None = None
    other_rates: bool = False
    records: int | None = None
    seeds: tuple[int, ...] = SEEDS


TELLING = (RANDOM, QTUNING_SAMPLES, KEEP_HIGH, ENTROPY)
# the worst value for time last
GENERATED_STAGES = (
    Stage(PRUNING, ("clean", "exchanged40")),  # a conclusion takes two conditions
    Stage(PRUNING, ("duplicates50",)),
    Stage((FULL,), ("clean", "exchanged40", "duplicates50")),
    Stage((KEEP_HIGH, DROP), ("clean", "exchanged40")),
    Stage((RANDOM, QTUNING_SAMPLES, *RESCORE), ("clean",), records=FEW_RECORDS),
    Stage((FLOAT32_SCORES,), ("clean",)),
    Stage(TELLING, ("trivial50",)),
    Stage((RANDOM, QTUNING, QTUNING_SAMPLES, KEEP_HIGH), ("clean",), seeds=MORE_SEEDS),
    Stage((KEEP_HIGH,), ("duplicates50",)),
    Stage((QTUNING,), ("trivial50",)),
    Stage((DFT,), ("clean",)),
    Stage((RANDOM, QTUNING, QTUNING_SAMPLES, KEEP_HIGH), ("exchanged40",), seeds=MORE_SEEDS),
    Stage((EAFT, INFOBATCH), ("clean",)),
    Stage((RANDOM, QTUNING_SAMPLES, KEEP_HIGH), ("clean",), other_rates=True),
    Stage(TELLING, ("clean", "exchanged40"), 0.5),
    Stage((INFOBATCH, DFT, EAFT), ("exchanged40", "duplicates50")),
    Stage(TELLING, ("mixed", "exchanged20")),
)
# samples of a natural data set are some five times as long
FULL_OF_FILE = FULL._replace(steps=30)
FILE_STAGES = (
    Stage((RANDOM, QTUNING, QTUNING_SAMPLES), ("clean",)),
    Stage((KEEP_HIGH,), ("clean",)),
    Stage((RANDOM, QTUNING, QTUNING_SAMPLES, KEEP_HIGH), ("exchanged40",)),
    Stage((RESIDUAL,), ("clean", "exchanged40")),
    Stage((FULL_OF_FILE,), ("clean", "exchanged40")),
    Stage((LONGEST, ENTROPY), ("clean", "exchanged40")),
)
_QUICK = (Variant("random", steps=30), KEEP_HIGH._replace(steps=30), FULL._replace(steps=15))
QUICK_STAGES = (Stage(_QUICK, ("exchanged40",), seeds=SEEDS[:2]),)


def rate_runs(base: Setting) -> list[Setting]:
    """Full data at each learning rate, and the model as it is: `base` gives data, sizes and steps."""
    full = replace(base, condition="clean", policy="full", sample_ratio=1.0, token_ratio=1.0, seed=0, options="{}")
    return [replace(full, learning_rate=0.0, steps=0), *(replace(full, learning_rate=rate) for rate in RATES)]


def grid(base: Setting, stages: Iterable[Stage]) -> list[Setting]:
    """The runs in their order: stage by stage, and within one seed by seed, so that a comparison is soon complete."""
    settings = [
        replace(
            base,
            condition=condition,
            policy=variant.policy,
            sample_ratio=stage.sample_ratio or variant.sample_ratio,
            token_ratio=variant.token_ratio,
            options=variant.options,
            steps=min(variant.steps, base.steps) if stage.sample_ratio else variant.steps,
            seed=seed,
            learning_rate=rate,
            records=stage.records or base.records,
        )
        for stage in stages
        for rate in (
            [rate for rate in RATES if rate != base.learning_rate] if stage.other_rates else [base.learning_rate]
        )
        for seed in stage.seeds
        for condition in stage.conditions
        for variant in stage.variants
    ]
    return list(dict.fromkeys(settings))


def setting_of(row: dict[str, str]) -> Setting:
    """The setting that a row of results belongs to."""
    kinds = {each.name: type_ for each, type_ in zip(fields(Setting), _TYPES, strict=True)}
    return Setting(**{name: kind(row[name]) for name, kind in kinds.items()})


_SIMILAR = ("data", "policy", "sample_ratio", "token_ratio", "steps", "pool", "held_out")
_ALIKE = (*_SIMILAR, "records", "options")
_TYPES = (str, str, str, float, float, int, float, int, int, int, int, str)


def missing(settings: Iterable[Setting], rows: Iterable[dict[str, str]]) -> list[Setting]:
    """Those without a row, in their order. Rows are written for finished runs only."""
    finished = {setting_of(row) for row in rows}
    return [setting for setting in settings if setting not in finished]


def chosen_rate(base: Setting, rows: Iterable[dict[str, str]]) -> float | None:
    """Of `RATES` the one with the lowest held-out nll of full data at the end; None until all have been run."""
    wanted = set(rate_runs(base))
    ends = {}
    for row in rows:
        setting = setting_of(row)
        if setting in wanted and setting.steps and int(row["step"]) == setting.steps:
            ends[setting.learning_rate] = float(row["nll"])
    return min(ends, key=ends.__getitem__) if len(ends) == len(RATES) else None


def minutes(setting: Setting, rows: Iterable[dict[str, str]], machine: str) -> float | None:
    """What the run will take of one processor: the median of those that differ in seed, rate or condition alone, on
    this machine if there are any; else of those with its policy and ratios at as many steps; else by the longest one of
    its data per step; None where nothing is known."""
    stored = [row for row in rows if row["run_minutes"]]
    for known in ([row for row in stored if row["machine"] == machine], stored):
        others = [(setting_of(row), float(row["run_minutes"])) for row in known]
        for names in (_ALIKE, _SIMILAR):
            if like := [took for other, took in others if all(getattr(other, n) == getattr(setting, n) for n in names)]:
                return statistics.median(like)
        per_step = [
            took / other.steps / other.pool for other, took in others if other.data == setting.data and other.steps
        ]
        if per_step:
            return max(per_step) * setting.steps * setting.pool
    return None


def plan_lines(settings: list[Setting], rows: list[dict[str, str]], machine: str, jobs: int) -> Iterator[str]:
    """The missing runs with their minutes, and the sum of those known, `jobs` runs side by side."""
    total = 0.0
    for setting in settings:
        known = minutes(setting, rows, machine)
        total += known or 0.0
        yield f"{'   ?' if known is None else f'{known:4.1f}'} min  {setting}"
    yield f"{len(settings)} runs missing, {total / jobs:.0f} minutes with {jobs} side by side"
