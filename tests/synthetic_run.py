"""Writes the record of a run that never took place, of any size, for the tests of the report."""

from pathlib import Path

import numpy as np

from qtuning_kernels.run_record.writer import RunRecord, write_texts

WORDS = [
    "sold",
    "half",
    "clips",
    "in",
    "May",
    "how",
    "many",
    "did",
    "Natalia",
    "sell",
    "for",
    "$12",
    "an",
    "hour",
]

TAGS = ("clean", "clean", "clean", "wrong", "trivial", "duplicate", "clean")


def quantile(values, gamma):
    values = sorted(values)
    return next(v for i, v in enumerate(values, 1) if i >= gamma * len(values) - 1e-9)


def synthetic_pool(rng, size, progress):
    """Columns of a pool's samples; perplexity and entropy fall as the run makes progress."""
    entropy = rng.gamma(4.0, 0.25, size) * (1 - 0.4 * progress)
    ppl = np.exp(0.6 * entropy + rng.normal(0.4, 0.5, size) * (1 - 0.3 * progress)).clip(1)
    alpha = 0.35
    low, high = ({n: quantile(v, g) for n, v in (("ppl", ppl), ("entropy", entropy))} for g in (alpha, 1 - alpha))
    quadrant = np.select(
        [
            (ppl >= high["ppl"]) & (entropy >= high["entropy"]),
            (ppl >= high["ppl"]) & (entropy <= low["entropy"]),
            (ppl <= low["ppl"]) & (entropy <= low["entropy"]),
            (ppl <= low["ppl"]) & (entropy >= high["entropy"]),
        ],
        [1, 2, 3, 4],
        0,
    )
    supplemented = (quadrant == 0) & (rng.random(size) < 0.1)
    role = np.where(supplemented, rng.choice([2, 4], size), np.where(np.isin(quadrant, [2, 4]), quadrant, 0))
    num_tokens = rng.integers(20, 200, size)
    kept_tokens = np.select([role == 2, role == 4], [num_tokens // 2, num_tokens], 0)
    columns = {
        "ppl": ppl,
        "entropy": entropy,
        "quadrant": quadrant,
        "role": role,
        "keep": role > 0,
        "supplemented": supplemented,
        "num_tokens": num_tokens,
        "kept_tokens": kept_tokens,
    }
    return columns, alpha


def synthetic_run(
    folder: Path,
    *,
    steps: int = 30,
    pool: int = 16,
    samples: int | None = None,
    texts: bool = True,
    text=lambda ident, rng: " ".join(rng.choice(WORDS, 40)),
    seed: int = 0,
) -> Path:
    """A record in ``folder/record``: `steps` pools drawn in turn from `samples` (default: two epochs)."""
    rng = np.random.default_rng(seed)
    samples = samples or max(1, steps * pool // 2)
    record_folder = folder / "record"
    if texts:
        rows = (
            {"id": i, "prompt": f"Q{i}: {text(i, rng)}?", "answer": text(i, rng), "tag": TAGS[i % len(TAGS)]}
            for i in range(samples)
        )
        write_texts(record_folder, rows)
    with RunRecord(record_folder, total_steps=steps, token_samples=64) as record:
        record.write_run(
            command="qtuning train --data gsm8k.jsonl --max-steps 30",
            evaluations=[{"step": s, "eval_loss": 1.5 - 0.5 * s / steps} for s in sorted({0, steps // 2, steps})]
            if steps
            else [],
            configuration={"qtuning": {"sample_ratio": 0.125, "token_ratio": 0.5}, "learning_rate": 1e-4},
        )
        for step in range(1, steps + 1):
            columns, alpha = synthetic_pool(rng, pool, step / steps)
            columns["id"] = [(i + (step - 1) * pool) % samples for i in range(pool)]
            tokens = [
                _token_row(columns, position, rng)
                for position in record.choose_token_samples(step, columns["keep"].tolist())
            ]
            seen, kept = int(columns["num_tokens"].sum()), int(columns["kept_tokens"].sum())
            phases = ("data", "score", "select", "compact", "train", "optimizer")
            seconds = rng.uniform(0.5, 1.0, 6) * (0.02, 1.6, 0.01, 0.01, 1.1, 0.2)
            row = {
                "step": step,
                "epoch": step * pool / samples,
                "loss": 1.2 * float(np.exp(-step / steps)) + rng.normal(0, 0.02),
                "learning_rate": 1e-4,
                "alpha": alpha,
                "tokens_seen": seen,
                "tokens_kept": kept,
                "tokens_scored": 3 * seen,
                "seconds": dict(zip(phases, seconds.tolist(), strict=True)),
                "flops_spent": 3e9 * (seen + 3 * kept),
                "flops_full": 3e9 * 3 * 3 * seen,
            }
            record.write_step(row, columns, tokens)
    return folder


def _token_row(columns, position, rng):
    count = int(columns["num_tokens"][position])
    nll = rng.gamma(1.0, 0.8, count)
    score = np.exp(nll) if columns["role"][position] == 2 else None
    keep = np.ones(count, bool)
    if score is not None:
        keep[np.argsort(-score, kind="stable")[: count - int(columns["kept_tokens"][position])]] = False
    return {
        "id": columns["id"][position],
        "token_ids": rng.integers(0, 49152, count),
        "tokens": [("\n" if rng.random() < 0.04 else " " + str(rng.choice(WORDS))) for _ in range(count)],
        "nll": nll,
        "score": score,
        "keep": keep,
        "prompt": f"Q{columns['id'][position]}: how many clips?",
    }
