"""`QTuningSFTTrainer`: TRL's `SFTTrainer` on what Q-Tuning keeps."""

from trl import SFTTrainer

from qtuning_kernels.training.mixin import QTuningMixin


class QTuningSFTTrainer(QTuningMixin, SFTTrainer):
    """`trl.SFTTrainer` whose steps train on what Q-Tuning keeps of their batches; extra ``trl``, TRL 1.16 or newer.

    Data preparation, packing, loss (``loss_type``), metrics and everything else are TRL's. A pool is a batch of
    samples: with packing, all samples of the packed rows of a batch.

    Args:
        *args, **kwargs: as in `trl.SFTTrainer`.
        qtuning: the settings; default `QTuningConfig()`.

    Raises:
        ValueError: as `QTuningMixin`.
    """
