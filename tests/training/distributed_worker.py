"""One process of a run over gloo, wrapped as asked; test_distributed.py and test_sharded.py start it with torchrun."""

import argparse
import json
import os
import signal
from collections import Counter
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import save_file

import qtuning_kernels as qk
from tests.processes import deepspeed_uncompiled, shard_on_cpus
from tests.tiny import tiny_model, tiny_samples

parser = argparse.ArgumentParser()
parser.add_argument("output", type=Path)
parser.add_argument("--pool", type=int, required=True, help="samples of the pool shared by all processes")
parser.add_argument("--accumulation", type=int, default=2)
parser.add_argument("--scope", default="global")
parser.add_argument("--kill-rank", type=int)
parser.add_argument("--wrapper", choices=["ddp", "fsdp2", "zero1", "zero2", "zero3"], default="ddp")
parser.add_argument("--head", choices=["tied", "untied", "saved"], default="tied")
parser.add_argument("--lora", action="store_true")
parser.add_argument("--dtype", default="float64")  # so that another order of additions does not show
parser.add_argument("--rescore-every", type=int, default=1)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--save-steps", type=int)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--policy", default="qtuning")
parser.add_argument("--count", action="store_true", help="collectives between the ends of steps 2 and 3")
options = parser.parse_args()
torch.set_num_threads(1)
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


wrapping = {}
if options.wrapper == "fsdp2":
    shard_on_cpus()
    wrapping = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                        "cpu_ram_efficient_loading": False,
                        "state_dict_type": "SHARDED_STATE_DICT"},
    }  # fmt: skip
elif options.wrapper.startswith("zero"):
    deepspeed_uncompiled()
    wrapping = {
        "optim": "adamw_torch",
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            # a tiny model's parameters would all be small enough to stay whole
            "zero_optimization": {"stage": int(options.wrapper[-1]), "stage3_param_persistence_threshold": 0,
                                  "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
        },
    }  # fmt: skip


class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and rank == options.kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)


class Count(transformers.TrainerCallback):
    """Every collective is an operator of the dispatcher's, also those that DDP's reducer starts."""

    def __init__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.counts = {}

    def on_step_end(self, args, state, control, **kwargs):
        if options.count and state.global_step == 2:
            self.profile.start()
        elif options.count and state.global_step == 3:
            self.profile.stop()
            names = (event.name for event in self.profile.events())
            self.counts.update(Counter(name for name in names if name.startswith("c10d::")))


def build_model():
    model = tiny_model("llama-tied" if options.head == "tied" else "llama").to(getattr(torch, options.dtype))
    if not options.lora:
        return model
    import peft

    torch.manual_seed(3)
    saved = ["lm_head"] if options.head == "saved" else None
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


model = build_model()  # before DeepSpeed would take it apart while it is made
arguments = transformers.TrainingArguments(
    output_dir=str(options.output),
    per_device_train_batch_size=options.pool // world,
    gradient_accumulation_steps=options.accumulation,
    max_steps=5,
    learning_rate=1e-3,
    report_to=[],
    save_strategy="steps" if options.save_steps else "no",
    save_steps=options.save_steps or 500,
    logging_steps=1 if not options.count else 100,  # a log of Trainer's gathers the loss
    seed=7,
    use_cpu=True,
    disable_tqdm=True,
    ddp_timeout=60,
    ddp_find_unused_parameters=False if options.count else None,  # DDP would reduce a list of them, too
    bf16=options.bf16,
    **wrapping,
)
count = Count()
trainer = qk.QTuningTrainer(
    model,
    arguments,
    train_dataset=datasets.Dataset.from_list(tiny_samples(160, longest=16)),
    qtuning=qk.QTuningConfig(
        policy=options.policy,
        sample_ratio=0.25,
        selection_scope=options.scope,
        score_dtype="model",
        matmul="default",
        micro_batch_tokens=40,
        rescore_every=options.rescore_every,
    ),
    callbacks=[Kill(), count],
)

tokens, exact = [], []
plan = trainer.get_batch_samples


def counted(*args):
    batches, count = plan(*args)
    nll = trainer._plan.scores[0].nll
    exact.append(bool((nll.bfloat16().float() != nll).any()))
    tokens.append(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    return batches, count


trainer.get_batch_samples = counted
trainer.train(resume_from_checkpoint=options.resume or None)
everyone = [None] * world
if world > 1:
    torch.distributed.all_gather_object(everyone, tokens)
else:
    everyone = [tokens]
wrapped = type(trainer.model_wrapped).__name__
weights = {}
if options.wrapper == "zero3":
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    partitioned = sum(p.ds_tensor.numel() < p.ds_numel for p in trainer.model.parameters())
else:
    partitioned = 0
    for name, parameter in trainer.model.named_parameters():
        partitioned += hasattr(parameter, "full_tensor")
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        weights[name] = whole.detach().contiguous().clone()
fused = trainer.fused()  # every process asks the model
trainer.save_model(str(options.output / "final"))
if rank == 0:
    save_file(weights, options.output / "w")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = {"tokens": everyone, "losses": losses, "summary": trainer.qtuning_summary(), "wrapped": wrapped,
              "partitioned": partitioned, "fused": fused, "exact": exact, "collectives": count.counts}  # fmt: skip
    (options.output / "result.json").write_text(json.dumps(result))
# everything is written; the interpreter's teardown beside gloo's threads aborts about once in ten runs
if world > 1:
    torch.distributed.barrier()
os._exit(0)
