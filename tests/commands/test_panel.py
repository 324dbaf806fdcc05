"""The panel: what the trainer logs, on a terminal and off one."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from qtuning_kernels.commands.panel import RunPanel

LOGS = {
    "loss": 0.8123,
    "qtuning/kept_samples": 2.0,
    "qtuning/kept_tokens": 231.0,
    "qtuning/tokens_per_second": 1234.4,
    "qtuning/supplemented": 0.5,
    "qtuning/q0": 0.4,
    "qtuning/q1": 0.25,
    "qtuning/q2": 0.1,
    "qtuning/q3": 0.2,
    "qtuning/q4": 0.05,
    "qtuning/seconds_score": 3.0,
    "qtuning/seconds_train": 1.0,
    "learning_rate": 1e-4,
}


def run(panel, steps=40, logging_steps=1, logs=LOGS, first=0, rank_zero=True):
    """The calls that `Trainer` makes."""
    args = SimpleNamespace(logging_steps=logging_steps)
    state = SimpleNamespace(global_step=first, max_steps=steps, is_world_process_zero=rank_zero)
    panel.on_train_begin(args, state, None)
    while state.global_step < steps:
        state.global_step += 1
        panel.on_step_end(args, state, None)
        if state.global_step % logging_steps == 0:
            panel.on_log(args, state, None, logs=dict(logs))
    panel.on_log(args, state, None, logs={"train_runtime": 1.0})
    panel.on_train_end(args, state, None)


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal_console(width=110):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, _environ={})


def test_plain_lines_off_a_terminal():
    console = plain_console()
    run(RunPanel(console))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 20
    assert "\x1b" not in console.file.getvalue()
    last = lines[-1]
    for expected in ("step 40/40", "loss 0.8123", "1,234 tokens/s", "231 tokens kept", "Q1 25%", "score 75%"):
        assert expected in last
    assert last.endswith("0:00:00 left")


@pytest.mark.parametrize(("steps", "logging_steps"), [(1, 1), (7, 1), (1000, 10), (1000, 300), (90, 7)])
def test_number_of_plain_lines_is_bounded(steps, logging_steps):
    console = plain_console()
    run(RunPanel(console), steps, logging_steps)
    lines = console.file.getvalue().splitlines()
    assert min(steps // logging_steps, 8) <= len(lines) <= 24


def test_live_panel_on_a_terminal():
    console = terminal_console()
    panel = RunPanel(console)
    run(panel)
    text = console.file.getvalue()
    for expected in (
        "Q-Tuning",
        "0.8123",
        "1,234",
        "tokens kept",
        "231",
        "Q1 harmful noise",
        "25%",
        "score",
        "75%",
        "40/40",
    ):
        assert expected in text
    assert panel._live is None


def test_narrow_terminal_stays_in_its_width():
    console = terminal_console(width=50)
    panel = RunPanel(console)
    panel._logs = {name.removeprefix("qtuning/"): value for name, value in LOGS.items()}
    with console.capture() as capture:
        console.print(panel.render())
    plain = Console(file=io.StringIO(), width=50)
    assert max(len(line) for line in _strip(capture.get()).splitlines()) <= plain.width


def _strip(text):
    from rich.text import Text

    return Text.from_ansi(text).plain


def test_logs_without_figures_show_progress_and_loss():
    console = plain_console()
    run(RunPanel(console), steps=2, logs={"loss": 1.5})
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("step 1/2  loss 1.5000  0:00:00 left")
    terminal = terminal_console()
    run(RunPanel(terminal), steps=2, logs={"loss": 1.5})
    assert "1.5000" in terminal.file.getvalue()
    assert "quadrants" not in terminal.file.getvalue()


def test_other_processes_are_silent():
    for console in (plain_console(), terminal_console()):
        run(RunPanel(console), rank_zero=False)
        assert console.file.getvalue() == ""


def test_close_gives_the_terminal_back_after_an_error():
    console = terminal_console()
    panel = RunPanel(console)
    state = SimpleNamespace(global_step=0, max_steps=5, is_world_process_zero=True)
    panel.on_train_begin(None, state, None)
    panel.close()
    panel.close()
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_figures_reach_tensorboard(tmp_path, monkeypatch):
    """`Trainer`'s own integration writes what the trainer logs; it needs nothing of ours."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from transformers import TrainingArguments

    from qtuning_kernels import QTuningTrainer
    from tests.tiny import tiny_model, tiny_samples

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        report_to="tensorboard", use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    QTuningTrainer(tiny_model(), arguments, train_dataset=tiny_samples(8)).train()
    files = list(tmp_path.rglob("events.out.tfevents*"))
    tags = {value.tag for file in files for event in EventFileLoader(str(file)).Load() for value in event.summary.value}
    expected = {"q1", "q2", "q3", "q4", "kept_tokens", "tokens_per_second", "seconds_score", "seconds_train"}
    assert {f"train/qtuning/{name}" for name in expected} <= tags
