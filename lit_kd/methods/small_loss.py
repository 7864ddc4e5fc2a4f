"""Co-teaching and JoCoR: two networks that learn from the rows of small loss, as wrong labels are learned late."""

from typing import Any

import torch
from torch import Tensor

from lit_kd.methods.peers import Peers
from lit_kd.models import Network
from lit_kd.terms import Term, Weights
from lit_kd.types import Batch, class_labels
from lit_kd.weightings.base import has_label, labelled_rows


class SmallLoss(Peers):
    """Drops a share of each batch, which rises linearly over the first epochs from 0 to the noise rate.

    Each process chooses among its own rows. Rows without a label are not drawn, as with `Supervised`.

    Args:
        peers: The other network, in a list: a module, name or checkpoint path, see `MutualLearning`.
        noise_rate: The share of wrong labels, in [0, 1), which is to be dropped: it must be known or estimated.
        ramp_epochs: Epochs until that share is dropped [code].
        **base: See `lit_kd.Distiller`.
    """

    by_sample = True
    rises = "ramp_epochs"

    def __init__(
        self, *, peers: list[Network], noise_rate: float | None = None, ramp_epochs: int = 10, **base: Any
    ) -> None:
        super().__init__(peers=peers, **base)
        name = type(self).__name__
        if len(peers) != 1:
            raise ValueError(f"expected one peer, as {name} trains two networks, found {len(peers)}")
        if noise_rate is None or not 0 <= noise_rate < 1:
            raise ValueError(
                f"expected as noise_rate the share of wrong labels, in [0, 1), which {name} must know, found "
                f"{noise_rate}: count wrong labels among rows you trust, or take table.shared['noise_rate'] of ALMKD"
            )
        if self.mix is not None:
            raise ValueError(f"expected no mix with {name}, found one: the loss of a mixture does not tell of one row")
        self.noise_rate, self.ramp_epochs = noise_rate, ramp_epochs

    def training_rows(self) -> Tensor:
        """Those with a label."""
        return labelled_rows(self.data)

    def small(self, losses: Tensor, batch: Batch) -> Tensor:
        """For rows of small loss by how much their mean exceeds the batch's sum over B; 0 for others, ``(B,)``."""
        labelled = has_label(batch.y if self.task.name == "regression" else class_labels(batch.y))
        ramp = min(self.current_epoch / self.ramp_epochs, 1) if self.ramp_epochs else 1
        kept = max(1, round((1 - self.noise_rate * ramp) * int(labelled.sum())))
        order = losses.detach().masked_fill(~labelled, torch.inf).argsort(stable=True)
        return torch.zeros_like(losses.detach()).index_fill(0, order[:kept], len(losses) / kept)


class CoTeaching(SmallLoss):
    """Co-teaching (arXiv 1804.06872): of two networks each picks rows of small loss, and the other learns from them.

    The loss is the mean over the rows that are kept; the published code divides it by their number once more, which
    only an optimizer such as Adam forgives. The student is exported, the other's accuracy logged as
    ``val/peer_1_accuracy``.

    Args:
        student: The network to train, a module or a name.
        **base: See `lit_kd.methods.small_loss.SmallLoss` and `lit_kd.Distiller`.
    """

    settled = ("term",)
    num_sources = 0

    def __init__(self, student: Network, **base: Any) -> None:
        super().__init__(student=student, **base)

    def weigh_all(self, losses: list[list[Tensor]], batch: Batch) -> list[Weights]:
        """The other's choice."""
        mine, theirs = (self.small(label, batch).unsqueeze(1) for (label,) in losses)
        return [theirs, mine]


class JoCoR(SmallLoss):
    """JoCoR (CVPR 2020): two networks learn to agree, from the rows on which their joint loss is small.

    A row's loss is ``(1 - a) (CE_1 + CE_2) + a (KL(p_1 || p_2) + KL(p_2 || p_1))``, with the gradient of both, and
    both learn from the rows where it is small [code]. The authors halve the noise rate where noise is asymmetric. The
    student is exported, the other's accuracy logged as ``val/peer_1_accuracy``.

    Args:
        student: The network to train, a module or a name.
        agreement: a, in [0, 1): the code's default; 0.9 on CIFAR-10, 0.85 on CIFAR-100 [text]. With SGD the student
            learns slowly where it is large.
        **base: See `lit_kd.methods.small_loss.SmallLoss` and `lit_kd.Distiller`.
    """

    num_sources = 1
    detached = False

    def __init__(self, student: Network, *, agreement: float = 0.1, **base: Any) -> None:
        super().__init__(student=student, **base)
        if not 0 <= agreement < 1:
            raise ValueError(f"expected agreement in [0, 1), found {agreement}")
        self.agreement = agreement

    def default_term(self) -> Term:
        """KL divergence."""
        return self.task.teacher_term(1.0)

    def weigh_all(self, losses: list[list[Tensor]], batch: Batch) -> list[Weights]:
        """The same of both."""
        shares = losses[0][0].new_tensor([1 - self.agreement, self.agreement])
        joint = torch.stack([torch.stack(own, dim=1) @ shares for own in losses]).sum(0)
        return [self.small(joint, batch).unsqueeze(1) * shares] * 2
