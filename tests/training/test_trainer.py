"""The trainer: plain training where nothing is pruned, and what it records, resumes, warns of and refuses."""

import json
import math
import warnings
from pathlib import Path

import datasets
import pytest
import torch
import transformers

import qtuning_kernels as qk
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.run_record.reader import read_record
from qtuning_kernels.training.checkpoints import latest_checkpoint
from tests.models.tiny_architectures import tiny_architecture
from tests.tiny import PRUNING, tiny_model, tiny_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **(defaults | kwargs))


def trainer(folder, model=None, count=64, config=None, collator=None, samples=None, **kwargs):
    return qk.QTuningTrainer(
        model if model is not None else tiny_model(),
        arguments(folder, **kwargs),
        train_dataset=datasets.Dataset.from_list(samples or tiny_samples(count)),
        data_collator=collator,
        qtuning=qk.QTuningConfig(**({"score_dtype": "float32", "matmul": "default"} | (config or {}))),
    )


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


class PlainCollator(PoolCollator):
    """For a plain Trainer: labels where the padding is on the left, as generation-style collators do."""

    def __call__(self, features):
        batch = super().__call__(features)
        batch.pop("sample_id", None)
        return batch


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2"])
def test_ratios_of_one_equal_a_plain_trainer(tmp_path, architecture, accumulation):
    """Loss divided by the wrong token count under accumulation (unsloth #8261) would show from step 1 on."""
    plain = transformers.Trainer(
        tiny_model(architecture),
        arguments(tmp_path / "plain", gradient_accumulation_steps=accumulation),
        train_dataset=datasets.Dataset.from_list(tiny_samples(96)),
        data_collator=PlainCollator(),
    )
    plain.train()
    ours = trainer(
        tmp_path / "ours",
        tiny_model(architecture),
        count=96,
        config={"sample_ratio": 1.0, "token_ratio": 1.0, "micro_batch_tokens": 64},
        gradient_accumulation_steps=accumulation,
    )
    ours.train()
    assert len(losses(ours)) == 5
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("token_mode", ["mask", "drop"])
def test_training_runs_and_learns(tmp_path, lora, token_mode):
    model = tiny_model("llama")
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    run = trainer(tmp_path, model, config={**PRUNING, "token_mode": token_mode}, max_steps=30, learning_rate=1e-2)
    run.train()
    summary = run.qtuning_summary()
    assert summary["steps"] == 30
    assert summary["samples_seen"] == 240
    assert summary["samples_kept"] == 60  # exactly 2 of each pool
    assert 0 < summary["tokens_kept"] < summary["tokens_seen"]
    assert sum(losses(run)[-5:]) < sum(losses(run)[:5])
    assert summary["loss_first"] == pytest.approx(losses(run)[0], rel=1e-6)


def test_the_record_agrees_with_the_policy(tmp_path):
    """Quadrants and kept samples, computed again from the recorded scores; kept tokens from eq. 1."""
    run = trainer(tmp_path, config=PRUNING)
    run.train()
    samples = read_record(tmp_path / "record").samples
    assert set(samples.step) == {1, 2, 3, 4, 5}
    for _, pool in samples.groupby("step"):
        triage = qk.triage_samples(torch.tensor(pool.ppl.values, dtype=torch.float32),
                                   torch.tensor(pool.entropy.values, dtype=torch.float32), 0.25)  # fmt: skip
        assert triage.quadrant.tolist() == pool.quadrant.tolist()
        assert triage.role.tolist() == pool.role.tolist()
        assert triage.keep.tolist() == pool["keep"].tolist()
        assert pool["keep"].sum() == 2
        for row in pool.itertuples():
            expected = {0: 0, 2: max(1, row.num_tokens // 2), 4: row.num_tokens}[row.role]
            assert row.kept_tokens == expected


def test_the_same_logs_as_any_trainer(tmp_path):
    run = trainer(tmp_path, config=PRUNING)
    run.train()
    row = next(r for r in run.state.log_history if "loss" in r)
    assert row["qtuning/kept_samples"] == 2
    assert row["qtuning/seconds_score"] > 0
    assert math.isclose(sum(row[f"qtuning/q{q}"] for q in range(5)), 1, abs_tol=1e-4)
    assert 0 < row["qtuning/flops_share"] < 1.5
    assert {"grad_norm", "learning_rate", "epoch"} <= row.keys()


def test_padding_side_of_the_collator_does_not_matter(tmp_path):
    class LeftCollator(PoolCollator):
        def __call__(self, features):
            batch = super().__call__(features)
            width = batch["attention_mask"].sum(1).tolist()
            for name in ("input_ids", "labels", "attention_mask"):
                rows = zip(batch[name], width, strict=True)
                batch[name] = torch.stack([torch.cat([r[n:], r[:n]]) for r, n in rows])
            return batch

    right = trainer(tmp_path / "right", config=PRUNING)
    left = trainer(tmp_path / "left", config=PRUNING, collator=LeftCollator())
    right.train(), left.train()
    assert losses(right) == losses(left)


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_resumes(make):
    """A checkpoint after 4 of 8 steps, then on from there in another folder: the same bits and accounts."""
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = make("whole", **saving)
    whole.train()
    resumed = make("resumed", **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert_same_weights(weights(whole), weights(resumed))
    ours, theirs = whole.qtuning_summary(), resumed.qtuning_summary()
    names = ("steps", "samples_seen", "samples_kept", "tokens_kept", "kept_by_quadrant", "loss_first", "loss_last")
    for name in names:
        assert ours[name] == theirs[name], name


STRATEGIES = {
    "rescore": PRUNING,
    "cached scores": {**PRUNING, "rescore_every": 2},
    "bfloat16 scores": {**PRUNING, "score_dtype": "bfloat16"},
}


@pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)
def test_resume_in_the_middle_of_an_epoch(tmp_path, config):
    """24 samples in pools of 8: three steps an epoch."""
    check_resumes(lambda name, **saving: trainer(tmp_path / name, config=config, count=24, **saving))


def test_cached_scores_spare_the_scoring_pass(tmp_path):
    """Scored in epochs 0 and 2, selected from the record of epoch 0 in epoch 1; the age is logged."""
    run = trainer(tmp_path, config={**PRUNING, "rescore_every": 2}, count=16, max_steps=6)
    run.train()
    steps = read_record(tmp_path / "record").steps
    assert (steps.tokens_scored > 0).tolist() == [True, True, False, False, True, True]
    assert steps.score_age_epochs.tolist() == [0, 0, 1, 1, 0, 0]


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    for step, state in ((5, "{}"), (10, '{"global_st')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
    with pytest.warns(UserWarning, match="checkpoint-10 is incomplete"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path / "checkpoint-5")


def test_a_second_run_leaves_the_record_of_the_first(tmp_path):
    """Into the same folder, not resumed: its rows took the place of the first run's."""
    trainer(tmp_path, max_steps=2).train()
    rows = (tmp_path / "record" / "samples.jsonl").read_bytes()
    trainer(tmp_path, max_steps=1).train()
    assert (tmp_path / "record.1" / "samples.jsonl").read_bytes() == rows
    assert len(read_record(tmp_path / "record").steps) == 1


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    model = tiny_architecture("bert-generation", is_decoder=False, vocab_size=tiny_model().config.vocab_size)
    with pytest.raises(ValueError, match="the logits of BertGenerationDecoder depend on later tokens"):
        trainer(tmp_path, model).train()


def test_evaluation_without_logits(tmp_path):
    samples = tiny_samples(12, seed=5)
    model = tiny_model("gemma2")
    run = trainer(tmp_path, model, config=PRUNING)
    run.eval_dataset = datasets.Dataset.from_list(samples)
    loss = run.evaluate()["eval_loss"]
    batch = PlainCollator()(samples[:8])
    with torch.no_grad():
        parts = [model(**PlainCollator()(part)).loss.item() for part in (samples[:8], samples[8:])]
    assert loss == pytest.approx((parts[0] * 8 + parts[1] * 4) / 12, rel=1e-5)
    assert batch["labels"].shape[0] == 8


def test_evaluation_of_labels_that_nothing_predicts(tmp_path):
    """A padding-free batch whose one label is the first token of its second sample: no token stands before it. Found
    as a label of the row, it left an empty sum without `detach`; the host's answer is a mean over that one label.
    """
    run = trainer(tmp_path)
    input_ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.full_like(input_ids, -100)
    labels[0, 3] = 8
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    ours, _, _ = run.prediction_step(run.model, batch, prediction_loss_only=True)
    with torch.no_grad():
        assert ours == run.model(**batch).loss


def test_a_step_outside_of_train_is_the_host_s(tmp_path):
    """Without a plan there is nothing to account for; it was an attribute of None that was asked for a clock."""
    run = trainer(tmp_path, tiny_model(), config=PRUNING)
    run.create_optimizer_and_scheduler(num_training_steps=1)
    batch = PoolCollator()(tiny_samples(8))
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = run.training_step(run.model, dict(batch), count)
    with torch.no_grad():
        batch.pop("sample_id")
        torch.testing.assert_close(loss, run.model(**batch).loss, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="num_items_in_batch is None; accepted: the number of labels"):
        run.training_step(run.model, PoolCollator()(tiny_samples(8)))


def test_pool_of_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size is 1, the selection pool"):
        trainer(tmp_path, per_device_train_batch_size=1, config=PRUNING)


def test_label_smoothing_stays_the_host_s(tmp_path):
    """A replaced loss would drop it: with both ratios 1 the run equals a plain Trainer's, smoothing included."""
    settings = {"label_smoothing_factor": 0.1, "max_steps": 3}
    plain = transformers.Trainer(
        tiny_model(),
        arguments(tmp_path / "plain", **settings),
        train_dataset=datasets.Dataset.from_list(tiny_samples(64)),
        data_collator=PlainCollator(),
    )
    plain.train()
    ours = trainer(tmp_path / "ours", config={"sample_ratio": 1.0, "token_ratio": 1.0}, **settings)
    ours.train()
    assert not ours.fused()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
    pruned = trainer(tmp_path / "pruned", config=PRUNING, **settings)
    pruned.train()
    assert all(math.isfinite(loss) for loss in losses(pruned))


def test_last_pool_of_one_sample(tmp_path):
    run = trainer(tmp_path, count=9, max_steps=2, config=PRUNING)
    run.train()
    assert run.qtuning_summary()["samples_kept"] == 3


def test_pool_without_an_eligible_sample(tmp_path):
    """Nothing to learn from in one step: said, counted, the weights stay, and the run goes on."""
    samples = tiny_samples(16)
    for sample in samples:
        sample["labels"] = [-100] * len(sample["labels"])
    run = trainer(tmp_path, samples=samples, max_steps=2, config=PRUNING)
    before = weights(run)
    with pytest.warns(UserWarning, match="step 1 trained on nothing: no sample of its pool is eligible"):
        run.train()
    assert_same_weights(before, weights(run))
    assert run.qtuning_summary()["empty_steps"] == 2
    assert run.qtuning_summary()["ineligible"] == 16


def test_nan_weights_stop_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    run = trainer(tmp_path, model, config=PRUNING)
    with pytest.raises(FloatingPointError, match="NaN for every sample of the pool, the first is 10"):
        run.train()


def test_half_precision_master_weights_are_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="trainable parameters are not float32"):
        trainer(tmp_path, tiny_model(dtype=torch.bfloat16), config=PRUNING)


def test_autocast_trains_float32_weights(tmp_path):
    run = trainer(tmp_path, config=PRUNING, bf16=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train()
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert all(math.isfinite(loss) for loss in losses(run))


def test_checkpoint_loads(tmp_path):
    run = trainer(tmp_path, config=PRUNING, save_strategy="steps", save_steps=5)
    run.train()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert_same_weights(weights(run), dict(loaded.named_parameters()))
    assert json.loads(Path(tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["global_step"] == 5


def test_predict_gives_the_host_s_logits(tmp_path):
    """An empty dictionary in the place of the outputs would make predictions of nothing."""
    run = trainer(tmp_path, config=PRUNING)
    samples = datasets.Dataset.from_list([{k: s[k] for k in ("input_ids", "labels")} for s in tiny_samples(4)])
    run.data_collator = PlainCollator()
    predictions = run.predict(samples).predictions
    assert predictions.shape[0] == 4
    assert predictions.shape[-1] == 97


def test_a_model_made_by_the_trainer(tmp_path):
    """`model_init` makes another model when training begins: scores of the first would be of untrained weights."""
    run = qk.QTuningTrainer(
        model_init=lambda: tiny_model("llama"),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=datasets.Dataset.from_list(tiny_samples(32)),
        qtuning=qk.QTuningConfig(**PRUNING, score_dtype="model", matmul="default"),
    )
    run.train()
    assert run.causal_lm.base is run.model
    assert run.qtuning_summary()["samples_kept"] == 4


def test_ids_may_be_text(tmp_path):
    samples = [sample | {"sample_id": f"row-{sample['sample_id']}"} for sample in tiny_samples(16)]
    config = {**PRUNING, "rescore_every": 2}
    run = trainer(tmp_path, samples=samples, config=config, max_steps=4, save_strategy="steps", save_steps=3)
    run.train()
    assert set(read_record(tmp_path).samples["id"]) == {f"row-{1000 + i}" for i in range(16)}
    again = trainer(tmp_path, samples=samples, config=config, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(weights(run), weights(again))


def test_an_evaluation_batch_without_labels_is_the_host_s(tmp_path):
    """Counted as loss 0 it would halve the evaluation's loss."""
    samples = tiny_samples(16)
    for sample in samples[8:]:
        sample["labels"] = [-100] * len(sample["labels"])
    run = trainer(tmp_path, config=PRUNING)
    plain = transformers.Trainer(tiny_model(), arguments(tmp_path / "plain"), data_collator=PlainCollator())
    data = datasets.Dataset.from_list(samples)
    assert run.evaluate(data)["eval_loss"] == pytest.approx(plain.evaluate(data)["eval_loss"], rel=1e-5, nan_ok=True)


def test_a_batch_without_labels_column_is_refused(tmp_path):
    run = trainer(tmp_path, config=PRUNING)
    with pytest.raises(ValueError, match="'labels' among the columns"):
        run.get_batch_samples(iter([{"input_ids": torch.ones(2, 3, dtype=torch.long)}]), 1, torch.device("cpu"))


def test_a_batch_size_of_one_that_was_found_is_refused(tmp_path):
    """`auto_find_batch_size` halves the pool until a step fits; of a pool of one nothing can be pruned."""
    run = trainer(tmp_path, config=PRUNING)
    run._train_batch_size = 1
    with pytest.raises(ValueError, match="the batch size found is 1, the selection pool; accepted: 2 or more"):
        run._begin()
