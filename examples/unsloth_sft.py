"""Unsloth: its model, and TRL's trainer that it has patched: python examples/unsloth_sft.py MODEL DATA.jsonl OUTPUT"""

import sys

from unsloth import FastLanguageModel  # isort: skip - patches the libraries that follow
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from qtuning_kernels import QTuningConfig, QTuningMixin


class QTuningUnslothTrainer(QTuningMixin, SFTTrainer):
    pass


name, data, output = sys.argv[1:4]
model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=2048, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=8)
QTuningUnslothTrainer(
    model,
    SFTConfig(output, per_device_train_batch_size=8, max_steps=60),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=tokenizer,
    qtuning=QTuningConfig(sample_ratio=0.25, token_ratio=0.5),
).train()
