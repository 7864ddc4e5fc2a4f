"""Deep mutual learning: networks that teach each other."""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.models import Network, is_path, resolve_model, student_name
from lit_kd.models.checkpoint import keep_plain
from lit_kd.models.taps import Tapped
from lit_kd.terms import Term, Weights
from lit_kd.types import Batch, Outputs


class MutualLearning(Distiller):
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

    needs_teacher = False

    def __init__(self, student: Network, peers: list[Network], **base: Any) -> None:
        super().__init__(student=student, teacher=None, **base)
        if not peers or not isinstance(peers, (list, tuple)):
            raise ValueError(f"expected a list of at least one peer, found {peers!r}: alone, use Supervised")
        self.hparams.pop("teacher", None)
        # not paths: the checkpoint of this training stands by itself
        names = [student_name(p)[0] if is_path(p) else p for p in peers]
        self.hparams["peers"] = names
        keep_plain(self.hparams)
        term, label, extra = self._templates
        for one in (term, label, *extra):
            if one is not None and (one.reads_features or one.keeps_rows):
                raise ValueError(
                    f"expected terms of the logits, as all networks share them, found {type(one).__name__}, which "
                    "compares features or keeps state by sample"
                )
        for k, peer in enumerate(peers, start=1):
            self.peers[f"peer_{k}"] = resolve_model(peer, self.num_classes, self.input_shape)
        weights = [[p.detach().flatten() for p in net.parameters()] for net in (self.student, *self.peers.values())]
        if any(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in combinations(weights, 2)):
            raise ValueError("expected networks that start from different weights, found two that are the same")

    @property
    def num_sources(self) -> int:
        """Each of the others."""
        return len(self.peers)

    def default_term(self) -> Term:
        """KL divergence."""
        return self.task.teacher_term(1.0)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1 for the label, and 1 for all others together."""
        return [1.0, *[1 / len(sources)] * len(sources)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One loss for each network."""
        assert self.terms is not None
        batch = self.prepare_batch(self.unpack(batch))
        student, _ = self.outputs(batch)
        said = [student, *(Tapped(peer)(batch.x).of(batch) for peer in self.peers.values())]
        fixed = [Outputs(out.logits.detach(), out.features) for out in said]
        losses = []
        for k, (name, out) in enumerate(zip(("", *(f"{peer}_" for peer in self.peers)), said, strict=True)):
            others = fixed[:k] + fixed[k + 1 :]
            terms, extra = self.terms(out, others, batch)
            losses.append(self.total(terms, self.weigh(out, others, batch), extra, len(batch.y), name))
        return torch.stack(losses).sum()
