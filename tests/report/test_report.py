"""The report's page: every number against the record, and every state that a record can be in."""

import html
import json
import math
import re
import statistics
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

pytest.importorskip("plotly", reason="needs the report extra: plotly, jinja2")
from qtuning_kernels.report import build_report, figures
from qtuning_kernels.report.plane import quantile as quantile_of_report
from qtuning_kernels.report.texts import MAX_TOKENS
from qtuning_kernels.run_record.reader import RecordError
from qtuning_kernels.run_record.writer import RunRecord
from tests.synthetic_run import TAGS, quantile, synthetic_pool, synthetic_run

from .report_expected import PHASES, rows
from .report_page import Page, array, assert_numbers, columns, points


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    return Page(build_report(run))


def test_every_number_follows_from_the_record(page, run):
    assert_numbers(page, run)


def test_shown_text_is_the_value(page):
    """What is displayed is the raw value, rounded; a share of 0.198 shows as 19.8 %."""
    shown = re.findall(r'data-number="share_samples_kept" data-value="([^"]+)">([^<]+)<', page.source)
    assert shown
    for value, text in shown:
        assert text == f"{100 * float(value):.1f} %"


def test_every_point_of_the_plane_is_a_row_of_the_record(page, run):
    """The whole run, each sample where it was scored last, then each step with the quadrants of that step."""
    table = rows(run, "samples.jsonl")
    frames = page.data["plane"]["frames"]
    assert [frame["step"] for frame in frames] == [None, *range(1, 31)]
    for number, frame in enumerate(frames):
        recorded = {row["id"]: row for row in table if frame["step"] in (None, row["step"])}
        shown = points(page, number)
        assert sorted(int(point["id"]) for point in shown) == sorted(recorded)
        assert frame["total"] == len(recorded)
        for point in shown:
            row = recorded[int(point["id"])]
            names = ("step", "kept_tokens", "num_tokens", "role", "quadrant", "keep", "supplemented")
            assert [point[name] for name in names] == [row[name] for name in names]
            assert (point["ppl"], point["entropy"]) == (np.float32(row["ppl"]), np.float32(row["entropy"]))


def test_thresholds_follow_from_alpha_on_single_steps_only(page, run):
    """Q_γ is the smallest value with at least a fraction γ at or below it; over several steps it means nothing."""
    samples = rows(run, "samples.jsonl")
    whole, *frames = page.data["plane"]["frames"]
    assert whole["thresholds"] == {}
    assert whole["alpha"] is None
    for step, frame in zip(rows(run, "steps.jsonl"), frames, strict=True):
        expected = {}
        for axis in ("ppl", "entropy"):
            values = [row[axis] for row in samples if row["step"] == step["step"]]
            expected[f"{axis}_low"] = quantile(values, step["alpha"])
            expected[f"{axis}_high"] = quantile(values, 1 - step["alpha"])
        assert frame["thresholds"] == expected
        assert frame["alpha"] == step["alpha"]


@pytest.mark.parametrize("count", [10, 100, 50_000])
def test_thresholds_of_an_alpha_that_is_known_to_float32(count):
    """α = h/n as float32 lies a hair above or below h/n; the threshold was that of the next sample."""
    values = np.arange(count, dtype=float)
    for higher in range(1, count // 2, max(1, count // 50)):
        alpha = float(np.float32(higher / count))
        assert quantile_of_report(values, alpha) == higher - 1
        assert quantile_of_report(values, 1 - alpha) == count - higher - 1


def test_no_thresholds_where_they_do_not_part_the_quadrants(tmp_path):
    """Two pools in a step: each has thresholds of its own, and those of the mean α part neither's samples."""
    synthetic_run(tmp_path, steps=2, pool=16)
    record = tmp_path / "record"
    samples = [row | {"step": 1} for row in rows(tmp_path, "samples.jsonl")]
    (record / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (record / "steps.jsonl").write_text(json.dumps(rows(tmp_path, "steps.jsonl")[0]) + "\n")
    (frame,) = Page(build_report(tmp_path)).data["plane"]["frames"]
    assert frame["thresholds"] == {}
    assert frame["alpha"] == 0.35


def test_recorded_thresholds_win(tmp_path):
    with RunRecord(tmp_path / "record") as record:
        sample = {"id": 1, "ppl": 2.0, "entropy": 1.0, "quadrant": 0, "keep": True, "num_tokens": 3}
        record.write_step({"step": 1, "alpha": 0.1, "ppl_low": 1.25, "ppl_high": 7.5}, [sample])
    thresholds = Page(build_report(tmp_path)).data["plane"]["frames"][0]["thresholds"]
    assert thresholds == {"ppl_low": 1.25, "ppl_high": 7.5, "entropy_low": 1.0, "entropy_high": 1.0}


def around(index, count, width=5):
    """The places that a centred rolling mean at `index` is over."""
    return range(max(0, index - width // 2), min(count, index + width // 2 + 1))


def test_curves_follow_from_the_record(page, run):
    """Shares and seconds over 5 steps at a time; means, medians and the loss as they are and smoothed."""
    samples, steps = rows(run, "samples.jsonl"), rows(run, "steps.jsonl")
    charts = page.data["figures"]
    pools = [[row for row in samples if row["step"] == step["step"]] for step in steps]
    assert "Means over 5 steps at a time" in page.text

    shares = {trace["name"]: array(trace["y"]) for trace in charts["shares"]["data"]}
    kept = {trace["name"]: array(trace["y"]) for trace in charts["kept"]["data"]}
    assert sum(name.startswith("Q") for name in shares) == 4
    for index in range(len(steps)):
        near = [row for place in around(index, len(steps)) for row in pools[place]]
        for name in shares:
            if name.startswith("Q"):
                expected = sum(row["quadrant"] == int(name[1]) for row in near) / len(near)
                assert shares[name][index] == pytest.approx(expected)
        trained = [row for row in near if row["keep"]]
        expected = sum(row["supplemented"] for row in trained) / len(trained)
        assert shares["supplemented, of the kept"][index] == pytest.approx(expected)
        assert kept["samples"][index] == pytest.approx(len(trained) / len(near))
        tokens = sum(row["kept_tokens"] for row in near) / sum(row["num_tokens"] for row in near)
        assert kept["tokens"][index] == pytest.approx(tokens)

    def check(raw, smooth, values):
        assert array(raw["y"]) == pytest.approx(values)
        expected = [statistics.fmean(values[place] for place in around(i, len(values))) for i in range(len(values))]
        assert array(smooth["y"]) == pytest.approx(expected)

    of_means = iter(charts["means"]["data"])
    for axis in ("ppl", "entropy"):
        for statistic in (statistics.fmean, statistics.median):
            check(next(of_means), next(of_means), [statistic(row[axis] for row in pool) for pool in pools])
    raw, smooth, evaluation = charts["loss"]["data"]
    check(raw, smooth, [row["loss"] for row in steps])
    assert (list(evaluation["x"]), list(evaluation["y"])) == ([0, 15, 30], [1.5, 1.25, 1.0])
    for phase, trace in zip(PHASES, charts["time"]["data"], strict=True):
        seconds = [row[f"seconds_{phase}"] for row in steps]
        expected = [statistics.fmean(seconds[place] for place in around(i, 30)) for i in range(30)]
        assert array(trace["y"]) == pytest.approx(expected)


def test_long_runs_are_binned_without_bias(tmp_path):
    """300 bins of 2 or 3 steps, and means over 31 bins around each."""
    folder = synthetic_run(tmp_path, steps=700, pool=8, texts=False)
    page = Page(build_report(folder))
    assert_numbers(page, folder)
    assert "Means over 72 steps at a time" in page.text
    samples = rows(folder, "samples.jsonl")
    q1 = next(t for t in page.data["figures"]["shares"]["data"] if t["name"].startswith("Q1"))
    ends, shares = array(q1["x"]), array(q1["y"])
    assert ends[-1] == 700
    for index in (0, 7, 150, 299):
        places = around(index, 300, 31)
        after, last = (ends[places[0] - 1] if places[0] else 0), ends[places[-1]]
        near = [row["quadrant"] for row in samples if after < row["step"] <= last]
        assert shares[index] == pytest.approx(near.count(1) / len(near))


def test_the_terms_are_explained(page, run):
    """What a stranger has to know, where the paper is, and why samples of Q1 were kept."""
    reading = " ".join(re.search(r'(?s)<section id="reading">(.*?)</section>', page.source)[1].split())
    assert 'href="https://arxiv.org/abs/2509.23873"' in reading
    for term in ("Perplexity", "Entropy", "Q1 … Q4", "α (alpha)", "Supplemented"):
        assert f"<dt>{term}</dt>" in reading
    q1 = [row for row in rows(run, "samples.jsonl") if row["quadrant"] == 1]
    plain = re.sub("<[^>]+>", "", reading)
    assert f"Of the {len(q1)} samples in Q1, {sum(row['supplemented'] for row in q1)} were kept" in plain


def test_planted_flaws_are_counted_by_quadrant(page, run):
    section = re.search(r'(?s)<section id="tags">(.*?)</section>', page.source)[1]
    assert "<h2>Planted flaws by quadrant</h2>" in section
    samples = rows(run, "samples.jsonl")
    for tag in set(TAGS):
        of_it = [row for row in samples if TAGS[row["id"] % len(TAGS)] == tag]
        line = re.search(rf'(?s)<tr><th scope="row">{tag}<br>(.*?)</tr>', section)[1]
        shown = re.findall(r"<td>([\d,]+)", line)
        counts = [sum(row["quadrant"] == quadrant for row in of_it) for quadrant in (1, 2, 3, 4, 0)]
        assert shown == [str(n) for n in (*counts, len(of_it), sum(row["keep"] for row in of_it))]
        assert f"{100 * counts[0] / len(of_it):.0f} %" in line


def test_other_tags_are_named_as_tags(tmp_path):
    table = plane_table(20).assign(prompt="p", answer="a", source=["web", "book"] * 10)
    stored = pyarrow.Table.from_pandas(table).replace_schema_metadata({"qtuning": '{"tag_field": "source"}'})
    pyarrow.parquet.write_table(stored, tmp_path / "plane.parquet")
    page = Page(build_report(tmp_path / "plane.parquet"))
    assert "Tags of the data by quadrant" in page.text
    assert page.data["samples"]["tag"] == ["web", "book"] * 10
    assert "flaws" not in page.text


def test_evaluations_are_shown_before_and_after(page):
    assert page.numbers["loss_eval_first"] == 1.5
    assert page.numbers["loss_eval_last"] == 1.0
    for label in ("evaluation loss before training", "evaluation loss at step 30", "mean of the first 5 steps"):
        assert label in page.text


def test_tables_have_captions_and_scopes(page):
    """A screen reader says what a table is, and of what row and column a cell is."""
    tables = re.findall(r"(?s)<table.*?</table>", page.source)
    assert len(tables) == 6
    for table in tables:
        assert re.search(r"(?s)<table[^>]*>\s*<caption>[^<]+</caption>", table)
        assert all(re.search(r'scope="(row|col)"', head) for head in re.findall(r"<th\b[^>]*>", table))
        body = re.search(r"(?s)<tbody>(.*)</tbody>", table)[1]
        for line in re.findall(r"(?s)<tr>(.*?)</tr>", body):
            assert line.lstrip().startswith('<th scope="row">'), line


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """As WCAG defines it, of two opaque colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(code):
    return [int(code[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_in_both_themes(page, theme):
    """Text 4.5 : 1, also on every shade of a token; what is drawn 3 : 1."""
    block = re.search(r"(?s):root%s \{(.*?)\}" % ("" if theme == "light" else r'\[data-theme="dark"\]'), page.source)[1]
    colours = {name: rgb(code) for name, code in re.findall(r"--(\w+): (#\w{6})", block)}
    shade = [int(part) for part in re.search(r"--shade: (\d+) (\d+) (\d+)", block).groups()]
    for text in ("ink", "quiet", "accent"):
        for ground in ("surface", "page"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["ink"], colours["notice"]) >= 4.5
    shares = re.findall(r"\.s\d \{ background: rgb\(var\(--shade\) / ([\d.]+)\)", page.source)
    assert len(shares) == 10
    for share_of_it in map(float, shares):
        mixed = [share_of_it * a + (1 - share_of_it) * b for a, b in zip(shade, colours["surface"], strict=True)]
        assert contrast(colours["ink"], mixed) >= 4.5
    layout = figures.THEMES[theme]["layout"]
    assert rgb(layout["font"]["color"]) == colours["ink"]
    assert contrast(rgb(layout["hoverlabel"]["font"]["color"]), rgb(layout["hoverlabel"]["bgcolor"])) >= 4.5
    for colour in (*figures.COLOURS.values(), *figures.PHASE_COLOURS.values()):
        assert contrast(rgb(colour), colours["surface"]) >= 3, colour


def test_token_view_shows_every_token_kept_or_pruned(page, run):
    articles = re.findall(r'(?s)<article class="sample".*?</article>', page.source)
    recorded = rows(run, "tokens.jsonl")
    assert sum(len(row["tokens"]) for row in recorded) <= MAX_TOKENS
    assert len(articles) == len(recorded) > 20
    for article, row in zip(articles, recorded, strict=True):
        answer = re.search(r'(?s)<p class="answer"[^>]*>(.*)</p>', article)[1]
        tokens = re.findall(r'(?s)<(span|del) class="s(\d)" title="([^"]*)">(.*?)</\1>', answer)
        assert [html.unescape(text).replace("⏎", "") for *_, text in tokens] == row["tokens"]
        assert [tag == "span" for tag, *_ in tokens] == row["keep"]
        assert f"{sum(row['keep'])} of {len(row['keep'])} tokens kept" in article
        order = row["score"] or row["nll"]
        shades = [int(shade) for _, shade, *_ in tokens]
        for low in range(len(order)):
            for high in range(0, len(order), 7):
                assert order[low] >= order[high] or shades[low] <= shades[high]


def test_token_scores_can_be_reached_without_a_mouse(page):
    answers = [a for tag, a in page.tags if a.get("class") == "answer"]
    assert len(answers) > 20
    for attributes in answers:
        assert attributes["tabindex"] == "0"
        assert "arrow keys" in attributes["aria-label"]


def test_every_sample_is_in_the_list_with_its_text(page, run):
    """Those never kept too, however many: the page's script cuts the list into pages."""
    samples = rows(run, "samples.jsonl")
    texts = {row["id"]: row for row in rows(run, "texts.jsonl")}
    table = columns(page.data["samples"])
    assert sorted(map(int, table["id"])) == sorted({row["id"] for row in samples})
    for place, ident in enumerate(map(int, table["id"])):
        scorings = [row for row in samples if row["id"] == ident]
        assert table["seen"][place] == len(scorings)
        for name, key in (("kept", "keep"), ("supplemented", "supplemented")):
            assert table[name][place] == sum(row[key] for row in scorings)
        assert table["quadrant"][place] == scorings[-1]["quadrant"]
        assert table["ppl"][place] == np.float32(scorings[-1]["ppl"])
        assert (table["prompt"][place], table["answer"][place]) == (texts[ident]["prompt"], texts[ident]["answer"])
        assert table["tag"][place] == texts[ident]["tag"]


def test_configuration_versions_and_command_are_shown(page):
    text = html.unescape(page.text)
    assert "qtuning train --data gsm8k.jsonl --max-steps 30" in text
    for expected in ("qtuning.sample_ratio", "0.125", "learning_rate", "transformers"):
        assert expected in text


def test_page_asks_for_nothing(page):
    """One file: no element that loads, and a policy that forbids the rest."""
    loading = {"src", "href", "srcset", "action", "data"}
    for tag, attributes in page.tags:
        if tag == "a":  # which a reader follows, and nothing else does
            assert attributes["href"] == "https://arxiv.org/abs/2509.23873"
            continue
        for name in loading & attributes.keys():
            assert attributes[name] == "data:,", (tag, attributes)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


HOSTILE = "<script>window.hacked=1</script>\"'&</textarea>--><img src=x onerror=window.hacked=1>\u2028{{7*7}}"


def test_hostile_text_stays_text(tmp_path):
    folder = synthetic_run(tmp_path, steps=3, text=lambda ident, rng: HOSTILE)
    with RunRecord(folder / "record", resume_step=3) as record:
        record.write_run(configuration={HOSTILE: HOSTILE}, command=HOSTILE, versions={HOSTILE: HOSTILE})
        token = {"id": HOSTILE, "tokens": [HOSTILE], "nll": [1.0], "keep": [True], "prompt": HOSTILE}
        sample = {"id": HOSTILE, "ppl": 2.0, "entropy": 1.0, "quadrant": 4, "role": 4, "keep": True}
        record.write_step({"step": 4}, [sample], [token])
    page = Page(build_report(folder))
    assert [tag for tag, _ in page.tags if tag == "img"] == []
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert page.source.count("</script>") == 3
    assert HOSTILE in html.unescape(page.source)
    assert "window.hacked=1</script>" not in page.source
    assert HOSTILE in page.data["samples"]["prompt"][0]
    assert HOSTILE in page.data["samples"]["id"]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("texts", [True, False])
def test_short_runs(tmp_path, steps, texts):
    folder = synthetic_run(tmp_path, steps=steps, samples=40, texts=texts)
    page = Page(build_report(folder))
    assert_numbers(page, folder)
    assert ("ended before its first optimiser step" in page.text) == (steps == 0)
    assert len(page.data["plane"]["frames"]) == {0: 0, 1: 1, 2: 3}[steps]
    assert ("recorded no texts" in page.text) == (not texts)


def test_killed_run(tmp_path):
    """A kill after the samples of step 3 were appended, in the middle of a later write."""
    folder = synthetic_run(tmp_path, steps=3)
    record = folder / "record"
    lines = (record / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (record / "steps.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    page = Page(build_report(folder))
    assert "ended inside step 3" in page.text
    assert page.numbers["steps"] == 2
    assert page.numbers["samples_seen"] == 32


def test_run_without_scores(tmp_path):
    """Steps of a warm-up on full data have samples but no place on the plane."""
    with RunRecord(tmp_path / "record") as record:
        record.write_step({"step": 1, "loss": 1.0}, [{"id": 0, "num_tokens": 5, "keep": True, "kept_tokens": 5}])
    page = Page(build_report(tmp_path))
    assert_numbers(page, tmp_path)
    assert "Not recorded per sample: ppl, entropy, quadrant, role, supplemented" in page.text


@pytest.mark.parametrize("scored", [True, False])
def test_a_policy_without_quadrants(tmp_path, scored):
    """What it keeps is drawn on the plane if it scores, and over the run; of quadrants there is nothing."""
    with RunRecord(tmp_path / "record") as record:
        record.write_run(configuration={"qtuning": {"policy": "entropy"}})
        for step in range(1, 4):
            rows = [
                {"id": 4 * step + i, "num_tokens": 10, "keep": i == 1, "kept_tokens": 5 * (i == 1)}
                | ({"ppl": 2.0 + i, "entropy": 1.0 + i} if scored else {})
                for i in range(4)
            ]
            record.write_step({"step": step, "loss": 1.0}, rows)
    page = Page(build_report(tmp_path))
    assert "entropy, which has no quadrants" in " ".join(page.text.split()).replace(" ,", ",")
    for absent in ("Q1", "harmful noise", "supplemented", "Not recorded per sample", "alpha"):
        assert absent not in page.text
    kept = page.data["figures"]["kept"]["data"]
    assert [trace["name"] for trace in kept] == ["samples", "tokens"]
    assert ("plane" in page.data["figures"]) == scored
    if scored:
        assert page.data["plane"]["names"] == {}
        assert {(point["quadrant"], point["keep"]) for point in points(page)} == {(0, 0), (2, 1)}


def test_non_finite_samples_are_counted_not_drawn(tmp_path):
    with RunRecord(tmp_path / "record") as record:
        rows_written = [
            {"id": i, "ppl": ppl, "entropy": 1.0, "quadrant": 0, "role": 0, "keep": False, "num_tokens": 3}
            for i, ppl in enumerate([2.0, math.nan, math.inf, 1e38])
        ]
        record.write_step({"step": 1, "loss": math.inf, "alpha": 0.3}, rows_written)
    page = Page(build_report(tmp_path))
    assert page.numbers["not_on_plane"] == 2
    assert len(points(page)) == page.data["plane"]["frames"][0]["total"] == 2


def test_a_head_without_entries_and_one_of_a_later_version(tmp_path):
    folder = synthetic_run(tmp_path, steps=2)
    head = folder / "record" / "run.json"
    run = json.loads(head.read_text())
    head.write_text(json.dumps({"record_version": 1}))
    assert_numbers(Page(build_report(folder)), folder)
    head.write_text(json.dumps(run | {"record_version": 99}))
    with pytest.raises(RecordError, match="record_version 99"):
        build_report(folder)


def test_clear_errors(tmp_path):
    with pytest.raises(RecordError, match="does not exist"):
        build_report(tmp_path / "missing")
    with pytest.raises(RecordError, match="holds no record"):
        build_report(tmp_path)
    (tmp_path / "text.csv").write_text("a,b\n")
    with pytest.raises(RecordError, match="neither the folder of a run nor a Parquet file"):
        build_report(tmp_path / "text.csv")
    (tmp_path / "plane.parquet").write_text("not parquet")
    with pytest.raises(RecordError, match="cannot be read as Parquet"):
        build_report(tmp_path / "plane.parquet")
    pd.DataFrame({"sample_id": [1], "ppl": [2.0]}).to_parquet(tmp_path / "plane.parquet")
    with pytest.raises(RecordError, match="lacks the columns entropy, num_tokens, quadrant, role"):
        build_report(tmp_path / "plane.parquet")


def plane_table(size=200):
    rng = np.random.default_rng(0)
    quadrant = rng.integers(0, 5, size)
    return pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(size)],
            "ppl": rng.lognormal(1.0, 0.5, size),
            "entropy": rng.gamma(4, 0.25, size),
            "num_tokens": rng.integers(1, 99, size),
            "quadrant": quadrant.astype("int8"),
            "role": np.where(np.isin(quadrant, [2, 4]), quadrant, 0).astype("int8"),
        }
    )


@pytest.mark.parametrize("size", [0, 1, 200])
@pytest.mark.parametrize("texts", [True, False])
def test_plane_of_a_scored_data_set(tmp_path, size, texts):
    table = plane_table(size)
    if texts:
        table["prompt"], table["answer"] = "p<b>", "a"
    table.to_parquet(tmp_path / "plane.parquet")
    output = build_report(tmp_path / "plane.parquet")
    assert output == tmp_path / "plane.html"
    page = Page(output)
    counts = {f"count_q{q}": int((table.quadrant == q).sum()) for q in range(5)}
    assert {key: page.numbers[key] for key in counts} == counts
    assert page.numbers["samples_seen"] == size
    assert page.numbers["tokens_seen"] == (int(table.num_tokens.sum()) if size else None)
    assert page.numbers["samples_kept"] == int((table.role > 0).sum())
    assert len(points(page) if size else []) == len(page.data["samples"]["id"]) == size
    assert page.data["samples"]["prompt"] == ["p<b>" if texts else None] * size


def test_plane_of_a_scored_data_set_has_thresholds(tmp_path):
    """`qtuning score` leaves its α in the file; what it filled up with shows as supplemented."""
    sampled, alpha = synthetic_pool(np.random.default_rng(3), 200, 0.0)
    names = ("ppl", "entropy", "num_tokens", "quadrant", "role")
    table = pyarrow.table({"sample_id": range(200), **{name: sampled[name] for name in names}})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"qtuning": json.dumps({"alpha": alpha})}), tmp_path / "plane.parquet"
    )
    page = Page(build_report(tmp_path / "plane.parquet"))
    (frame,) = page.data["plane"]["frames"]
    assert frame["alpha"] == alpha
    assert frame["thresholds"] == {
        f"{axis}_{end}": quantile(sampled[axis], gamma)
        for axis in ("ppl", "entropy")
        for end, gamma in (("low", alpha), ("high", 1 - alpha))
    }
    assert page.numbers["samples_supplemented"] == int(sampled["supplemented"].sum()) > 0


def test_output_can_be_named(run, tmp_path):
    output = build_report(run, tmp_path / "new" / "page.html")
    assert output == tmp_path / "new" / "page.html"
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", ["plane.parquet", "link.html", "samples.jsonl"])
def test_a_page_never_replaces_what_it_is_made_from(tmp_path, name):
    """`qtuning report plane.parquet --output plane.parquet` ended with 0, and the plane was gone."""
    if name == "samples.jsonl":
        source = synthetic_run(tmp_path, steps=1)
        file = output = source / "record" / name
    else:
        source = file = tmp_path / "plane.parquet"
        plane_table(3).to_parquet(file)
        output = tmp_path / name
        if output != file:
            output.symlink_to(file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="is a file of the input"):
        build_report(source, output)
    assert file.read_bytes() == before


@pytest.mark.slow
def test_fifty_thousand_samples_fit(tmp_path):
    """Every sample is drawn, and the page stays below 30 MB even if each has 4,000 characters of text."""
    folder = synthetic_run(tmp_path, steps=782, pool=64, samples=50_000, text=lambda i, rng: "é" * 2000)
    output = build_report(folder)
    assert output.stat().st_size < 30e6
    page = Page(output)
    assert_numbers(page, folder)
    assert len(points(page)) == page.data["plane"]["frames"][0]["total"] == 50_000
    limit = page.data["samples"]["limit"]
    assert f"Texts are cut at {limit} characters" in page.text
    assert {len(text) for text in page.data["samples"]["answer"]} == {limit}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the trainer itself, on a tiny model."""
    from transformers import TrainingArguments

    from qtuning_kernels import QTuningConfig, QTuningTrainer
    from tests.tiny import tiny_model, tiny_samples

    folder = tmp_path_factory.mktemp("trained")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2, eval_on_start=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    config = QTuningConfig(sample_ratio=0.25, token_ratio=0.5)
    data = {"train_dataset": tiny_samples(48), "eval_dataset": tiny_samples(8)}
    trainer = QTuningTrainer(tiny_model(), arguments, **data, qtuning=config)
    trainer.train()
    trainer.evaluate()  # after the record's files are closed
    return folder


def test_report_of_the_trainers_own_record(trained):
    """Whatever the report needs, the trainer records: nothing is missing and every number agrees."""
    page = Page(build_report(trained))
    assert_numbers(page, trained)
    assert all(value is not None for value in page.numbers.values())
    assert page.numbers["samples_seen"] == 80
    assert page.numbers["samples_kept"] == 20
    assert "Not recorded" not in page.text
    assert len(points(page)) == 48
    evaluations = json.loads((trained / "record" / "run.json").read_text())["evaluations"]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5, 5]
    assert all(row.keys() == {"step", "eval_loss"} for row in evaluations)
    assert page.numbers["loss_eval_first"] == evaluations[0]["eval_loss"]
    assert page.numbers["loss_eval_last"] == evaluations[-1]["eval_loss"]


def test_command(run, tmp_path, capsys):
    from qtuning_kernels.commands import cli

    assert cli.main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}\n"
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_missing_library_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ModuleNotFoundError, match=r"plotly: .* -m pip install 'qtuning-kernels\[report\]'"):
        build_report(run)
