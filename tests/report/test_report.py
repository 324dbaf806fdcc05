"""The report's page: every number against the record, and every state that a record can be in."""

import html
import json
import math
import re
import statistics
import sys

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly", reason="needs the report extra: plotly, jinja2")
from qtuning_kernels.report import build_report
from qtuning_kernels.report.texts import MAX_LISTED, MAX_TOKENS
from qtuning_kernels.run_record.reader import RecordError
from qtuning_kernels.run_record.writer import RunRecord
from tests.synthetic_run import quantile, synthetic_run

from .report_expected import PHASES, rows, share
from .report_page import Page, array, assert_numbers


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
    table = {(row["step"], row["id"]): row for row in rows(run, "samples.jsonl")}
    figures = page.data["figures"]["plane"]
    assert len(figures) == len(page.data["frames"]) == 25
    latest = {}
    for (step, ident), row in table.items():
        latest[ident] = (step, row)
    for number, figure in enumerate(figures):
        seen = set()
        for trace in figure["data"]:
            x, y, custom = (array(trace[name]) for name in ("x", "y", "customdata"))
            for ppl, entropy, (sample, step, kept, total, role, supplemented) in zip(x, y, custom, strict=True):
                ident = int(page.data["samples"]["id"][sample])
                row = table[int(step), ident]
                assert ppl == np.float32(row["ppl"])
                assert entropy == np.float32(row["entropy"])
                assert (kept, total) == (row["kept_tokens"], row["num_tokens"])
                assert (role, bool(supplemented)) == (row["role"], row["supplemented"])
                assert trace["name"].endswith("kept" if row["keep"] else "dropped")
                assert trace["name"].startswith(f"Q{row['quadrant']} " if row["quadrant"] else "middle")
                assert ident not in seen
                seen.add(ident)
                if number == 0:
                    assert step == latest[ident][0]
        if number == 0:
            assert seen == set(latest)
        assert page.data["frames"][number]["shown"] == page.data["frames"][number]["total"] == len(seen)


def test_thresholds_follow_from_alpha(page, run):
    """Q_γ is the smallest value with at least a fraction γ at or below it; frames show medians over steps."""
    samples = rows(run, "samples.jsonl")
    expected = {name: [] for name in ("ppl_low", "ppl_high", "entropy_low", "entropy_high")}
    for step in rows(run, "steps.jsonl"):
        for axis in ("ppl", "entropy"):
            values = [row[axis] for row in samples if row["step"] == step["step"]]
            expected[f"{axis}_low"].append(quantile(values, step["alpha"]))
            expected[f"{axis}_high"].append(quantile(values, 1 - step["alpha"]))
    whole = page.data["frames"][0]["thresholds"]
    assert whole == {name: pytest.approx(statistics.median(values)) for name, values in expected.items()}
    lines = {shape["name"]: shape for shape in page.data["figures"]["plane"][0]["layout"]["shapes"]}
    assert lines["ppl_high"]["x0"] == lines["ppl_high"]["x1"] == whole["ppl_high"]
    assert lines["entropy_low"]["y0"] == lines["entropy_low"]["y1"] == whole["entropy_low"]


def test_recorded_thresholds_win(tmp_path):
    with RunRecord(tmp_path / "record") as record:
        sample = {"id": 1, "ppl": 2.0, "entropy": 1.0, "quadrant": 0, "keep": True, "num_tokens": 3}
        record.write_step({"step": 1, "alpha": 0.1, "ppl_low": 1.25, "ppl_high": 7.5}, [sample])
    thresholds = Page(build_report(tmp_path)).data["frames"][0]["thresholds"]
    assert thresholds == {"ppl_low": 1.25, "ppl_high": 7.5, "entropy_low": 1.0, "entropy_high": 1.0}


def test_curves_follow_from_the_record(page, run):
    samples, steps = rows(run, "samples.jsonl"), rows(run, "steps.jsonl")
    figures = page.data["figures"]

    def pool(step):
        return [row for row in samples if row["step"] == step]

    curves = {trace["name"]: array(trace["y"]) for trace in figures["shares"]["data"]}
    names = [name for name in curves if name.startswith("Q")]
    assert len(names) == 4
    for index, row in enumerate(steps):
        pool_rows = pool(row["step"])
        for name in names:
            count = sum(r["quadrant"] == int(name[1]) for r in pool_rows)
            assert curves[name][index] == pytest.approx(count / len(pool_rows))
        kept = [r for r in pool_rows if r["keep"]]
        supplemented = share(sum(r["supplemented"] for r in kept), len(kept))
        got = curves["supplemented, of the kept"][index]
        assert math.isnan(got) if supplemented is None else got == pytest.approx(supplemented)
    ppl_mean, ppl_median, entropy_mean, entropy_median = (array(t["y"]) for t in figures["means"]["data"])
    for index, row in enumerate(steps):
        for axis, mean, median in (("ppl", ppl_mean, ppl_median), ("entropy", entropy_mean, entropy_median)):
            values = [r[axis] for r in pool(row["step"])]
            assert mean[index] == pytest.approx(statistics.fmean(values))
            assert median[index] == pytest.approx(statistics.median(values))
    assert array(figures["loss"]["data"][0]["y"]) == pytest.approx([row["loss"] for row in steps])
    for phase, trace in zip(PHASES, figures["time"]["data"], strict=True):
        assert array(trace["y"]) == pytest.approx([row[f"seconds_{phase}"] for row in steps])
    bars = [trace["x"][0] for trace in figures["flops"]["data"]]
    assert bars == pytest.approx([page.numbers["flops_full"], page.numbers["flops_spent"]])


def test_long_runs_are_binned_without_bias(tmp_path):
    folder = synthetic_run(tmp_path, steps=700, pool=8, texts=False)
    page = Page(build_report(folder))
    assert_numbers(page, folder)
    assert "700 steps in 300 bins" in html.unescape(page.text)
    samples = rows(folder, "samples.jsonl")
    q1 = next(t for t in page.data["figures"]["shares"]["data"] if t["name"].startswith("Q1"))
    ends, shares = array(q1["x"]), array(q1["y"])
    assert ends[-1] == 700
    start = 0
    for end, got in zip(ends[:20], shares[:20], strict=True):
        of_bin = [row["quadrant"] for row in samples if start < row["step"] <= end]
        assert got == pytest.approx(of_bin.count(1) / len(of_bin))
        start = end


def test_token_view_shows_every_token_kept_or_pruned(page, run):
    articles = re.findall(r'(?s)<article class="sample".*?</article>', page.source)
    recorded = rows(run, "tokens.jsonl")
    assert sum(len(row["tokens"]) for row in recorded) <= MAX_TOKENS
    assert len(articles) == len(recorded) > 20
    for article, row in zip(articles, recorded, strict=True):
        answer = re.search(r'(?s)<p class="answer">(.*)</p>', article)[1]
        tokens = re.findall(r'(?s)<(span|del) class="s(\d)" title="([^"]*)">(.*?)</\1>', answer)
        assert [html.unescape(text).replace("⏎", "") for *_, text in tokens] == row["tokens"]
        assert [tag == "span" for tag, *_ in tokens] == row["keep"]
        assert f"{sum(row['keep'])} of {len(row['keep'])} tokens kept" in article
        order = row["score"] or row["nll"]
        shades = [int(shade) for _, shade, *_ in tokens]
        for low in range(len(order)):
            for high in range(0, len(order), 7):
                assert order[low] >= order[high] or shades[low] <= shades[high]


def test_never_and_always_kept_are_listed_with_texts(page, run):
    samples = rows(run, "samples.jsonl")
    texts = {row["id"]: row for row in rows(run, "texts.jsonl")}
    kept = {row["id"]: False for row in samples}
    for row in samples:
        kept[row["id"]] |= row["keep"]
    never = {ident for ident, any_kept in kept.items() if not any_kept}
    section = re.search(r"(?s)<summary>Never kept</summary>(.*?)</details>", page.source)[1]
    listed = [int(ident) for ident in re.findall(r"<b>(\d+)</b>", section)]
    assert len(listed) == len(set(listed)) == min(MAX_LISTED, len(never))
    assert set(listed) <= never
    assert all(texts[ident]["prompt"] in html.unescape(section) for ident in listed)
    assert f"The first {MAX_LISTED} of {len(never)}" in section


def test_configuration_versions_and_command_are_shown(page):
    text = html.unescape(page.text)
    assert "qtuning train --data gsm8k.jsonl --max-steps 30" in text
    for expected in ("qtuning.sample_ratio", "0.125", "learning_rate", "transformers"):
        assert expected in text


def test_page_asks_for_nothing(page):
    """One file: no element that loads, and a policy that forbids the rest."""
    loading = {"src", "href", "srcset", "action", "data"}
    for tag, attributes in page.tags:
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
    assert len(page.data["frames"]) == {0: 0, 1: 1, 2: 3}[steps]
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
    assert ("plane" in page.data["figures"]) == scored or not page.data["figures"]["plane"]
    if scored:
        assert [trace["name"] for trace in page.data["figures"]["plane"][0]["data"]] == ["dropped", "kept"]


def test_non_finite_samples_are_counted_not_drawn(tmp_path):
    with RunRecord(tmp_path / "record") as record:
        rows_written = [
            {"id": i, "ppl": ppl, "entropy": 1.0, "quadrant": 0, "role": 0, "keep": False, "num_tokens": 3}
            for i, ppl in enumerate([2.0, math.nan, math.inf, 1e38])
        ]
        record.write_step({"step": 1, "loss": math.inf, "alpha": 0.3}, rows_written)
    page = Page(build_report(tmp_path))
    assert page.numbers["not_on_plane"] == 2
    assert page.data["frames"][0]["shown"] == 2


def test_older_and_later_versions(tmp_path):
    folder = synthetic_run(tmp_path, steps=2)
    head = folder / "record" / "run.json"
    run = json.loads(head.read_text())
    head.write_text(json.dumps({"record_version": 0}))
    page = Page(build_report(folder))
    assert "record is of version 0" in html.unescape(page.text)
    assert_numbers(page, folder)
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
    assert sum(len(array(t["x"])) for f in page.data["figures"]["plane"] for t in f["data"]) == size


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
    assert page.data["frames"][0]["shown"] == page.data["frames"][0]["total"] == 50_000
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
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    config = QTuningConfig(sample_ratio=0.25, token_ratio=0.5)
    QTuningTrainer(tiny_model(), arguments, train_dataset=tiny_samples(48), qtuning=config).train()
    return folder


def test_report_of_the_trainers_own_record(trained):
    """Whatever the report needs, the trainer records: nothing is missing and every number agrees."""
    page = Page(build_report(trained))
    assert_numbers(page, trained)
    assert all(value is not None for value in page.numbers.values())
    assert page.numbers["samples_seen"] == 80
    assert page.numbers["samples_kept"] == 20
    assert "Not recorded" not in page.text
    assert set(page.data["frames"][0]["thresholds"]) == {"ppl_low", "ppl_high", "entropy_low", "entropy_high"}
    assert sum(len(array(trace["x"])) for trace in page.data["figures"]["plane"][0]["data"]) == 48


def test_command(run, tmp_path, capsys):
    from qtuning_kernels.commands import cli

    assert cli.main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}\n"
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_missing_library_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ModuleNotFoundError, match=r"plotly: pip install 'qtuning-kernels\[report\]'"):
        build_report(run)
