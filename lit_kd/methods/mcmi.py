"""Preparing a teacher: its outputs are to vary more within a class."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_kd.losses import class_log_means
from lit_kd.methods.supervised import Supervised
from lit_kd.models import Network, is_path
from lit_kd.terms import ClassInformation, Term
from lit_kd.types import class_labels


class MCMI(Supervised):
    """Prepares a teacher: ``CE - weight KL(p || Q_y)`` (MCMI, arXiv 2401.08732).

    Fine-tunes a trained network, here the ``student``, so that its predictions tell more about a sample than its class.
    Q_y is its mean prediction over the rows labelled y, from one pass before the training, and is then fixed [code];
    the pass is in evaluation mode and without augmentation [ours]. The teacher is then distilled by any method. The
    authors take 20 epochs of SGD from a learning rate of 0.05, cosine [code]. Needs a data module of `lit_kd.data`.

    Args:
        student: The trained network, a module or a checkpoint path.
        weight: Of the information, at least 0: 0.15 for a ResNet-56 on CIFAR-100, 0.1 to 0.25 were tried [code]. Watch
            the accuracy: nothing but the cross-entropy keeps p from running away from Q.
        **base: See `lit_kd.Distiller`.
    """

    tasks = ("classification",)

    def __init__(self, student: Network, *, weight: float = 0.15, extra: list[Term] | None = None, **base: Any) -> None:
        if weight < 0:
            raise ValueError(f"expected a weight of at least 0, found {weight}")
        super().__init__(student=student, extra=[ClassInformation(-weight), *(extra or [])], **base)
        self.weight = weight
        self._fresh = isinstance(student, str) and not is_path(student) and not base.get("pretrained")

    def prepare_epoch(self) -> None:
        """Before the first, ask what the network says of each class on average."""
        assert self.terms is not None
        for term in self.terms:
            if isinstance(term, ClassInformation) and term.log_means.isnan().any():
                if self._fresh:
                    rank_zero_warn("the student is a model name: its weights are random. Give a checkpoint's path.")
                rows = self.training_rows()
                rows = rows if self.data.train_on_meta else rows[rows < self.data.train_size]
                said, _, y = self.predict_rows(self.data.parts.rows(rows), teachers=False)
                term.log_means.copy_(class_log_means(said.logits, class_labels(y)))
