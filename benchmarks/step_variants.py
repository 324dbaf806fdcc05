"""The variants of a whole optimiser step that `step.py` measures, all on one model and one optimiser."""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext

import datasets
import torch
import transformers

from qtuning_kernels import QTuningConfig, QTuningTrainer
from qtuning_kernels.commands.inputs import load_data, load_model, load_tokenizer, model_source
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.models.matmul import choose_precision, float32_matmul
from qtuning_kernels.training.accounting import PHASES

Step = Callable[[int], dict[str, float]]
# shapes of randomly initialised models: SmolLM2-1.7B's, and one for rehearsals
RANDOM = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
             "num_key_value_heads": 32},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip


def random_model(size: str, source: str) -> transformers.PreTrainedModel:
    """Of the family and the vocabulary of `source`, without its weights; float32."""
    config = transformers.AutoConfig.from_pretrained(source)
    config.update(RANDOM[size])
    config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Bench:
    """A model, an optimiser, and the variants of the step on them."""

    def __init__(self, options: argparse.Namespace, group: str) -> None:
        self.options, self.group = options, group
        arguments = argparse.Namespace(
            model=options.model,
            data=options.data,
            prompt_field=options.prompt_field if options.data else None,
            completion_field=options.completion_field if options.data else None,
            data_split=None,
            data_config=None,
            cutoff=2048,
            skip_unusable=False,
        )
        source = model_source(arguments)
        self.tokenizer = load_tokenizer(source)
        transformers.utils.logging.set_verbosity_error()
        _, rows, _ = load_data(arguments, self.tokenizer)
        needed = max(512, options.pool * (options.repeats + 1))
        self.rows = [rows[i] for i in range(min(needed, len(rows)))]
        self.samples = [to_sample(r["input_ids"], r["labels"], r["sample_id"]) for r in self.rows]
        self.device = torch.device(options.device)
        self.base = (random_model(options.random, source) if options.random else load_model(source)).to(self.device)
        self.model = self.base
        if group == "lora":
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(
                self.base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.folder = tempfile.mkdtemp()
        self.matmul = choose_precision(self.base).matmul

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
            use_cpu=self.device.type == "cpu",
            report_to=[],
            max_steps=1,
            disable_tqdm=True,
        )

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def update(self) -> float:
        start = self.now()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.now() - start

    def full_data(self) -> Step:
        trainer = transformers.Trainer(
            self.model,
            self.arguments(transformers.TrainingArguments),
            train_dataset=datasets.Dataset.from_list(self.features(0)),
            data_collator=transformers.DataCollatorForSeq2Seq(self.tokenizer),
        )
        return self._trainer_step(trainer)

    def _trl_features(self) -> list[dict]:
        rows = (f for i in range(self.options.repeats + 1) for f in self.features(i))
        return [{"input_ids": f["input_ids"], "labels": f["labels"]} for f in rows]

    def trl(self) -> Step:
        import trl

        trainer = trl.SFTTrainer(
            self.model,
            self.arguments(trl.SFTConfig),
            train_dataset=datasets.Dataset.from_list(self._trl_features()),
            processing_class=self.tokenizer,
        )
        return self._trainer_step(trainer)

    def _trainer_step(self, trainer: transformers.Trainer) -> Step:
        trainer.optimizer = self.optimizer
        model = trainer.accelerator.prepare_model(self.model)
        trainer.current_gradient_accumulation_steps = 1

        def step(index: int) -> dict[str, float]:
            batch = trainer.data_collator(self.features(index))
            start = self.now()
            batches, count = trainer.get_batch_samples(iter([batch]), 1, self.device)
            trainer.training_step(model, batches[0], count)
            return {"train": self.now() - start, "optimizer": self.update()}

        return step

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.group == "autocast" else nullcontext()

    def eager(self) -> Step:
        """Written for reading, not speed: what the paper describes, in the obvious operations."""
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
            start = self.now()
            batch = collator(self.features(index)).to(self.device)
            self.model.eval()
            with torch.no_grad(), self.autocast():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            log_p = torch.log_softmax(logits[:, :-1].float(), -1)
            labels = batch["labels"][:, 1:]
            nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            del logits, log_p
            seconds["score"] = self.now() - start

            start = self.now()
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
            seconds["select"] = self.now() - start

            start = self.now()
            self.model.train()
            with self.autocast():
                loss = self.model(
                    input_ids=batch["input_ids"][kept],
                    attention_mask=batch["attention_mask"][kept],
                    labels=targets[kept],
                ).loss
            loss.backward()
            seconds["train"] = self.now() - start
            return seconds | {"optimizer": self.update()}

        return step

    def config(self, policy: str = "qtuning", **settings: object) -> QTuningConfig:
        """At the ratios of the command line and with the paper's order of tokens, unless others are given."""
        given = {"sample_ratio": self.options.sample_ratio, "token_ratio": self.options.token_ratio}
        return QTuningConfig(policy=policy, record=False, **(given | {"token_order": "keep_low"} | settings))

    def trainer(self, config: QTuningConfig, reference: dict | None = None) -> QTuningTrainer:
        return QTuningTrainer(
            self.model,
            self.arguments(transformers.TrainingArguments),
            train_dataset=datasets.Dataset.from_list(self.features(0)),
            processing_class=self.tokenizer,
            qtuning=config,
            reference_nll=reference,
        )

    def ours(self, sample_ratio: float, token_ratio: float, score_dtype: str, matmul: str = "auto") -> Step:
        settings = {"token_ratio": token_ratio, "score_dtype": score_dtype, "matmul": matmul}
        return self.selecting_step(self.trainer(self.config(sample_ratio=sample_ratio, **settings)))

    def mixin_over_trl(self) -> Step:
        import trl

        from qtuning_kernels import QTuningSFTTrainer

        trainer = QTuningSFTTrainer(
            self.model,
            self.arguments(trl.SFTConfig),
            train_dataset=datasets.Dataset.from_list(self._trl_features()),
            processing_class=self.tokenizer,
            qtuning=self.config(),
        )
        return self.selecting_step(trainer)

    def selecting_step(self, trainer: transformers.Trainer) -> Step:
        run = self._trainer_step(trainer)

        def step(index: int) -> dict[str, float]:
            seconds = run(index)
            phases = {phase: trainer._plan.clock.seconds[phase] for phase in PHASES}
            return phases | {"optimizer": seconds["optimizer"]}

        return step

    def like_for_like(self, step: Step) -> Step:
        """With the switch for float32 products as this package's default step sets it."""

        def run(index: int) -> dict[str, float]:
            with float32_matmul(self.matmul):
                return step(index)

        return run

    def variant(self, name: str) -> Step:
        ratios = (self.options.sample_ratio, self.options.token_ratio)
        build = {
            "full data": lambda: self.like_for_like(self.full_data()),
            "full data, TRL": lambda: self.like_for_like(self.trl()),
            "eager Q-Tuning": lambda: self.like_for_like(self.eager()),
            "ours 1×1": lambda: self.ours(1.0, 1.0, "model"),
            "ours": lambda: self.ours(*ratios, "auto"),
            "ours over TRL": self.mixin_over_trl,
        }
        for matmul in ("default", "onednn"):
            for dtype in ("model", "bfloat16"):
                build[f"ours, {matmul}, {dtype}"] = lambda d=dtype, m=matmul: self.ours(*ratios, d, m)
        return build[name]()
