"""Counts instructions in compiled GPU code: NVIDIA cubins (from Triton or nvcc) and AMD assembly.

A loop is a backward branch and what lies between it and its target; the innermost ones hold the work. What is
known for certain without a GPU is read here: instruction classes and access widths per trip, registers, spills,
shared memory. Elements per trip follow from the bytes that one thread loads (or, in a store-only loop, stores).
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# per multiprocessor: registers, register allocation unit per warp, most threads, most blocks, shared memory bytes
MULTIPROCESSOR = {
    "sm_80": (65536, 256, 2048, 32, 164 * 1024),
    "sm_90": (65536, 256, 2048, 32, 228 * 1024),
    "sm_100": (65536, 256, 2048, 32, 228 * 1024),
}


@dataclass
class Loop:
    """One innermost loop: its instructions in order, as mnemonics with modifiers."""

    start: int
    instructions: list[str]
    vendor: str = "nvidia"

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches `pattern` from its start."""
        return sum(bool(re.match(pattern, op)) for op in self.instructions)

    @property
    def load_widths(self) -> Counter:
        """Global loads by width in bits."""
        return _widths(self.instructions, "load", self.vendor)

    @property
    def store_widths(self) -> Counter:
        """Global stores by width in bits."""
        return _widths(self.instructions, "store", self.vendor)

    @property
    def load_bytes(self) -> int:
        """Bytes that one thread loads from global memory per trip."""
        return sum(bits // 8 * n for bits, n in self.load_widths.items())

    @property
    def store_bytes(self) -> int:
        """Bytes that one thread stores to global memory per trip."""
        return sum(bits // 8 * n for bits, n in self.store_widths.items())

    @property
    def exponentials(self) -> int:
        """Base-2 exponentials on the special-function unit."""
        return self.count(r"MUFU\.EX2" if self.vendor == "nvidia" else r"v_exp_f32")

    @property
    def barriers(self) -> int:
        """Block barriers and cross-lane exchanges."""
        return self.count(r"BAR|SHFL|REDUX|WARPSYNC" if self.vendor == "nvidia" else r"s_barrier|ds_|v_readlane")


@dataclass
class Kernel:
    """One compiled kernel: resources, and the innermost loops of its code."""

    name: str
    arch: str
    registers: int
    spill_bytes: int
    shared: int
    threads: int
    code: Loop  # all of it, as if it were one trip
    loops: list[Loop] = field(default_factory=list)
    spilled_registers: int = 0  # on AMD, where they may go to other registers than to memory
    flow: list[tuple[str, list[int]]] = field(default_factory=list)  # of NVIDIA: a mnemonic, and which may come next

    @cached_property
    def blocks_per_multiprocessor(self) -> int | None:
        """Resident blocks, limited by registers, threads and shared memory; None where the limits are not known."""
        if self.arch not in MULTIPROCESSOR:
            return None
        registers, unit, threads, blocks, shared = MULTIPROCESSOR[self.arch]
        per_warp = -(-self.registers * 32 // unit) * unit
        by_registers = registers // per_warp // (self.threads // 32)
        by_shared = shared // (self.shared + 1024) if self.shared else blocks
        return min(by_registers, threads // self.threads, blocks, by_shared)

    def main_loop(self) -> Loop | None:
        """The loop that does the kernel's work: most exponentials, then bytes moved."""
        return max(self.loops, key=lambda x: (x.exponentials, x.load_bytes + x.store_bytes), default=None)

    def store_only_loops(self) -> list[Loop]:
        """Loops that write global memory and read none of it."""
        return [x for x in self.loops if x.store_bytes and not x.load_bytes]


def _flow(
    instructions: list[tuple[int, str, str]], labels: dict[str, int], guarded: set[int]
) -> list[tuple[str, list[int]]]:
    """The control-flow graph; `guarded`: the positions of instructions that a predicate may switch off."""
    index = {position: i for i, (position, _, _) in enumerate(instructions)}
    flow = []
    for i, (position, op, target) in enumerate(instructions):
        name = op.split(".")[0]
        following = [index[labels[target]]] if target in labels else []
        if name in ("BRX", "JMX"):
            following = [index[label] for label in labels.values()]  # any of them, where the code does not say
        if i + 1 < len(instructions) and (position in guarded or name not in ("EXIT", "RET", "BRA", "BRX", "JMX")):
            following.append(i + 1)
        flow.append((op, following))
    return flow


def _widths(instructions: list[str], kind: str, vendor: str) -> Counter:
    widths: Counter = Counter()
    if vendor == "nvidia":
        prefix = ("LDG", "LDGSTS") if kind == "load" else ("STG",)
        for op in instructions:
            head, *modifiers = op.split(".")
            if head in prefix:
                # a plain access is 32 bits wide; narrower and wider ones say so
                known = {
                    "U8": 8,
                    "S8": 8,
                    "U16": 16,
                    "S16": 16,
                    "64": 64,
                    "128": 128,
                    "ENL2": 256,
                    "256": 256,
                }
                widths[next((known[m] for m in modifiers if m in known), 32)] += 1
        return widths
    pattern = re.compile(rf"(?:global|buffer|flat)_{kind}_(\w+)")
    known = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    for op in instructions:
        if match := pattern.match(op):
            name = match.group(1)
            short = 8 if "byte" in name else 16
            widths[next((bits for key, bits in known.items() if name.startswith(key)), short)] += 1
    return widths


def _innermost_loops(instructions: list[tuple[int, str, str]], labels: dict[str, int], vendor: str) -> list[Loop]:
    """`instructions`: (position, mnemonic, branch target or ""); `labels`: position that a label stands before."""
    spans = set()
    for position, _, target in instructions:
        # a branch to itself is the trap behind the last instruction, not a loop
        if target in labels and labels[target] < position:
            spans.add((labels[target], position))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [
        Loop(start, [op for position, op, _ in instructions if start <= position <= end], vendor)
        for start, end in sorted(inner)
    ]


def _tool(name: str) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else name


def run_tool(tool: str, *args: str | Path) -> str:
    """What one of the disassembler's tools prints; Triton brings them."""
    return subprocess.run([_tool(tool), *args], check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes, arch: str, threads: int, dynamic_shared: int = 0) -> list[Kernel]:
    """Every kernel in a cubin.

    Args:
        cubin: the ELF image that ptxas wrote (``asm["cubin"]`` of Triton, or a file of ``nvcc -cubin``).
        arch: "sm_90" and the like.
        threads: per block, for the number of resident blocks.
        dynamic_shared: shared memory in bytes that the launch adds to what the cubin declares.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        text = run_tool("nvdisasm", "-c", file.name)
    resources = {}
    pattern = r"Function (\S+):\s*\n\s*REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, usage):
        resources[name] = [int(n) for n in numbers]
    kernels = []
    for section in re.split(r"(?=\.section\s+\.text\.)", text):
        match = re.match(r"\.section\s+\.text\.([\w$.]+)", section)
        if not match or match.group(1) not in resources:
            continue
        instructions, labels, pending, guarded, local = [], {}, [], set(), 0
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                pending.append(label.group(1))
            elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
                position, op, rest = int(found.group(1), 16), found.group(3), found.group(4)
                labels.update(dict.fromkeys(pending, position))
                pending = []
                target = re.search(r"`\((\.L_x_\d+)\)", rest)
                instructions.append((position, op, target.group(1) if target and op.startswith("BRA") else ""))
                if found.group(2) or re.match(r"\s*!?U?P\w", rest):
                    guarded.add(position)
                local += op.startswith(("LDL", "STL"))
        name = match.group(1)
        registers, stack, shared, _ = resources[name]
        kernels.append(
            Kernel(
                name=name,
                arch=arch,
                registers=registers,
                # a stack without local accesses is not a spill
                spill_bytes=stack if local else 0,
                shared=shared + dynamic_shared,
                threads=threads,
                code=Loop(0, [op for _, op, _ in instructions if op != "NOP"]),
                loops=_innermost_loops(instructions, labels, "nvidia"),
                flow=_flow(instructions, labels, guarded),
            )
        )
    return kernels


def read_amdgcn(text: str, arch: str, threads: int, shared: int = 0) -> Kernel:
    """The kernel in AMD assembly (``asm["amdgcn"]``)."""

    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    instructions, labels, pending = [], {}, []
    for position, line in enumerate(text.splitlines()):
        if label := re.match(r"(\.LBB\w+):", line):
            pending.append(label.group(1))
        elif found := re.match(r"\s+((?:[sv]|ds|global|buffer|flat|scratch)_\w+)(.*)", line):
            labels.update(dict.fromkeys(pending, position))
            pending = []
            target = re.search(r"(\.LBB\w+)", found.group(2)) if "branch" in found.group(1) else None
            instructions.append((position, found.group(1), target.group(1) if target else ""))
    name = re.search(r"\.name:\s+(\w+)", text)
    return Kernel(
        name=name.group(1) if name else "kernel",
        arch=arch,
        registers=metadata("vgpr_count"),
        spill_bytes=metadata("private_segment_fixed_size"),
        shared=shared,
        threads=threads,
        code=Loop(0, [op for _, op, _ in instructions], "amd"),
        loops=_innermost_loops(instructions, labels, "amd"),
        spilled_registers=metadata("vgpr_spill_count"),
    )
