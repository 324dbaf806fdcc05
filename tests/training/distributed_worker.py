"""One process of a data-parallel run over gloo; started by test_distributed.py through torchrun."""

import argparse
import json
import os
import signal
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import save_file

import qtuning_kernels as qk
from tests.tiny import tiny_model, tiny_samples

parser = argparse.ArgumentParser()
parser.add_argument("output", type=Path)
parser.add_argument("--pool", type=int, required=True, help="samples of the pool shared by all processes")
parser.add_argument("--accumulation", type=int, default=2)
parser.add_argument("--scope", default="global")
parser.add_argument("--kill-rank", type=int)
options = parser.parse_args()

torch.set_num_threads(1)
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and rank == options.kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)


trainer = qk.QTuningTrainer(
    # float64, so that another order of additions does not show
    tiny_model("llama-tied").double(),
    transformers.TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.pool // world,
        gradient_accumulation_steps=options.accumulation,
        max_steps=5,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        seed=7,
        use_cpu=True,
        disable_tqdm=True,
        ddp_timeout=60,
    ),
    train_dataset=datasets.Dataset.from_list(tiny_samples(160, longest=16)),
    qtuning=qk.QTuningConfig(
        sample_ratio=0.25, selection_scope=options.scope, score_dtype="model", matmul="default", micro_batch_tokens=40
    ),
    callbacks=[Kill()],
)

tokens = []
plan = trainer.get_batch_samples


def counted(*args):
    batches, kept = plan(*args)
    tokens.append(sum(batch.labels.numel() for batch in batches[-1].batches))
    return batches, kept


trainer.get_batch_samples = counted
trainer.train()
everyone = [None] * world
if world > 1:
    torch.distributed.all_gather_object(everyone, tokens)
else:
    everyone = [tokens]
if rank == 0:
    save_file({n: p.detach().contiguous() for n, p in trainer.model.named_parameters()}, options.output / "w")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = {"tokens": everyone, "losses": losses, "summary": trainer.qtuning_summary()}
    (options.output / "result.json").write_text(json.dumps(result))
# everything is written; the interpreter's teardown beside gloo's threads aborts about once in ten runs
if world > 1:
    torch.distributed.barrier()
os._exit(0)
