"""SimKD: the student borrows the teacher's head."""

from typing import Any

import torch

from lit_kd.distiller import Distiller
from lit_kd.models import Network
from lit_kd.models.subclasses import class_head
from lit_kd.models.taps import Composite, Tapped
from lit_kd.teachers.modules import first_batch
from lit_kd.terms import Hint, Term, Weights
from lit_kd.terms.features import gives_logits
from lit_kd.types import PENULTIMATE, Batch, Outputs, evaluating


class SimKD(Distiller):
    """SimKD (arXiv 2203.14001): the student's features learn to be the teacher's, whose head then classifies them.

    The loss is the squared error between the student's features, through a projector, and the teacher's; labels are
    not used. What is exported, and predicts, is the student's body, the projector and the teacher's last layer.

    Args:
        student: The network whose body is trained, a module or a name.
        teacher: One teacher: a module or a checkpoint path.
        student_tap: A layer of the student by its path, or ``"penultimate"``: what the last linear layer reads.
        teacher_tap: The layer whose output, averaged over the image where it is a map, the teacher's last linear layer
            reads. In the paper the last maps: for networks such as ``resnet20``, ``"layer3"`` of both.
        **base: See `lit_kd.Distiller`.
    """

    num_sources = 1
    settled = ("term", "label_term")
    student: Composite

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_tap: str = PENULTIMATE,
        teacher_tap: str = PENULTIMATE,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if len(self._teacher_specs) > 1:
            raise ValueError(f"expected one teacher, whose head is borrowed, found {len(self._teacher_specs)}")
        self.student = Composite(self.student, student_tap)
        self.teacher_tap = teacher_tap

    def default_term(self) -> Term:
        """The squared error of the projected features."""
        return Hint("projector", self.teacher_tap, adapt=False)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The teacher alone."""
        return [0.0, 1.0]

    def complete_student(self) -> None:
        """Make the projector, and take the teacher's head."""
        batch, body, tap = first_batch(self), self.student.body, self.student.tap
        with evaluating(body):
            ours = Tapped(body, (tap,))(batch.x).features[tap]
        if not self.student.spec:
            theirs, head = self.teachers(batch)[0], class_head(self.teachers.models[0])
            features = theirs.features[self.teacher_tap]
            pooled = features.mean((2, 3)) if features.dim() == 4 else features
            if pooled.shape[1:] != (head.in_features,) or not gives_logits(head(pooled), theirs.logits):
                raise ValueError(
                    f"expected the teacher's last linear layer to read the mean of its layer {self.teacher_tap!r}, "
                    "found that it does not: choose the layer before the pooling as teacher_tap, or 'penultimate'"
                )
            self.student.build(ours.shape[1:], features.shape[1:], head)
        # what lies behind the tap learns nothing, and DDP would wait for its gradient
        learning = [p for p in body.parameters() if p.requires_grad]
        read = torch.autograd.grad(ours.sum(), learning, allow_unused=True) if ours.requires_grad else ()
        for parameter, gradient in zip(learning, read or [None] * len(learning), strict=True):
            parameter.requires_grad_(gradient is not None)

    def on_validation_start(self) -> None:
        """Refuse a student without projector and head."""
        if not self.student.spec:
            raise ValueError("expected a student with projector and head, found none: train it, or pass ckpt_path")

    on_test_start = on_predict_start = on_validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The shapes of the projector and the head go with the student."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["composite"] = self.student.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make projector and head to load into."""
        if not self.student.spec:
            self.student.rebuild(checkpoint["composite"])
        super().on_load_checkpoint(checkpoint)
