"""The report's charts as Plotly figures, which carry their data into the page."""

import base64
import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from qtuning_kernels.run_record.schema import PHASES, QUADRANT_LABELS, QUADRANTS

# Okabe and Ito's palette, which stays apart under every common colour blindness; 3 : 1 on both themes' surfaces
COLOURS = {1: "#D55E00", 2: "#0072B2", 3: "#CC79A7", 4: "#009E73", 0: "#7F7F7F"}
PHASE_COLOURS = dict(zip(PHASES, ("#7F7F7F", "#B07A00", "#D55E00", "#CC79A7", "#0072B2", "#009E73"), strict=True))
_LOSS_COLOUR, _MEDIAN_COLOUR = "#0072B2", "#D55E00"


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


def packed(values: pd.Series, dtype: str) -> dict:
    """A column as Plotly packs an array, and the page's script unpacks it."""
    array = values.to_numpy(f"<{dtype}", na_value=np.nan if dtype[0] == "f" else -1)
    return {"dtype": dtype, "bdata": base64.b64encode(array.tobytes()).decode()}


def plane_layout(rows: pd.DataFrame, second_axis: str, quadrants: bool) -> go.Figure:
    """The plane without its points, which the page's script takes from the rows."""
    ppl, entropy = np.maximum(rows.ppl.to_numpy(float), 1e-3), rows.entropy.to_numpy(float)
    ranges = [_padded(np.log10(ppl)), _padded(entropy)] if len(rows) else [None, None]
    corners = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1)}
    style = {"xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 18}}
    annotations = [
        {
            "text": QUADRANT_LABELS[quadrant],
            "x": x,
            "y": y,
            "xanchor": ("left", "right")[x],
            "yanchor": ("bottom", "top")[y],
        }
        for quadrant, (x, y) in corners.items()
        if quadrants
    ]
    layout = {
        "xaxis": {
            "title": {"text": "perplexity of the sample (log scale)"},
            "type": "log",
            "minorloglabels": "complete",
            "range": ranges[0],
        },
        "yaxis": {"title": {"text": second_axis}, "range": ranges[1]},
        "annotations": [each | style for each in annotations],
        "hovermode": "closest",
        "hoverdistance": 12,
        "uirevision": "plane",
        "height": 540,
    }
    return go.Figure(layout=layout)


def _padded(values: np.ndarray) -> list[float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low) or 0.1
    return [low - pad, high + pad]


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
            _add_raw(figure, curves, f"{name}_{kind}", colour, row=row, col=1)
            _add_line(figure, curves, f"{name}_{kind}_smooth", kind, f"{kind} %{{y:.4g}}", line=line, **place)
    figure.update_yaxes(title_text="perplexity (log)", type="log", row=1, col=1)
    figure.update_yaxes(title_text=second_axis, row=2, col=1)
    figure.update_xaxes(title_text="optimiser step", row=2, col=1)
    return _over_steps(_without_template(figure), curves, height=480, xaxis_title=None)


def loss_figure(curves: pd.DataFrame, evaluations: list[dict[str, float]]) -> go.Figure:
    """The training loss, and what the evaluations found, from step 0 on."""
    figure = go.Figure()
    _add_raw(figure, curves, "loss", _LOSS_COLOUR)
    line = {"width": 2, "color": _LOSS_COLOUR}
    _add_line(figure, curves, "loss_smooth", "training", "%{y:.4g} nats", line=line)
    for name in dict.fromkeys(key for row in evaluations for key in row if key != "step"):
        x, y = zip(*((row["step"], row[name]) for row in evaluations if name in row), strict=True)
        marker = {"size": 10, "symbol": "diamond", "color": _MEDIAN_COLOUR}
        label = " ".join(["evaluation", name[5:-5]]).strip()
        figure.add_scatter(x=x, y=y, name=label, mode="lines+markers", marker=marker, hovertemplate="%{y:.4g} nats")
    return _over_steps(figure, curves, height=320, yaxis_title="loss (nats per kept token)")


def time_figure(curves: pd.DataFrame) -> go.Figure:
    """Seconds of a step by phase, stacked, over the run."""
    figure = go.Figure()
    _add_stack(figure, curves, {f"seconds_{p}": (name, PHASE_COLOURS[p]) for p, name in PHASES.items()}, "%{y:.3g} s")
    return _over_steps(figure, curves, height=380, yaxis_title="seconds per step")


def _add_line(figure: go.Figure, curves: pd.DataFrame, column: str, name: str, hover: str, **style: Any) -> None:
    x, y = curves.step.to_numpy(), curves[column].to_numpy()
    figure.add_scatter(x=x, y=y, name=name, mode="lines", hovertemplate=hover, **style)


def _add_raw(figure: go.Figure, curves: pd.DataFrame, column: str, colour: str, **place: int) -> None:
    """The values before smoothing, thin."""
    style = {"line": {"width": 1, "color": colour}, "opacity": 0.35, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=curves.step, y=curves[column], name=column, mode="lines", **style, **place)


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


def _without_template(figure: go.Figure) -> go.Figure:
    """The page sets its own template, light or dark."""
    figure.layout.template = None
    return figure


def as_json(figures: dict[str, go.Figure]) -> dict:
    """The figures as plain JSON values, arrays in Plotly's base64 form."""
    return {name: json.loads(pio.to_json(_without_template(each), validate=False)) for name, each in figures.items()}
