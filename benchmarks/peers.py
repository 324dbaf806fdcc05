"""What the kernels are compared with: the same results, as PyTorch and other packages give them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Stats = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [N, V], labels [N] -> nll, entropy [N]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], weight [V, H], labels [N] -> scalar


def eager_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return -log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def compiled_stats() -> Stats:
    return torch.compile(eager_stats, dynamic=False)


def cross_entropy_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """nll alone: F.cross_entropy has no entropy."""
    return F.cross_entropy(logits, labels, reduction="none"), None


def trl_stats() -> Stats:
    """TRL's two functions; on a CPU both are plain PyTorch in a loop over rows (on a GPU: gpu.py's `trl`)."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda logits, labels: (-selective_log_softmax(logits, labels), entropy_from_logits(logits))


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


def compiled_loss() -> Loss:
    return torch.compile(eager_loss, dynamic=False)


def torch_linear_loss() -> Loss:
    """F.linear_cross_entropy (torch >= 2.13) with its own choice of chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def trl_linear_loss() -> Loss:
    """What `loss_type="nll"` of TRL's SFTTrainer computes in, log-probability and entropy in chunks of tokens."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        outputs = ("log_probs", "entropy")
        settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
        return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, *settings)[0].sum()

    return loss


def cut_cross_entropy_loss() -> Loss:
    """cut-cross-entropy's path for devices without Triton."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(
        hidden, weight, labels, reduction="sum", impl="torch_compile"
    )
