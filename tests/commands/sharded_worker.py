"""The command line where FSDP and DeepSpeed work on CPUs; test_processes.py starts it with torchrun."""

import sys

from transformers.integrations import is_deepspeed_available

from qtuning_kernels.commands.cli import main
from tests.processes import deepspeed_uncompiled, shard_on_cpus

shard_on_cpus()
if is_deepspeed_available():
    deepspeed_uncompiled()
sys.exit(main())
