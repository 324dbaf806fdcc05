"""The report's charts as Plotly figures, which carry their data into the page."""

import html
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from qtuning_kernels.report.plane import DENSE, Frame
from qtuning_kernels.report.summary import Number, truth
from qtuning_kernels.run_record.schema import PHASES, QUADRANT_LABELS, QUADRANTS

# Okabe and Ito's palette, which stays apart under every common colour blindness
COLOURS = {1: "#D55E00", 2: "#0072B2", 3: "#CC79A7", 4: "#009E73", 0: "#7F7F7F"}
PHASE_COLOURS = dict(zip(PHASES, ("#7F7F7F", "#E69F00", "#D55E00", "#CC79A7", "#0072B2", "#009E73"), strict=True))
_LOSS_COLOUR, _MEDIAN_COLOUR = "#0072B2", "#E69F00"


def _theme(ink: str, quiet: str, grid: str, surface: str) -> dict:
    axis = {"gridcolor": grid, "linecolor": grid, "zeroline": False, "automargin": True}
    layout = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": surface, "bordercolor": grid, "font": {"color": ink}},
        "colorway": [ink],
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": quiet, "activecolor": ink},
        "margin": {"l": 56, "r": 12, "t": 36, "b": 48},
    }
    return go.layout.Template(layout=layout).to_plotly_json()


THEMES = {
    "light": _theme("#1b1f24", "#57606a", "#d8dee4", "#ffffff"),
    "dark": _theme("#e6e9ec", "#a0aab4", "#39414a", "#1c2127"),
}


def plane_figures(frames: list[Frame], sample_number: dict, second_axis: str) -> list[go.Figure]:
    """One figure per frame, all with the same traces and axes, so that one replaces the other.

    Each point carries its number in the page's list of samples, its step, its kept and all tokens, its role
    and whether it was supplemented.
    """
    drawn = {group[:2] for frame in frames for group in frame.groups() if len(group[3])}
    dense = any(len(frame.points) > DENSE for frame in frames)
    layout = _plane_layout(frames, second_axis)
    figures = []
    for frame in frames:
        traces = [_plane_trace(*group, sample_number, dense) for group in frame.groups() if group[:2] in drawn]
        figures.append(go.Figure(traces, layout | {"shapes": list(_threshold_lines(frame.thresholds))}))
    return figures


def _plane_trace(
    quadrant: int, keep: bool, name: str, points: pd.DataFrame, sample_number: dict, dense: bool
) -> go.Scattergl:
    numbers = points.id.map(sample_number).to_numpy(np.int32)
    counts = points[["step", "kept_tokens", "num_tokens", "role"]].fillna(-1).to_numpy(np.int32)
    supplemented = truth(points.supplemented).to_numpy(np.int32)
    return go.Scattergl(
        name=name,
        x=points.ppl.to_numpy(np.float32),
        y=points.entropy.to_numpy(np.float32),
        customdata=np.column_stack([numbers, counts, supplemented]),
        mode="markers",
        marker={
            "color": COLOURS[quadrant],
            "symbol": "circle" if keep else "x-thin-open",
            "size": (7 if keep else 6) - 2 * dense,
            "opacity": (0.9 if keep else 0.7) - 0.2 * dense,
            "line": {"width": 1, "color": COLOURS[quadrant]},
        },
        hovertemplate="%{fullData.name}<br>perplexity %{x:.4g}<br>entropy %{y:.4g} nats<extra></extra>",
    )


def _plane_layout(frames: list[Frame], second_axis: str) -> dict:
    ppl = np.concatenate([frame.points.ppl.to_numpy(float) for frame in frames] or [[]])
    entropy = np.concatenate([frame.points.entropy.to_numpy(float) for frame in frames] or [[]])
    x_range, y_range = None, None
    if len(ppl):
        low, high = np.log10(np.maximum(ppl.min(), 1e-3)), np.log10(np.maximum(ppl.max(), 1e-3))
        pad = 0.05 * (high - low) or 0.1
        x_range = [float(low - pad), float(high + pad)]
        pad = 0.06 * (entropy.max() - entropy.min()) or 0.1
        y_range = [float(entropy.min() - pad), float(entropy.max() + pad)]
    corners = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1)}
    return {
        "xaxis": {"title": {"text": "perplexity of the sample (log scale)"}, "type": "log", "range": x_range},
        "yaxis": {"title": {"text": second_axis}, "range": y_range},
        "annotations": [
            {
                "text": QUADRANT_LABELS[quadrant],
                "xref": "paper",
                "yref": "paper",
                "x": x,
                "y": y,
                "xanchor": "right" if x else "left",
                "yanchor": "top" if y else "bottom",
                "showarrow": False,
                "font": {"color": COLOURS[quadrant], "size": 18},
            }
            for quadrant, (x, y) in corners.items()
            if frames and frames[0].quadrants
        ],
        "hovermode": "closest",
        "hoverdistance": 12,
        "uirevision": "plane",
        "height": 540,
    }


def _threshold_lines(thresholds: dict[str, float]) -> Iterable[dict]:
    for name, value in thresholds.items():
        vertical = name.startswith("ppl")
        across, along = ("x", "y") if vertical else ("y", "x")
        yield {
            "type": "line",
            "name": name,
            f"{across}0": value,
            f"{across}1": value,
            f"{along}0": 0,
            f"{along}1": 1,
            f"{along}ref": "paper",
            "line": {"color": "#7F7F7F", "width": 1.5, "dash": "dash" if name.endswith("high") else "dot"},
        }


def kept_figure(curves: pd.DataFrame) -> go.Figure:
    """The shares of samples and of tokens that are trained on."""
    figure = go.Figure()
    for name, colour in (("samples", _LOSS_COLOUR), ("tokens", _MEDIAN_COLOUR)):
        line = {"width": 2, "color": colour}
        _add_line(figure, curves, f"{name}_kept", name, "%{y:.1%}", line=line)
    axis = {"title": {"text": "share that is trained on"}, "tickformat": ".0%", "rangemode": "tozero"}
    return _over_steps(figure, curves, height=320, yaxis=axis)


def shares_figure(curves: pd.DataFrame) -> go.Figure:
    """Stacked shares of the quadrants, and the share of kept samples that were supplemented."""
    figure = go.Figure()
    _add_stack(figure, curves, {f"q{q}": (name, COLOURS[q]) for q, name in QUADRANTS.items()}, "%{y:.1%}")
    line = {"width": 2, "dash": "dot"}  # in the theme's ink
    _add_line(figure, curves, "supplemented", "supplemented, of the kept", "%{y:.1%}", line=line)
    axis = {"title": {"text": "share of samples"}, "tickformat": ".0%", "range": [0, 1]}
    return _over_steps(figure, curves, height=420, yaxis=axis)


def means_figure(curves: pd.DataFrame, second_axis: str) -> go.Figure:
    """Mean and median perplexity and entropy of the pools, the paper's figure 8."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, name in ((1, "ppl"), (2, "entropy")):
        for kind, colour, dash in (("mean", _LOSS_COLOUR, "solid"), ("median", _MEDIAN_COLOUR, "dash")):
            place = {"row": row, "col": 1, "legendgroup": kind, "showlegend": row == 1}
            line = {"width": 2, "color": colour, "dash": dash}
            _add_line(figure, curves, f"{name}_{kind}", kind, f"{kind} %{{y:.4g}}", line=line, **place)
    figure.update_yaxes(title_text="perplexity (log)", type="log", row=1, col=1)
    figure.update_yaxes(title_text=second_axis, row=2, col=1)
    figure.update_xaxes(title_text="optimiser step", row=2, col=1)
    return _over_steps(_without_template(figure), curves, height=480, xaxis_title=None)


def loss_figure(curves: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    _add_line(figure, curves, "loss", "loss", "%{y:.4g} nats", line={"width": 2, "color": _LOSS_COLOUR})
    return _over_steps(figure, curves, height=320, yaxis_title="loss (nats per kept token)")


def time_figure(curves: pd.DataFrame) -> go.Figure:
    """Seconds of a step by phase, stacked, over the run."""
    figure = go.Figure()
    _add_stack(figure, curves, {f"seconds_{p}": (name, PHASE_COLOURS[p]) for p, name in PHASES.items()}, "%{y:.3g} s")
    return _over_steps(figure, curves, height=380, yaxis_title="seconds per step")


def _add_line(figure: go.Figure, curves: pd.DataFrame, column: str, name: str, hover: str, **style: Any) -> None:
    x, y = curves.step.to_numpy(), curves[column].to_numpy()
    figure.add_scatter(x=x, y=y, name=name, mode="lines", hovertemplate=hover, **style)


def _add_stack(figure: go.Figure, curves: pd.DataFrame, columns: dict[str, tuple[str, str]], hover: str) -> None:
    for column, (name, colour) in columns.items():
        style = {"line": {"width": 0, "color": colour}, "fillcolor": colour, "stackgroup": "stack"}
        _add_line(figure, curves, column, name, hover, **style)


def _over_steps(figure: go.Figure, curves: pd.DataFrame, **layout: Any) -> go.Figure:
    """The layout of a chart over the run."""
    figure.update_layout({"xaxis_title": "optimiser step", "hovermode": "x unified"} | layout)
    if len(curves) < 3:  # a line through so few points is hardly seen
        figure.update_traces(mode="lines+markers")
    return figure


def flops_figure(numbers: dict[str, Number]) -> go.Figure:
    figure = go.Figure()
    bars = {"flops_full": ("full data", "#7F7F7F"), "flops_spent": ("this run", _LOSS_COLOUR)}
    for key, (name, colour) in bars.items():
        figure.add_bar(
            y=[name],
            x=[numbers[key].value],
            orientation="h",
            marker_color=colour,
            hovertemplate=html.escape(numbers[key].text) + "<extra></extra>",
        )
    figure.update_layout(xaxis_title="FLOPs", showlegend=False, height=200, bargap=0.35)
    return figure


def _without_template(figure: go.Figure) -> go.Figure:
    """The page sets its own template, light or dark."""
    figure.layout.template = None
    return figure


def as_json(figures: dict[str, go.Figure | list[go.Figure]]) -> dict:
    """The figures as plain JSON values, arrays in Plotly's base64 form."""

    def plain(figure: go.Figure) -> dict:
        return json.loads(pio.to_json(_without_template(figure), validate=False))

    return {
        name: [plain(each) for each in figure] if isinstance(figure, list) else plain(figure)
        for name, figure in figures.items()
    }
