"""Every file of examples/ runs: on a tiny model where its host is installed, else on a host of the same interface.

The interfaces are those of the hosts' own sources: where they look their trainer up, and what they construct it with.
"""

import json
import runpy
import sys
import types
from pathlib import Path

import datasets
import pytest
import transformers
from accelerate.state import AcceleratorState

import qtuning_kernels as qk
from qtuning_kernels.data.collator import PoolCollator
from tests.tiny import tiny_model, tiny_samples
from tests.tiny_tokenizer import word_tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WORDS = "one two three four five six seven eight nine ten what is the sum of and".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    tiny_model("llama").save_pretrained(folder / "model")
    word_tokenizer(WORDS).save_pretrained(folder / "model")
    rows = []
    for i in range(32):
        prompt, completion = WORDS[i % 10 : i % 10 + 4], WORDS[i % 7 : i % 7 + 2 + i % 5]
        rows.append({"prompt": " ".join(prompt), "completion": " " + " ".join(completion)})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ["trainer.py", "trl_sft.py", "accelerate_loop.py"])
def test_runs(model_and_data, tmp_path, monkeypatch, capsys, name):
    if name == "trl_sft.py":
        pytest.importorskip("trl")
    arguments = [str(model_and_data / "model"), str(model_and_data / "data.jsonl"), str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", [name, *arguments[: 2 if name == "accelerate_loop.py" else 3]])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    printed = capsys.readouterr().out
    if name == "accelerate_loop.py":
        assert printed.count("tokens, loss") == 3
    else:
        assert "'samples_kept': 6" in printed  # two of eight, three times


def module(monkeypatch, name, **names):
    made = types.ModuleType(name)
    made.__path__ = []
    for key, value in names.items():
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, made)
    return made


def trains(kind, folder, **extra):
    """Constructed as hosts do, by keywords, and one step taken."""
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    samples = datasets.Dataset.from_list(tiny_samples(16))
    trainer = kind(
        model=tiny_model(), args=arguments, data_collator=PoolCollator(), train_dataset=samples, callbacks=None, **extra
    )
    trainer.train()
    assert trainer.qtuning_summary()["samples_kept"] == 2
    return trainer


class Host(transformers.Trainer):
    """Takes an argument of its own, as every host does."""

    def __init__(self, *args, own=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = own


def test_axolotl(monkeypatch, tmp_path):
    for name in ("axolotl", "axolotl.core", "axolotl.integrations"):
        module(monkeypatch, name)
    module(monkeypatch, "axolotl.core.trainers", AxolotlTrainer=Host)
    module(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    plugin = runpy.run_path(str(EXAMPLES / "axolotl_plugin.py"))
    cfg = types.SimpleNamespace(qtuning_sample_ratio=0.25, qtuning_token_ratio=0.5)
    trainer = trains(plugin["QTuningPlugin"]().get_trainer_cls(cfg), tmp_path, own=3)
    assert trainer.own == 3
    written = (EXAMPLES / "axolotl.yaml").read_text()
    assert all(f"{name}:" in written for name in plugin["QTuningArgs"].model_fields)
    assert plugin["QTuningPlugin"]().get_input_args() == "examples.axolotl_plugin.QTuningArgs"


def test_llamafactory(monkeypatch, tmp_path):
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.sft"):
        module(monkeypatch, name)
    workflow = module(monkeypatch, "llamafactory.train.sft.workflow", CustomSeq2SeqTrainer=Host)
    ran = []
    module(
        monkeypatch,
        "llamafactory.train.tuner",
        run_exp=lambda: ran.append(trains(workflow.CustomSeq2SeqTrainer, tmp_path, own=3)),
    )
    runpy.run_path(str(EXAMPLES / "llamafactory.py"))
    assert isinstance(ran[0], qk.QTuningMixin)
    assert ran[0].own == 3


def test_ms_swift(monkeypatch, tmp_path):
    module(monkeypatch, "swift")
    trainers = module(monkeypatch, "swift.trainers", Seq2SeqTrainer=Host)
    runpy.run_path(str(EXAMPLES / "ms_swift.py"))
    assert trains(trainers.Seq2SeqTrainer, tmp_path, own=3).own == 3


def test_unsloth(monkeypatch, model_and_data, tmp_path):
    pytest.importorskip("trl")
    import trl

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(name, max_seq_length, load_in_4bit):
            return tiny_model("llama"), word_tokenizer(WORDS)

        @staticmethod
        def get_peft_model(model, r):
            return model

    trained = []

    class Trainer(trl.SFTTrainer):  # Unsloth replaces the class in TRL by one of its own
        def train(self, *args, **kwargs):
            self.args.max_steps = 1
            trained.append(self)
            return super().train(*args, **kwargs)

    def config(*args, **kwargs):
        return trl.SFTConfig(*args, **kwargs, use_cpu=True, report_to=[], bf16=False, save_strategy="no")

    module(monkeypatch, "unsloth", FastLanguageModel=FastLanguageModel)
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(SFTTrainer=Trainer, SFTConfig=config))
    monkeypatch.setattr(
        sys, "argv", ["unsloth_sft.py", "model", str(model_and_data / "data.jsonl"), str(tmp_path / "output")]
    )
    runpy.run_path(str(EXAMPLES / "unsloth_sft.py"))
    assert trained[0].qtuning_summary()["samples_kept"] == 2


def test_every_example_is_here():
    # own_policy.py trains in tests/training/test_policies.py; paper.yaml and sums.yaml run in tests/commands
    mentioned = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.iterdir() if path.suffix and path.name not in mentioned] == []
