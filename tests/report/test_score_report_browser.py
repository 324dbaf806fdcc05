"""The report of a scored data set in a real browser, and the colours of the points that a browser draws."""

import json
import math
import re
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from qtuning_kernels.commands import cli
from tests.tiny import byte_model

from .conftest import NO_WEBGL, needs_chromium
from .report_expected import rows
from .report_page import Page, columns

pytest.importorskip("plotly", reason="needs the report extra: plotly, jinja2")
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = needs_chromium

# the lines drawn across the plane and those wanted, each as left, top, width and height within its axes, in pixels
LINES = """(wanted) => {
  const plot = document.getElementById("chart-plane");
  const { xaxis, yaxis, _size } = plot._fullLayout, box = plot.getBoundingClientRect();
  const drawn = [...plot.querySelectorAll(".shapelayer path")].map((path) => {
    const { left, top, width, height } = path.getBoundingClientRect();
    return [left - box.left - _size.l, top - box.top - _size.t, width, height];
  });
  const across = wanted.ppl.map((value) => [xaxis.l2p(Math.log10(value)), 0, 0, yaxis._length]);
  return [drawn, [...across, ...wanted.entropy.map((value) => [0, yaxis.l2p(value), xaxis._length, 0])]];
}"""
STROKES = """() => [...document.querySelectorAll("#chart-plane .shapelayer path")].map((path) => {
  const { stroke, strokeWidth, opacity, strokeOpacity } = getComputedStyle(path);
  return [stroke, parseFloat(strokeWidth), opacity * strokeOpacity, path.checkVisibility()];
})"""
# [row, colour] of every point: as Plotly hands it to WebGL, and as the elements have it without
COLOURS_BY_WEBGL = """() => document.getElementById("chart-plane")._fullData.flatMap((trace) =>
  trace.customdata.map((row, i) => [row, [trace.marker.color].flat()[i] ?? trace.marker.color]))"""
COLOURS_OF_ELEMENTS = """() => [...document.querySelectorAll("#chart-plane .scatterlayer path.point")].map((path) => {
  const { trace } = path.closest(".trace").__data__[0];
  const { fill, stroke } = getComputedStyle(path);
  return [trace.customdata[path.__data__.i], fill === "none" ? stroke : fill];
})"""
# [row, colour] of the points that no other is near, as the pixels on the canvas have it
COLOURS_OF_PIXELS = """() => {
  const plot = document.getElementById("chart-plane"), { xaxis, yaxis, _size } = plot._fullLayout;
  const drawn = plot.querySelector(".gl-canvas-context");
  const copy = Object.assign(document.createElement("canvas"), { width: drawn.width, height: drawn.height });
  const context = copy.getContext("2d");
  context.drawImage(drawn, 0, 0);
  const scale = drawn.width / plot._fullLayout.width;
  const points = plot._fullData.flatMap((trace) => trace.customdata.map((row, i) =>
    [row, xaxis.l2p(Math.log10(trace.x[i])) + _size.l, yaxis.l2p(trace.y[i]) + _size.t]));
  const alone = ([row, x, y]) => points.every((each) => each[0] === row || Math.hypot(each[1] - x, each[2] - y) > 10);
  return points.filter(alone).map(([row, x, y]) => {
    const near = context.getImageData(Math.round(x * scale) - 2, Math.round(y * scale) - 2, 5, 5).data;
    const pixels = [...Array(25).keys()].map((i) => near.subarray(4 * i, 4 * i + 4));
    return [row, [...pixels.reduce((one, other) => (other[3] > one[3] ? other : one))]];
  });
}"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """What `qtuning score` writes about 45 samples, and the report of it."""
    folder = tmp_path_factory.mktemp("scored")
    data, plane = folder / "data.jsonl", folder / "plane.parquet"
    samples = ({"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}." * (1 + i % 3)} for i in range(45))
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    fields = ["--prompt-field", "question", "--completion-field", "answer"]
    model = ["--model", str(byte_model(folder / "model")), "--score-dtype", "float32"]
    assert cli.main(["score", str(data), *model, *fields, "--output", str(plane)]) == 0
    assert cli.main(["report", str(plane)]) == 0
    table = pq.read_table(plane)
    alpha = json.loads(table.schema.metadata[b"qtuning"])["alpha"]
    return SimpleNamespace(report=plane.with_suffix(".html"), samples=table.to_pylist(), alpha=alpha)


def test_thresholds_of_a_scored_data_set_are_drawn(open_report, scored):
    """Two lines down and two across, where the quantiles at α and 1 − α lie."""
    wanted = {
        axis: [
            sorted(sample[axis] for sample in scored.samples)[math.ceil(round(gamma * len(scored.samples), 3)) - 1]
            for gamma in (scored.alpha, 1 - scored.alpha)
        ]
        for axis in ("ppl", "entropy")
    }
    page = open_report(scored.report)
    page.wait_for_function("document.querySelectorAll('#chart-plane .shapelayer path').length === 4")
    drawn, expected = page.evaluate(LINES, wanted)
    assert len({tuple(line) for line in expected}) == 4
    for line, where in zip(sorted(drawn), sorted(expected), strict=True):
        assert line == pytest.approx(where, abs=1)
    for stroke, width, opacity, visible in page.evaluate(STROKES):
        assert (stroke, width, opacity, visible) == ("rgb(127, 127, 127)", 1.5, 1, True)
    assert f"45 samples. α = {scored.alpha:.3g}." in page.locator("#frame-note").inner_text()


def listed(section):
    """Id, prompt and answer of each sample that the list shows, on all of its pages."""
    found = []
    while True:
        for item in section.locator("li").all():
            meta, *texts = item.locator("p").all_text_contents()
            found.append((int(meta.split(" ")[0]), *texts))
        if section.locator("#next").is_disabled():
            return found
        section.locator("#next").click()


def test_samples_of_a_scored_data_set_are_listed_and_searched(open_report, scored):
    page = open_report(scored.report)
    section = page.locator("#samples")
    by_perplexity = sorted(scored.samples, key=lambda sample: -sample["ppl"])
    texts = [(sample["sample_id"], sample["prompt"], sample["answer"]) for sample in by_perplexity]
    assert listed(section) == texts
    assert section.locator("#found").inner_text() == "41–45 of 45 samples"
    section.locator("input[type=search]").fill("what IS 1")
    matching = [text for text in texts if "What is 1" in text[1]]
    assert sorted(ident for ident, *_ in matching) == [1, *range(10, 20)]
    assert section.locator("#found").inner_text() == "1–11 of 11 samples"
    assert listed(section) == matching
    section.locator("input[type=search]").fill("What is 45")
    assert section.locator("#found").inner_text() == "No sample."
    assert listed(section) == []
    section.locator("input[type=search]").fill("")
    assert listed(section) == texts


def quadrant_by(borders, sample):
    wrong, right = sample["ppl"] >= borders["ppl_high"], sample["ppl"] <= borders["ppl_low"]
    unsure, sure = sample["entropy"] >= borders["entropy_high"], sample["entropy"] <= borders["entropy_low"]
    return 1 if wrong and unsure else 2 if wrong and sure else 3 if right and sure else 4 if right and unsure else 0


def rgb(colour):
    """`#D55E00`, or a colour as a browser computes it, as three numbers."""
    parts = re.findall("[0-9A-F]{2}", colour) if colour[0] == "#" else re.findall(r"\d+", colour)
    return tuple(int(part, 16 if colour[0] == "#" else 10) for part in parts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("script", [None, NO_WEBGL], ids=["webgl", "no-webgl"])
def test_points_have_the_colour_of_their_quadrant_when_they_were_scored(open_report, run, scheme, script):
    """On "all steps" that of a sample's last scoring, on a step that of this step; as the table of quadrants has it."""
    page = open_report(run / "report.html", scheme=scheme, script=script)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    data = Page(run / "report.html").data
    ids = [int(data["samples"]["id"][number]) for number in columns(data["plane"]["columns"])["sample"]]
    swatches = [page.locator(f"#quadrants .swatch.q{quadrant}") for quadrant in range(5)]
    key = [rgb(swatch.evaluate("(element) => getComputedStyle(element).backgroundColor")) for swatch in swatches]
    assert len(set(key)) == 5

    samples = rows(run, "samples.jsonl")
    last = {row["id"]: row["quadrant"] for row in samples}
    first = {row["id"]: row["quadrant"] for row in samples if row["step"] == 1}
    assert set(last.values()) == set(range(5))
    # what other colours would be: those by the last step's thresholds, and those of the first scoring
    borders = data["plane"]["frames"][-1]["thresholds"]
    today = {row["id"]: quadrant_by(borders, row) for row in samples}
    assert sum(today[ident] != last[ident] for ident in last) > 20
    assert any(first[ident] != last[ident] for ident in first)

    for step, recorded in ((0, last), (1, first)):
        page.locator("#frame").fill(str(step))
        page.wait_for_function(f"document.querySelectorAll('#chart-plane .shapelayer path').length === {4 * step}")
        drawn = page.evaluate(COLOURS_OF_ELEMENTS if script else COLOURS_BY_WEBGL)
        assert len(drawn) == len(recorded)
        assert {ids[row]: rgb(colour) for row, colour in drawn} == {i: key[q] for i, q in recorded.items()}
        if script is None:
            pixels = page.evaluate(COLOURS_OF_PIXELS)
            assert {recorded[ids[row]] for row, _ in pixels} == set(recorded.values())
            for row, (*colour, opacity) in pixels:
                assert opacity > 150
                assert colour == pytest.approx(key[recorded[ids[row]]], abs=3)
