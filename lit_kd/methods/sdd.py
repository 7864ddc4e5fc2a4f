"""Scale-decoupled distillation."""

from typing import Any

from lit_kd.methods.fitnet import FitNet
from lit_kd.models import Network
from lit_kd.terms import ScaleDecoupled, Term


class SDD(FitNet):
    """Logits of regions of the last map besides those of the whole (SDD, arXiv 2403.13512).

    See `lit_kd.terms.ScaleDecoupled`. The label counts 1, and there is no warm-up [ours]. In the authors' code, SD-KD
    has 0.1 for the label and 0.9 for KD; SD-DKD and SD-NKD have 1 and ``min(epoch / warmup, 1)``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        term: What is learned from each region, a term of logits: by default KL at temperature 4.
        student_tap: The layer whose mean over the image the student's last linear layer reads; ``"layer3"`` in networks
            such as ``resnet20`` and ``cnn-16``, ``"relu"`` in ``wrn-16-2``, ``"layer4"`` in torchvision's ResNets.
        teacher_tap: The same of the teacher.
        scales: k of each division of the map into k by k regions.
        weight: What is distilled.
        **base: See `FitNet` and `lit_kd.Distiller`.
    """

    tasks = ("classification",)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        term: Term | None = None,
        student_tap: str = "layer3",
        teacher_tap: str = "layer3",
        scales: list[int] | tuple[int, ...] = (1, 2, 4),
        weight: float = 1.0,
        **base: Any,
    ) -> None:
        term = ScaleDecoupled(term, student_tap, teacher_tap, scales)
        super().__init__(
            student, teacher, student_tap=student_tap, teacher_tap=teacher_tap, term=term, weight=weight, **base
        )
