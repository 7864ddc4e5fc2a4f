"""What ALM-KD, and methods with a warm-up, cannot do right: refused, or warned of, before the training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable
from lit_kd.types import check_choice
from lit_kd.weightings.base import Rule

if TYPE_CHECKING:
    from lit_kd.methods.almkd import ALMKD


def own_rule(rule: str | Rule, rules: Mapping[str, type[Rule]]) -> Rule:
    """The rule of that name, or a copy of one, as it holds a run's state; a ValueError if there is none."""
    if isinstance(rule, Rule):
        return copy.deepcopy(rule)
    check_choice("rule", rule, rules)
    return rules[rule]()


def check_training(module: ALMKD) -> None:
    """Refuse data that the rule is not made for, and terms that its look-ahead does not reach; a ValueError."""
    check_terms(module)
    rule, name, task = module.rule, type(module.rule).__name__, module.task.name
    if task not in rule.tasks:
        raise ValueError(f"the rule {name} needs one class a sample, found task {task!r}: use the rule paper or amal")
    if module.mix is not None and rule.train_share:
        raise ValueError(f"expected a rule of train_share 0 with mix, found {rule.train_share}: rows are taken apart")
    warn_of_absent_classes(module.data)
    rows, batch = len(module.data.labels), module.data.batch_size * module.trainer.world_size
    if rule.trains_on_meta and rule.looks_ahead and batch >= rows:
        raise ValueError(
            f"expected batches smaller than the {rows} rows that are trained on, found {batch} rows: a meta row "
            "speaks for other batches' rows only, and there would be none. Lower the data's batch_size"
        )


def check_maker(rule: Rule, table: SampleTable, fresh: bool) -> None:
    """Refuse a checkpoint's table that another rule made, a ValueError; note who made a fresh one."""
    name = type(rule).__name__
    if not fresh and table.maker != name:
        raise ValueError(
            f"expected the rule that made the checkpoint's sample table, {table.maker}, found {name}: pass the same "
            "rule, or start without the checkpoint"
        )
    table.maker = name


def check_terms(module: ALMKD) -> None:
    """Refuse terms that the look-ahead does not reach; a ValueError."""
    for term in module.terms.weighted:
        if term.reads_features and module.needs_meta and module.meta_gradient == "last_layer":
            raise ValueError(
                f"ALMKD cannot weigh {type(term).__name__} by sample: it compares features, which the last layer's "
                "meta-gradient does not reach. Instead, set meta_gradient to exact, or pass it as extra"
            )
    if module.speed.compile and module.needs_meta and module.meta_gradient != "last_layer":
        raise ValueError(f"expected compile=False with meta_gradient {module.meta_gradient!r}: take one of the two")


def warn_of_rule(module: ALMKD, epochs: int | None) -> None:
    """Say so where the rule will learn nothing, or hear no teacher beside labels, in a training of so many epochs."""
    rule, name, data, trainer = module.rule, type(module.rule).__name__, module.data, module.trainer
    every, own_loader = trainer.check_val_every_n_epoch, type(data).val_dataloader is not DataModule.val_dataloader
    validates = trainer.enable_validation and (len(data.parts.val) or own_loader)
    if rule.wants_validation and module.teachers and (not validates or (epochs and every and every >= epochs)):
        rank_zero_warn(
            f"the rule {name} compares teachers and student on validation rows, and this training has none in time: "
            "labels that are right are heard alone, unless an earlier part of the run compared both. Give the data "
            "a val split, and leave limit_val_batches and check_val_every_n_epoch unset"
        )
    warn_if_unheard(module, epochs)


def warn_if_unheard(module: ALMKD, epochs: int | None) -> None:
    """Say so where the student learns with the first weights alone, in a training of so many epochs."""
    rule, name = module.rule, type(module.rule).__name__
    if epochs is not None and not any(map(rule.active, range(epochs))):
        rank_zero_warn(
            f"the rule {name} learns nothing in {epochs} epochs that the student trains with: all are warm-up. Train "
            f"longer, or pass rule=lit_kd.weightings.{name}(warmup_epochs=...)"
        )


class SayIfUnheard(Callback):
    """Says so at the end of a training that stopped early."""

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """See `warn_if_unheard`."""
        warn_if_unheard(getattr(module, "distiller", module), trainer.current_epoch)


def warn_of_absent_classes(data: DataModule) -> None:
    """Say so where no trusted row has a class that is trained on."""
    if data.task == "regression":
        return
    both = data.labels, data.labels[data.trusted]
    classes = [(y == 1).any(0).nonzero() if data.task == "multilabel" else y[y >= 0] for y in both]
    absent = sorted(set(classes[0].flatten().tolist()) - set(classes[1].flatten().tolist()))
    if absent and data.meta_size:
        rank_zero_warn(
            f"no meta row has a class of {absent}, which training rows have: nothing tells right labels of them from "
            "wrong ones. Give the meta split, or the validation rows that it is cut from, rows of each class"
        )


def warn_of_warmup(warmup: int, epochs: int | None) -> None:
    """Say so where the training, of so many epochs, ends before its warm-up does."""
    if epochs is not None and warmup >= epochs:
        rank_zero_warn(
            f"all {epochs} epochs are warm-up ({warmup} epochs): the teacher is never listened to. Train longer, or "
            "pass a smaller warmup_epochs"
        )
