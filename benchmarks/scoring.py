"""The scoring pass: what a cheaper precision changes in the selection, and which layout is faster.

    python -m benchmarks.scoring --data gsm8k.jsonl --prompt-field question --completion-field answer

Agreement: 512 samples scored in bfloat16 and in float32; Spearman's rank correlation of both axes, and the share
of kept samples that the two selections have in common, over pools of 16. Layouts: the same samples padded in groups
of similar length, packed into rows, and padded to the pool's longest as a plain collator does, in turn. Behind the
backbone: the share of a scoring pass that head, softmax and entropy take, written in the obvious operations on the
padded pool and through `linear_token_stats` on its answers.  Rows go to benchmarks/results/scoring.csv.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
import transformers

from benchmarks.common import RESULTS, ROOT, environment, fill, interleave, markdown, read_rows, spread, write_rows
from benchmarks.peers import eager_stats
from benchmarks.step_variants import Bench
from qtuning_kernels import eu_plane, linear_token_stats, triage_samples
from qtuning_kernels.data.micro_batches import micro_batches
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.models import scoring
from qtuning_kernels.models.causal_lm import CausalLM, backbone

PARTS = ["agreement", "layouts", "behind"]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; ties, of which there are next to none among float32 means, by position."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def planes(bench: Bench, count: int) -> dict[str, torch.Tensor]:
    samples = bench.samples[:count]
    found = {}
    for dtype in ("float32", "bfloat16"):
        scores = scoring.score_samples(bench.model, samples, score_dtype=dtype)
        plane = eu_plane(scores.nll, scores.entropy, scores.cu_seqlens)
        found[dtype] = torch.stack([plane.ppl, plane.entropy])
    return found


def agreement(bench: Bench, count: int, pool: int) -> list[dict]:
    found = planes(bench, count)
    exact, cheap = found["float32"], found["bfloat16"]
    rows = []
    for name, a, b in zip(("ppl", "entropy"), exact, cheap, strict=True):
        rows.append({"measure": f"spearman {name}", "value": f"{spearman(a, b):.6f}"})
    for ratio in (0.125, 0.25, 0.5):
        shared = kept = 0
        for start in range(0, count - pool + 1, pool):
            a, b = (triage_samples(*x[:, start : start + pool], ratio).keep for x in (exact, cheap))
            shared, kept = shared + int((a & b).sum()), kept + int(a.sum())
        rows.append({"measure": f"kept sets' overlap at {ratio:.1%}", "value": f"{shared / kept:.4f}"})
    return rows


def layouts(bench: Bench, repeats: int) -> list[dict]:
    causal_lm = CausalLM(bench.model)
    pool = bench.pool(0)
    longest = max(len(s.input_ids) for s in pool)
    unsorted = [to_sample(torch.nn.functional.pad(s.input_ids, (0, longest - len(s.input_ids))),
                          torch.full((longest,), 1)) for s in pool]  # fmt: skip

    def forward(batches: list) -> None:
        with torch.no_grad():
            for batch in batches:
                backbone(causal_lm.decoder, batch.input_ids, batch.position_ids)

    causal_lm.base.eval()
    cases = {f"{layout}, {budget} tokens": micro_batches(pool, budget, layout)
             for layout in ("grouped", "padded", "packed") for budget in (8192,)}  # fmt: skip
    cases["padded to the longest"] = micro_batches(unsorted, 10**9)
    seconds = interleave({name: lambda b=batches: forward(b) for name, batches in cases.items()}, repeats)
    return [
        {"measure": f"backbone forward, {name}", "tokens": sum(b.input_ids.numel() for b in cases[name])} | spread(s)
        for name, s in seconds.items()
    ]


def behind_the_backbone(bench: Bench, repeats: int, dtype: str) -> list[dict]:
    """A scoring pass with and without what follows the backbone, in turn; the share is one minus their ratio."""
    model = copy.deepcopy(bench.model).to(getattr(torch, dtype)).eval()
    causal_lm = CausalLM(model)
    pool = bench.pool(0)
    whole = transformers.DataCollatorForSeq2Seq(bench.tokenizer)(bench.features(0))
    tokens, mask = whole["input_ids"], whole["attention_mask"]
    labels = whole["labels"][:, 1:].clamp(min=0).flatten()
    batches = micro_batches(pool, 8192)

    @torch.no_grad()
    def eager(head: bool) -> None:
        hidden = causal_lm.decoder(input_ids=tokens, attention_mask=mask, use_cache=False)[0]
        if head:
            eager_stats(causal_lm.head(hidden[:, :-1]).flatten(0, 1), labels)

    @torch.no_grad()
    def native(head: bool) -> None:
        for batch in batches:
            hidden = backbone(causal_lm.decoder, batch.input_ids, batch.position_ids).flatten(0, 1)
            if head:
                linear_token_stats(hidden[batch.rows], causal_lm.head.weight, batch.labels)

    passes = {"eager": eager, "native": native}
    cases = {(name, head): lambda f=f, head=head: f(head) for name, f in passes.items() for head in (False, True)}
    seconds = interleave(cases, repeats)
    rows = []
    for name in passes:
        shares = [1 - a / b for a, b in zip(seconds[name, False], seconds[name, True], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
        measure = f"share behind the backbone, {name}, {dtype}"
        value = f"{middle:.1%} ({low:.1%}–{high:.1%})"
        rows.append({"measure": measure, "value": value} | spread(seconds[name, True]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--prompt-field", default="question")
    parser.add_argument("--completion-field", default="answer")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="others keep their rows")
    parser.add_argument("--output", type=Path, default=RESULTS / "scoring.csv")
    options = parser.parse_args()
    bench = Bench(options, "float32")
    common = environment() | {"data": Path(options.data).name if options.data else "word-problems"}
    measure = {
        "agreement": lambda: agreement(bench, options.count, options.pool),
        "layouts": lambda: layouts(bench, options.repeats),
        "behind": lambda: [
            row for dtype in ("float32", "bfloat16") for row in behind_the_backbone(bench, options.repeats, dtype)
        ],
    }
    rows = read_rows(options.output) if options.output.exists() else []
    for part in options.only:
        new = [common | {"pool": options.pool, "part": part} | row for row in measure[part]()]
        rows = [row for row in rows if row.get("part") != part] + new
        write_rows(options.output, rows)
    lines = [
        [
            row["measure"],
            row.get("value")
            or f"{float(row['median_ms']):.0f} ms ({float(row['q1_ms']):.0f}–{float(row['q3_ms']):.0f}), "
            f"{row['tokens']} tokens",
        ]
        for row in rows
    ]
    fill(ROOT / "docs" / "benchmarks.md", {"scoring": markdown(["measure", "value"], lines)})
    print(markdown(["measure", "value"], lines))


if __name__ == "__main__":
    main()
