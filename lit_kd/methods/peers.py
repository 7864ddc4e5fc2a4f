"""Several networks that learn side by side, from each other's outputs or choices."""

from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.models import Network, is_path, resolve_model, student_name
from lit_kd.models.checkpoint import keep_plain
from lit_kd.models.taps import Tapped
from lit_kd.terms import Weights
from lit_kd.types import Batch, Outputs


class Peers(Distiller):
    """Trains the student and others at once, each with its own group of the optimizer.

    Each has a loss of its own, of the label and, with `num_sources` above 0, of what all others say. The student is the
    one that is exported; the others' accuracy is logged as ``val/peer_1_accuracy``, ...

    Args:
        student: The network to train, a module or a name.
        peers: The others, modules, names or checkpoint paths; ``load_from_checkpoint`` must be given modules again. No
            two may start from the same weights, as those of the same name do not: they would stay the same.
        **base: See `lit_kd.Distiller`.
    """

    needs_teacher = False
    detached: ClassVar[bool] = True  # whether no gradient flows into what the others say

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

    def weigh_all(self, losses: list[list[Tensor]], batch: Batch) -> list[Weights]:
        """For each network, the student first, what `weigh` says elsewhere; from each one's terms."""
        raise NotImplementedError(f"{type(self).__name__} must override weigh_all()")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One loss for each network."""
        assert self.terms is not None
        batch = self.prepare_batch(self.unpack(batch))
        student, _ = self.outputs(batch)
        said = [student, *(Tapped(peer)(batch.x).of(batch) for peer in self.peers.values())]
        heard = [Outputs(out.logits.detach(), out.features) for out in said] if self.detached else said
        others = [heard[:k] + heard[k + 1 :] if self.num_sources else [] for k in range(len(said))]
        found = [self.terms(out, sources, batch) for out, sources in zip(said, others, strict=True)]
        weights = self.weigh_all([losses for losses, _ in found], batch)
        names = ("", *(f"{peer}_" for peer in self.peers))
        totals = [
            self.total(losses, weight, extra, len(batch.y), name)
            for (losses, extra), weight, name in zip(found, weights, names, strict=True)
        ]
        return torch.stack(totals).sum()
