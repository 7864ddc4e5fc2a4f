"""A teacher that adapts to the data of the training."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_kd.models import Network, adapt, is_path, load_student
from lit_kd.types import read_logits

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AdaptedTeacher(nn.Module):
    """A copy of a teacher whose BatchNorm layers follow the student's data (Teacher Adaptation, arXiv 2308.09544).

    On training batches they normalise by the batch, and their running statistics follow [code]; in evaluation these are
    used. No parameter changes, dropout stays off, and the network that is given stays as it is [ours]. For a teacher
    whose data were unlike the student's. Taps have the prefix ``network.``. There is no teacher cache. Each process
    follows its own batches. A resumed run starts from the given statistics, which evaluation and batches of one row
    read.

    Args:
        network: A module, or the path of a lit_kd checkpoint.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        if not (isinstance(network, nn.Module) or is_path(network)):
            raise ValueError(f"expected a network, a module or the path of a lit_kd checkpoint, found {network!r}")
        self.network = copy.deepcopy(network) if isinstance(network, nn.Module) else load_student(network)
        head = getattr(self.network, "lit_kd_head", None)
        adapt(self, head=head and f"network.{head}")

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """The logits, ``(B, C)``."""
        return read_logits(self.network, self.network(*args, **options))


@contextmanager
def adapting(teachers: Sequence[nn.Module]) -> Iterator[None]:
    """For a while, BatchNorm of those that adapt is in training mode."""
    adapted = [part for teacher in teachers if isinstance(teacher, AdaptedTeacher) for part in teacher.modules()]
    norms = [part for part in adapted if isinstance(part, NORMS)]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        for norm in norms:
            norm.eval()
