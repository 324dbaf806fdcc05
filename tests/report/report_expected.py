"""The report's numbers, recomputed from the record's files with the standard library alone."""

import json
import math
from pathlib import Path

PHASES = ("data", "score", "select", "compact", "train", "optimizer")


def rows(folder: Path, name: str) -> list[dict]:
    path = folder / "record" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def total(table: list[dict], key: str) -> float | None:
    values = [row[key] for row in table if row.get(key) is not None]
    return math.fsum(values) if values else None


def share(part, whole):
    return None if part is None or not whole else part / whole


def finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def expected_numbers(folder: Path) -> dict[str, float | int | None]:
    samples, steps = rows(folder, "samples.jsonl"), rows(folder, "steps.jsonl")
    kept = [row for row in samples if row.get("keep")]
    supplemented = [row for row in samples if row.get("supplemented")]
    tokens_seen, tokens_kept = total(samples, "num_tokens"), total(samples, "kept_tokens")
    losses = [row["loss"] for row in steps if row.get("loss") is not None]
    head = json.loads((folder / "record" / "run.json").read_text())
    evaluations = [row["eval_loss"] for row in head.get("evaluations", [])] or [None]
    seconds = {phase: total(steps, f"seconds_{phase}") for phase in PHASES}
    known = [value for value in seconds.values() if value is not None]
    seconds_total = math.fsum(known) if known else None
    spent, full = total(steps, "flops_spent"), total(steps, "flops_full")
    times_seen, times_kept = {}, {}
    for row in samples:
        times_seen[row["id"]] = times_seen.get(row["id"], 0) + 1
        times_kept[row["id"]] = times_kept.get(row["id"], 0) + bool(row.get("keep"))
    never = sum(count == 0 for count in times_kept.values())
    always = sum(count == times_seen[ident] for ident, count in times_kept.items())
    distinct = len(times_seen)
    numbers = {
        "steps": len(steps),
        "samples_seen": len(samples),
        "samples_distinct": distinct,
        "samples_kept": len(kept),
        "share_samples_kept": share(len(kept), len(samples)),
        "samples_supplemented": len(supplemented),
        "share_supplemented": share(len(supplemented), len(kept)),
        "tokens_seen": tokens_seen,
        "tokens_kept": tokens_kept,
        "share_tokens_kept": share(tokens_kept, tokens_seen),
        "not_on_plane": sum(not (finite(row.get("ppl")) and finite(row.get("entropy"))) for row in samples),
        "loss_first": math.fsum(losses[:5]) / len(losses[:5]) if losses else None,
        "loss_last": math.fsum(losses[-5:]) / len(losses[-5:]) if losses else None,
        "loss_eval_first": evaluations[0],
        "loss_eval_last": evaluations[-1],
        "seconds_total": seconds_total,
        "seconds_per_step": share(seconds_total, len(steps)),
        "tokens_per_second": share(tokens_seen, seconds_total),
        "tokens_scored": total(steps, "tokens_scored"),
        "flops_spent": spent,
        "flops_full": full,
        "share_flops_saved": None if share(spent, full) is None else 1 - spent / full,
        "never_kept": never,
        "share_never_kept": share(never, distinct),
        "always_kept": always,
        "share_always_kept": share(always, distinct),
        "sometimes_kept": distinct - never - always,
        "share_sometimes_kept": share(distinct - never - always, distinct),
    }
    for quadrant in range(5):
        in_it = [row for row in samples if row.get("quadrant") == quadrant]
        numbers[f"count_q{quadrant}"] = len(in_it)
        numbers[f"share_q{quadrant}"] = share(len(in_it), len(samples))
        numbers[f"kept_q{quadrant}"] = sum(bool(row.get("keep")) for row in in_it)
        numbers[f"supplemented_q{quadrant}"] = sum(bool(row.get("supplemented")) for row in in_it)
    for phase in PHASES:
        numbers[f"seconds_{phase}"] = seconds[phase]
        numbers[f"share_seconds_{phase}"] = share(seconds[phase], seconds_total)
    return numbers
