"""Any method within your own LightningModule."""

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_kd.data import DistillationDataModule
from lit_kd.distiller import Distiller
from lit_kd.distiller.optimisation import refuse_callbacks
from lit_kd.methods.almkd import ALMKD
from lit_kd.models.checkpoint import drop_unknown
from lit_kd.models.subclasses import Subclassed
from lit_kd.models.taps import Composite, Watch
from lit_kd.teachers.cache import follow
from lit_kd.terms.base import row_losses, weighted_means
from lit_kd.types import Batch, Outputs, as_ours, as_theirs
from lit_kd.weightings.base import TellRule, count_errors


class Distilled(LightningModule):
    """Makes any method part of your own module: ``class Mine(Distilled, LightningModule)``.

    Override `configure_distillation`, and call `distillation` in your training step. Optimizers, metrics, logs and
    further losses stay yours. Steps get ``(x, y)``, or mappings where your data are such, also from data modules of
    `lit_kd.data`; prediction steps get what your loader gives. Every method runs in automatic optimisation, and in a
    manual one of your own: the look-ahead of ALM-KD takes no step, and its ``gradient_clip_val`` and
    ``accumulate_grad_batches`` have no effect here. Hooks that you override must call ``super()``. Methods that change
    batches or the network, or train further ones, cannot be used.
    """

    _method: tuple[Distiller, ...] = ()  # in a tuple, it is no submodule: the student is yours
    _watch: Watch | None = None

    def configure_distillation(self) -> Distiller:
        """The method, around your own network, such as ``KD(self.net, teacher, num_classes=10)``."""
        raise NotImplementedError(f"{type(self).__name__} must override configure_distillation()")

    @property
    def distiller(self) -> Distiller:
        """What `configure_distillation` gave."""
        if not self._method:
            try:
                made = self.configure_distillation()
            except AttributeError as error:  # which torch would take for a missing property
                raise RuntimeError(f"configure_distillation() failed: {error}") from error
            if made.changes_batches or made.peers or isinstance(made.student, (Composite, Subclassed)):
                found = type(made).__name__
                raise ValueError(f"expected a method that leaves batches and networks as they are, found {found}")
            unpack = made.unpack
            made.unpack = lambda batch: unpack(as_ours(batch))  # type: ignore[method-assign]
            self._method = (made,)
        return self._method[0]

    def distillation(self, logits: Tensor, batch: Any) -> Tensor:
        """The weighted loss of each row, ``(B,)``, from your network's logits ``(B, C)`` for a training batch.

        The network must have run on this batch last. The means of all terms are logged as ``distillation/TERM``.
        """
        method = self.distiller
        if self._watch is None:
            raise ValueError("expected distillation() within a fit: let overridden hooks call super(), first setup()")
        batch = method.unpack(batch)
        student, teachers = method.outputs(batch, Outputs(logits, self._watch.features(len(logits))))
        losses, weights, extra = method.weighed(student, teachers, batch)
        means = weighted_means(losses, weights, extra)
        method.log_means({f"distillation/{name}": mean for name, mean in means.items()}, len(logits))
        return row_losses(losses, weights, extra)

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    # what our data modules ask for
    needs_meta = property(lambda self: self.distiller.needs_meta)
    trains_on_meta = property(lambda self: self.distiller.trains_on_meta)
    rows_of_epoch = property(lambda self: self.distiller.rows_of_epoch)

    def configure_callbacks(self) -> Any:
        """The method's own in a training, but for the one that reads what validation steps return, which are yours."""
        own: Any = super().configure_callbacks()
        if not self._fitting:
            return own
        self.distiller.trainer = self.trainer
        return [*own, *(one for one in self.distiller.configure_callbacks() if not isinstance(one, TellRule))]

    def setup(self, stage: str) -> None:
        """Set up the method for a training; its terms' parts are trained and saved with yours."""
        super().setup(stage)
        if stage == "fit":
            method = self.distiller
            method.trainer, method.log = self.trainer, self.log  # type: ignore[method-assign]
            method.setup(stage)
            refuse_callbacks(method)
            own = {*self.parameters()}
            if any(weight in own for model in method.teachers.models for weight in model.parameters()):
                rank_zero_warn(
                    f"expected the teacher outside of {type(self).__name__}, found its weights among the module's own, "
                    "which checkpoints hold: keep it in a tuple, self.teacher = (net,), or pass a path"
                )
            self.distillation_terms = method.terms

    def on_fit_start(self) -> None:
        """Make the table, and watch the layers whose features are read."""
        super().on_fit_start()
        follow(self.distiller, self)
        self.distiller.on_fit_start()
        if self._watch:
            self._watch.stop()
        self._watch = Watch(self.distiller.tapped_student)

    def on_train_epoch_start(self) -> None:
        """The method's part."""
        super().on_train_epoch_start()
        self.distiller.on_train_epoch_start()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Show your steps ``(x, y)``, or the mapping that your data gave."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        data: Any = getattr(self.trainer, "datamodule", None)
        parts = batch if isinstance(batch, dict) and batch.keys() == {"train", "meta"} else {"train": batch}
        if not isinstance(parts["train"], Batch):
            keyed = isinstance(data, DistillationDataModule) and {data.label_key, data.input_key} != {None}
            if not keyed or self.trainer.predicting:
                return batch
            parts = {"train": data.unpack(batch)}  # of a loader that stays its own
        key = getattr(data, "labels_at", None)
        return as_theirs(parts["train"], parts.get("meta"), key or "labels", data.input_key if key else None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Keep the meta batch."""
        if isinstance(self.distiller, ALMKD) and self.distiller.needs_meta:
            meta = getattr(batch, "meta", None)
            if meta is None:
                cure = "pass a data module of lit_kd.data, whose on_after_batch_transfer is not overridden"
                raise ValueError(f"expected batches with a meta batch, found {type(batch).__name__}: {cure}")
            self.distiller.meta_batch = meta
            self.distiller.look_ahead.before()
        return super().on_train_batch_start(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Let ALM-KD's rule compare student and teachers on validation rows."""
        super().on_validation_epoch_end()
        if not self._fitting or self.trainer.sanity_checking:
            return
        method = self.distiller
        if isinstance(method, ALMKD) and method.rule.wants_validation:
            student, teachers, y = method.predict_rows(method.data.parts.val)
            wrong = count_errors(student.logits, y, [t.logits for t in teachers], [t.known for t in teachers])
            method.rule.validated(method.table, wrong, torch.tensor(len(y), device=y.device))

    def on_train_epoch_end(self) -> None:
        """The method's part."""
        super().on_train_epoch_end()
        self.distiller.on_train_epoch_end()

    def on_train_end(self) -> None:
        """The method's part."""
        super().on_train_end()
        self.distiller.on_train_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the table, too."""
        super().on_save_checkpoint(checkpoint)
        self.distiller.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the table up again."""
        super().on_load_checkpoint(checkpoint)
        if "distillation_terms" not in self._modules:
            drop_unknown(checkpoint["state_dict"], {}, ("distillation_terms.",))
        if self._method and self.distiller.terms is not None:
            self.distiller.on_load_checkpoint(checkpoint)

    def teardown(self, stage: str) -> None:
        """Stop watching."""
        super().teardown(stage)
        if self._watch:
            self._watch.stop()
            self._watch = None
            self.distiller.cpu()
