"""What a run's record holds: its files, their columns, and the names that go with them.

A record is a folder, ``<output_dir>/record/``, of

- ``run.json``: ``record_version``, ``created``, ``command``, ``configuration``, ``versions``, ``resumed``,
  ``total_steps``, ``evaluations`` (``step`` and losses ``eval_…``, of each evaluation, one before the first step too);
- ``samples.jsonl``: one row per sample and optimiser step (`SAMPLE_COLUMNS`);
- ``steps.jsonl``: one row per optimiser step (`STEP_COLUMNS`);
- ``tokens.jsonl``: one row per chosen sample and step (`TOKEN_COLUMNS`);
- ``texts.jsonl``: optional, the beginning of each sample's text (`TEXT_COLUMNS`).

Any of them is read in one line::

    samples = pandas.read_json("runs/demo/record/samples.jsonl", lines=True)

and all of them, whatever state the run was left in, by ``read_record("runs/demo")``. NaN is written as null
and an infinity as the string ``"Infinity"`` or ``"-Infinity"``; pandas reads these as NaN and ±inf.
"""

RECORD_VERSION = 1
LOSS_STEPS = 5  # that a loss is a mean of: single steps train on so few samples that their losses are noise

# the phases of an optimiser step in which time is counted
PHASES = {
    "data": "loading the pool",
    "score": "scoring forward",
    "select": "selection",
    "compact": "compacting the kept part",
    "train": "training forward and backward",
    "optimizer": "optimiser",
}
# eq. 6; 0 is every sample that is in none of the four
QUADRANTS = {
    1: "Q1 harmful noise",
    2: "Q2 valuable misconception",
    3: "Q3 redundant knowledge",
    4: "Q4 calibration",
    0: "middle (in no quadrant)",
}
QUADRANT_LABELS = {quadrant: name.split()[0] for quadrant, name in QUADRANTS.items()}  # Q1 … Q4, middle

# id: int or str, stable over the run. ppl, entropy: of the sample, nats. quadrant 0..4, role 2 | 4 | 0.
# num_tokens: trainable tokens; kept_tokens: those that entered the loss.
SAMPLE_COLUMNS = (
    *("step", "id", "ppl", "entropy", "quadrant", "role", "keep", "supplemented"),
    *("num_tokens", "kept_tokens"),
)
# ppl_low, ppl_high, entropy_low, entropy_high: the quantiles Q_α and Q_(1−α) of the pool.
# tokens_seen: trainable tokens of the pool; tokens_kept: those in the loss; tokens_scored: positions that the
# scoring forwards read, padding included. flops_spent: of this step; flops_full: of the step on full data.
STEP_COLUMNS = (
    *("step", "epoch", "loss", "learning_rate"),
    *("alpha", "ppl_low", "ppl_high", "entropy_low", "entropy_high"),
    *(f"count_q{quadrant}" for quadrant in range(5)),
    *("count_samples", "count_kept", "count_supplemented", "tokens_seen", "tokens_kept", "tokens_scored"),
    *(f"seconds_{phase}" for phase in PHASES),
    *("flops_spent", "flops_full"),
)
# token_ids, tokens (strings), nll (nats), score (neighbour-aware, eq. 7; null for a sample that is not
# token-pruned) and keep are lists over the trainable tokens; prompt is text.
TOKEN_COLUMNS = ("step", "id", "token_ids", "tokens", "nll", "score", "keep", "prompt")
TEXT_COLUMNS = ("id", "prompt", "answer", "truncated", "tag")  # tag: what the data says of the sample, if anything

TABLES = {
    "samples.jsonl": SAMPLE_COLUMNS,
    "steps.jsonl": STEP_COLUMNS,
    "tokens.jsonl": TOKEN_COLUMNS,
}
