"""The same charts as PNG and SVG files, for papers."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qtuning_kernels.files import write_atomic
from qtuning_kernels.report.figures import COLOURS, PHASE_COLOURS
from qtuning_kernels.report.plane import DENSE, Frame
from qtuning_kernels.run_record.schema import PHASES, QUADRANTS

_SIZE = (6.4, 4.4)  # inches


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        with write_atomic(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=200)
    return paths


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_labels(axis: Axis) -> None:
    """2 and 30 on a logarithmic axis, where the default is 2 × 10⁰."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))


def plane_picture(frame: Frame, folder: Path, second_axis: str) -> list[Path]:
    """The plane of one frame. Points are rasterised in the SVG, axes and text are not."""
    figure, axes = _axes("perplexity", second_axis)
    for quadrant, keep, name, points in frame.groups():
        if len(points):
            axes.scatter(
                points.ppl,
                points.entropy,
                s=(12 if keep else 8) / (3 if len(frame.points) > DENSE else 1),
                color=COLOURS[quadrant],
                marker="o" if keep else "x",
                linewidths=0.7,
                alpha=0.8 if keep else 0.5,
                label=name,
                rasterized=True,
            )
    for name, value in frame.thresholds.items():
        line = axes.axvline if name.startswith("ppl") else axes.axhline
        line(value, color="#7F7F7F", linewidth=1, linestyle="--" if name.endswith("high") else ":")
    axes.set_xscale("log")
    _plain_labels(axes.xaxis)
    if len(frame.points):
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return _save(figure, folder, "plane")


def _stack(axes: Axes, curves: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> None:
    """Stacked areas, or stacked bars where there are too few steps for an area."""
    names, colours = zip(*columns.values(), strict=True)
    values = [curves[column].fillna(0).to_numpy() for column in columns]
    if len(curves) > 1:
        axes.stackplot(curves.step, values, labels=names, colors=colours, linewidth=0)
        return
    bottom = 0.0
    for height, name, colour in zip(values, names, colours, strict=True):
        axes.bar(curves.step, height, bottom=bottom, label=name, color=colour)
        bottom = bottom + height


def curve_pictures(curves: pd.DataFrame, folder: Path, quadrants: bool, second_axis: str) -> list[Path]:
    """Shares, mean perplexity and entropy, loss and time over the run."""
    style: dict[str, Any] = {"marker": "o"} if len(curves) < 3 else {}
    paths = []

    figure, axes = _axes("optimiser step", "share of samples" if quadrants else "share that is trained on")
    if quadrants:
        _stack(axes, curves, {f"q{q}": (name, COLOURS[q]) for q, name in QUADRANTS.items()})
        axes.plot(curves.step, curves.supplemented, "k:", label="supplemented, of the kept", **style)
    else:
        axes.plot(curves.step, curves.samples_kept, label="samples", **style)
        axes.plot(curves.step, curves.tokens_kept, label="tokens", **style)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    paths += _save(figure, folder, "shares")

    figure = Figure(figsize=_SIZE, layout="constrained")
    for axes, name, label in zip(
        figure.subplots(2, 1, sharex=True), ("ppl", "entropy"), ("perplexity", second_axis), strict=True
    ):
        axes.plot(curves.step, curves[f"{name}_mean"], color="#0072B2", label="mean", **style)
        axes.plot(curves.step, curves[f"{name}_median"], "--", color="#E69F00", label="median", **style)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    _plain_labels(figure.axes[0].yaxis)
    figure.axes[0].legend(frameon=False)
    figure.axes[1].set_xlabel("optimiser step")
    paths += _save(figure, folder, "ppl_entropy")

    figure, axes = _axes("optimiser step", "loss (nats per kept token)")
    axes.plot(curves.step, curves.loss, color="#0072B2", **style)
    paths += _save(figure, folder, "loss")

    figure, axes = _axes("optimiser step", "seconds per step")
    _stack(axes, curves, {f"seconds_{p}": (name, PHASE_COLOURS[p]) for p, name in PHASES.items()})
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    paths += _save(figure, folder, "time")
    return paths
