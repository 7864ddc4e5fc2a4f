"""Distillation at inputs that are changed a little, in the worst direction."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.models.taps import Tapped
from lit_kd.teachers import AdaptedTeacher, FileTeacher
from lit_kd.terms import Weighed
from lit_kd.types import UNLABELED, Batch, Outputs, check_choice, class_labels, evaluating
from lit_kd.weightings.mean_teacher import as_one


class AdversarialKD(KD):
    """`KD` in which the teacher is learned from at ``x + d``, d at most ``epsilon`` in each number; the label at x.

    - ``attack="student"``: d is where the student differs most from what the teacher says of x, and is taught that:
      ``max_d KL(p_T(x) || p_S(x + d))``, the inner maximum of RSLAD (arXiv 2108.07969) [code], from d = 0 [ours],
      beside the label at x, as in ARD (arXiv 1905.09747) [code]. For students that resist attacks.
    - ``attack="teacher"``: d is where the teacher errs most, ``max_d CE(p_T(x + d), y)``, with its own class for a row
      without a label; the student is taught what it says there (after IKD, arXiv 2209.09841 [ours]).

    The maximum is sought from d = 0 by steps along the gradient's sign, each of ``2.5 epsilon / steps``; one step is
    FGSM. Networks are attacked in evaluation mode, several teachers as their ``average`` [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        attack: Who is attacked.
        epsilon: Above 0, in units of what the networks read: where pixels are divided by a standard deviation s,
            8 / 255 of a pixel is ``8 / 255 / s``. Inputs are not cut off to the range of pixels.
        steps: Of the search, at least 1.
        **base: See `KD` and `lit_kd.Distiller`; without ``mix``, and ``"teacher"`` without ``teacher_cache`` and
            without a teacher that adapts, as it is asked in evaluation mode.
    """

    tasks = ("classification",)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        attack: Literal["student", "teacher"] = "student",
        epsilon: float = 0.1,
        steps: int = 1,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        check_choice("attack", attack, ("student", "teacher"))
        if not epsilon > 0 or steps < 1:
            raise ValueError(f"expected an epsilon above 0 and at least 1 step, found {epsilon} and {steps}")
        if self.mix is not None or (attack == "teacher" and self.teacher_cache):
            raise ValueError(
                "expected no mix, and no teacher_cache with attack='teacher', which asks about other inputs"
            )
        self.attack, self.epsilon, self.steps = attack, epsilon, steps

    def setup(self, stage: str) -> None:
        """Refuse to attack a teacher that adapts, or is a file."""
        super().setup(stage)
        refused = any(isinstance(model, (AdaptedTeacher, FileTeacher)) for model in self.teachers.models)
        if stage == "fit" and self.attack == "teacher" and refused:
            raise ValueError(
                "expected neither an AdaptedTeacher nor a file as the teacher with attack='teacher', which asks it in "
                "evaluation mode, and about other inputs"
            )

    def attacked(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The inputs ``x + d`` of a loss that is large, from a function of inputs to losses ``(B,)``."""
        d = torch.zeros_like(x)
        for _ in range(self.steps):
            d.requires_grad_()
            [gradient] = torch.autograd.grad(loss(x + d).sum(), d)
            d = (d.detach() + 2.5 * self.epsilon / self.steps * gradient.sign()).clamp(-self.epsilon, self.epsilon)
        return x + d

    def weighed(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Weighed:
        """Those of `KD`, the teachers' at other inputs."""
        if not isinstance(batch.x, Tensor) or not batch.x.is_floating_point():
            raise ValueError(f"expected inputs to attack, a floating-point tensor, found {type(batch.x).__name__}")
        draws = self._draws.get_state()
        losses, weights, extra = super().weighed(student, teachers, batch)
        said = as_one(teachers, of=self.average).logits
        if self.attack == "student":
            with evaluating(self.student):
                x = self.attacked(batch.x, lambda x: kd_loss(self.tapped_student(x).logits, said))
        else:
            y = class_labels(batch.y)
            y = y.where(y != UNLABELED, said.argmax(-1))
            models = [Tapped(model) for model in self.teachers.models]

            def errs(x: Tensor) -> Tensor:
                return cross_entropy(as_one([model(x) for model in models], of=self.average).logits, y)

            x = self.attacked(batch.x, errs)
            teachers = self.teachers(batch._replace(x=x))
        student = self.tapped_student(x)
        assert self.terms is not None
        self._draws.set_state(draws)  # the same teachers are dropped
        moved, _ = self.terms(student, self.sources(student, teachers, batch), batch)
        return [losses[0], *moved[1:]], weights, extra
