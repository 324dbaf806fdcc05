"""LLaMA-Factory: this in the place of `llamafactory-cli train`: python examples/llamafactory.py CONFIG.yaml"""

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp

from qtuning_kernels import QTuningConfig, QTuningMixin


class QTuningSeq2SeqTrainer(QTuningMixin, workflow.CustomSeq2SeqTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, qtuning=QTuningConfig(sample_ratio=0.25, token_ratio=0.5), **kwargs)


workflow.CustomSeq2SeqTrainer = QTuningSeq2SeqTrainer
run_exp()
