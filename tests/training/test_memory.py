"""Memory of a long run of a tiny model does not grow with its steps, whatever lengths they bring."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import random
import torch
import qtuning_kernels as qk, transformers
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.models.matmul import time_products
from tests.tiny import PRUNING, tiny_model
from tests.training.steps import gradients

torch.set_num_threads(1)
random.seed(0)
arguments = transformers.TrainingArguments("unused", per_device_train_batch_size=4, use_cpu=True, report_to=[])
# where a processor rounds such products to bfloat16, the scores alone go to oneDNN
exact = time_products([(64, 64)], 64).is_exact("onednn")
matmul = "onednn" if exact else "default"
config = qk.QTuningConfig(**PRUNING, record=False, score_dtype="bfloat16", matmul=matmul)
trainer = qk.QTuningTrainer(tiny_model(), arguments, qtuning=config)

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

def sample():  # lengths that no earlier step has had, as in real data
    tokens = [random.randrange(3, 90) for _ in range(random.randrange(8, 120))]
    return {"input_ids": tokens, "labels": [-100] * 3 + tokens[3:]}

for step in range(300):
    gradients(trainer, [PoolCollator()([sample() for _ in range(4)])])
    if step % 30 == 29:
        print(resident(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_flat_after_the_first_steps():
    """oneDNN keeps a compiled kernel for every shape it has met: without a bound on them this run grew from 810 to 1158
    MB. Measured every 30 of 300 steps with lengths that all differ: after the first 60, in which the caches fill, no
    more than 24 MB are added."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resident = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(resident) == 10
    assert max(resident[2:]) - resident[1] < 24 * 1024, resident
