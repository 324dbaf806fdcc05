"""Package layout; everything declarative is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "qtuning_kernels",
        "qtuning_kernels.commands",
        "qtuning_kernels.pruning",
        "qtuning_kernels.triton_kernels",
    ],
    # another distribution owns the import name `triton_kernels`, so the folder installs inside the package
    package_dir={"qtuning_kernels.triton_kernels": "triton_kernels"},
)
