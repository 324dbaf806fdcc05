"""TRL's SFTTrainer, one line changed: python examples/trl_sft.py MODEL DATA.jsonl OUTPUT

DATA has one record a line with "prompt" and "completion". Packing, losses and metrics are TRL's.
"""

import sys

from datasets import load_dataset
from trl import SFTConfig

from qtuning_kernels import QTuningConfig, QTuningSFTTrainer

model, data, output = sys.argv[1:4]
trainer = QTuningSFTTrainer(  # was: SFTTrainer(
    model,
    SFTConfig(output, per_device_train_batch_size=8, max_steps=3, learning_rate=1e-5, report_to=[], bf16=False),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    qtuning=QTuningConfig(sample_ratio=0.25, token_ratio=0.5),
)
trainer.train()
print(trainer.qtuning_summary())
