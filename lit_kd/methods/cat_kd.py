"""Class attention transfer."""

from typing import Any

from lit_kd.methods.fitnet import FitNet
from lit_kd.models import Network
from lit_kd.terms import ClassMaps, Term


class CATKD(FitNet):
    """Class activation maps in the place of hints (CAT-KD, CVPR 2023): where in the image each class is seen.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_tap: The layer whose mean over the image the student's last linear layer reads; ``"layer3"`` in networks
            such as ``resnet20`` and ``cnn-16``, ``"relu"`` in ``wrn-16-2``, ``"layer4"`` in torchvision's ResNets.
        teacher_tap: The same of the teacher.
        normalise: Compare maps of norm 1, so that no network's scale counts.
        weight: What the maps count, beside 1 for the label. In the authors' configs 10 to 600 with normalised maps, and
            0.5 to 15 without; with 600, maps have 4 by 4 places, which is not offered.
        **base: See `FitNet` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_tap: str = "layer3",
        teacher_tap: str = "layer3",
        normalise: bool = True,
        weight: float = 10.0,
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, student_tap=student_tap, teacher_tap=teacher_tap, weight=weight, **base)
        self.normalise = normalise

    def default_term(self) -> Term:
        """Class activation maps."""
        return ClassMaps(self.student_tap, self.teacher_tap, self.normalise)
