"""What a step costs under each policy: positions scored, tokens trained on, seconds.

    python -m benchmarks.policies [--data gsm8k.jsonl --prompt-field question --completion-field answer]

Every policy takes the same pools of samples in the same process, in turn, on one model and one optimiser, at one sample
ratio, one token ratio and its default options. Where a policy needs a reference model, its scores are there beforehand.
Rows go to benchmarks/results/policies.csv, and the table of docs/policies.md is made of them (``--table``: of nothing
new).
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, environment, fill, markdown, read_rows, write_rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the embedded one, qtuning fetch)")
    parser.add_argument("--data", help="data file (default: the embedded word problems)")
    parser.add_argument("--prompt-field", default="question")
    parser.add_argument("--completion-field", default="answer")
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--sample-ratio", type=float, default=0.125)
    parser.add_argument("--token-ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only fill the table from the CSV")
    parser.add_argument("--output", type=Path, default=RESULTS / "policies.csv")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[dict]:
    from benchmarks.step_variants import Bench
    from qtuning_kernels.data.samples import to_sample
    from qtuning_kernels.models.scoring import score_samples
    from qtuning_kernels.pruning.policies import POLICIES

    bench = Bench(options, "float32")
    reference = {}
    for index in range(options.repeats + 1):
        pool = [to_sample(**row) for row in bench.features(index)]
        scores = score_samples(bench.model, pool)
        parts = scores.nll.split(scores.cu_seqlens.diff().tolist())
        reference |= {sample.sample_id: part for sample, part in zip(pool, parts, strict=True)}
    names = options.policies or list(POLICIES)
    trainers = {name: bench.trainer(bench.config(name), reference) for name in names}
    steps = {name: bench.selecting_step(trainer) for name, trainer in trainers.items()}
    seen: dict[str, list[dict]] = {name: [] for name in names}
    for index in range(-1, options.repeats):  # the first round warms up
        for name, step in steps.items():
            seconds = step(index % (options.repeats + 1))
            totals = trainers[name]._plan.totals
            if index >= 0:
                counts = {"scored": totals.tokens_scored, "trained": totals.tokens_kept}
                seen[name].append({**seconds, **counts, "total": sum(seconds.values())})
    where = environment() | {"pool": options.pool, "repeats": options.repeats}
    where |= {"sample_ratio": options.sample_ratio, "token_ratio": options.token_ratio}
    fields = ("scored", "trained", "score", "select", "train", "total")
    return [
        {"policy": name, **{f: f"{statistics.median(s[f] for s in own):.4g}" for f in fields}, **where}
        for name, own in seen.items()
    ]


def table(rows: list[dict]) -> str:
    head = ["policy", "positions scored", "tokens trained on", "score s", "select s", "train s", "step s"]
    fields = ("policy", "scored", "trained", "score", "select", "train", "total")
    return markdown(head, [[row[field] for field in fields] for row in rows])


def main() -> None:
    options = parse()
    if not options.table:
        kept = read_rows(options.output) if options.output.exists() else []
        new = measure(options)
        made = {row["policy"] for row in new}
        write_rows(options.output, [row for row in kept if row["policy"] not in made] + new)
    rows = read_rows(options.output)
    print(table(rows))
    fill(ROOT / "docs" / "policies.md", {"policies": table(rows)})


if __name__ == "__main__":
    main()
