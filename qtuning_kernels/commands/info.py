"""`qtuning info`: versions, devices, and which backend serves each."""

import argparse
import os
import warnings

from qtuning_kernels.commands.terminal import program
from qtuning_kernels.demo import assets
from qtuning_kernels.kernels import dispatch
from qtuning_kernels.run_record.writer import DISTRIBUTIONS, installed_versions


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        "info",
        help="print versions, devices and backends",
        description="Print versions, devices, which backend serves each, and why one is not available.",
    )


def run(arguments: argparse.Namespace) -> None:
    import torch

    from qtuning_kernels.models.matmul import SMOLLM2_SHAPES, time_products

    versions = installed_versions()
    print("versions")
    print(f"  {'python':<16} {versions['python']} on {versions['platform']}")
    for name in DISTRIBUTIONS:
        print(f"  {name:<16} {versions.get(name, 'not installed')}")
    print("devices")
    print(f"  {'cpu':<16} {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"  {f'cuda:{index}':<16} {torch.cuda.get_device_name(index)}")
    there = [name for name in ("cuda", "xpu", "mps") if getattr(torch, name).is_available()]
    if not there:
        print(f"  {'cuda, xpu, mps':<16} not available in this process")
    print("backends")
    for name in dispatch.BACKENDS:
        print(f"  {name:<16} {dispatch.unavailable_reason(name) or 'available'}")
    forced = os.environ.get("QTUNING_BACKEND")
    print(f"  {'QTUNING_BACKEND':<16} {forced or 'not set: the fastest one that is available'}")
    for device in ["cpu", *there]:
        print(f"  {f'{device} tensors':<16} {_serving(device)}")
    for device, reason in dispatch.ORDER_REASON.items():
        print(f"  {f'{device} order':<16} {', '.join(dispatch.default_order(device))}: {reason}")
    times = time_products(SMOLLM2_SHAPES, 512)
    print("products")
    for name, milliseconds in times.milliseconds.items():
        print(f"  {name:<16} {milliseconds:.1f} ms, error {times.error[name]:.1e}")
    print(f"  {'float32 by':<16} {times.matmul()}: the faster of those as exact as float32")
    print("embedded")
    for asset in (assets.MODEL, assets.DATA):
        folder = assets.asset_folder(asset) if assets.is_fetched(asset) else f"not fetched; run: {program()} fetch"
        print(f"  {asset.name:<22} {folder}")


def _serving(device: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is printed above
        try:
            return f"served by {dispatch.backend(device)}"
        except (ValueError, dispatch.BackendUnavailableError) as error:
            return f"error: {error}"
