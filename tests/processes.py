"""Runs of several processes on this machine's CPU, as torchrun starts them, and what the wrappers need there."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import accelerate
from accelerate.state import AcceleratorState, PartialState

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def run_processes(*command, processes=2, launcher=None, cwd=ROOT, timeout=240):
    """Runs a script or ``-m MODULE`` with its arguments, in one process or in many behind `launcher`, torchrun's."""
    before = [] if processes == 1 else launcher or [*TORCHRUN, str(processes)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *before, *map(str, command)],
        cwd=cwd, env=os.environ | environment, timeout=timeout, capture_output=True, text=True, check=False,
    )  # fmt: skip


def shard_on_cpus() -> None:
    """accelerate makes DDP of FSDP where there is no accelerator, and says nothing."""
    made = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = accelerate.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP

    AcceleratorState.__init__ = init


def deepspeed_uncompiled() -> None:
    """DeepSpeed compiles an operator for processes of one machine: minutes, behind a lock that a kill leaves behind."""
    # by its full name: `torch`, as an attribute of deepspeed.comm, is PyTorch
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
