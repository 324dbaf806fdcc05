"""Hugging Face's Trainer, on a small model and data of your own: python examples/trainer.py MODEL DATA.jsonl OUTPUT

DATA has one record a line with "prompt" and "completion".
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from qtuning_kernels import QTuningConfig, QTuningTrainer
from qtuning_kernels.data.tokenization import load_sft_dataset

model_name, data, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model_name)
dataset, report = load_sft_dataset(data, tokenizer)
print(report)

trainer = QTuningTrainer(
    AutoModelForCausalLM.from_pretrained(model_name, dtype="float32"),
    TrainingArguments(output, per_device_train_batch_size=8, max_steps=3, learning_rate=1e-5, report_to=[]),
    train_dataset=dataset,
    processing_class=tokenizer,
    qtuning=QTuningConfig(sample_ratio=0.25, token_ratio=0.5),
)
trainer.train()
print(trainer.qtuning_summary())
