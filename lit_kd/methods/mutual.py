"""Deep mutual learning: networks that teach each other."""

from torch import Tensor

from lit_kd.methods.peers import Peers
from lit_kd.terms import Term, Weights
from lit_kd.types import Batch


class MutualLearning(Peers):
    """Deep mutual learning (DML, arXiv 1706.00384): each network learns from the label and from all others.

    ``L_k = CE_k + 1 / (K - 1) sum_j KL(p_j || p_k)`` at temperature 1 [from memory]; no gradient flows into p_j. All
    take a step at once, each with its own group of the optimizer. The student is the one that is exported; the others'
    accuracy is logged as ``val/peer_1_accuracy``, ...

    Args:
        student: The network to train, a module or a name.
        peers: The others, modules, names or checkpoint paths; ``load_from_checkpoint`` must be given modules again. No
            two may start from the same weights, as those of the same name do not: they would stay the same.
        **base: See `lit_kd.Distiller`.
    """

    @property
    def num_sources(self) -> int:
        """Each of the others."""
        return len(self.peers)

    def default_term(self) -> Term:
        """KL divergence."""
        return self.task.teacher_term(1.0)

    def weigh_all(self, losses: list[list[Tensor]], batch: Batch) -> list[Weights]:
        """1 for the label, and 1 for all others together."""
        return [[1.0, *[1 / len(own[1:])] * len(own[1:])] for own in losses]
