"""`QTuningTrainer`: the Hugging Face `Trainer` whose step prunes samples and tokens first."""

import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.data.samples import unpad
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.models.matmul import Precision
from qtuning_kernels.run_record.writer import RunRecord
from qtuning_kernels.training.accounting import Totals
from qtuning_kernels.training.distributed import gather
from qtuning_kernels.training.record_rows import sample_rows, step_row, token_rows
from qtuning_kernels.training.step import QTuningStep, StepPlan

STATE_FILE = "qtuning_state.safetensors"
logger = logging.get_logger(__name__)


class QTuningTrainer(Trainer):
    """A `transformers.Trainer` that trains each step on what Q-Tuning keeps of its batch.

    The batch of the dataloader, ``per_device_train_batch_size`` samples, is the selection pool. Everything
    else (schedulers, checkpoints, resuming, callbacks, mixed precision, clipping, logging) is `Trainer`'s
    own. The loss is the sum of nll over the kept tokens, divided by their number in the whole optimiser
    step, over all pools and processes.

    Args:
        model: a decoder-only causal language model of `transformers`, or a PEFT model around one.
        args: `transformers.TrainingArguments`.
        data_collator: default `PoolCollator`; any that gives padded ``input_ids``, ``labels`` (−100 outside
            the answer) and ``attention_mask`` will do.
        train_dataset: samples with ``input_ids``, ``labels`` and, if they have one, a stable ``sample_id``.
        eval_dataset, processing_class: as in `Trainer`.
        qtuning: the settings; default `QTuningConfig()`.
        **kwargs: further arguments of `Trainer`.

    Raises:
        ValueError: a model that is not supported, a pool of one, or settings that exclude each other.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        qtuning: QTuningConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.qtuning = QTuningConfig() if qtuning is None else qtuning
        pad = getattr(processing_class, "pad_token_id", None)
        super().__init__(
            model,
            args,
            PoolCollator(pad or 0) if data_collator is None else data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )
        self.causal_lm = CausalLM(self.model)
        self.causal_lm.check()
        self._refuse_unsupported()
        # the step divides by its own count of tokens, and accelerate must not divide again
        self.model_accepts_loss_kwargs = True
        self.totals = Totals()
        self._step: QTuningStep | None = None
        self._plan: StepPlan | None = None
        self._record: RunRecord | None = None
        self._window = Totals()  # since the last log
        self._score_age = 0.0
        self._resume_from: str | None = None
        self.add_callback(_StepEnd(self))

    def _refuse_unsupported(self) -> None:
        pool = self.args.per_device_train_batch_size
        if self.qtuning.selection_scope == "global":
            pool *= self.args.world_size
        if pool < 2 and self.qtuning.sample_ratio < 1:
            raise ValueError(
                f"per_device_train_batch_size={self.args.per_device_train_batch_size} is the selection pool, "
                "and of a pool of one nothing can be pruned; accepted: 2 or more (the paper uses 8)"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP expect the same number of forwards and backwards of every process, and this step "
                "makes as many as the kept samples of a process need; accepted: one process, or DDP"
            )
        for name, value, instead in (
            ("torch_compile", self.args.torch_compile, "compile the backbone: model.get_decoder().compile()"),
            ("label_smoothing_factor", self.args.label_smoothing_factor, "leave it 0"),
            ("compute_loss_func", self.compute_loss_func, "leave it out, the loss is nll of the kept tokens"),
        ):
            if value:
                raise ValueError(f"{name}={value!r} has no place in this trainer's step; {instead}")
        if self.args.n_gpu > 1:
            raise ValueError("nn.DataParallel is not supported; start one process per GPU, with torchrun or accelerate")
        half = [n for n, p in self.model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if half:
            warnings.warn(
                f"{len(half)} trainable parameters are not float32 (first: {half[0]}): with half-precision "
                "master weights most updates of a fine-tuning run round to nothing. Load the model with "
                "dtype=torch.float32 and set bf16=True for mixed precision.",
                stacklevel=3,
            )

    # what Trainer calls

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "sample_id" not in self._signature_columns:
            self._signature_columns += ["sample_id"]

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard):
            loader.device = None  # pools stay on the host, where they are taken apart
        return loader

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; ``resume_from_checkpoint=True`` takes the newest complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(latest_checkpoint(self.args.output_dir))
        self._step = None
        self.totals, self._window = Totals(), Totals()
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._resume_from = kwargs.get("resume_from_checkpoint")
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._record is not None:
                self._record.close()
                self._record = None

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """One optimiser step, already planned: the last entry is the plan, the others are None."""
        if self._step is None:
            self._begin()
        with torch.profiler.record_function("qtuning.plan"):
            start = time.perf_counter()
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            if not batches:
                return [], None
            data_seconds = time.perf_counter() - start
            plan = self._step.plan([unpad(batch) for batch in batches], epoch=self.state.epoch or 0.0)
            plan.clock.seconds["data"] = data_seconds
        if plan.num_kept == 0:
            warnings.warn(
                f"step {self.state.global_step + 1} trains on nothing: no sample of its pool is eligible "
                "(no trainable token, or a perplexity that is not finite)",
                stacklevel=2,
            )
        self._plan = plan
        return [None] * (len(batches) - 1) + [plan], plan.num_kept

    def training_step(
        self, model: nn.Module, inputs: StepPlan | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward over the plan's micro-batches; nothing for the pools before the last."""
        if inputs is None:
            return torch.zeros((), device=self.args.device)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        with inputs.clock.phase("train"):
            loss = self._step.train(inputs, self.accelerator.backward, lambda: self.accelerator.no_sync(model))
        if inputs.num_kept:
            inputs.totals.loss_first = inputs.totals.loss_last = sum(gather(loss.item())) / self.args.world_size
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Evaluation's loss, without logits: mean nll of the trainable tokens, nothing pruned."""
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            inputs = {name: value for name, value in inputs.items() if name != "sample_id"}
            return super().compute_loss(model, inputs, return_outputs)
        step = self._step or QTuningStep(
            model, self.causal_lm, self.qtuning, self.args.device, self.accelerator.autocast
        )
        loss = step.loss(unpad(inputs))
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs: StepPlan | None) -> float:
        return inputs.totals.flops_spent if isinstance(inputs, StepPlan) else 0.0

    def _track_num_input_tokens(self, inputs: StepPlan | None) -> None:
        if self.args.include_num_input_tokens_seen != "no" and inputs is not None:
            self.state.num_input_tokens_seen += inputs.totals.tokens_kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.steps:
            logs.update(self._logged())
            self._window = Totals()
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save and self._step is not None:
            metadata = {
                "totals": json.dumps(asdict(self.totals)),
                "matmul": self._step.precision.matmul,
                "score_dtype": self._step.precision.score_dtype,
            }
            self._step.cache.save(Path(output_dir) / STATE_FILE, metadata)

    # the run's own bookkeeping

    def _begin(self) -> None:
        """Before the first step: the step itself, what a resumed run brings along, and the record."""
        resumed = self._resume_from is not None
        state = Path(self._resume_from) / STATE_FILE if resumed else None
        metadata = _metadata(state) if state and state.exists() else {}
        precision = Precision(metadata["matmul"], metadata["score_dtype"]) if metadata else None
        self._step = QTuningStep(
            self.model_wrapped, self.causal_lm, self.qtuning, self.args.device, self.accelerator.autocast, precision
        )
        logger.info(str(self._step.precision))
        if metadata:
            self._step.cache.load(state)
            self.totals = Totals(**json.loads(metadata["totals"]))
        if self.qtuning.record and self.is_world_process_zero():
            self._record = RunRecord(
                Path(self.args.output_dir) / "record",
                resume_step=self.state.global_step if resumed else None,
                total_steps=self.state.max_steps,
                token_samples=self.qtuning.record_tokens,
                seed=self.args.seed,
            )
            self._record.write_run(
                configuration={
                    "qtuning": asdict(self.qtuning),
                    "precision": asdict(self._step.precision),
                    "training": self.args.to_sanitized_dict(),
                }
            )

    def _end_step(self) -> None:
        """After the optimiser: the step's accounts and its record."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        plan.totals.seconds = plan.clock.seconds
        self.totals.add(plan.totals)
        self._window.add(plan.totals)
        self._score_age = plan.score_age
        if not self.qtuning.record:
            return
        own = sample_rows(plan)
        rows = [row for part in gather(own) for row in part]
        if self._record is not None:
            step = self.state.global_step
            chosen = self._record.choose_token_samples(step, [row["keep"] for row in own])
            self._record.write_step(
                {"step": step, "epoch": self.state.epoch, "learning_rate": self._get_learning_rate()} | step_row(plan),
                rows,
                token_rows(plan, chosen, self.processing_class, self.qtuning),
            )

    def _logged(self) -> dict[str, float]:
        """The window since the last log, under ``qtuning/``."""
        window, count = self._window, max(1, sum(self._window.quadrant.values()))
        seconds = sum(window.seconds.values())
        logs = {
            "kept_samples": window.samples_kept / window.steps,
            "kept_tokens": window.tokens_kept / window.steps,
            "tokens_per_second": window.tokens_seen / seconds if seconds else math.nan,
            "supplemented": window.supplemented / window.steps,
            "ineligible": window.ineligible / window.steps,
            "flops_share": window.flops_spent / window.flops_full if window.flops_full else math.nan,
            **{f"q{q}": window.quadrant[q] / count for q in "01234"},
            **{f"seconds_{phase}": value / window.steps for phase, value in window.seconds.items()},
        }
        if self.qtuning.rescore_every > 1:
            logs["score_age_epochs"] = self._score_age
        return {f"qtuning/{name}": round(value, 6) for name, value in logs.items()}

    def qtuning_summary(self) -> dict[str, Any]:
        """Totals of the run, resumed parts included: the fields of `accounting.Totals`, and the precision."""
        return asdict(self.totals) | {"precision": str(self._step.precision) if self._step else None}


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def latest_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run. One that a kill left half-written is passed over.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = sorted(
        (f for f in Path(output_dir).glob("checkpoint-*") if f.name.split("-")[-1].isdigit()),
        key=lambda f: int(f.name.split("-")[-1]),
        reverse=True,
    )
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())  # Trainer writes it last
        except (OSError, ValueError):
            warnings.warn(f"{folder} is incomplete and passed over", stacklevel=2)
            continue
        return folder
    raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from")


class _StepEnd(TrainerCallback):
    """Times the optimiser and closes the accounts of a step before anything is logged or saved."""

    def __init__(self, trainer: QTuningTrainer) -> None:
        self.trainer = trainer
        self.start = 0.0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.trainer._plan is not None:
            self.start = self.trainer._plan.clock.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        plan = self.trainer._plan
        if plan is not None:
            plan.clock.seconds["optimizer"] = plan.clock.now() - self.start
        self.trainer._end_step()
