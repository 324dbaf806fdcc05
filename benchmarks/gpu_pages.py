"""What `gpu_day.py` measured, as tables: of one device for its report, of all for the pages (`make docs-figures`)."""

from pathlib import Path

from benchmarks.common import RESULTS, ROOT, fill, markdown, read_rows

GPUS = RESULTS / "gpu"
PAGES = ("README.md", "docs/kernels.md", "docs/benchmarks.md")
NONE = {
    "gpu timed": "No GPU has timed them yet: `make gpu` does, on a machine that has one.",
    "gpu step": "",
}
HEADLINE = ("token_stats", "torch.compile", "token_stats, gradient of 100%", "torch.compile, gradient",
            "liger-kernel, gradient, of a copy", "quack-kernels, gradient", "linear_token_stats",
            "linear_cross_entropy, 25%", "linear_cross_entropy, 100%", "liger-kernel", "cut-cross-entropy", "trl",
            "quack-kernels")  # fmt: skip


def latest(path: Path, *names: str) -> list[dict[str, str]]:
    """The last row of each combination of these fields."""
    rows = read_rows(path) if path.exists() else []
    return list({tuple(row.get(name, "") for name in names): row for row in rows}.values())


def kernel_rows(folder: Path) -> list[dict[str, str]]:
    return latest(folder / "gpu.csv", "group", "case", "rows", "vocabulary", "hidden")


def kernel_table(rows: list[dict[str, str]]) -> str:
    head = ["GPU", "case", "rows × vocabulary (× hidden)", "median ms (quartiles)", "rate", "share", "peak MiB"]
    lines = []
    for row in rows:
        shape = " × ".join(filter(None, (row["rows"], row["vocabulary"], row["hidden"])))
        time = row["error"] or f"{row['median_ms']} ({row['q1_ms']}–{row['q3_ms']})"
        rates = ((row.get("gb_per_s"), "GB/s"), (row.get("tflop_per_s"), "TFLOP/s"))
        rate = next((f"{value} {unit}" for value, unit in rates if value), "")
        lines.append([row["gpu"], row["case"], shape, time, rate, row.get("share", ""), row.get("peak_mib", "")])
    note = "The rate is of the bytes or products that the result needs; its share, of a copy's or the head product's."
    return f"{note}\n\n{markdown(head, lines)}"


def step_table(rows: list[dict[str, str]]) -> str:
    head = ["GPU", "model", "precision", "step", "median s (quartiles)", "vs full data", "vs eager Q-Tuning"]
    lines = [
        [row["gpu"] or row["machine"], row["model"], row["group"], row["variant"]]
        + [f"{row['median_s']} ({row['q1_s']}–{row['q3_s']})", row["vs_full_data"], row.get("vs_eager_Q-Tuning", "")]
        for row in rows
    ]
    return markdown(head, lines)


def step_rows(folder: Path) -> list[dict[str, str]]:
    return latest(folder / "step.csv", "gpu", "model", "group", "variant")


def parts(folders: list[Path]) -> dict[str, str]:
    """The pages' parts, from the rows of every device; a sentence where there are none."""
    kernels = [row for folder in folders for row in kernel_rows(folder)]
    steps = [row for folder in folders for row in step_rows(folder)]
    short = [row for row in kernels if row["case"] in HEADLINE and not row["error"]]
    return {
        "gpu timed": kernel_table(short) if short else NONE["gpu timed"],
        "gpu kernels": kernel_table(kernels) if kernels else NONE["gpu timed"],
        "gpu step": step_table(steps) if steps else NONE["gpu step"],
    }


def tables(folder: Path) -> list[str]:
    """Of one device, for its report."""
    made = {"Kernels": (kernel_rows(folder), kernel_table), "Steps": (step_rows(folder), step_table)}
    return [f"## {title}\n{table(rows)}\n" for title, (rows, table) in made.items() if rows]


def main() -> None:
    folders = sorted(path for path in GPUS.glob("*") if path.is_dir()) if GPUS.exists() else []
    for name in PAGES:
        fill(ROOT / name, parts(folders))


if __name__ == "__main__":
    main()
