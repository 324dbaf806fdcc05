"""A run that test_kill.py kills somewhere and starts again; prints nothing, leaves its checkpoints."""

import sys

import datasets
import torch
import transformers

import qtuning_kernels as qk
from tests.tiny import tiny_model, tiny_samples

torch.set_num_threads(1)
output, resume = sys.argv[1], sys.argv[2] == "resume"
trainer = qk.QTuningTrainer(
    tiny_model("llama"),
    transformers.TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=8,
        max_steps=40,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        seed=7,
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=datasets.Dataset.from_list(tiny_samples(64)),
    qtuning=qk.QTuningConfig(sample_ratio=0.25, rescore_every=2, score_dtype="bfloat16", matmul="default"),
)
trainer.train(resume_from_checkpoint=resume)
trainer.save_model(output)
