"""Axolotl: a plugin that puts the selection in front of its trainer; examples/axolotl.yaml turns it on."""

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from qtuning_kernels import QTuningConfig, QTuningMixin


class QTuningArgs(BaseModel):
    qtuning_sample_ratio: float = 0.125
    qtuning_token_ratio: float = 0.5


class QTuningPlugin(BasePlugin):
    def get_input_args(self):
        return "examples.axolotl_plugin.QTuningArgs"

    def get_trainer_cls(self, cfg):
        class QTuningAxolotlTrainer(QTuningMixin, AxolotlTrainer):
            def __init__(self, *args, **kwargs):
                ratios = {"sample_ratio": cfg.qtuning_sample_ratio, "token_ratio": cfg.qtuning_token_ratio}
                super().__init__(*args, qtuning=QTuningConfig(**ratios), **kwargs)

        return QTuningAxolotlTrainer
