"""Package layout; everything declarative is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "qtuning_kernels",
        "qtuning_kernels.pruning",
        "qtuning_kernels.report",
        "qtuning_kernels.triton_kernels",
    ],
    # another distribution owns the import name `triton_kernels`, so the folder installs inside the package
    package_data={"qtuning_kernels.report": ["templates/*"]},
    package_dir={"qtuning_kernels.triton_kernels": "triton_kernels"},
)
