"""Manual optimisation: what Lightning does by itself only in automatic optimisation."""

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.models.shim import only_statistics

PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


class ManualOptimisation(Distiller):
    """Takes the student's steps itself: `update` in the training step.

    Args:
        gradient_clip_val: Largest norm of the student's gradient, in place of the trainer's option.
        accumulate_grad_batches: Batches an update; likewise.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self, *, gradient_clip_val: float | None = None, accumulate_grad_batches: int = 1, **base: Any
    ) -> None:
        super().__init__(**base)
        if accumulate_grad_batches < 1:
            raise ValueError(f"expected accumulate_grad_batches of at least 1, found {accumulate_grad_batches}")
        self.automatic_optimization = False
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches

    def setup(self, stage: str) -> None:
        """Refuse what a look-ahead cannot do right: fp16, and sharded students."""
        if stage == "fit":
            name, precision = type(self).__name__, self.trainer.precision
            if precision in ("16-mixed", "16-true"):
                raise ValueError(f"{name} does not support precision {precision}: use bf16-mixed or 32-true")
            refuse_sharded(self)
        super().setup(stage)

    def update(self, loss: Tensor, batch_idx: int) -> Tensor:
        """Backward, and after every n-th and the last batch clip, step, and step the schedulers. Return the loss."""
        if only_statistics(self.trainer):
            return loss.detach()
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        last = self.trainer.is_last_batch
        self.manual_backward(loss / self.accumulate_grad_batches)
        if last or (batch_idx + 1) % self.accumulate_grad_batches == 0:
            if self.gradient_clip_val is not None:
                self.clip_gradients(optimizer.optimizer, self.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad()
            self._step_schedulers("step")
        if last:  # not in on_train_epoch_end: checkpoints are written before that
            self._step_schedulers("epoch")
        return loss.detach()  # which Lightning's callbacks are given

    def _step_schedulers(self, interval: str) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and not isinstance(config.scheduler, PLATEAU):
                config.scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that follow a metric, now that the epoch's metrics are known."""
        super().on_train_epoch_end()
        if self.trainer.fit_loop.restarting or self.trainer.lightning_module is not self:
            return  # resumed right after a validation, whose metrics are not in the checkpoint; as Lightning does
        metrics = self.trainer.callback_metrics
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, PLATEAU):
                if self.lr_monitor not in metrics or config.interval != "epoch":
                    raise ValueError(
                        f"ReduceLROnPlateau follows the metric {self.lr_monitor!r} each {config.interval}; expected "
                        f"lr_interval 'epoch', and lr_monitor in {sorted(metrics)}"
                    )
                config.scheduler.step(metrics[self.lr_monitor])

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients: validation may come between accumulated batches."""


def refuse_sharded(module: Distiller) -> None:
    """Refuse strategies under which no process has the whole student; a ValueError."""
    name, strategy = type(module).__name__, module.trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(f"{name} reads layers that {type(strategy).__name__} shards: use the strategy ddp")


def learning_rate(module: LightningModule, parameter: Tensor) -> float:
    """The current learning rate of a parameter."""
    found: Any = module.optimizers()
    for optimizer in found if isinstance(found, list) else [found]:
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return float(group["lr"])
    raise ValueError("the student's last layer is not among the optimizer's parameters: unfreeze it")
