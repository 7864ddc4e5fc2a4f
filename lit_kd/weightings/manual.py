"""One update in manual optimisation: what Lightning does by itself only in automatic optimisation."""

from __future__ import annotations

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


def check_manual(module: LightningModule) -> None:
    """Refuse what a look-ahead in manual optimisation cannot do right: fp16, and sharded students."""
    name, precision, strategy = type(module).__name__, module.trainer.precision, module.trainer.strategy
    if precision in ("16-mixed", "16-true"):
        raise ValueError(f"{name} does not support precision {precision}: use bf16-mixed or 32-true")
    if isinstance(strategy, SHARDED):
        raise ValueError(f"{name} reads layers that {type(strategy).__name__} shards: use the strategy ddp")


def check_trainer_options(module: LightningModule) -> None:
    """Refuse the trainer's options that have no effect in manual optimisation, and name the module's own."""
    if module.trainer.state.fn != TrainerFn.FITTING:
        return
    name = type(module).__name__
    for option, unset in (("gradient_clip_val", (None, 0)), ("accumulate_grad_batches", (1,))):
        value = getattr(module.trainer, option)
        if value not in unset:
            raise ValueError(
                f"expected no {option} of the trainer, which does not reach {name}, found {value}: take {name}'s own "
                f"in its place, {name}({option}={value}) or --model.{option}={value}"
            )


def manual_update(module: LightningModule, loss: Tensor, batch_idx: int, clip: float | None, accumulate: int) -> None:
    """Backward, and on every ``accumulate``-th or last batch clip, step, and step the schedulers.

    Args:
        module: In manual optimisation, with one optimizer.
        loss: Mean over the batch, a scalar.
        batch_idx: Of the epoch.
        clip: Largest gradient norm.
        accumulate: Batches an update.
    """
    optimizer = module.optimizers()
    assert isinstance(optimizer, LightningOptimizer)
    last = module.trainer.is_last_batch
    module.manual_backward(loss / accumulate)
    if last or (batch_idx + 1) % accumulate == 0:
        if clip is not None:
            module.clip_gradients(optimizer.optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        _step_schedulers(module, "step")
    if last:  # not in on_train_epoch_end: checkpoints are written before that
        _step_schedulers(module, "epoch")


def _step_schedulers(module: LightningModule, interval: str) -> None:
    for config in module.trainer.lr_scheduler_configs:
        if config.interval == interval and not isinstance(config.scheduler, PLATEAU):
            config.scheduler.step()


def step_plateaus(module: LightningModule) -> None:
    """Step the schedulers that follow a metric: in on_train_epoch_end, when the epoch's metrics are known.

    Raises:
        ValueError: If a metric is not among those logged, or the scheduler steps more often than it is measured.
    """
    if module.trainer.fit_loop.restarting:
        return  # resumed right after a validation, whose metrics are not in the checkpoint; as Lightning does
    metrics = module.trainer.callback_metrics
    for config in module.trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, PLATEAU):
            monitor = getattr(config.scheduler, "monitor", None)  # Lightning's own has it, torch's has not
            if monitor not in metrics or config.interval != "epoch":
                raise ValueError(
                    f"ReduceLROnPlateau follows the metric {monitor!r} each {config.interval}; expected lr_interval "
                    f"'epoch', and as monitor of lightning.pytorch.cli.ReduceLROnPlateau one of {sorted(metrics)}"
                )
            config.scheduler.step(metrics[monitor])


def learning_rate(module: LightningModule, parameter: Tensor) -> float:
    """The current learning rate of a parameter."""
    optimizer = module.optimizers()
    assert isinstance(optimizer, LightningOptimizer)
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return float(group["lr"])
    raise ValueError("the student's last layer is not among the optimizer's parameters: unfreeze it")
