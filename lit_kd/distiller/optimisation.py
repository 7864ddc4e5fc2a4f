"""The student's optimizer, its scheduler, and how long a training is."""

import math
from collections.abc import Iterable, Sized
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import BatchSampler

from lit_kd.models.shim import given_epochs, in_training
from lit_kd.models.taps import Composite
from lit_kd.teachers.cache import FillTeacherCache
from lit_kd.types import check_choice

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller

LIKELY = 100  # epochs of a training that EarlyStopping or a Timer may end


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """The default optimizer: SGD, lr 0.05, Nesterov momentum 0.9, weight decay 5e-4; RepDistiller's has no Nesterov."""
    return SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def configure(module: "Distiller") -> Any:
    """The optimizer over what requires gradients, with a group for each further learner, and its scheduler."""
    refuse_callbacks(module)
    check_choice("lr_interval", module.lr_interval, ("epoch", "step"))
    makers: dict[str, Any] = {"optimizer": module.optimizer}
    if module.lr_scheduler not in (None, "cosine"):
        makers["lr_scheduler"] = module.lr_scheduler
    for name, maker in makers.items():
        if not callable(maker):
            found = shorten(repr(maker), 60)
            raise TypeError(f"expected as {name} a class, or a function that makes one, found {found}")
    peers = [list(peer.parameters()) for peer in module.peers.values()]
    apart = {id(p) for group in peers for p in group}
    own = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    if not own:
        raise ValueError("expected a student with trainable parameters, found all of them frozen: unfreeze some")
    plain = [p for term in module.terms or () if not term.decays for p in term.parameters()]
    kept = {id(p) for p in plain}
    groups: Any = [{"params": group} for group in ([p for p in own if id(p) not in kept], *peers)]
    groups += [{"params": plain, "weight_decay": 0.0}] if plain else []
    optimizer = module.optimizer(groups if len(groups) > 1 else own)
    for group in optimizer.param_groups if module.lr else ():
        group["lr"] = module.lr
    if module.lr_scheduler is None:
        return optimizer
    given = module.lr_scheduler
    scheduler = anneal(optimizer, module.schedule_length) if given == "cosine" else given(optimizer)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": module.lr_interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        module.lr_monitor = module.lr_monitor or getattr(scheduler, "monitor", None)  # Lightning's own class has it
        if module.lr_monitor is None:
            raise ValueError("expected the metric that ReduceLROnPlateau follows, found none: set lr_monitor='val/nll'")
        config |= {"monitor": module.lr_monitor} if module.automatic_optimization else {}
    return {"optimizer": optimizer, "lr_scheduler": config}


def check_sharded(module: "Distiller") -> None:
    """Refuse trainable parameters that the other processes would not hear of, where gradients are shared by shards."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or strategy.distributed_sampler_kwargs["num_replicas"] < 2:
        return
    if getattr(module, "samples", False):
        raise ValueError(
            f"{type(module).__name__} samples responses, which sharded networks cannot: use the strategy ddp"
        )
    whole = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if whole:
        raise ValueError(
            f"expected parameters that configure_model has sharded with {type(strategy).__name__}, found {whole[0]} "
            "whole, of which each process would learn its own: shard it with fully_shard, or use the strategy ddp"
        )


def anneal(optimizer: Optimizer, length: int | None) -> LambdaLR:
    """A cosine to 0 over so many steps; torch's own keeps the length of a resumed, shorter run."""
    if length is None:
        raise ValueError("lr_scheduler 'cosine' needs to know the end: set the trainer's max_epochs or max_steps")
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, length) / length)))


def planned_length(module: "Distiller") -> tuple[int | None, int | None]:
    """How many epochs and how many updates a training has, the last epoch maybe cut; ``None``: not known."""
    trainer = module.trainer
    given = given_epochs(trainer), trainer.max_steps
    epochs, updates = (end if end is not None and end >= 0 else None for end in given)
    trainer.fit_loop.setup_data()  # makes the loader, so that its length is known
    if math.isinf(trainer.num_training_batches):
        return epochs, updates
    each = updates_per_epoch(module)
    ends = [end for end in (updates, None if epochs is None else epochs * each) if end is not None]
    return (math.ceil(min(ends) / each), min(ends)) if ends else (None, None)


def likely_length(module: "Distiller") -> int | None:
    """How many epochs a training has, for who divides it into parts: not all that are planned, if it may stop early."""
    epochs = planned_length(module)[0]
    return min(epochs or LIKELY, LIKELY) if has_callback(module, EarlyStopping, Timer) else epochs


def check_start(module: "Distiller") -> None:
    """What can be said of a training only when it begins."""
    check_sharded(module)
    warn_of_length(module)


def warn_of_length(module: "Distiller") -> None:
    """Say so where the training ends before the method has its full strength, or a batch has nothing to compare."""
    name, epochs = type(module).__name__, planned_length(module)[0] if module.rises else None
    if epochs is not None and getattr(module, module.rises) > epochs:
        found = f"{getattr(module, module.rises)} with {name}, which never comes to its full strength"
        rank_zero_warn(f"expected {module.rises} within the training's {epochs} epochs, found {found}: set it lower")
    compares = [type(term).__name__ for term in module.terms or () if term.couples_batch]
    if compares and has_lone_row(module):
        rank_zero_warn(
            f"expected batches of several rows, which {compares[0]} compares with each other, found that "
            "each epoch has one of a single row, which teaches nothing of it: set drop_last=True, or another batch_size"
        )


def has_lone_row(module: "Distiller") -> bool:
    """Whether each epoch has a training batch of one row, as far as the loader tells."""
    module.trainer.fit_loop.setup_data()
    loaders: Any = module.trainer.train_dataloader
    batches = getattr(loaders["train"] if isinstance(loaders, dict) else loaders, "batch_sampler", None)
    if not isinstance(batches, BatchSampler) or not isinstance(batches.sampler, Sized):
        return False
    rest = len(batches.sampler) % batches.batch_size
    return batches.batch_size == 1 or (rest == 1 and not batches.drop_last)


def updates_per_epoch(module: "Distiller") -> int:
    """How many updates a whole epoch has, of a stream whose length is known."""
    manual = module.trainer.lightning_module is module and not module.automatic_optimization
    own = getattr(module, "accumulate_grad_batches", None) if manual else None
    return max(1, math.ceil(module.trainer.num_training_batches / (own or module.trainer.accumulate_grad_batches)))


def has_callback(module: "Distiller", *kinds: type[Callback]) -> bool:
    """Whether the trainer has a callback of one of these classes."""
    return any(isinstance(one, kinds) for one in module.trainer.callbacks)  # type: ignore[attr-defined]  # set unseen


def callbacks_of(module: "Distiller") -> list[Callback]:
    """What fills the cache of teachers; early enough to refuse callbacks that act before a module is set up."""
    refuse_callbacks(module)
    return [FillTeacherCache(module)] if module.teacher_cache else []


def refuse_callbacks(module: "Distiller") -> None:
    """Refuse, in a training, callbacks of Lightning that cannot do here what they are for; a ValueError."""
    if not in_training(module):
        return
    name, manual = type(module).__name__, not module.automatic_optimization
    parts = any(True for term in module.terms or () for _ in term.parameters())
    composite = isinstance(module.student, Composite)
    counts = module.lr_scheduler == "cosine" and module.lr_interval == "step"
    tune = f"it runs before {name} has its state by sample. Use it on KD or Supervised with this student, then set"
    early = f"it copies {name} before all that is trained is made."
    own = f"{name} steps by itself. Use {name}(accumulate_grad_batches=...)"
    headless = not hasattr(module.trainer.lightning_module, "backbone")
    part = f"{name} has no backbone. Freeze a part of {name}.student by a BaseFinetuning of your own"
    for kind, refused, why in (
        (BackboneFinetuning, headless, part),
        (LearningRateFinder, module.keeps_rows, f"{tune} model.lr to what it found"),
        (BatchSizeFinder, module.keeps_rows, f"{tune} the data's batch_size to what it found"),
        (StochasticWeightAveraging, composite, f"{early} Leave it out"),
        (WeightAveraging, composite, f"{early} Leave it out"),
        (WeightAveraging, parts, f"{early} Use StochasticWeightAveraging, which averages the student alone"),
        (GradientAccumulationScheduler, manual, own),
        (GradientAccumulationScheduler, counts, "lr_scheduler 'cosine' counts updates. Set lr_interval='epoch'"),
    ):
        if refused and has_callback(module, kind):
            raise ValueError(f"expected no {kind.__name__} with {name}, found one: {why}")
