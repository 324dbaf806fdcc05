"""What is packed: the sdist has all that git has; a build without PyTorch makes a package that says what to type."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qtuning_kernels.kernels.contract import BackendUnavailableError
from qtuning_kernels.kernels.extension import load_extension
from tests.test_layers import KERNELS_OF_TRITON, PACKAGE, ROOT

OF_HOSTS_AND_EDITORS = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
JUNK = ("csrc/a.so", "tests/__pycache__/a.pyc", "runs/a/summary.json", "build/a.o", "benchmarks/results/gpu/a/a.log")


def setup_py(folder: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing to compare with")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def unpacked(tracked, tmp_path_factory) -> Path:
    """The sdist of a checkout in which somebody has worked, unpacked."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in JUNK:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    setup_py(checkout, "sdist", "--dist-dir", str(folder))
    (file,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(file, folder)
    return folder / file.name.removesuffix(".tar.gz")


def test_the_sdist_has_what_git_has(tracked, unpacked):
    """It lacked csrc/cuda, the helpers of the tests, and the documents."""
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert packed - made == {name for name in tracked if not name.startswith(OF_HOSTS_AND_EDITORS)}


def test_pictures_and_links_of_the_readme_hold_on_pypi(unpacked, tmp_path):
    """There its relative addresses lead nowhere, so that no picture shows."""
    folder = tmp_path / "project"
    shutil.copytree(unpacked, folder)
    pyproject, address = folder / "pyproject.toml", "https://example.org/owner/name"
    pyproject.write_text(pyproject.read_text().replace("urls = { ", f'urls = {{ Source = "{address}", '))
    setup_py(folder, "egg_info", "--egg-base", str(tmp_path))
    (metadata,) = tmp_path.glob("*.egg-info/PKG-INFO")
    text = metadata.read_text()
    assert f"Project-URL: Source, {address}" in text
    assert "Description-Content-Type: text/markdown" in text
    addresses = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text)
    assert all(re.match("https:|#", found) for _, found in addresses)
    assert {found for mark, found in addresses if mark} == {
        f"{address}/raw/v0.1.0/{picture}" for picture in ("docs/plane.png", "benchmarks/results/step.png")
    }
    for _, found in addresses:
        if found.startswith(f"{address}/"):
            assert (ROOT / found.partition("/v0.1.0/")[2].partition("#")[0]).exists()


def test_an_isolated_build_says_what_to_type(unpacked, tmp_path):
    """It downloaded another PyTorch of 2.6 GB to compile for; and every wheel lacked pruning/policies."""
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    printed = setup_py(unpacked, "bdist_wheel", "--dist-dir", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert "the native extension is left out: PyTorch was not there at build time" in printed
    (file,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(file) as wheel:
        modules = {name for name in wheel.namelist() if name.endswith(".py")}
        assert f"{PACKAGE}/report/templates/report.html" in wheel.namelist()
        record = wheel.extract(f"{PACKAGE}/native_build.json", tmp_path)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.py")}
    assert modules == sources | {
        f"{PACKAGE}/{KERNELS_OF_TRITON}/{p.name}" for p in (ROOT / KERNELS_OF_TRITON).glob("*.py")
    }
    with pytest.raises(BackendUnavailableError) as raised:
        load_extension("_C", record, "PyTorch and a C++ compiler")
    command = f"{sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps --editable '{ROOT}'"
    assert command in str(raised.value)
    assert "\n" not in str(raised.value)
