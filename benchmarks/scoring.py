"""The scoring pass: what a cheaper precision changes in the selection, and which layout is faster.

    python -m benchmarks.scoring --data gsm8k.jsonl --prompt-field question --completion-field answer

Agreement: 512 samples scored in bfloat16 and in float32; Spearman's rank correlation of both axes, and the share
of kept samples that the two selections have in common, over pools of 16. Layouts: the same samples padded in groups
of similar length, packed into rows, and padded to the pool's longest as a plain collator does, in turn. Behind the
backbone: the share of a scoring pass that head, softmax and entropy take, written in the obvious operations on the
padded pool and through `linear_token_stats` on its answers. Attention: the model's causal attention, by PyTorch and by
the native backend. Rows go to benchmarks/results/scoring.csv.
"""

import argparse
import copy
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import RESULTS, ROOT, environment, fill, interleave, markdown, read_rows, spread, write_rows
from benchmarks.peers import eager_stats
from benchmarks.step_variants import Bench
from qtuning_kernels import eu_plane, linear_token_stats, triage_samples
from qtuning_kernels.data.micro_batches import micro_batches
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.models import scoring
from qtuning_kernels.models.causal_lm import CausalLM, backbone
from qtuning_kernels.models.cpu_layers import cpu_layers

PARTS = ["agreement", "layouts", "behind", "attention"]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; ties, of which there are next to none among float32 means, by position."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def planes(bench: Bench, count: int) -> dict[str, torch.Tensor]:
    samples = bench.samples[:count]
    found = {}
    for dtype in ("float32", "bfloat16"):
        plane = eu_plane(*scoring.score_samples(bench.model, samples, score_dtype=dtype))
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
             for layout in ("padded", "packed") for budget in (8192,)}  # fmt: skip
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


def attention(bench: Bench, repeats: int, dtype: str) -> list[dict]:
    """One layer's attention, 2048 tokens in sequences of each length; PyTorch's time over the native backend's."""
    config = bench.base.config
    sizes = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = []
    for length in (64, 256, 1024):
        tensors = [torch.randn(2048 // length, length, n, dim, dtype=getattr(torch, dtype)).transpose(1, 2)
                   for n in sizes]  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in tensors]

        def run(native: bool, backward: bool, tensors: list = tensors, leaves: list = leaves) -> None:
            with cpu_layers(torch.nn.Identity()) if native else nullcontext():
                out = scaled_dot_product_attention(*(leaves if backward else tensors), is_causal=True, enable_gqa=True)
            if backward:
                torch.autograd.grad(out, leaves, tensors[0])

        cases = {(native, backward): lambda n=native, b=backward: run(n, b)
                 for backward in (False, True) for native in (False, True)}  # fmt: skip
        seconds = interleave(cases, 5 * repeats)
        for backward in (False, True):
            ratios = [a / b for a, b in zip(seconds[False, backward], seconds[True, backward], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            what = "forward and backward" if backward else "forward"
            measure = f"attention, {what}, {2048 // length} × {length} tokens, {dtype}: PyTorch over native"
            rows.append({"measure": measure, "value": f"{middle:.2f}× ({low:.2f}–{high:.2f})"}
                        | spread(seconds[True, backward]))  # fmt: skip
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
        "attention": lambda: [
            row for dtype in ("float32", "bfloat16") for row in attention(bench, options.repeats, dtype)
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
