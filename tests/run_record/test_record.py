"""The record: what is written is what is read, in every state that a run can leave it."""

import json
import math
import signal
import subprocess
import sys
import time

import pandas
import pytest
import torch

from qtuning_kernels.run_record.reader import RecordError, read_record
from qtuning_kernels.run_record.schema import RECORD_VERSION, SAMPLE_COLUMNS, STEP_COLUMNS
from qtuning_kernels.run_record.writer import RunRecord, write_texts


def sample_columns(size=4, first=0):
    return {
        "id": list(range(first, first + size)),
        "ppl": torch.linspace(1.5, 9.0, size),
        "entropy": torch.linspace(0.25, 2.0, size),
        "quadrant": torch.tensor([1, 2, 3, 4] * (size // 4), dtype=torch.int8),
        "role": torch.tensor([0, 2, 0, 4] * (size // 4), dtype=torch.int8),
        "keep": torch.tensor([False, True, False, True] * (size // 4)),
        "supplemented": [False, False, False, True] * (size // 4),
        "num_tokens": [10] * size,
        "kept_tokens": [0, 5, 0, 10] * (size // 4),
    }


def token_row(ident=1):
    return {
        "id": ident,
        "token_ids": torch.tensor([7, 8]),
        "tokens": [" a", "<b>"],
        "nll": torch.tensor([0.5, float("inf")]),
        "score": None,
        "keep": torch.tensor([True, False]),
        "prompt": "two\nlines  and \ud800",
    }


def write_run(folder, steps=3, **options):
    with RunRecord(folder, **options) as record:
        first = 1 + (options.get("resume_step") or 0)
        for step in range(first, first + steps):
            row = {"step": step, "loss": 1.0 / step, "seconds": {"score": 0.5, "train": 1.0}}
            record.write_step(row, sample_columns(first=4 * step), [token_row()])
    return record


def test_round_trip(tmp_path):
    write_run(tmp_path / "record").write_run(configuration={"lr": 1e-4}, command="qtuning train")
    record = read_record(tmp_path)
    assert record.notices == []
    assert record.run["record_version"] == RECORD_VERSION
    assert record.run["configuration"] == {"lr": 1e-4}
    assert record.run["command"] == "qtuning train"
    assert "torch" in record.run["versions"]
    assert list(record.samples.columns) == list(SAMPLE_COLUMNS)
    assert set(STEP_COLUMNS) <= set(record.steps.columns)
    assert record.samples.step.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert record.samples.ppl.tolist() == torch.linspace(1.5, 9.0, 4).tolist() * 3
    assert record.samples.keep.tolist() == [False, True, False, True] * 3
    assert record.steps.seconds_score.tolist() == [0.5] * 3
    assert record.steps.count_q2.tolist() == [1] * 3
    assert record.steps.count_kept.tolist() == [2] * 3
    assert record.steps.count_supplemented.tolist() == [1] * 3
    assert record.tokens.nll[0] == [0.5, math.inf]
    assert record.tokens["prompt"][0] == "two\nlines  and ?"


def test_rows_and_columns_write_the_same(tmp_path):
    columns = {name: _list(column) for name, column in sample_columns().items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for name, samples in (("rows", rows), ("columns", sample_columns())):
        with RunRecord(tmp_path / name) as record:
            record.write_step({"step": 1}, samples)
    assert (tmp_path / "rows/samples.jsonl").read_text() == (tmp_path / "columns/samples.jsonl").read_text()


def _list(column):
    return column.tolist() if hasattr(column, "tolist") else column


def test_non_finite_values_reach_pandas(tmp_path):
    columns = sample_columns() | {"ppl": [math.nan, math.inf, -math.inf, 2.0]}
    with RunRecord(tmp_path) as record:
        record.write_step({"step": 1, "loss": math.nan}, columns)
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    one_line = pandas.read_json(tmp_path / "samples.jsonl", lines=True)
    for samples in (one_line, read_record(tmp_path).samples):
        assert math.isnan(samples.ppl[0])
        assert samples.ppl[1:].tolist() == [math.inf, -math.inf, 2.0]
    assert math.isnan(read_record(tmp_path).steps.loss[0])


def test_string_ids_stay_strings(tmp_path):
    with RunRecord(tmp_path) as record:
        record.write_step({"step": 1}, sample_columns() | {"id": ["001", "1", "a", "1.0"]})
    assert read_record(tmp_path).samples.id.tolist() == ["001", "1", "a", "1.0"]


@pytest.mark.parametrize("resume_step", [0, 2, 3, 9])
def test_resume_truncates_later_rows(tmp_path, resume_step):
    write_run(tmp_path, steps=3)
    record = RunRecord(tmp_path, resume_step=resume_step)
    record.close()
    steps = list(range(1, min(3, resume_step) + 1))
    read = read_record(tmp_path)
    assert read.steps.step.tolist() == steps
    assert read.samples.step.tolist() == [step for step in steps for _ in range(4)]
    assert read.tokens.step.tolist() == steps
    assert [entry["step"] for entry in read.run["resumed"]] == [resume_step]


def test_resumed_run_is_the_uninterrupted_run(tmp_path):
    write_run(tmp_path / "once", steps=4)
    write_run(tmp_path / "twice", steps=3)
    write_run(tmp_path / "twice", steps=2, resume_step=2)
    for name in ("samples.jsonl", "steps.jsonl", "tokens.jsonl"):
        assert (tmp_path / "once" / name).read_text() == (tmp_path / "twice" / name).read_text()


def test_resume_of_a_run_without_record_starts_one(tmp_path):
    write_run(tmp_path, steps=1, resume_step=5)
    assert read_record(tmp_path).steps.step.tolist() == [6]


def test_fresh_run_sets_an_earlier_record_aside(tmp_path):
    write_run(tmp_path / "record", steps=3)
    write_texts(tmp_path / "record", [{"id": 0, "prompt": "p", "answer": "a"}])
    write_run(tmp_path / "record", steps=1)
    assert len(read_record(tmp_path).steps) == 1
    assert len(read_record(tmp_path).texts) == 1
    assert len(read_record(tmp_path / "record.1").steps) == 3


@pytest.mark.parametrize("name", ["samples.jsonl", "steps.jsonl", "tokens.jsonl"])
def test_every_cut_of_a_file_is_readable(tmp_path, name):
    """A kill can leave any prefix of the last write: each must read as the steps that are whole."""
    write_run(tmp_path, steps=2)
    whole = (tmp_path / name).read_bytes()
    first = len(b"".join(whole.splitlines(keepends=True)[: len(whole.splitlines()) // 2]))
    for end in range(first, len(whole), 7):
        (tmp_path / name).write_bytes(whole[:end])
        record = read_record(tmp_path)
        assert set(record.samples.step) <= set(record.steps.step)
        assert record.steps.step.tolist() == ([1] if name == "steps.jsonl" else [1, 2])


def test_killed_process(tmp_path):
    """SIGKILL in the middle of writing loses at most the step under way, and a resume goes on from there."""
    code = (
        "import sys; from qtuning_kernels.run_record.writer import RunRecord\n"
        "record = RunRecord(sys.argv[1])\n"
        "for step in range(1, 10**9):\n"
        "    record.write_step({'step': step}, [{'id': i, 'keep': True} for i in range(500)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "steps.jsonl").exists() or (tmp_path / "steps.jsonl").stat().st_size < 2000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    record = read_record(tmp_path)
    last = len(record.steps)
    assert last > 5
    assert record.steps.step.tolist() == list(range(1, last + 1))
    assert record.samples.groupby("step").size().tolist() == [500] * last
    RunRecord(tmp_path, resume_step=last - 1).close()
    assert len(read_record(tmp_path).steps) == last - 1


def test_empty_run(tmp_path):
    RunRecord(tmp_path).close()
    record = read_record(tmp_path)
    assert (len(record.samples), len(record.steps), len(record.tokens), len(record.texts)) == (0, 0, 0, 0)
    assert record.notices == ["The run ended before its first optimiser step was recorded."]


def test_a_run_that_stopped_early_says_so(tmp_path):
    write_run(tmp_path, steps=3, total_steps=8)
    assert read_record(tmp_path).notices == ["3 of 8 steps are recorded: the run is under way, or it ended early."]
    write_run(tmp_path, steps=5, total_steps=8, resume_step=3)
    assert read_record(tmp_path).notices == []


def test_columns_that_rows_lack_are_nan(tmp_path):
    write_run(tmp_path, steps=1)
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "id": 3, "ppl": 2.5}\n')
    record = read_record(tmp_path)
    assert record.samples.ppl.tolist() == [2.5]
    assert math.isnan(record.samples.entropy[0])


def test_later_version_is_an_error(tmp_path):
    write_run(tmp_path, steps=1)
    _edit_version(tmp_path, RECORD_VERSION + 1)
    with pytest.raises(RecordError, match=f"record_version {RECORD_VERSION + 1}.*Update"):
        read_record(tmp_path)


def _edit_version(folder, version):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"record_version": version}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"record_version": "1"}', "\x00"])
def test_damaged_head_is_an_error(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecordError, match=r"run\.json"):
        read_record(tmp_path)


def test_damaged_row_names_file_and_line(tmp_path):
    write_run(tmp_path, steps=1)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_text(lines[0] + "{broken\n" + "".join(lines[1:]))
    with pytest.raises(RecordError, match=r"samples\.jsonl, line 2"):
        read_record(tmp_path)


def test_missing_record_is_an_error(tmp_path):
    with pytest.raises(RecordError, match="does not exist"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="holds no record"):
        read_record(tmp_path)


def test_unequal_columns_are_an_error(tmp_path):
    with RunRecord(tmp_path) as record, pytest.raises(ValueError, match="equal length"):
        record.write_step({"step": 1}, {"id": [1, 2], "ppl": [1.0]})


@pytest.mark.parametrize("total_steps", [1, 7, 30, 1000])
def test_token_samples_are_bounded_spread_and_seeded(tmp_path, total_steps):
    def choices(name, seed):
        record = RunRecord(tmp_path / name, total_steps=total_steps, token_samples=40, seed=seed)
        chosen = []
        for step in range(1, total_steps + 1):
            keep = [position % 2 == 0 for position in range(64)]
            chosen.append(record.choose_token_samples(step, keep))
            record.write_step({"step": step}, [], [{"id": position} for position in chosen[-1]])
        record.close()
        return chosen

    first = choices("a", 0)
    assert first == choices("b", 0)
    assert total_steps == 1 or first != choices("c", 1)  # with one step all that is kept is taken
    assert sum(map(len, first)) == min(40, total_steps * 32)
    assert max(map(len, first)) - min(map(len, first)) <= 1
    assert all(position % 2 == 0 for chosen in first for position in chosen)


def test_texts_are_truncated_and_say_so(tmp_path):
    write_texts(
        tmp_path,
        [{"id": 1, "prompt": "abc", "answer": "x" * 9}, {"id": 2, "prompt": "", "answer": "y", "tag": "wrong"}],
        limit=4,
    )
    assert [json.loads(line) for line in (tmp_path / "texts.jsonl").open()] == [
        {"id": 1, "prompt": "abc", "answer": "xxxx", "truncated": True},
        {"id": 2, "prompt": "", "answer": "y", "truncated": False, "tag": "wrong"},
    ]


def test_evaluations_are_those_of_the_run_as_it_went_on(tmp_path):
    """Each call brings all of them: a resumed run drops those behind its checkpoint, and older records have none."""
    early, late, again = ({"step": step, "eval_loss": loss} for step, loss in ((0, 2.0), (4, 1.5), (4, 1.25)))
    write_run(tmp_path / "record", steps=4).write_run(evaluations=[early, late])
    record = write_run(tmp_path / "record", steps=2, resume_step=2)
    record.close()
    record.write_run(evaluations=[early, again])
    assert read_record(tmp_path).run["evaluations"] == [early, again]
    (tmp_path / "record" / "run.json").write_text('{"record_version": 1}')
    assert read_record(tmp_path).run["evaluations"] == []
