"""Quack's cross-entropy as entries of `gpu_static.py`'s table: CuTe DSL, compiled in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.gpu_kernels import VOCABULARY, Entry
from benchmarks.machine_code import read_cubin, run_tool

LIBRARY = "quack-kernels"
TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}  # as CuTe DSL names them
# what quack.cross_entropy.cross_entropy asks for: loss and lse of bfloat16 logits, then their gradient
KERNELS = {
    "cross-entropy forward": "CrossEntropy.compile(BFloat16, Int64, None, N, True, False, None, None)",
    "cross-entropy backward": "CrossEntropyBackward.compile(BFloat16, Int64, N, None)",
}
PROGRAM = """
from cutlass import BFloat16, Int64
from quack.cross_entropy import CrossEntropy, CrossEntropyBackward
N = {vocabulary}
{call}
"""


def entries(arch: str, divisible: bool) -> Iterator[Entry]:
    """Both kernels, without a loop: a thread holds its logits in registers. An odd vocabulary does not compile.

    Raises:
        ImportError: quack-kernels is not installed.
    """
    if arch not in TARGETS:
        return
    try:
        metadata.version(LIBRARY)
        compiler = f"nvidia-cutlass-dsl {metadata.version('nvidia-cutlass-dsl')}"
    except metadata.PackageNotFoundError as error:
        raise ImportError(error) from error
    for name, call in KERNELS.items():
        with tempfile.TemporaryDirectory() as folder:
            environ = {"QUACK_ARCH": arch, "CUTE_DSL_ARCH": TARGETS[arch], "CUDA_VISIBLE_DEVICES": ""}
            environ |= {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": folder, "QUACK_CACHE_DIR": f"{folder}/cache"}
            program = PROGRAM.format(vocabulary=VOCABULARY[divisible], call=call)
            done = subprocess.run([sys.executable, "-c", program], env=os.environ | environ, capture_output=True)
            if done.returncode:
                print(f"{arch} {LIBRARY} {name}: does not compile", flush=True)
                continue
            (cubin,) = Path(folder).glob("*.cubin")
            elf = run_tool("cuobjdump", "-elf", cubin)
            threads = int(re.search(r"EIATTR_REQNTID\s+Format:\s+\w+\s+Value:\s+0x(\w+)", elf).group(1), 16)
            (kernel,) = read_cubin(cubin.read_bytes(), arch, threads)
        tile = 8 * kernel.code.count("LDGSTS") * threads  # 16 bytes each, to shared memory
        kernel.shared += 2 * tile
        if not kernel.blocks_per_multiprocessor:
            print(f"{arch} {LIBRARY} {name}: a block does not fit", flush=True)
            continue
        yield Entry(LIBRARY, name, None, {}, tile=tile, compiled=kernel, compiler=compiler)
