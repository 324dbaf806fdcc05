"""The report in a real browser: nothing is asked for, nothing fails, and what one touches answers.

Screenshots go to the folder that QTUNING_TEST_ARTIFACTS names, else to the test's temporary folder.
"""

import os
from pathlib import Path

import pytest

from qtuning_kernels.report import build_report
from qtuning_kernels.run_record.writer import RunRecord
from tests.synthetic_run import synthetic_run

from .conftest import DESKTOP, NO_WEBGL, PHONE, needs_chromium
from .report_expected import rows
from .report_page import Page, columns

pytest.importorskip("plotly", reason="needs the report extra: plotly, jinja2")
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = needs_chromium

# the first drawn point that no other is near, in pixels of the window
FIND_POINT = """() => {
  const plot = document.getElementById("chart-plane");
  const layout = plot._fullLayout, box = plot.getBoundingClientRect();
  const pixel = (x, y) => [layout.xaxis.l2p(Math.log10(x)) + layout._size.l + box.left,
                           layout.yaxis.l2p(y) + layout._size.t + box.top];
  const points = plot._fullData.flatMap((trace) =>
    Array.from(trace.x, (x, i) => ({ at: pixel(x, trace.y[i]), row: trace.customdata[i] })));
  const apart = (a, b) => Math.hypot(a.at[0] - b.at[0], a.at[1] - b.at[1]);
  const inside = (p) => p.at[0] > box.left + 100 && p.at[0] < box.right - 60 && p.at[1] > box.top + 60;
  return points.find((p) => inside(p) && points.every((q) => q === p || apart(p, q) > 12));
}"""
COUNT_POINTS = """() => document.getElementById("chart-plane")._fullData.reduce((n, t) => n + t.x.length, 0)"""


def artifact(tmp_path, name):
    folder = Path(os.environ.get("QTUNING_TEST_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_whole_at_every_width_and_theme(open_report, run, tmp_path, viewport, scheme):
    page = open_report(run / "report.html", viewport=viewport, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"], "the page scrolls sideways"
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    page.screenshot(path=artifact(tmp_path, f"report_{viewport['width']}_{scheme}.png"), full_page=True)


def test_hover_shows_the_text_of_the_sample(open_report, run):
    page = open_report(run / "report.html")
    page.locator("#chart-plane").scroll_into_view_if_needed()
    point = page.evaluate(FIND_POINT)
    page.mouse.move(*point["at"])
    page.locator("#hovered .prompt").wait_for()
    drawn = Page(run / "report.html")
    columns_of_plane = columns(drawn.data["plane"]["columns"])
    step, number = (columns_of_plane[name][point["row"]] for name in ("step", "sample"))
    sample = int(drawn.data["samples"]["id"][number])
    row = next(r for r in rows(run, "samples.jsonl") if (r["step"], r["id"]) == (step, sample))
    text = next(t for t in rows(run, "texts.jsonl") if t["id"] == sample)
    shown = page.locator("#hovered").inner_text()
    kept, total = row["kept_tokens"], row["num_tokens"]
    assert text["prompt"] in shown
    assert text["answer"] in shown
    assert f"{kept} of {total} answer tokens kept" in shown
    page.locator(".hoverlayer .hovertext").first.wait_for()


def test_nothing_of_a_hovered_point_is_left_in_another_frame(open_report, run):
    page = open_report(run / "report.html")
    page.locator("#chart-plane").scroll_into_view_if_needed()
    page.mouse.move(*page.evaluate(FIND_POINT)["at"])
    page.locator("#hovered .prompt").wait_for()
    page.locator(".hoverlayer .hovertext").first.wait_for()
    page.locator("#frame").focus()
    page.keyboard.press("End")
    page.wait_for_function("document.querySelectorAll('.hoverlayer .hovertext').length === 0")
    assert page.locator("#hovered .prompt").count() == 0


def test_a_supplement_says_why_it_was_kept(open_report, tmp_path):
    """A sample of Q1 that is kept, alone in its step, hovered."""
    with RunRecord(tmp_path / "record") as record:
        sample = {"id": 7, "ppl": 3.0, "entropy": 2.0, "quadrant": 1, "role": 2, "keep": True, "supplemented": True}
        other = {"id": 8, "ppl": 1.5, "entropy": 1.0, "quadrant": 3, "role": 0, "keep": False, "supplemented": False}
        record.write_step({"step": 1}, [{"num_tokens": 5, "kept_tokens": 2} | row for row in (sample, other)])
    page = open_report(build_report(tmp_path))
    page.locator("#chart-plane").scroll_into_view_if_needed()
    at = page.evaluate(
        FIND_POINT.replace("points.find", "points.filter((p) => p.row === 0).find").replace("inside(p) &&", "")
    )
    page.mouse.move(*at["at"])
    page.locator("#hovered", has_text="scored in step 1").wait_for()
    shown = page.locator("#hovered").inner_text()
    assert "Q1 harmful noise, kept" in shown
    assert "Kept as a supplement, because Q2 and Q4 held too few of its pool; treated as Q2" in shown


def test_tap_on_a_phone_shows_the_text(open_report, run):
    page = open_report(run / "report.html", viewport=PHONE, has_touch=True)
    page.locator("#chart-plane").scroll_into_view_if_needed()
    point = page.evaluate(FIND_POINT)
    page.touchscreen.tap(*point["at"])
    page.locator("#hovered .prompt").wait_for()


@pytest.mark.parametrize("script", [None, NO_WEBGL], ids=["webgl", "no-webgl"])
def test_slider_moves_through_the_run(open_report, run, script):
    page = open_report(run / "report.html", script=script)
    slider, label = page.locator("#frame"), page.locator("#frame-label")
    samples = rows(run, "samples.jsonl")
    assert label.inner_text() == "all steps 1–30"
    assert page.evaluate(COUNT_POINTS) == len({row["id"] for row in samples})
    slider.focus()
    page.keyboard.press("End")
    assert label.inner_text() == "step 30"
    assert page.evaluate(COUNT_POINTS) == sum(row["step"] == 30 for row in samples)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert label.inner_text() == "step 1"
    assert page.evaluate(COUNT_POINTS) == sum(row["step"] == 1 for row in samples)
    page.wait_for_function("document.querySelectorAll('#chart-plane .shapelayer path').length === 4")
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelectorAll('#chart-plane .shapelayer path').length === 0")
    page.locator("#play").click()
    page.wait_for_function("document.getElementById('frame').value > 2")
    page.locator("#play").click()


def test_search_finds_and_filters(open_report, run):
    page = open_report(run / "report.html")
    tokens = rows(run, "tokens.jsonl")
    section = page.locator("#tokens")
    found, visible = section.locator("[data-found]"), section.locator("article:not([hidden])")
    assert found.inner_text() == f"{len(tokens)} of {len(tokens)} samples"
    wanted = tokens[3]["prompt"]
    section.locator("input").fill(wanted.upper())
    matching = sum(wanted in row["prompt"] for row in tokens)
    assert visible.count() == matching > 0
    assert found.inner_text() == f"{matching} of {len(tokens)} samples"
    section.locator("input").fill("")
    section.locator("select").select_option("2")
    assert visible.count() == sum(row["score"] is not None for row in tokens)
    assert section.locator("article:not([hidden]) del").count() == sum(
        row["keep"].count(False) for row in tokens if row["score"] is not None
    )
    section.locator("input").fill("no such words")
    assert visible.count() == 0


def test_all_that_was_never_kept_is_reached_by_pages_and_by_search(open_report, run):
    page = open_report(run / "report.html")
    kept = {row["id"]: False for row in rows(run, "samples.jsonl")}
    for row in rows(run, "samples.jsonl"):
        kept[row["id"]] |= row["keep"]
    never = {ident for ident in kept if not kept[ident]}
    section = page.locator("#samples")
    section.locator("select[name=kept]").select_option("never")
    seen, following = [], section.locator("#next")
    while True:
        seen += [int(meta.split(" ")[0]) for meta in section.locator("li .meta").all_text_contents()]
        if following.is_disabled():
            break
        following.focus()
        page.keyboard.press("Enter")
    assert len(seen) == len(never) > 100
    assert set(seen) == never
    text = next(t for t in rows(run, "texts.jsonl") if t["id"] == seen[-1])
    section.locator("input").fill(text["prompt"].upper())
    assert section.locator("#found").inner_text() == "1–1 of 1 samples"
    assert text["answer"] in section.locator("li").text_content()
    section.locator("select[name=kept]").select_option("always")
    assert section.locator("#found").inner_text() == "No sample."
    section.locator("input").fill("")
    section.locator("select[name=kept]").select_option("")
    section.locator("select[name=tag]").select_option("wrong")
    wrong = sum(t["tag"] == "wrong" for t in rows(run, "texts.jsonl"))
    assert section.locator("#found").inner_text() == f"1–20 of {wrong} samples"


def test_token_scores_are_read_by_keyboard_and_by_touch(open_report, run):
    page = open_report(run / "report.html", viewport=PHONE, has_touch=True)
    shown, answer = page.locator("#token"), page.locator("#tokens .answer").first
    recorded = rows(run, "tokens.jsonl")[0]
    answer.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    token = answer.locator(":scope > *").nth(1)
    assert shown.inner_text() == f"“{token.inner_text().strip()}”: {token.get_attribute('title')}"
    assert f"nll {recorded['nll'][1]:.3g} nats" in shown.inner_text()
    answer.locator(":scope > *").nth(5).tap()
    assert f"nll {recorded['nll'][5]:.3g} nats" in shown.inner_text()
    assert page.locator(".chosen").count() == 1


# of every text that is shown, the contrast with the colours that lie behind it, of which some are transparent
CONTRASTS = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (front, back) => {
    const a = front.length > 3 ? front[3] : 1;
    return [0, 1, 2].map((i) => a * front[i] + (1 - a) * back[i]);
  };
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own.length > 3 && own[3] < 1 ? over(own, ground(element.parentElement)) : own;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, style, noscript") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const back = ground(element);
    const text = over(parse(element.closest("svg") ? style.fill : style.color), back);
    const [low, high] = [luminance(text), luminance(back)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 120)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(open_report, run, scheme):
    """4.5 : 1 as it is computed in the page, in the charts too."""
    page = open_report(run / "report.html", scheme=scheme)
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 1000
    assert sum("<text" in what for _, what in found) > 50
    assert [pair for pair in found if pair[0] < 4.5] == []


def test_theme_can_be_switched(open_report, run):
    page = open_report(run / "report.html")
    colour = "getComputedStyle(document.querySelector('#chart-plane .xtitle')).fill"
    before = page.evaluate(colour)
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.wait_for_function(f"{colour} !== {before!r}")


HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def test_hostile_text_shows_as_text(open_report, tmp_path):
    folder = synthetic_run(tmp_path, steps=2, text=lambda ident, rng: HOSTILE)
    with RunRecord(folder / "record", resume_step=2) as record:
        token = {"id": HOSTILE, "tokens": [HOSTILE], "nll": [1.0], "keep": [True], "prompt": HOSTILE}
        sample = {"id": HOSTILE, "ppl": 2.0, "entropy": 1.0, "quadrant": 4, "role": 4, "keep": True}
        record.write_step({"step": 3}, [sample], [token])
    page = open_report(build_report(folder))
    page.locator("#chart-plane").scroll_into_view_if_needed()
    point = page.evaluate(FIND_POINT)
    page.mouse.move(*point["at"])
    page.locator("#hovered .prompt").wait_for()
    assert HOSTILE in page.locator("#hovered").inner_text()
    assert HOSTILE in page.locator("#tokens").text_content()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("steps", [0, 1])
def test_empty_and_one_step_runs_open(open_report, tmp_path, steps):
    page = open_report(build_report(synthetic_run(tmp_path, steps=steps)))
    assert page.locator("#frame").is_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("script", [None, NO_WEBGL], ids=["webgl", "no-webgl"])
def test_fifty_thousand_samples_open(open_report, tmp_path, script, record_property):
    """All are drawn with WebGL; without it a part is, and the page says how many."""
    output = build_report(synthetic_run(tmp_path, steps=782, pool=64, samples=50_000))
    page = open_report(output, script=script)
    record_property("ready_ms", page.evaluate("Number(document.documentElement.dataset.ready)"))
    drawn = page.evaluate(COUNT_POINTS)
    note = page.locator("#frame-note").inner_text()
    if script is None:
        assert drawn == 50_000
        assert "50,000 samples" in note
    else:
        assert 3000 < drawn <= 4100
        assert f"Drawn: {drawn:,} of 50,000 samples" in note
        assert "no WebGL" in note
