"""Three optimiser steps end where they end with the reference backend, on the device that the backend serves."""

import pytest
import torch
import transformers

import qtuning_kernels as qk
from qtuning_kernels.demo import assets
from tests.tiny import PRUNING, tiny_model, tiny_samples

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3
MOST_ERROR = 1e-4  # of the distance that the steps went; one wrong row of 20 would be above 1e-2


def three_steps(model, samples, folder, on_gpu, name, monkeypatch):
    """(losses, where each parameter went from, how far it went, what was kept), served by backend `name`."""
    monkeypatch.setenv("QTUNING_BACKEND", name)
    arguments = transformers.TrainingArguments(
        str(folder / name), per_device_train_batch_size=8, max_steps=STEPS, logging_steps=1, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", use_cpu=not on_gpu, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = qk.QTuningConfig(**PRUNING, score_dtype="model", matmul="default", record=False)
    trainer = qk.QTuningTrainer(model, arguments, train_dataset=samples, qtuning=config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    went = {n: p.detach().cpu() - before[n] for n, p in model.named_parameters()}
    return losses, before, went, (trainer.totals.samples_kept, trainer.totals.tokens_kept)


def compare(make_model, samples, tmp_path, backend, on_gpu, monkeypatch):
    with torch.device("cpu"):  # data and model come from the host, as they do in a run
        losses, _, went, kept = three_steps(make_model(), samples, tmp_path, on_gpu, backend, monkeypatch)
        truth, before, expected, same = three_steps(make_model(), samples, tmp_path, on_gpu, "reference", monkeypatch)
    assert len(losses) == STEPS
    assert kept == same
    assert losses == pytest.approx(truth, rel=1e-3)  # logged to four places
    distance, size = norm(expected.values()), norm(before.values())
    error = norm(went[n] - x for n, x in expected.items())
    print(f"went {distance:.2e}, error {error:.1e}, losses {losses}")
    rounded = STEPS * torch.finfo(torch.float32).eps * size  # both runs round every parameter at every step
    assert MOST_ERROR * distance + rounded < 1e-2 * distance  # or nothing would be seen
    assert error <= MOST_ERROR * distance + rounded


def norm(tensors):
    return torch.stack([x.norm() for x in tensors]).norm().item()


def on_gpu():
    """Whether the test's tensors are on the GPU, as its backend wants them."""
    return torch.empty(0).is_cuda


def test_three_steps(backend, tmp_path, monkeypatch):
    compare(lambda: tiny_model("llama"), tiny_samples(24), tmp_path, backend, on_gpu(), monkeypatch)


def test_three_steps_of_the_embedded_model(backend, tmp_path, monkeypatch):
    if not on_gpu():
        pytest.skip("135 million parameters: on a GPU only")
    if not assets.is_fetched(assets.MODEL):
        pytest.skip("the embedded model is not fetched: qtuning fetch")
    folder = assets.asset_folder(assets.MODEL)

    def make_model():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    compare(make_model, tiny_samples(24), tmp_path, backend, True, monkeypatch)
