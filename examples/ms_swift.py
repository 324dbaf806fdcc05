"""ms-swift: swift sft … --external_plugins examples/ms_swift.py"""

from swift import trainers

from qtuning_kernels import QTuningConfig, QTuningMixin


class QTuningSwiftTrainer(QTuningMixin, trainers.Seq2SeqTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, qtuning=QTuningConfig(sample_ratio=0.25, token_ratio=0.5), **kwargs)


trainers.Seq2SeqTrainer = QTuningSwiftTrainer  # the factory looks it up here by name
