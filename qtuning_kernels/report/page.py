"""Puts the report's page together: numbers, charts and texts in one file that needs nothing else."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from qtuning_kernels.files import refuse_overwrite, write_atomic
from qtuning_kernels.report import figures, plane, summary, texts
from qtuning_kernels.report.plane_file import read_plane_file
from qtuning_kernels.run_record.reader import Record, RecordError, read_record, record_folder
from qtuning_kernels.run_record.schema import PHASES, QUADRANTS, STEP_COLUMNS

_PLANE_SUFFIXES = (".parquet", ".pq")
_QTUNING_COLUMNS = ("ppl", "entropy", "quadrant", "role", "supplemented", "alpha", *plane.THRESHOLDS)
_SECOND_AXES = {"qtuning_residual": "entropy that the perplexity leaves (ranks)"}  # others: the entropy itself


def write_page(run: Path, output: Path | None) -> Path:
    """See `build_report`."""
    if run.is_file():
        if run.suffix not in _PLANE_SUFFIXES:
            raise RecordError(f"{run} is neither the folder of a run nor a Parquet file ({', '.join(_PLANE_SUFFIXES)})")
        output, source = output or run.with_suffix(".html"), run
    else:
        source = record_folder(run)
        home = source.parent if source.name == "record" else source
        output = output or home / "report.html"
    refuse_overwrite(output, [source])
    context = _plane_file_context(run) if run.is_file() else _run_context(read_record(source), home)
    with write_atomic(output) as temporary:
        temporary.write_text(_render(context), encoding="utf-8")
    return output


def _render(context: dict[str, Any]) -> str:
    loader = PackageLoader("qtuning_kernels.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = {name: Markup(loader.get_source(environment, name)[0]) for name in ("report.css", "report.js")}
    return environment.get_template("report.html").render(
        **context, css=source["report.css"], js=source["report.js"], plotly_js=Markup(get_plotlyjs())
    )


def _script_json(value: Any) -> Markup:
    """JSON for the inside of a script element: nothing in it can close the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _page_context(
    samples: pd.DataFrame,
    steps: pd.DataFrame,
    text_table: pd.DataFrame,
    charts: dict[str, Any] | None = None,
    policy: str = "qtuning",
) -> dict[str, Any]:
    """What every page shows: the plane with the samples of its points, and further charts."""
    frame_list = plane.frames(samples, steps)
    ids = samples.id.drop_duplicates().tolist()
    numbered, second_axis = {each: i for i, each in enumerate(ids)}, _second_axis(policy)
    placed = [frame for frame in frame_list if len(frame.points)]
    charts = {"plane": figures.plane_figures(frame_list if placed else [], numbered, second_axis)} | (charts or {})
    excerpts = texts.excerpts(ids, text_table)
    frame_notes = [
        {
            "label": frame.label,
            "shown": len(frame.points),
            "total": frame.total,
            "steps": frame.steps,
            "thresholds": frame.thresholds,
        }
        for frame in frame_list
    ]
    data = {
        "frames": frame_notes,
        "samples": {"id": [str(each) for each in ids], **excerpts},
        "themes": figures.THEMES,
        "figures": figures.as_json(charts),
    }
    return {
        "policy": policy,
        "has_quadrants": policy.startswith("qtuning") or plane.has_quadrants(samples),
        "quadrants": QUADRANTS,
        "phases": PHASES,
        "heights": _heights(charts),
        "has_texts": len(text_table) > 0,
        "excerpt_limit": excerpts["limit"],
        "data": _script_json(data),
    }


def _run_context(record: Record, home: Path) -> dict[str, Any]:
    history = summary.sample_history(record.samples)
    numbers = summary.run_numbers(record, history)
    curves = summary.over_time(record)
    charts = {}
    policy = str(record.run["configuration"].get("qtuning", {}).get("policy", "qtuning"))
    quadrants = plane.has_quadrants(record.samples)
    if len(curves):
        charts["kept"] = figures.kept_figure(curves)
        if quadrants:
            charts["shares"] = figures.shares_figure(curves)
        if curves.ppl_mean.notna().any():
            charts["means"] = figures.means_figure(curves, _second_axis(policy))
        if curves.loss.notna().any():
            charts["loss"] = figures.loss_figure(curves)
        if numbers["seconds_total"].value is not None:
            charts["time"] = figures.time_figure(curves)
    if numbers["share_flops_saved"].value is not None:
        charts["flops"] = figures.flops_figure(numbers)
    token_list, token_rest = texts.token_samples(record)
    return _page_context(record.samples, record.steps, record.texts, charts, policy) | {
        "title": f"Q-Tuning run {home.resolve().name}",
        "kind": "run",
        "run": record.run,
        "configuration": _rows(record.run["configuration"]),
        "notices": record.notices + _resumed(record.run) + _missing(record, policy),
        "numbers": numbers,
        "bins": len(curves),
        "tokens": token_list,
        "tokens_left": token_rest,
        "never": texts.listed(history, record.texts, kept=False),
        "always": texts.listed(history, record.texts, kept=True),
    }


def _plane_file_context(path: Path) -> dict[str, Any]:
    samples, text_table = read_plane_file(path)
    steps = pd.DataFrame(columns=list(STEP_COLUMNS))
    return _page_context(samples, steps, text_table) | {
        "title": f"Error–uncertainty plane of {path.name}",
        "kind": "plane",
        "notices": [] if len(samples) else [f"{path.name} holds no sample."],
        "numbers": summary.plane_file_numbers(samples),
    }


def _second_axis(policy: str) -> str:
    return _SECOND_AXES.get(policy, "mean entropy (nats)")


def _heights(charts: dict[str, Any]) -> dict[str, int]:
    """The height in pixels of each chart that has something to draw, which the page reserves beforehand."""
    each = {name: figure[0] if isinstance(figure, list) and figure else figure for name, figure in charts.items()}
    return {name: figure.layout.height for name, figure in each.items() if figure}


def _rows(configuration: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and their values as text."""
    rows = []
    for key, value in configuration.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _resumed(run: dict[str, Any]) -> list[str]:
    return [
        f"The run was resumed from its checkpoint of step {entry.get('step')} ({entry.get('created')})."
        for entry in run["resumed"]
    ]


def _missing(record: Record, policy: str) -> list[str]:
    """Which columns a record that has rows lacks altogether, though the policy gives them."""
    useless = () if policy.startswith("qtuning") else _QTUNING_COLUMNS
    notices = []
    for name, table in (("sample", record.samples), ("step", record.steps)):
        empty = [column for column in table.columns if len(table) and table[column].isna().all()]
        if table.alpha.notna().any() if "alpha" in table else False:
            empty = [column for column in empty if column not in plane.THRESHOLDS]  # they follow from alpha
        empty = [column for column in empty if column not in useless]
        if empty:
            notices.append(f"Not recorded per {name}: {', '.join(empty)}.")
    return notices
