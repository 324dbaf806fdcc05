"""Policies in a run: what is scored for them, which tokens they train on, their weights, their state."""

from dataclasses import dataclass
from typing import ClassVar

import datasets
import pytest
import torch
import transformers

import qtuning_kernels as qk
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.models.scoring import Scorer, score_samples
from qtuning_kernels.pruning.policies import POLICIES, Decision, Policy, PoolStats, make_policy
from qtuning_kernels.training.reference import ReferenceScores
from qtuning_kernels.training.score_cache import ScoreCache
from tests.tiny import PRUNING, tiny_model, tiny_samples
from tests.training.steps import assert_same_gradients, gradients
from tests.training.test_hosts import FIXED, HostTrainer, make_plain, make_sft, sum_over_step
from tests.training.test_trainer import check_resumes

pytestmark = pytest.mark.usefixtures("one_thread")

# with their own thresholds these would keep nothing of a model that knows nothing
OPTIONS = {"stm": {"threshold": 1e4}, "profit": {"threshold": 1e-4}}


def reference() -> dict:
    """Another model's scores of `tiny_samples`."""
    torch.manual_seed(5)
    other = tiny_model("llama")
    samples = [to_sample(**row) for row in tiny_samples(64)]
    scores = score_samples(other, samples)
    parts = scores.nll.split(scores.cu_seqlens.diff().tolist())
    return {sample.sample_id: part for sample, part in zip(samples, parts, strict=True)}


def run(folder, policy, kind=qk.QTuningTrainer, model=None, samples=None, **settings):
    """A trainer with this policy, and with the reference that it may need."""
    options = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "seed": 7,
               "save_strategy": "no"}  # fmt: skip
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        **options | settings,
    )  # fmt: skip
    options = OPTIONS.get(policy, {})
    config = qk.QTuningConfig(policy=policy, policy_options=options, record=False, **PRUNING, **FIXED)
    needs = make_policy(config).needs
    return kind(
        tiny_model() if model is None else model,
        arguments,
        train_dataset=datasets.Dataset.from_list(samples or tiny_samples(24)),
        data_collator=PoolCollator(),
        qtuning=config,
        **({"reference_nll": reference()} if "reference_nll" in needs else {}),
    )


@pytest.mark.parametrize("policy", ["full", "random", "longest", "dft", "eaft", "beyond_ll"])
def test_nothing_is_scored_that_nobody_needs(tmp_path, monkeypatch, policy):
    """The model's forwards are those of training alone: a pool fits one micro-batch of each length class."""
    monkeypatch.setattr(Scorer, "score", lambda *_: pytest.fail("scored"))
    ours = run(tmp_path, policy)
    forwards, steps = [], []
    ours.model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    loss = ours.compute_loss
    monkeypatch.setattr(ours, "compute_loss", lambda *a, **k: steps.append(1) or loss(*a, **k))
    ours.train()
    assert sum(forwards) == len(steps) >= 4
    assert len(forwards) - sum(forwards) <= 2  # the probe asks the model for its own loss, and for ours
    assert ours.qtuning_summary()["tokens_scored"] == 0


@pytest.mark.parametrize("policy", ["qtuning", "entropy", "random"])
def test_pools_are_scored_for_those_who_need_it(tmp_path, policy):
    ours = run(tmp_path, policy)
    ours.train()
    assert (ours.qtuning_summary()["tokens_scored"] > 0) == (policy != "random")


@pytest.mark.parametrize("policy", [name for name, each in POLICIES.items() if not each.weighted])
def test_every_host_trains_on_the_same_tokens(tmp_path, monkeypatch, policy):
    """The gradients of a pool in our trainer and in a plain one with the mixin, in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    results = {}
    for kind in (qk.QTuningTrainer, HostTrainer):
        ours = run(tmp_path, policy, kind, tiny_model().double())
        results[kind] = gradients(ours, [PoolCollator()(tiny_samples(16)[start : start + 8]) for start in (0, 8)])
    (_, ours, plan), (_, hosts, theirs) = results.values()
    assert plan.totals.tokens_kept == theirs.totals.tokens_kept > 0
    assert_same_gradients(ours, hosts)


@pytest.mark.parametrize("policy", [name for name, each in POLICIES.items() if not each.weighted])
def test_trl_trains_on_the_tokens_of_our_trainer(tmp_path, monkeypatch, policy):
    """The same weights and gradients in float64, which a loss of TRL's own would not be computed in."""
    pytest.importorskip("trl")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(ReferenceScores, "__init__", lambda *_: None)
    monkeypatch.setattr(ReferenceScores, "nll", lambda _, samples: torch.cat([s.labels % 7 + 2.5 for s in samples]))
    options = OPTIONS.get(policy, {})
    config = qk.QTuningConfig(policy=policy, policy_options=options, record=False, **PRUNING, **FIXED)
    sft = make_sft(tmp_path, "prompt and completion", tiny_model().double(), config)
    sft.compute_loss_func = sum_over_step
    batch = next(iter(sft.get_train_dataloader()))
    host = make_plain(tmp_path, tiny_model().double(), config)
    _, theirs, plan = gradients(sft, [batch])
    _, mine, own = gradients(qk.QTuningTrainer(host.model, host.args, qtuning=config), [batch])
    for selection, other in zip(plan.selections, own.selections, strict=True):
        assert torch.equal(selection.token_weight, other.token_weight)
    assert plan.totals.tokens_kept == own.totals.tokens_kept > 0
    assert_same_gradients(mine, theirs)


def plain_weighted_gradient(model, samples, weight_of):
    """One sample at a time: Σ weight·nll over the number of all trainable tokens."""
    model.zero_grad()
    total, count = 0.0, 0
    for index, sample in enumerate(samples):
        log_p = torch.log_softmax(model(input_ids=sample.input_ids[None]).logits[0], -1)[sample.label_positions - 1]
        nll = -log_p.gather(1, sample.labels[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1)
        total = total + (weight_of(index, nll.detach(), entropy.detach()) * nll).sum()
        count += len(nll)
    (total / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", [name for name, each in POLICIES.items() if each.weighted and not each.of_pool])
def test_the_loss_is_weighed_by_its_own_forward(tmp_path, monkeypatch, policy):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    ours = run(tmp_path, policy, model=tiny_model().double())
    samples = [to_sample(**row) for row in tiny_samples(16)]
    _, actual, _ = gradients(ours, [PoolCollator()(tiny_samples(16)[start : start + 8]) for start in (0, 8)])
    expected = plain_weighted_gradient(
        ours.model, samples, lambda index, nll, entropy: ours.policy.loss_weight(nll, entropy)
    )
    assert_same_gradients(actual, expected)


@dataclass(frozen=True)
class Halves(Policy):
    """Every second sample whole, of the others every second token at a weight of its own."""

    weighted: ClassVar = True

    def __call__(self, pool: PoolStats) -> Decision:
        weight = torch.arange(int(pool.cu_seqlens[-1])) % 2 * 0.25
        odd = pool.per_token(torch.arange(len(pool.num_tokens)) % 2 == 1)
        return Decision(torch.arange(len(pool.num_tokens)) != 2, torch.where(odd, 1.0, weight))


@pytest.mark.parametrize("token_mode", ["mask", "drop"])
def test_weights_of_a_decision_reach_the_loss(tmp_path, token_mode):
    ours = run(tmp_path, Halves(), model=tiny_model().double())
    ours.qtuning = qk.QTuningConfig(policy=Halves(), record=False, token_mode=token_mode, **PRUNING, **FIXED)
    rows = tiny_samples(8)
    _, actual, plan = gradients(ours, [PoolCollator()(rows)])
    weight, cu_seqlens = plan.selections[0].token_weight, plan.selections[0].cu_seqlens
    assert sorted(set(weight.tolist())) == [0, 0.25, 1]
    assert not weight[cu_seqlens[2] : cu_seqlens[3]].any()
    model, total, count = ours.model, 0.0, 0
    model.zero_grad()
    for index, sample in enumerate(to_sample(**row) for row in rows):
        own = weight[cu_seqlens[index] : cu_seqlens[index + 1]]
        count += len(own)
        sample = getattr(sample, {"mask": "masked", "drop": "dropped"}[token_mode])(own != 0)
        log_p = torch.log_softmax(model(input_ids=sample.input_ids[None]).logits[0], -1)
        total = total - (own[own != 0] * log_p[sample.label_positions - 1, sample.labels]).sum()
    (total / count).backward()
    assert_same_gradients(actual, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_weights_are_refused_where_the_loss_takes_none(tmp_path):
    batch = PoolCollator()(tiny_samples(8))
    for act in (
        lambda: run(tmp_path, Halves(), HostTrainer),
        lambda: qk.select_batch(tiny_model(), batch, qk.QTuningConfig(policy="dft")),
        lambda: run(tmp_path, "dft", label_smoothing_factor=0.1).train(),
    ):
        with pytest.raises(ValueError, match=r"(Halves|DFT|Dft).* weighs tokens.*; accepted"):
            act()


# those that draw, or remember from one step to another; the others run with --slow
WITH_A_STATE = ("random", "infobatch", "tailsft", "qtuning", "rho1")


@pytest.mark.parametrize(
    "policy", [pytest.param(p, marks=[] if p in WITH_A_STATE else pytest.mark.slow) for p in POLICIES]
)
def test_resume_in_the_middle_of_an_epoch(tmp_path, policy):
    """24 samples in pools of 8: three steps an epoch."""
    check_resumes(lambda name, **saving: run(tmp_path / name, policy, **saving))


def test_draws_differ_from_step_to_step(tmp_path):
    ours = run(tmp_path, "random")
    ours._begin()
    pools = [[to_sample(**row) for row in tiny_samples(8)]] * 2
    kept = [ours._planner.plan(pools, step=step).selections[i].keep.tolist() for step in (0, 1) for i in (0, 1)]
    assert len({tuple(each) for each in kept}) > 1
    again = ours._planner.plan(pools, step=0).selections
    assert [each.keep.tolist() for each in again] == kept[:2]


def test_first_nll_is_remembered(tmp_path):
    samples = [to_sample(**row) for row in tiny_samples(3)]
    cache = ScoreCache()
    assert cache.first_nll(samples[:2], torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert cache.first_nll(samples, torch.tensor([5.0, 6.0, 7.0])).tolist() == [1, 2, 7]
    cache.save(tmp_path / "state", {})
    again = ScoreCache()
    again.load(tmp_path / "state")
    assert again.first_nll(samples, torch.tensor([8.0, 8.0, 8.0])).tolist() == [1, 2, 7]


@dataclass(frozen=True)
class Bad(Policy):
    decision: object = None

    def __call__(self, pool: PoolStats) -> Decision:
        return self.decision(len(pool.num_tokens), int(pool.cu_seqlens[-1]))


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (lambda b, t: Decision(torch.ones(b), torch.ones(t)), r"keep of torch.float32, \[8\]; accepted: bool"),
        (lambda b, t: Decision(torch.ones(b) > 0, torch.ones(b)), r"token_weight of .*; accepted: floating"),
        (lambda b, t: Decision(torch.ones(b) > 0, torch.ones(t) / 2), "neither 0 nor 1; accepted"),
        (lambda b, t: Decision(torch.ones(b) > 0, -torch.ones(t)), "negative or not finite; accepted"),
        (lambda b, t: Decision(torch.ones(b) > 0, torch.ones(t) / 0), "negative or not finite; accepted"),
    ],
)
def test_a_bad_decision_is_refused(tmp_path, decision, message):
    ours = run(tmp_path, Bad(decision))
    with pytest.raises(ValueError, match=message):
        gradients(ours, [PoolCollator()(tiny_samples(8))])


@dataclass(frozen=True)
class AboveReference(Policy):
    """Tokens whose nll is above the reference's."""

    needs: ClassVar = frozenset({"nll", "reference_nll"})

    def __call__(self, pool: PoolStats) -> Decision:
        return Decision(pool.num_tokens > 0, (pool.nll > pool.reference_nll).float())


def test_reference_from_a_model_from_scores_and_from_a_file(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    known = reference()
    ids = list(known)
    pq.write_table(pa.table({"sample_id": ids, "nll": [known[i].tolist() for i in ids]}), tmp_path / "plane.parquet")
    torch.manual_seed(5)
    weights = []
    for given in (
        {"reference_model": tiny_model("llama")},
        {"reference_nll": known},
        {"reference_nll": tmp_path / "plane.parquet"},
    ):
        config = qk.QTuningConfig(policy=AboveReference(), record=False, **FIXED)
        arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        ours = qk.QTuningTrainer(tiny_model(), arguments, qtuning=config, **given)
        _, _, plan = gradients(ours, [PoolCollator()(tiny_samples(8))])
        weights.append(plan.selections[0].token_weight)
        assert 0 < weights[-1].sum() < len(weights[-1])
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        (AboveReference(), {}, "reference_model and reference_nll are None; accepted"),
        (AboveReference(), {"reference_nll": {1000: [1.0]}}, "reference_nll has no sample 10|entries; accepted"),
        (
            AboveReference(),
            {"reference_nll": {1000 + i: [1.0] * 99 for i in range(8)}},
            r"sample 1000 has 99 entries; accepted: \d+",
        ),
        ("longest", {"reference_nll": {}}, "compares with no reference; accepted: without"),
    ],
)
def test_a_bad_reference_is_refused(tmp_path, policy, given, message):
    config = qk.QTuningConfig(policy=policy, record=False, **FIXED)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=message):
        gradients(
            qk.QTuningTrainer(tiny_model(), arguments, qtuning=config, **given), [PoolCollator()(tiny_samples(8))]
        )


@pytest.mark.parametrize("host", ["ours", "TRL"])
def test_a_policy_of_ones_own(tmp_path, host):
    """examples/own_policy.py by name: it keeps some samples of every pool, and the run trains on them."""
    config = qk.QTuningConfig(
        policy="examples.own_policy:Band", policy_options={"least": 4.5, "most": 4.7}, record=False, **FIXED
    )
    if host == "TRL":
        pytest.importorskip("trl")
        ours = make_sft(tmp_path, "prompt and completion", tiny_model(), config)
    else:
        ours = make_plain(tmp_path, tiny_model(), config)
    before = {name: p.clone() for name, p in ours.model.named_parameters()}
    ours.train()
    totals = ours.qtuning_summary()
    assert 0 < totals["samples_kept"] < totals["samples_seen"] == 40
    assert not any(torch.equal(p, before[name]) for name, p in ours.model.named_parameters())
