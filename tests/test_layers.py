"""The package's shape: layers that import only from those below them, short files, few lines, documented names."""

import ast
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import qtuning_kernels as qk

ROOT = Path(__file__).parent.parent
PACKAGE = "qtuning_kernels"
# each imports only from those before it and from itself
LAYERS = (
    *("arguments", "files", "config", "kernels", "pruning", "data", "models"),
    *("run_record", "training", "report", "demo", "commands", "__main__"),
)
KERNELS_OF_TRITON = "triton_kernels"  # beside the package, installed as a folder of it
ALLOWED_TO_TRITON = ("kernels.contract", KERNELS_OF_TRITON)
MOST_LINES_OF_A_FILE = 350
# 11,000 is the aim; over it are the policies, many processes, what users bring as data, the command line, the report
MOST_LINES = 12_856
SOURCES = (PACKAGE, KERNELS_OF_TRITON, "csrc")
MADE = {".so", ".json", ".pyc"}  # by a build


def modules(root: Path) -> dict[str, Path]:
    """Every module by its name within the package. The package's own `__init__`, which gathers names, is none."""
    found = {}
    for folder in (root / PACKAGE, root / KERNELS_OF_TRITON):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(root if folder.name == KERNELS_OF_TRITON else folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name:
                found[name] = path
    return found


def public_names(root: Path) -> dict[str, str]:
    """The module that each name of the package's own `__init__` comes from."""
    nodes = ast.walk(ast.parse((root / PACKAGE / "__init__.py").read_text()))
    return {
        alias.name: node.module.removeprefix(f"{PACKAGE}.")
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}.")
        for alias in node.names
    }


def imported(name: str, path: Path, known: Mapping[str, Path], public: Mapping[str, str]) -> Iterator[str]:
    """The modules of the package that one imports, wherever in the file: within functions too.

    A public name of the package counts as the module that it comes from. What is imported by a string (`importlib`) is
    not seen; backends are chosen that way.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = [PACKAGE, *package.split(".")] if package else [PACKAGE]
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            wanted = [(base, alias.name) for alias in node.names]
        else:
            continue
        for module, attribute in wanted:
            top, _, inner = module.partition(".")
            if top == PACKAGE:
                whole = f"{inner}.{attribute}".lstrip(".")
                if not inner and attribute in public:
                    yield public[attribute]
                else:
                    yield whole if attribute and whole in known else inner


def import_graph(root: Path) -> dict[str, set[str]]:
    known, public = modules(root), public_names(root)
    return {name: set(imported(name, path, known, public)) - {name} for name, path in known.items()}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle through each import that closes one."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def wrong_layers(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports from a later layer, or from no layer at all."""
    wrong = []
    for name, others in sorted(graph.items()):
        for other in sorted(others):
            layer, of_other = name.split(".")[0], other.split(".")[0]
            if layer == KERNELS_OF_TRITON:
                fine = any(other == allowed or other.startswith(f"{allowed}.") for allowed in ALLOWED_TO_TRITON)
            else:
                fine = of_other in LAYERS[: LAYERS.index(layer) + 1]
            if not fine:
                wrong.append(f"{name} imports {other or PACKAGE}")
    return wrong


def line_counts(root: Path, paths: list[str]) -> dict[str, int]:
    return {
        path: len((root / path).read_text().splitlines())
        for path in paths
        if path.split("/")[0] in SOURCES and Path(path).suffix not in MADE and (root / path).exists()
    }


def too_long(counts: Mapping[str, int]) -> dict[str, int]:
    return {path: count for path, count in counts.items() if count > MOST_LINES_OF_A_FILE}


def undocumented(module) -> list[str]:
    return [name for name in module.__all__ if not (getattr(module, name).__doc__ or "").strip()]


@pytest.fixture(scope="module")
def sources() -> dict[str, int]:
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: build products cannot be told from sources")
    return line_counts(ROOT, listed.stdout.splitlines())


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in modules(ROOT)} == {*LAYERS, KERNELS_OF_TRITON}


def test_imports_make_no_circle():
    assert circles(import_graph(ROOT)) == []


def test_layers_import_only_from_those_before_them():
    assert wrong_layers(import_graph(ROOT)) == []


def test_files_are_short(sources):
    assert too_long(sources) == {}


def test_the_whole_is_small(sources):
    assert sum(sources.values()) <= MOST_LINES


def test_public_names_are_documented():
    assert undocumented(qk) == []


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_graph_sees_circles_and_wrong_layers(tmp_path):
    """A made-up package with one of each: a lazy, a relative and a whole-module import, and Triton's own rule."""
    write(
        tmp_path,
        {
            "qtuning_kernels/__init__.py": "from qtuning_kernels.commands.cli import main\n",
            "qtuning_kernels/config.py": "def f():\n    from qtuning_kernels.data import samples\n",
            "qtuning_kernels/data/__init__.py": "",
            "qtuning_kernels/data/samples.py": "from .batches import x\nfrom ..config import y\n",
            "qtuning_kernels/data/batches.py": "import qtuning_kernels.data.samples\n",
            "qtuning_kernels/kernels/contract.py": "",
            "qtuning_kernels/kernels/dispatch.py": "import importlib\nfrom qtuning_kernels import main\n",
            "qtuning_kernels/commands/cli.py": "import torch\nfrom qtuning_kernels.data.samples import Sample\n",
            "triton_kernels/__init__.py": "from qtuning_kernels.triton_kernels.rows import f\n",
            "triton_kernels/rows.py": "from ..kernels.contract import A\nfrom ..kernels.dispatch import b\n",
        },
    )
    graph = import_graph(tmp_path)
    assert graph == {
        "config": {"data.samples"},
        "data": set(),
        "data.samples": {"data.batches", "config"},
        "data.batches": {"data.samples"},
        "kernels.contract": set(),
        "kernels.dispatch": {"commands.cli"},
        "commands.cli": {"data.samples"},
        "triton_kernels": {"triton_kernels.rows"},
        "triton_kernels.rows": {"kernels.contract", "kernels.dispatch"},
    }
    assert circles(graph) == [
        ["data.samples", "config", "data.samples"],
        ["data.samples", "data.batches", "data.samples"],
    ]
    assert wrong_layers(graph) == [
        "config imports data.samples",
        "kernels.dispatch imports commands.cli",
        "triton_kernels.rows imports kernels.dispatch",
    ]


def test_the_counts_see_long_files(tmp_path):
    write(
        tmp_path,
        {
            "csrc/long.cu": "\n" * 351,
            "csrc/short.h": "\n" * 350,
            "qtuning_kernels/report/templates/page.html": "a\nb",
            "qtuning_kernels/built.json": "{}\n",
            "tests/long.py": "\n" * 400,
        },
    )
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    counts = line_counts(tmp_path, [*paths, "csrc/deleted.h"])
    assert counts == {"csrc/long.cu": 351, "csrc/short.h": 350, "qtuning_kernels/report/templates/page.html": 2}
    assert too_long(counts) == {"csrc/long.cu": 351}


def test_a_name_without_a_docstring_is_seen():
    class Module:
        __all__ = ("with_one", "without")

        def with_one():
            """One line."""

        def without(): ...

    assert undocumented(Module) == ["without"]
