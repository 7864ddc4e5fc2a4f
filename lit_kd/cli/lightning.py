"""LightningCLI, wired for distillation."""

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

import lit_kd.methods  # noqa: F401 - so that short names of methods are legal in a config
from lit_kd.data import DataModule
from lit_kd.distiller.base import Distiller
from lit_kd.models.shim import GivenOptionsWin
from lit_kd.report.callbacks import Last, ResumeAsBefore, SaveConfig, WritePredictions
from lit_kd.report.show import ShowRun
from lit_kd.terms import Task
from lit_kd.version import __version__

DESCRIPTION = """Distil a student when labels or teacher cannot be trusted.
Besides the subcommands below there are others, which lit-kd --help lists."""


class Cli(GivenOptionsWin):
    """Lightning's command line: any method as ``--model``, any of our data modules as ``--data``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data inform the model; the best and the last epoch are kept, and written whole; a run is shown."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", _known, apply_on="instantiate")
        names = "data.input_shape", "model.init_args.input_shape"
        # as a list, which YAML has a word for
        parser.link_arguments(*names, lambda shape: shape and list(shape), apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Last, "last")
        parser.add_lightning_class_args(ShowRun, "show")
        parser.link_arguments("checkpoint.dirpath", "last.dirpath")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "last.filename": "last",
                "last.save_on_train_epoch_end": True,
                "trainer.plugins": [{"class_path": "lit_kd.report.callbacks.WholeCheckpoints"}],
            }
        )

    def instantiate_classes(self) -> None:
        """Make all; the best epoch is that of the task's own score, unless another is wanted."""
        super().instantiate_classes()
        task: Task = self.model.task
        for callback in self.trainer.checkpoint_callbacks:
            if getattr(callback, "monitor", None) == "val/accuracy" != f"val/{task.score}":
                callback.monitor, callback.mode = f"val/{task.score}", task.best  # type: ignore[attr-defined]

    def before_instantiate_classes(self) -> None:
        """Checkpoints hold tensors and plain values only: nothing else is loaded unless the user asks for it."""
        if self.subcommand is not None and self.config[self.subcommand].weights_only is None:
            self.config[self.subcommand].weights_only = True


def _known(num_classes: int) -> int:
    if not num_classes:  # of a wrapped data module
        raise ValueError("expected the number of classes before data are read, found none: set --data.num_classes")
    return num_classes


def make_cli(args: ArgsType = None, kind: type[Cli] = Cli, exit_on_error: bool = True, **kwargs: Any) -> Cli:
    """Parse and, unless ``run=False``, run; ``exit_on_error=False`` raises the parser's errors."""
    return kind(
        Distiller,
        DataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"save_to_log_dir": False},  # but to the run's directory
        parser_kwargs={"version": __version__, "description": DESCRIPTION, "exit_on_error": exit_on_error},
        args=args,
        **({"save_config_callback": SaveConfig} | kwargs),
    )


def _matters(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning is more than an advertisement, or about TPUs."""
    return not record.getMessage().startswith(("💡 Tip: For seamless cloud", "TPU available"))


def run(args: list[str] | None) -> None:
    """Run one of Lightning's subcommands, and make a parser for no other: each knows every class."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_matters)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # of Lightning's own code
    line, every = sys.argv[1:] if args is None else args, Cli.subcommands()
    wanted = {line[0]: every[line[0]]} if line and line[0] in every else every
    kind = type("Cli", (Cli,), {"subcommands": staticmethod(lambda: wanted)})
    make_cli(args, kind, trainer_defaults={"callbacks": [WritePredictions(), ResumeAsBefore()]})
