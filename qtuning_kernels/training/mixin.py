"""`QTuningMixin`: any Hugging Face trainer, on the part of each pool that Q-Tuning keeps."""

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.batches import BatchKind, put_together, take_apart
from qtuning_kernels.data.samples import Sample, without_labels
from qtuning_kernels.files import share
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.models.collectives import gather
from qtuning_kernels.models.matmul import Precision, float32_matmul
from qtuning_kernels.pruning.policies import Policy, make_policy
from qtuning_kernels.run_record.writer import RunRecord
from qtuning_kernels.training.accounting import Totals
from qtuning_kernels.training.checkpoints import latest_checkpoint
from qtuning_kernels.training.planner import StepPlan, StepPlanner
from qtuning_kernels.training.record_rows import evaluation_rows, sample_rows, step_row, token_rows
from qtuning_kernels.training.reference import ReferenceScores
from qtuning_kernels.training.support import refuse_unsupported

if TYPE_CHECKING:  # what stands behind the mixin in the bases
    from transformers import Trainer as Host
else:
    Host = object

STATE_FILE = "qtuning_state.safetensors"
logger = logging.get_logger(__name__)


class QTuningMixin(Host):
    """Put before `transformers.Trainer` or a subclass of it in the bases of a class of your own.

    A batch of the dataloader is a selection pool. The mixin changes what `get_batch_samples` returns and nothing else:
    as many batches as came, each of its kept samples only, labels −100 on pruned tokens, padding cut off; padded and
    padding-free batches alike. The step is the host's: loss, normalisation, gradient accumulation, wrappers.

    With several processes and ``selection_scope="global"`` the pools of all are one, and the kept samples are dealt out
    so that tokens balance; a process left with nothing gets a sample without labels.

    Args:
        *args, **kwargs: the host's.
        qtuning: the settings; default `QTuningConfig()`.
        reference_model, reference_nll: as in `ReferenceScores`, for a policy that compares with it; the first is moved
            to the run's device.

    Raises:
        ValueError: a model that is not supported, a pool of one, a wrapper in which this cannot work; from training, a
            batch that cannot be divided by samples.
    """

    model: nn.Module

    takes_weights = False  # whether the loss can weigh tokens

    def __init__(
        self,
        *args: Any,
        qtuning: QTuningConfig | None = None,
        reference_model: nn.Module | None = None,
        reference_nll: Mapping[int | str, Any] | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        self.qtuning = QTuningConfig() if qtuning is None else qtuning
        self.policy = make_policy(self.qtuning)
        if self.policy.weighted and not self.takes_weights:
            raise ValueError(
                f"policy {self.policy!r} weighs tokens, and the loss of {type(self).__name__} is its host's, which "
                "takes no weights; accepted: a policy that keeps or prunes, or QTuningTrainer"
            )
        super().__init__(*args, **kwargs)
        self.reference: ReferenceScores | None = None
        if "reference_nll" in self.policy.needs:
            model = reference_model and reference_model.to(self.args.device)
            self.reference = ReferenceScores(model, reference_nll)
        elif reference_model is not None or reference_nll is not None:
            raise ValueError(
                f"policy {self.policy!r} compares with no reference; accepted: without reference_model, reference_nll"
            )
        self.causal_lm = CausalLM(self.model)
        self.sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not self.sharded:  # or else its weights may be in parts already
            self.causal_lm.check()
        refuse_unsupported(self)
        policy: Any = getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
        if getattr(policy, "output_dtype", None) is not None:  # would round scores and losses as they leave the model
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)
        self.totals = Totals()
        self._planner: StepPlanner | None = None
        self._plan: StepPlan | None = None
        self._record: RunRecord | None = None
        self._window = Totals()  # since the last log
        self._score_age = 0.0
        self._resume_from: str | None = None
        self.add_callback(_Accounts(self))

    # what Trainer calls

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and "sample_id" not in self._signature_columns:
            self._signature_columns += ["sample_id"]

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard):
            loader.device = None  # pools stay on the host, where they are taken apart
        return loader

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the host's; ``resume_from_checkpoint=True`` takes the newest complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(latest_checkpoint(self._folder))
        self._resume_from = resume_from_checkpoint or None
        try:
            return super().train(self._resume_from, *args, **kwargs)
        finally:
            if self._record is not None:
                self._record.close()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """As many batches as the host would train on, cut to what is kept, and the number of their labels."""
        planner = self._planner or self._begin()
        with torch.profiler.record_function("qtuning.plan"):
            start = time.perf_counter()
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not batches:
                return batches, count
            pools, kinds = zip(*map(take_apart, batches), strict=True)
            seconds = time.perf_counter() - start
            state = self.state
            self._plan = plan = planner.plan(list(pools), state.epoch or 0.0, state.global_step, state.max_steps)
            plan.clock.data = seconds
            if not planner.selects:
                return batches, count
            triples = zip(plan.kept, pools, kinds, strict=True)
            batches = [_batch(kept, pool, kind, self.policy) for kept, pool, kind in triples]
            count = self._get_num_items_in_batch(batches, device)
            if self.policy.weighted:  # and the loss a mean over all tokens, pruned ones included
                seen = plan.totals.tokens_seen
                count = sum(gather(seen)) if self.args.average_tokens_across_devices else seen
        if count is None:
            if any((batch["labels"][:, 1:] == -100).all() for batch in batches):
                raise ValueError(
                    "a batch has no label left, and the host's loss is a mean over the labels of a batch; accepted: a "
                    "model or a compute_loss_func that takes num_items_in_batch, or a larger pool"
                )
            return batches, None
        return batches, torch.as_tensor(count).clamp(min=1)  # a step without labels has loss 0, not 0 / 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        plan, planner = self._plan, self._planner
        if plan is None or planner is None:  # a step of the caller's own, outside of `train`
            return self._step(model, inputs, *args, **kwargs)
        with plan.clock.phase("train"), float32_matmul(planner.precision.matmul):
            loss = self._step(model, inputs, *args, **kwargs)
        plan.loss = plan.loss + loss
        return loss

    def _step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step on a pool, timed as a whole."""
        return super().training_step(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host's, which writes nothing of a sharded state and says nothing; of a checkpoint it is a part."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or (_internal_call and output_dir):
            super().save_model(output_dir, _internal_call)
        else:
            kept = plugin.state_dict_type
            plugin.set_state_dict_type("FULL_STATE_DICT")
            try:
                super().save_model(output_dir, _internal_call)
            finally:
                plugin.set_state_dict_type(kept)  # that of checkpoints, and of resuming
        if self.args.should_save:
            share(Path(output_dir or cast(str, self.args.output_dir)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._window.steps:
            logs.update(self._logged())
            self._window = Totals()
        super().log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._planner is not None:
            metadata = {
                "totals": json.dumps(asdict(self.totals)),
                "matmul": self._planner.precision.matmul,
                "score_dtype": self._planner.precision.score_dtype,
            }
            path = Path(output_dir) / STATE_FILE if self.args.should_save else None
            self._planner.cache.save(path, metadata)

    # the run's own bookkeeping

    @property
    def _folder(self) -> Path:
        return Path(cast(str, self.args.output_dir))  # None on its way into the arguments only

    def _begin(self) -> StepPlanner:
        """Before the first step: the planner, what a resumed run brings along, and the record."""
        pool = getattr(self, "_train_batch_size", 2)  # `auto_find_batch_size` may have made it smaller
        if pool < 2 and getattr(self.policy, "sample_ratio", 1) < 1 and self.args.world_size == 1:
            raise ValueError(f"the batch size found is {pool}, the selection pool; accepted: 2 or more")
        self.causal_lm = CausalLM(self.model)  # `model_init` may have made another since
        if self.sharded:
            self.causal_lm.check(self.model)
        resumed = self._resume_from is not None
        state = Path(self._resume_from) / STATE_FILE if self._resume_from else None
        metadata = _metadata(state) if state and state.exists() else {}
        precision = Precision(metadata["matmul"], metadata["score_dtype"]) if metadata else None
        where = self.args.device, self.accelerator.autocast
        self._planner = planner = StepPlanner(
            self.model,
            self.causal_lm,
            self.qtuning,
            *where,
            precision,
            self.sharded,
            self.policy,
            self.args.seed,
            self.reference,
        )
        logger.info(str(planner.precision))
        if state and metadata:
            planner.cache.load(state)
            self.totals = Totals(**json.loads(metadata["totals"]))
        if self.qtuning.record and self.is_world_process_zero():
            self._record = RunRecord(
                self._folder / "record",
                resume_step=self.state.global_step if resumed else None,
                total_steps=self.state.max_steps,
                token_samples=self.qtuning.record_tokens,
                seed=self.args.seed,
            )
            self._record.write_run(
                configuration={
                    "qtuning": self.qtuning.as_record(),
                    "precision": asdict(planner.precision),
                    "training": self.args.to_sanitized_dict(),
                },
                evaluations=evaluation_rows(self.state.log_history),
            )
        return planner

    def _end_step(self) -> None:
        """After the optimiser: the step's accounts and its record."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        own = sample_rows(plan) if self.qtuning.record else []
        parts, losses, rows = zip(*gather((plan.totals, float(plan.loss), own)), strict=True)
        plan.totals = Totals.of_step(parts, sum(losses) / len(losses), plan.clock.seconds)
        self.totals.add(plan.totals)
        self._window.add(plan.totals)
        self._score_age = plan.score_age
        step = self.state.global_step
        if plan.totals.empty_steps:
            warnings.warn(
                f"step {step} trained on nothing: no sample of its pool is eligible "
                "(no trainable token, or a perplexity that is not finite)",
                stacklevel=2,
            )
        if self._record is not None:
            chosen = self._record.choose_token_samples(step, [row["keep"] for row in own])
            self._record.write_step(
                {"step": step, "epoch": self.state.epoch, "learning_rate": self._get_learning_rate()} | step_row(plan),
                chain(*rows),
                token_rows(plan, chosen, self.processing_class, self.qtuning),
            )

    def _logged(self) -> dict[str, float]:
        """The window since the last log, under ``qtuning/``."""
        window, placed = self._window, sum(self._window.quadrant.values())
        seconds = sum(window.seconds.values())
        logs = {
            "kept_samples": window.samples_kept / window.steps,
            "kept_tokens": window.tokens_kept / window.steps,
            "tokens_per_second": window.tokens_seen / seconds if seconds else math.nan,
            "flops_share": window.flops_spent / window.flops_full if window.flops_full else math.nan,
            **{f"seconds_{phase}": value / window.steps for phase, value in window.seconds.items()},
        }
        if placed:  # by a policy that has quadrants
            logs |= {name: getattr(window, name) / window.steps for name in ("supplemented", "ineligible")}
            logs |= {f"q{q}": number / placed for q, number in window.quadrant.items()}
        if self.qtuning.rescore_every > 1:
            logs["score_age_epochs"] = self._score_age
        return {f"qtuning/{name}": round(value, 6) for name, value in logs.items()}

    def qtuning_summary(self) -> dict[str, Any]:
        """Totals of the run, resumed parts included: the fields of `accounting.Totals`, and the precision."""
        return asdict(self.totals) | {"precision": str(self._planner.precision) if self._planner else None}


def _batch(kept: list[Sample], pool: list[Sample], kind: BatchKind, policy: Policy) -> dict[str, Any]:
    """A batch of what is kept, with a column of weights if there are any; never empty."""
    if policy.weighted:
        kind = kind._replace(columns=(*kind.columns, "token_weight"), fill=kind.fill | {"token_weight": 0.0})
    return put_together(kept or [without_labels(pool)], kind)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


class _Accounts(TrainerCallback):
    """Opens the accounts of a run, and closes those of a step before anything is logged or saved."""

    def __init__(self, trainer: QTuningMixin) -> None:
        self.trainer = trainer
        self.start: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._planner = self.trainer._plan = self.trainer._record = None
        self.trainer.totals, self.trainer._window = Totals(), Totals()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.trainer._plan is not None:
            self.start = self.trainer._plan.clock.now()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if (plan := self.trainer._plan) is not None:
            plan.clock.since(self.start, "optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer._end_step()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        if (record := self.trainer._record) is not None:
            record.write_run(evaluations=evaluation_rows(self.trainer.state.log_history))
