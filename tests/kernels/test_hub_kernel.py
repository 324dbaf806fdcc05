"""The package for the Hugging Face `kernels` library: loaded as that library loads it, where this one is not."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import truth

ROOT = Path(__file__).parents[2]
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
PROGRAM = """
import importlib.util, json, sys
sys.modules["qtuning_kernels"] = None  # importing it is an error
import torch
folder, data = sys.argv[1:]
name = json.load(open(f"{folder}/metadata.json"))["id"]
spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
made = {}
for key, (logits, labels, upstream) in torch.load(data).items():
    leaf = logits.requires_grad_()
    stats = kernel.token_stats(leaf, labels)
    torch.autograd.backward(stats, upstream)
    made[key] = (*(x.detach() for x in stats), leaf.grad)
torch.save(made, data)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("make_hub_kernel", ROOT / "tools/hub_kernel/make.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker.make(tmp_path_factory.mktemp("hub") / "kernel")


def test_it_is_what_the_library_reads(project):
    """A folder per backend with the same sources, which the digest names, all their imports relative."""
    for backend in BACKENDS:
        folder = project / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["id"].startswith(f"_qtuning_kernels_{backend}_")
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": backend}
        sources = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
        assert metadata["digest"]["files"] == {
            name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for name, path in sources.items()
        }
        assert {"triton_kernels/token_stats.py", "kernels/functional.py", "__init__.py"} <= sources.keys()
        for name, path in sources.items():
            assert path.read_bytes() == (project / "torch-ext/qtuning_kernels" / name).read_bytes()
            for node in ast.walk(ast.parse(path.read_text())):
                names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert {x.split(".")[0] for x in names} <= {*sys.stdlib_module_names, "torch", "triton"}, name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_it_runs_where_the_package_is_not(project, tmp_path):
    cases = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(2, 3, 37, dtype=torch.float64) * 3).to(dtype)
        labels = torch.randint(0, 37, (2, 3)).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(-100))
        cases[str(dtype)] = (logits, labels, [torch.randn(2, 3) for _ in range(3)])
    data = tmp_path / "data.pt"
    torch.save(cases, data)
    command = [sys.executable, "-P", "-c", PROGRAM, str(project / "build/torch-cpu"), str(data)]
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key, (*stats, grad) in torch.load(data).items():
        logits, labels, upstream = cases[key]
        exact, same = (truth.stats(x, labels) for x in (logits.double(), logits.float()))
        for name, a, s, e in zip(("nll", "entropy", "lse"), stats, same, exact, strict=True):
            truth.assert_no_worse(name, a, s, e)
        (exact_grad,) = truth.grads(lambda x: truth.stats(x, labels), [logits.double()], upstream)  # noqa: B023
        terms = truth.logit_terms(logits, labels, upstream)
        if logits.dtype == torch.float32:
            (same_grad,) = truth.grads(lambda x: truth.stats(x, labels), [logits], upstream)  # noqa: B023
            truth.assert_grad_no_worse("gradient", grad, same_grad, exact_grad, terms)
        else:
            truth.assert_grad_rounded_once("gradient", grad, exact_grad, terms)
