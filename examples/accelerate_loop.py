"""A loop of your own with accelerate, no trainer: python examples/accelerate_loop.py MODEL DATA.jsonl

DATA has one record a line with "prompt" and "completion".
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_kernels import QTuningConfig, select_batch
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.data.tokenization import load_sft_dataset

model_name, data = sys.argv[1:3]
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(model_name)
dataset, _ = load_sft_dataset(data, tokenizer)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=PoolCollator(tokenizer.pad_token_id or 0))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
config = QTuningConfig(sample_ratio=0.25, token_ratio=0.5)

for step, pool in zip(range(3), loader, strict=False):
    batch = select_batch(model, pool, config)  # the line that this package adds
    labels = accelerator.gather((batch["labels"][:, 1:] != -100).sum()).sum()
    loss = model(**batch, num_items_in_batch=labels).loss * accelerator.num_processes
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: {int(labels)} of {int((pool['labels'][:, 1:] != -100).sum())} tokens, loss {loss.item():.3f}")
