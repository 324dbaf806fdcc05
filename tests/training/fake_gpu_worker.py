"""A step on the fake device: what its host waits for, and float64. Prints JSON."""

import json

import torch

import qtuning_kernels as qk
from qtuning_kernels.data.micro_batches import micro_batches
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.kernels.linear import linear_cross_entropy
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.training.planner import StepPlanner
from tests.tiny import PRUNING, tiny_model, tiny_samples
from tests.training.fake_gpu import DEVICE, FakeGpu, OnGpu, move

samples = [to_sample(s["input_ids"], s["labels"], s["sample_id"]) for s in tiny_samples(16)]
config = qk.QTuningConfig(**PRUNING, score_dtype="model", record=False)
host = tiny_model("llama")
host.set_attn_implementation("eager")
expected = StepPlanner(host, CausalLM(host), config, torch.device("cpu")).plan([samples])

mode = FakeGpu()
forwards = []
model = tiny_model("llama")
model.set_attn_implementation("eager")
with mode:
    move(model)
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    planner = StepPlanner(model, CausalLM(model), config, DEVICE)
    plan = planner.plan([samples])
    scoring, mode.waits = mode.waits, []
    causal_lm = planner.causal_lm
    loss = torch.zeros((), device=DEVICE)
    for batch in micro_batches(plan.kept[0], config.micro_batch_tokens, planner.scorer.layout):
        batch = batch.to(DEVICE)

        def loss_of(hidden, weight, bias, labels=batch.labels):
            return linear_cross_entropy(hidden, weight, labels, bias=bias) / plan.totals.tokens_kept

        part = causal_lm.forward(model, batch.input_ids, batch.position_ids, batch.rows, loss_of)
        part.backward()
        loss += part.detach()
    training, mode.waits = mode.waits, []
    float(loss)
    ending, mode.waits = mode.waits, []
    float64, mode.float64 = mode.float64, []
    noticed = OnGpu(torch.rand(3))
    noticed[noticed > noticed.double().mean()].cpu()
    torch.zeros(2).to(DEVICE)
print(json.dumps({
    "scoring": scoring, "training": training, "ending": ending, "float64": float64,
    "noticed": [mode.waits, mode.float64],
    "forwards": len(forwards), "copies": mode.asynchronous_copies,
    "on_device": isinstance(next(model.parameters()), OnGpu) and loss.device.type,
    "error": (plan.scores[0].nll - expected.scores[0].nll).abs().max().item(),
    "same": plan.totals.tokens_kept == expected.totals.tokens_kept,
}))  # fmt: skip
