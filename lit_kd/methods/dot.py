"""Distillation-oriented trainer: two momenta."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from lit_kd.data.table import all_sum, process
from lit_kd.distiller.momenta import TwoMomenta, two_momenta
from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.models.shim import only_statistics
from lit_kd.terms import Weights
from lit_kd.terms.base import weighted_means
from lit_kd.weightings.manual import ManualOptimisation


class DOT(ManualOptimisation, KD):
    """Distillation-oriented trainer (DOT, ICCV 2023): `KD`, and what is distilled has more momentum than the label.

    Each step has two backward passes, and `lit_kd.distiller.momenta.TwoMomenta` keeps their momenta apart. Extra terms
    count as distilled. For other losses pass a term, such as ``DOT(..., term=DecoupledKL())``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        optimizer: Maps parameters to a `TwoMomenta`, such as ``partial(TwoMomenta, lr=0.1, delta=0.05)``.
        **base: See `lit_kd.weightings.manual`, `KD` and `lit_kd.Distiller`.
    """

    _of_label: Tensor  # the label's part of the loss

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        optimizer: OptimizerCallable = two_momenta,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, optimizer=optimizer, **base)

    def setup(self, stage: str) -> None:
        """Refuse what would take one backward pass."""
        if stage == "fit" and self.trainer.lightning_module is not self:
            raise ValueError("expected DOT by itself, as it takes the steps, found it within your module: use KD")
        if stage == "fit" and self.speed.compile:
            raise ValueError("expected compile=False with DOT: a compiled student has one backward pass")
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        """The optimizer, with its scheduler; refuses any but `TwoMomenta`."""
        configured = super().configure_optimizers()
        made = configured["optimizer"] if isinstance(configured, Mapping) else configured
        if not isinstance(made, TwoMomenta):
            raise ValueError(f"expected as optimizer lit_kd.distiller.momenta.TwoMomenta, found {type(made).__name__}")
        return configured

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Two backward passes and, after every n-th batch, a step."""
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        if not only_statistics(self.trainer):
            self._keep_gradient_of_label()
        del self._of_label  # and its graph
        return self.update(loss, batch_idx)

    def total(
        self, losses: list[Tensor], weights: Weights, extra: Mapping[str, Tensor], rows: int, learner: str = ""
    ) -> Tensor:
        """As in the base; notes what of it is the label's."""
        own = weights[:, :1] if isinstance(weights, Tensor) else weights[:1]
        self._of_label = weighted_means(losses[:1], own, {})["label"]
        return super().total(losses, weights, extra, rows, learner)

    def _keep_gradient_of_label(self) -> None:
        """Add the label's gradient, the mean over processes, to that of earlier batches of this update."""
        optimizer = self._optimizer()
        reached = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        loss = self._of_label / self.accumulate_grad_batches
        gradients = torch.autograd.grad(loss, reached, retain_graph=True, allow_unused=True)
        found = {p: gradient for p, gradient in zip(reached, gradients, strict=True) if gradient is not None}
        if process()[1] > 1:
            mean = all_sum(parameters_to_vector(found.values())) / process()[1]
            vector_to_parameters(mean, found.values())
        for p, gradient in found.items():
            optimizer.of_label[p] = optimizer.of_label[p] + gradient if p in optimizer.of_label else gradient

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale the sum of both gradients to the largest norm, and each of them alike."""
        assert isinstance(optimizer, TwoMomenta)
        assert gradient_clip_val is not None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale = (gradient_clip_val / (get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
        for gradient in [*gradients, *optimizer.of_label.values()]:
            gradient.mul_(scale)

    def _optimizer(self) -> TwoMomenta:
        wrapped = self.optimizers()
        assert isinstance(wrapped, LightningOptimizer)
        assert isinstance(wrapped.optimizer, TwoMomenta)
        return wrapped.optimizer
