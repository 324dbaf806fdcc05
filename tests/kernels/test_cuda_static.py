"""What the compiler makes of the CUDA kernels: warnings, registers, spills, access widths and instructions.

Needs nvcc and the disassembler that the package triton brings; no GPU. The counts are those of `make bench`'s static
table. One architecture by default, the others with --slow.
"""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the disassembler comes with the package triton")
from benchmarks import compile_cuda

pytestmark = [
    pytest.mark.skipif(compile_cuda.nvcc() is None, reason="there is no nvcc"),
    pytest.mark.timeout(900),
]
slow = pytest.mark.slow

# instructions per element, most: of the forward, of the backward for nll alone, and of the backward for all three.
# The last meets 6.0 on Blackwell only, where pairs of float32 take one instruction.
BARS = {"sm_80": (8.5, 6.0, 6.75), "sm_90": (8.5, 6.0, 6.75), "sm_100": (8.5, 6.0, 6.0)}


@pytest.fixture(
    scope="module",
    params=["sm_90", pytest.param("sm_80", marks=slow), pytest.param("sm_100", marks=slow)],
)
def compiled(request):
    return request.param, compile_cuda.compile_all(request.param)


def select(kernels, **wanted):
    found = [k for what, k in kernels if all(what[name] == value for name, value in wanted.items())]
    assert found, f"no kernel is {wanted}"
    return found


def per_element(kernel, size):
    loop = kernel.main_loop()
    elements = loop.load_bytes / size
    return len(loop.instructions) / elements, loop.exponentials / elements


def row_loops(kernel):
    """The loops over a row. What the compiler has put behind the kernel's end to bring the threads of a warp together
    for the last shuffles jumps back as well, over that end on Ampere, and is not one."""
    return [
        loop
        for loop in kernel.loops
        if (loop.load_bytes or loop.store_bytes) and not loop.count(r"WARPSYNC\.COLLECTIVE|EXIT")
    ]


def test_every_instance_is_there(compiled):
    """4 dtypes × 3 forms, and backward with and without entropy, for equal and for other alignments."""
    _, kernels = compiled
    assert len(select(kernels, operator="token_stats")) == 12
    assert len(select(kernels, operator="combine")) == 12
    assert len(select(kernels, operator="token_stats_backward")) == 48


def test_nothing_spills(compiled):
    _, kernels = compiled
    assert {what["operator"]: k.name for what, k in kernels if k.spill_bytes} == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("form", ["linear", "negated"])
def test_full_occupancy(compiled, dtype, form):
    """At most 32 registers, so that eight blocks of 256 threads fill a multiprocessor."""
    _, kernels = compiled
    for kernel in (
        *select(kernels, operator="token_stats", dtype=dtype, form=form),
        *select(kernels, operator="token_stats_backward", dtype=dtype, form=form, same_lead=True),
    ):
        assert kernel.registers <= 32, kernel.name
        assert kernel.blocks_per_multiprocessor == 8, kernel.name


def test_every_hot_loop_moves_128_bits(compiled):
    """Whatever V and stride are: rows are cut at 16 bytes when the kernel runs, so there is no other loop. Not float64:
    on Blackwell the compiler takes its vectors apart into two 64-bit loads."""
    _, kernels = compiled
    for what, kernel in kernels:
        if not str(what["operator"]).startswith("token_stats") or what["dtype"] == "float64":
            continue
        loops = row_loops(kernel)
        assert loops, kernel.name
        for loop in loops:
            assert set(loop.load_widths) | set(loop.store_widths) == {128}, kernel.name


def test_no_barrier_in_the_loop(compiled):
    _, kernels = compiled
    for what, kernel in kernels:
        if str(what["operator"]).startswith("token_stats"):
            assert all(loop.barriers == 0 for loop in row_loops(kernel)), kernel.name


def test_forward_counts(compiled):
    arch, kernels = compiled
    (kernel,) = select(kernels, operator="token_stats", dtype="bfloat16", form="linear")
    instructions, exponentials = per_element(kernel, 2)
    assert instructions <= BARS[arch][0]
    assert exponentials <= 1.13


@pytest.mark.parametrize("has_entropy", [False, True], ids=["nll", "all"])
def test_backward_counts(compiled, has_entropy):
    arch, kernels = compiled
    wanted = {"operator": "token_stats_backward", "dtype": "bfloat16", "form": "linear", "same_lead": True}
    (kernel,) = select(kernels, **wanted, has_entropy=has_entropy)
    instructions, exponentials = per_element(kernel, 2)
    assert instructions <= BARS[arch][1 + has_entropy]
    assert exponentials == 1.0


def test_pruned_rows_are_stores_only(compiled):
    """The loop over a pruned row writes 16 bytes per thread and trip, and loads nothing."""
    _, kernels = compiled
    for kernel in select(kernels, operator="token_stats_backward"):
        (loop,) = kernel.store_only_loops()
        assert set(loop.store_widths) == {128}, kernel.name
        assert loop.count("LD") == loop.exponentials == 0, kernel.name


@slow
@pytest.mark.parametrize("arch", compile_cuda.ARCHITECTURES)
def test_compiles_without_a_warning(arch):
    for source in compile_cuda.SOURCES:
        assert compile_cuda.compile_source(source, arch)


def test_a_warning_is_an_error(tmp_path):
    """That the flag works at all: an unused variable must not pass."""
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void kernel() { int unused; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        compile_cuda.compile_source(source, "sm_90")


def test_architectures_are_those_of_the_build():
    """setup.py's default list and the one that is checked here must not drift apart."""
    text = (Path(__file__).parents[2] / "setup.py").read_text()
    listed = re.search(r'^ARCHITECTURES = "(.*)\+PTX"', text, re.MULTILINE).group(1)
    assert [f"sm_{number.replace('.', '')}" for number in listed.split(";")] == list(compile_cuda.ARCHITECTURES)
