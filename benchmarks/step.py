"""Whole optimiser steps, side by side: the analogue of the paper's table 6 on one machine.

    python benchmarks/step.py --data gsm8k.jsonl --prompt-field question --completion-field answer

Every variant takes the same pools of samples in the same process, in turn (A B C A B C …), on one model and
one AdamW: only the step differs. A child process runs each combination of precision and allocator, another
each measurement of peak memory. Rows go to benchmarks/results/step.csv, the plot is drawn from them alone
(``--plot``).

Variants of a group:
    full data        transformers.Trainer.training_step on the whole padded pool
    full data, TRL   the same with trl.SFTTrainer, if it is installed
    eager Q-Tuning   Q-Tuning as one writes it first: full logits, log_softmax, a Python loop over samples
    ours 1×1         this package's step with both ratios 1: packing without pruning
    ours             this package's step at the ratios, scored in the training precision
    ours, bf16 score the same, scored in bfloat16
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TUNED = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
GROUPS = ("float32", "autocast", "lora")
PHASES = ("score", "select", "compact", "train", "optimizer")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the embedded one, qtuning fetch)")
    parser.add_argument("--data", help="data file (default: the embedded word problems)")
    parser.add_argument("--prompt-field", default="question")
    parser.add_argument("--completion-field", default="answer")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--allocators", nargs="+", choices=("default", "tuned"), default=["default", "tuned"])
    parser.add_argument("--variants", nargs="+", help="only those whose name begins so")
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--sample-ratio", type=float, default=0.125)
    parser.add_argument("--token-ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="ours over budgets and pool sizes, float32")
    parser.add_argument("--memory", action="store_true", help="peak resident memory instead of time")
    parser.add_argument("--agreement", action="store_true", help="bfloat16 against float32 scores instead")
    parser.add_argument("--layouts", action="store_true", help="padded against packed micro-batches instead")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the CSV")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


class Bench:
    """A model, an optimiser, and the variants of the step on them."""

    def __init__(self, options: argparse.Namespace, group: str) -> None:
        import torch
        import transformers

        from qtuning_kernels.batching import to_sample
        from qtuning_kernels.commands.options import load_data, load_model, load_tokenizer, model_source

        self.torch, self.options, self.group = torch, options, group
        arguments = argparse.Namespace(
            model=options.model,
            data=options.data,
            prompt_field=options.prompt_field if options.data else None,
            completion_field=options.completion_field if options.data else None,
            data_split=None,
            data_config=None,
            cutoff=2048,
            skip_without_answer=False,
        )
        source = model_source(arguments)
        self.tokenizer = load_tokenizer(source)
        transformers.utils.logging.set_verbosity_error()
        _, rows, _ = load_data(arguments, self.tokenizer)
        needed = max(512, options.pool * (options.repeats + 1))
        self.rows = [rows[i] for i in range(min(needed, len(rows)))]
        self.samples = [to_sample(r["input_ids"], r["labels"], r["sample_id"]) for r in self.rows]
        self.base = load_model(source)
        self.model = self.base
        if group == "lora":
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(
                self.base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.folder = tempfile.mkdtemp()

    def features(self, index: int) -> list[dict]:
        start = index * self.options.pool % (len(self.rows) - self.options.pool + 1)
        return [
            {"input_ids": r["input_ids"], "labels": r["labels"]} for r in self.rows[start : start + self.options.pool]
        ]

    def pool(self, index: int) -> list:
        start = index * self.options.pool % (len(self.rows) - self.options.pool + 1)
        return self.samples[start : start + self.options.pool]

    def arguments(self, kind: type) -> object:
        return kind(
            output_dir=self.folder,
            per_device_train_batch_size=self.options.pool,
            bf16=self.group == "autocast",
            use_cpu=True,
            report_to=[],
            max_steps=1,
            disable_tqdm=True,
        )

    def update(self) -> float:
        start = time.perf_counter()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def full_data(self):
        import datasets
        import transformers

        trainer = transformers.Trainer(
            self.model,
            self.arguments(transformers.TrainingArguments),
            train_dataset=datasets.Dataset.from_list(self.features(0)),
            data_collator=transformers.DataCollatorForSeq2Seq(self.tokenizer),
        )
        return self._trainer_step(trainer)

    def trl(self):
        import datasets
        import trl

        features = [
            {"input_ids": f["input_ids"], "completion_mask": [int(x != -100) for x in f["labels"]]}
            for f in (f for i in range(self.options.repeats + 1) for f in self.features(i))
        ]
        trainer = trl.SFTTrainer(
            self.model,
            self.arguments(trl.SFTConfig),
            train_dataset=datasets.Dataset.from_list(features),
            processing_class=self.tokenizer,
        )

        def convert(batch: list[dict]) -> list[dict]:
            return [
                {"input_ids": f["input_ids"], "completion_mask": [int(x != -100) for x in f["labels"]]}
                for f in batch
            ]

        return self._trainer_step(trainer, convert)

    def _trainer_step(self, trainer, convert=lambda features: features):
        trainer.optimizer = self.optimizer
        model = trainer.accelerator.prepare_model(self.model)
        trainer.current_gradient_accumulation_steps = 1

        def step(index: int) -> dict[str, float]:
            batch = trainer.data_collator(convert(self.features(index)))
            start = time.perf_counter()
            batches, count = trainer.get_batch_samples(iter([batch]), 1, self.torch.device("cpu"))
            trainer.training_step(model, batches[0], count)
            return {"train": time.perf_counter() - start, "optimizer": self.update()}

        return step

    def autocast(self):
        from contextlib import nullcontext

        return self.torch.autocast("cpu", self.torch.bfloat16) if self.group == "autocast" else nullcontext()

    def eager(self):
        """Written for reading, not speed: what the paper describes, in the obvious operations."""
        import transformers

        torch = self.torch
        collator = transformers.DataCollatorForSeq2Seq(self.tokenizer)
        ratio, token_ratio = self.options.sample_ratio, self.options.token_ratio

        def quadrants(ppl: list[float], entropy: list[float], alpha: float) -> list[int]:
            def bounds(values: list[float]) -> tuple[float, float]:
                ordered = sorted(values)
                n = len(ordered)
                low = ordered[max(0, -int(-alpha * n // 1) - 1)]
                return low, ordered[min(n - 1, max(0, -int(-(1 - alpha) * n // 1) - 1))]

            (p_low, p_high), (e_low, e_high) = bounds(ppl), bounds(entropy)
            found = []
            for p, e in zip(ppl, entropy, strict=True):
                if p >= p_high and e <= e_low:
                    found.append(2)
                elif p <= p_low and e >= e_high:
                    found.append(4)
                else:
                    found.append(0)
            return found

        def step(index: int) -> dict[str, float]:
            seconds = {}
            start = time.perf_counter()
            batch = collator(self.features(index))
            self.model.eval()
            with torch.no_grad(), self.autocast():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            log_p = torch.log_softmax(logits[:, :-1].float(), -1)
            labels = batch["labels"][:, 1:]
            nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            del logits, log_p
            seconds["score"] = time.perf_counter() - start

            start = time.perf_counter()
            ppls, entropies = [], []
            for row in range(len(labels)):
                answer = labels[row] != -100
                ppls.append(nll[row][answer].mean().exp().item())
                entropies.append(entropy[row][answer].mean().item())
            wanted = max(1, int(ratio * len(labels)))
            low, high = 0.0, 0.49
            for _ in range(20):
                middle = (low + high) / 2
                if sum(q > 0 for q in quadrants(ppls, entropies, middle)) >= wanted:
                    high = middle
                else:
                    low = middle
            found = quadrants(ppls, entropies, high)
            kept = [row for row in range(len(labels)) if found[row]][:wanted]
            kept += [row for row in range(len(labels)) if row not in kept][: wanted - len(kept)]
            targets = torch.full_like(batch["labels"], -100)
            for row in kept:
                positions = (labels[row] != -100).nonzero().squeeze(1)
                if found[row] != 4:
                    ppl = nll[row][positions].exp()
                    padded = torch.cat([ppl[:1], ppl, ppl[-1:]])
                    score = 0.5 * ppl + 0.5 * (padded[:-2] + padded[2:])
                    count = max(1, int(token_ratio * len(positions)))
                    positions = positions[score.argsort()[:count]]
                targets[row, positions + 1] = batch["labels"][row, positions + 1]
            seconds["select"] = time.perf_counter() - start

            start = time.perf_counter()
            self.model.train()
            with self.autocast():
                loss = self.model(
                    input_ids=batch["input_ids"][kept],
                    attention_mask=batch["attention_mask"][kept],
                    labels=targets[kept],
                ).loss
            loss.backward()
            seconds["train"] = time.perf_counter() - start
            return seconds | {"optimizer": self.update()}

        return step

    def ours(self, sample_ratio: float, token_ratio: float, score_dtype: str):
        from qtuning_kernels import QTuningConfig
        from qtuning_kernels.causal_lm import CausalLM
        from qtuning_kernels.step import QTuningStep

        config = QTuningConfig(
            sample_ratio=sample_ratio, token_ratio=token_ratio, score_dtype=score_dtype, step="rescore"
        )
        device = self.torch.device("cpu")
        runner = QTuningStep(self.model, CausalLM(self.model), config, device, self.autocast)

        def step(index: int) -> dict[str, float]:
            pool = self.pool(index)
            plan = runner.plan([pool])
            self.model.train()
            with plan.clock.phase("train"):
                runner.train(plan, lambda loss: loss.backward())
            plan.clock.seconds["optimizer"] = self.update()
            return {phase: plan.clock.seconds[phase] for phase in PHASES}

        return step

    def variants(self) -> dict:
        ratios = (self.options.sample_ratio, self.options.token_ratio)
        table = {
            "full data": self.full_data,
            "full data, TRL": self.trl,
            "eager Q-Tuning": self.eager,
            "ours 1×1": lambda: self.ours(1.0, 1.0, "model"),
            "ours": lambda: self.ours(*ratios, "model"),
            "ours, bf16 score": lambda: self.ours(*ratios, "bfloat16"),
        }
        wanted = self.options.variants
        names = [n for n in table if not wanted or any(n == w or n.startswith(w) for w in wanted)]
        if "full data, TRL" in names:
            try:
                import trl  # noqa: F401
            except ImportError:
                names.remove("full data, TRL")
        return {name: table[name]() for name in names}


def child(options: argparse.Namespace) -> None:
    """Measures one group and prints JSON lines."""
    bench = Bench(options, options.groups[0])
    bench.model.train()
    if options.child == "sweep":
        budgets = [(r, t, options.pool) for r in (0.125, 0.25, 0.5) for t in (0.5, 0.7, 1.0)]
        variants = {(f"{r:g}×{t:g}", "bfloat16"): bench.ours(r, t, "bfloat16") for r, t, _ in budgets}
        variants = {f"ours {name}": step for (name, _), step in variants.items()}
    else:
        variants = bench.variants()
    if options.child == "memory":
        (step,) = variants.values()
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(0), step(1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"peak_mib": peak / 1024, "loaded_mib": loaded / 1024}))
        return
    for step in variants.values():  # warm-up
        step(options.repeats)
    for index in range(options.repeats):
        for name, step in variants.items():
            print(json.dumps({"variant": name, "repeat": index, "seconds": step(index)}), flush=True)


def run_child(options: argparse.Namespace, kind: str, group: str, allocator: str, variants: list[str]) -> list[dict]:
    environment = dict(os.environ)
    environment.pop("GLIBC_TUNABLES", None)
    if allocator == "tuned":
        environment["GLIBC_TUNABLES"] = TUNED
    command = [sys.executable, __file__, "--child", kind, "--groups", group]
    for name in ("model", "data", "prompt_field", "completion_field", "pool", "sample_ratio", "token_ratio", "repeats"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    if variants:
        command += ["--variants", *variants]
    lines = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                lines.append(json.loads(line))
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return lines


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def summarise(lines: list[dict], common: dict) -> list[dict]:
    rows = []
    totals = {}
    for line in lines:
        totals.setdefault(line["variant"], []).append(line)
    for name, own in totals.items():
        sums = [sum(line["seconds"].values()) for line in own]
        row = common | {"variant": name, "repeats": len(sums), "median_s": statistics.median(sums)}
        row |= {"q10_s": quantile(sums, 0.1), "q90_s": quantile(sums, 0.9)}
        for phase in PHASES:
            row[f"{phase}_s"] = statistics.median(line["seconds"].get(phase, 0.0) for line in own)
        baseline = totals.get("full data")
        if baseline:  # step by step, so that what slows both cancels
            ratios = [
                sum(b["seconds"].values()) / sum(o["seconds"].values()) for b, o in zip(baseline, own, strict=True)
            ]
            row["speedup_vs_full"] = statistics.median(ratios)
            row["speedup_q10"], row["speedup_q90"] = quantile(ratios, 0.1), quantile(ratios, 0.9)
        rows.append(row)
    return rows


def main() -> None:
    options = parse()
    if options.child:
        child(options)
        return
    from common import append_rows, machine

    if options.plot:
        plot(options.output)
        return
    if options.agreement:
        agreement(options)
        return
    for group in options.groups:
        for allocator in options.allocators:
            common = machine() | {
                "benchmark": "step",
                "group": group,
                "allocator": allocator,
                "data": Path(options.data).name if options.data else "word-problems",
                "pool": options.pool,
                "sample_ratio": options.sample_ratio,
                "token_ratio": options.token_ratio,
            }
            if options.memory:
                for variant in ("full data", "full data, TRL", "eager Q-Tuning", "ours 1×1", "ours", "ours, bf16 score"):
                    (line,) = run_child(options, "memory", group, allocator, [variant])
                    append_rows(options.output, [common | {"variant": variant} | line])
                continue
            kind = "sweep" if options.sweep else "time"
            rows = summarise(run_child(options, kind, group, allocator, options.variants or []), common)
            append_rows(options.output, rows)
            for row in rows:
                ratio = f"{row['speedup_vs_full']:.2f}×" if "speedup_vs_full" in row else ""
                phases = " ".join(f"{p} {row[f'{p}_s']:.2f}" for p in PHASES)
                print(f"{group:9} {allocator:8} {row['variant']:18} {row['median_s']:7.2f} s  {ratio:7} {phases}")
    plot(options.output)


if __name__ == "__main__":
    main()
