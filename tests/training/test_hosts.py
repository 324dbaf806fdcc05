"""The mixin in other trainers: host × data shape × full or LoRA.

With ratios of 1 a run equals the host's alone, step by step. Pruned, the gradient of a step equals a plain computation
over its pool with the same kept tokens, in float64, so that nothing of the host's loss or normalisation was replaced.
"""

import datasets
import pytest
import torch
import transformers

import qtuning_kernels as qk
from qtuning_kernels.data.batches import take_apart
from qtuning_kernels.data.collator import PoolCollator
from tests.tiny import PRUNING, tiny_model, tiny_samples
from tests.tiny_tokenizer import word_tokenizer
from tests.training.steps import assert_same_gradients, gradients, plain_gradient

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "what",
    "is",
    "the",
    "sum",
    "of",
    "and",
]
FIXED = {"score_dtype": "model", "matmul": "default"}


def _text(generator, low, high):
    count = int(torch.randint(low, high, (), generator=generator))
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator))


def _texts(count):
    generator = torch.Generator().manual_seed(5)
    return [(_text(generator, 2, 6), _text(generator, 1, 12)) for _ in range(count)]


def _prompts():
    return [{"prompt": p, "completion": " " + c} for p, c in _texts(64)]


def _messages():
    rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in _texts(64)]
    return [{"messages": row} for row in rows]


SHAPES = {
    "prompt and completion": (_prompts, {}),
    "messages": (_messages, {}),
    "assistant only": (_messages, {"assistant_only_loss": True}),
    "padding-free": (_prompts, {"padding_free": True, "max_length": None}),
    "packed": (_prompts, {"packing": True, "max_length": 64}),
    "wrapped": (_prompts, {"packing": True, "packing_strategy": "wrapped", "max_length": 64}),
}


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


class HostTrainer(qk.QTuningMixin, transformers.Trainer):
    """The mixin alone: the loss is the model's own."""


def arguments(kind, folder, **settings):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return kind(output_dir=str(folder), **(defaults | settings))


def make_sft(folder, shape, model, qtuning=None, **settings):
    rows, options = SHAPES[shape]
    kind = trl.SFTTrainer if qtuning is None else qk.QTuningSFTTrainer
    extra = {} if qtuning is None else {"qtuning": qtuning}
    return kind(
        model,
        arguments(trl.SFTConfig, folder, bf16=False, gradient_checkpointing=False, **(options | settings)),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=word_tokenizer(WORDS),
        **extra,
    )


def make_plain(folder, model, qtuning=None, **settings):
    kind = transformers.Trainer if qtuning is None else HostTrainer
    extra = {} if qtuning is None else {"qtuning": qtuning}
    return kind(
        model,
        arguments(transformers.TrainingArguments, folder, **settings),
        train_dataset=datasets.Dataset.from_list(tiny_samples(64)),
        data_collator=PoolCollator() if qtuning else _without_ids,
        **extra,
    )


def _without_ids(features):
    batch = PoolCollator()(features)
    batch.pop("sample_id", None)
    return batch


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "LoRA"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ratios_of_one_equal_trl_alone(tmp_path, shape, wrap):
    alone = make_sft(tmp_path / "alone", shape, wrap(tiny_model()))
    alone.train()
    keep_all = qk.QTuningConfig(sample_ratio=1.0, token_ratio=1.0, record=False, **FIXED)
    ours = make_sft(tmp_path / "ours", shape, wrap(tiny_model()), keep_all)
    ours.train()
    assert len(losses(ours)) == 5
    assert losses(ours) == pytest.approx(losses(alone), rel=1e-6)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert [r[name] for r in ours.state.log_history if name in r] == pytest.approx(
            [r[name] for r in alone.state.log_history if name in r], rel=1e-5
        )


def check_pruned(trainer, accumulation, bound=1e-9):
    """One step's gradient, against one sample at a time with full logits and the tokens that the plan kept."""
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader) for _ in range(accumulation)]
    samples = [sample for batch in batches for sample in take_apart(batch)[0]]
    _, grads, plan = gradients(trainer, batches)
    keep = torch.cat([selection.token_mask for selection in plan.selections])
    assert 0 < keep.sum() < len(keep)
    assert 0 < plan.totals.samples_kept < len(samples)
    cu_seqlens = torch.tensor([0, *(len(s.label_positions) for s in samples)]).cumsum(0)
    trainer.model.train()
    assert_same_gradients(grads, plain_gradient(trainer.model, samples, keep, cu_seqlens), bound)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "LoRA"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_pruned_gradient_in_trl(tmp_path, shape, accumulation, wrap):
    """TRL's own loss is computed in float32."""
    settings = {"gradient_accumulation_steps": accumulation}
    config = qk.QTuningConfig(**PRUNING, record=False, **FIXED)
    check_pruned(make_sft(tmp_path, shape, wrap(tiny_model()), config, **settings), accumulation, bound=2e-5)


def sum_over_step(outputs, labels, num_items_in_batch=None):
    nll = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    return nll / num_items_in_batch


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_pruned_gradient_of_a_loss_function_in_trl(tmp_path, shape, accumulation):
    """The host's `compute_loss_func`, in float64."""
    settings = {"gradient_accumulation_steps": accumulation}
    config = qk.QTuningConfig(**PRUNING, record=False, **FIXED)
    trainer = make_sft(tmp_path, shape, tiny_model().double(), config, **settings)
    trainer.compute_loss_func = sum_over_step
    check_pruned(trainer, accumulation)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "LoRA"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_pruned_gradient_in_a_plain_trainer(tmp_path, monkeypatch, accumulation, wrap):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    settings = {"gradient_accumulation_steps": accumulation}
    config = qk.QTuningConfig(**PRUNING, record=False, **FIXED)
    check_pruned(make_plain(tmp_path, wrap(tiny_model().double()), config, **settings), accumulation)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "LoRA"])
def test_ratios_of_one_equal_a_plain_trainer(tmp_path, wrap):
    alone = make_plain(tmp_path / "alone", wrap(tiny_model()))
    alone.train()
    keep_all = qk.QTuningConfig(sample_ratio=1.0, token_ratio=1.0, record=False, **FIXED)
    ours = make_plain(tmp_path / "ours", wrap(tiny_model()), keep_all)
    ours.train()
    assert losses(ours) == pytest.approx(losses(alone), rel=1e-6)


def test_trl_s_loss_type_stays(tmp_path):
    """A replaced loss would turn "dft" into "nll"."""
    config = qk.QTuningConfig(**PRUNING, record=False, **FIXED)
    runs = [make_sft(tmp_path / kind, "packed", tiny_model(), config, loss_type=kind) for kind in ("nll", "dft")]
    for run in runs:
        run.train()
    nll, dft = (losses(run)[0] for run in runs)
    assert abs(nll - dft) > 0.01


def test_a_loop_without_a_trainer_gets_the_same_batch(tmp_path):
    config = qk.QTuningConfig(**PRUNING, record=False, **FIXED)
    trainer = make_plain(tmp_path, tiny_model(), config)
    pool = PoolCollator()(tiny_samples(8))
    (expected,), count = trainer.get_batch_samples(iter([dict(pool)]), 1, torch.device("cpu"))
    batch = qk.select_batch(tiny_model(), pool, config)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert int((batch["labels"][:, 1:] != -100).sum()) == int(count)


def test_a_loop_may_find_nothing_to_train_on():
    pool = PoolCollator()(tiny_samples(8))
    pool["labels"][:] = -100
    batch = qk.select_batch(tiny_model(), pool, qk.QTuningConfig(**PRUNING, **FIXED))
    assert (batch["labels"] == -100).all()
    assert len(batch["labels"]) == 1
