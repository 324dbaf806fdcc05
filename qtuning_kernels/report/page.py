"""Puts the report's page together: numbers, charts and texts in one file that needs nothing else."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from qtuning_kernels.files import refuse_overwrite, write_atomic
from qtuning_kernels.report import figures, summary, texts
from qtuning_kernels.report.plane import THRESHOLDS, make_plane
from qtuning_kernels.report.plane import has_quadrants as any_quadrant
from qtuning_kernels.report.plane_file import read_plane_file
from qtuning_kernels.run_record.reader import Record, RecordError, read_record, record_folder
from qtuning_kernels.run_record.schema import LOSS_STEPS, PHASES, QUADRANTS

_PLANE_SUFFIXES = (".parquet", ".pq")
_QTUNING_COLUMNS = ("ppl", "entropy", "quadrant", "role", "supplemented", "alpha", *THRESHOLDS)
# of the plane's rows and of the samples, as the page's script reads them
_ROW_COLUMNS = {"step": "i4", "ppl": "f4", "entropy": "f4", "kept_tokens": "i4", "num_tokens": "i4"}
_ROW_COLUMNS |= dict.fromkeys(("quadrant", "role", "keep", "supplemented", "last"), "i1")
_SAMPLE_COLUMNS = {"ppl": "f4", "entropy": "f4", "quadrant": "i1", "seen": "i4", "kept": "i4", "supplemented": "i4"}
# the tags of the embedded data, see `demo.word_problems`
_PLANTED = {
    "clean": "as the generator made them",
    "wrong": "every result in the solution is another number",
    "duplicate": "one of eight problems again, behind another opening",
    "trivial": "the sum of two digits",
}
_KEEPING = {
    "run": {"never": "never kept", "times": "kept at times", "always": "always kept"},
    "plane": {"always": "with a role", "never": "without a role"},
}
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
    """What every page shows: the plane, all samples, the tags of the data, and further charts."""
    plane, history = make_plane(samples, steps), summary.sample_history(samples)
    rows, has_quadrants = plane.rows, any_quadrant(samples)
    if not has_quadrants:  # two colours: of what is dropped, of what is kept
        rows, history = rows.assign(quadrant=2 * summary.truth(rows.keep)), history.assign(quadrant=0)
    number = pd.Series(range(len(history)), index=history.id)
    columns = {name: figures.packed(rows[name], kind) for name, kind in _ROW_COLUMNS.items()}
    columns |= {"sample": figures.packed(rows.id.map(number), "i4")}
    kind, charts = "plane" if charts is None else "run", dict(charts or {})
    if plane.frames:
        charts["plane"] = figures.plane_layout(rows, _second_axis(policy), has_quadrants)
    ids, excerpts = history.id.tolist(), texts.excerpts(history.id.tolist(), text_table)
    tags = summary.tag_counts(samples, text_table)
    tag_of = dict(zip(text_table.id, text_table.tag, strict=True)) if len(tags) else {}
    data = {
        "kind": kind,
        "plane": {"columns": columns, "frames": plane.frames, "names": QUADRANTS if has_quadrants else {}},
        "samples": {
            "id": [str(each) for each in ids],
            "tag": [tag_of.get(each) for each in ids] if tag_of else [],
            **{name: figures.packed(history[name], kind) for name, kind in _SAMPLE_COLUMNS.items()},
            **excerpts,
        },
        "colours": figures.COLOURS,
        "themes": figures.THEMES,
        "figures": figures.as_json(charts),
    }
    return {
        "kind": kind,
        "policy": policy,
        "has_quadrants": policy.startswith("qtuning") or has_quadrants,
        "quadrants": QUADRANTS,
        "phases": PHASES,
        "heights": {name: figure.layout.height for name, figure in charts.items()},
        "has_texts": bool(text_table.prompt.notna().any()),
        "excerpt_limit": excerpts["limit"],
        "frames": plane.frames,
        "tags": tags.reset_index().to_dict("records"),
        "keeping": _KEEPING[kind],
        "planted": _PLANTED if set(tags.index) <= set(_PLANTED) else {},
        "data": _script_json(data),
    }


def _run_context(record: Record, home: Path) -> dict[str, Any]:
    numbers = summary.run_numbers(record, summary.sample_history(record.samples))
    curves = summary.over_time(record)
    charts = {}
    policy = str(record.run["configuration"].get("qtuning", {}).get("policy", "qtuning"))
    if len(curves):
        charts["kept"] = figures.kept_figure(curves)
        if any_quadrant(record.samples):
            charts["shares"] = figures.shares_figure(curves)
        if curves.ppl_mean.notna().any():
            charts["means"] = figures.means_figure(curves, _second_axis(policy))
        if curves.loss.notna().any():
            charts["loss"] = figures.loss_figure(curves, record.run["evaluations"])
        if numbers["seconds_total"].value is not None:
            charts["time"] = figures.time_figure(curves)
    token_list, token_rest = texts.token_samples(record)
    return _page_context(record.samples, record.steps, record.texts, charts, policy) | {
        "title": f"Q-Tuning run {home.resolve().name}",
        "run": record.run,
        "configuration": _rows(record.run["configuration"]),
        "notices": record.notices + _resumed(record.run) + _missing(record, policy),
        "numbers": numbers,
        "evaluated": [row["step"] for row in record.run["evaluations"] if "eval_loss" in row],
        "loss_steps": min(LOSS_STEPS, len(record.steps) or LOSS_STEPS),
        "rolling": round(summary.window(len(curves)) * len(record.steps) / max(1, len(curves))),
        "tokens": token_list,
        "tokens_left": token_rest,
    }


def _plane_file_context(path: Path) -> dict[str, Any]:
    samples, steps, text_table = read_plane_file(path)
    return _page_context(samples, steps, text_table) | {
        "title": f"Error–uncertainty plane of {path.name}",
        "notices": [] if len(samples) else [f"{path.name} holds no sample."],
        "numbers": summary.plane_file_numbers(samples),
    }


def _second_axis(policy: str) -> str:
    return _SECOND_AXES.get(policy, "mean entropy (nats)")


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
            empty = [column for column in empty if column not in THRESHOLDS]  # they follow from alpha
        empty = [column for column in empty if column not in useless]
        if empty:
            notices.append(f"Not recorded per {name}: {', '.join(empty)}.")
    return notices
