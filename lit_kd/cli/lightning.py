"""LightningCLI, wired for distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lit_kd.methods  # noqa: F401 - imported so that their short names are legal in a config
from lit_kd.cli.configs import check_ckpt_path
from lit_kd.data import DataModule
from lit_kd.distiller.base import Distiller
from lit_kd.models.checkpoint import read_checkpoint
from lit_kd.report.callbacks import Bar, BestAndLast, ResumeAsBefore, SaveConfig, WritePredictions
from lit_kd.report.show import ShowRun
from lit_kd.teachers.modules import is_path
from lit_kd.version import __version__

DESCRIPTION = """Distil a student when labels or teacher cannot be trusted.
Besides the subcommands below there are others, which lit-kd --help lists."""


class Narrow(DefaultHelpFormatter):
    """Texts begin further to the left, so that a method's help is a third shorter."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)  # type: ignore[no-untyped-call]


class Parser(LightningArgumentParser):
    """With `Narrow` help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"formatter_class": Narrow} | kwargs))


class Cli(LightningCLI):
    """The command line of Lightning: any method as ``--model``, any of our data modules as ``--data``."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with shorter help, and without abbreviated options, which jsonargparse is giving up."""
        parser: LightningArgumentParser = super().init_parser(**({"allow_abbrev": False} | kwargs))
        parser.formatter_class = Narrow
        parser.__class__ = Parser  # the help of a subclass is that of a new parser of the same type
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the data knows is told to the model; the best and the last epoch are kept; a run is shown."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        # a list, which YAML has a word for
        parser.link_arguments("data.input_shape", "model.init_args.input_shape", _as_list, apply_on="instantiate")
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(ShowRun, "show")
        parser.set_defaults(
            {"checkpoint.monitor": "val/accuracy", "checkpoint.mode": "max", "checkpoint.save_last": True}
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's, with a bar that draws itself less often, unless the user chose one."""
        trainer = super().instantiate_trainer(**kwargs)
        chosen: list[Any] = []
        for given in (self._here(self.config_init).get("trainer.callbacks"), self.trainer_defaults.get("callbacks")):
            chosen += given if isinstance(given, list) else [given]
        if not any(isinstance(one, ProgressBar) for one in chosen):
            trainer.callbacks = [  # type: ignore[attr-defined]
                Bar() if isinstance(one, RichProgressBar) else one
                for one in trainer.callbacks  # type: ignore[attr-defined]
            ]
        return trainer

    def before_instantiate_classes(self) -> None:
        """Read a student's checkpoint once before it is needed: jsonargparse would bury what is wrong with it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, or could run code.
        """
        student = self._here(self.config).get("model.init_args.student")
        if isinstance(student, str) and is_path(student):
            read_checkpoint(Path(student))

    @staticmethod
    def _here(config: Any) -> Any:
        """The part that is the subcommand's."""
        return config[config.subcommand] if config.get("subcommand") else config

    def _parse_ckpt_path(self) -> None:
        """Explicit options win: Lightning would let the checkpoint's hyperparameters override them silently.

        The optimizer's options, which come back with its state, are seen to by `ResumeAsBefore`.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
        """
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path:
            check_ckpt_path(path)


def _as_list(shape: tuple[int, ...] | None) -> list[int] | None:
    return None if shape is None else list(shape)


def make_cli(args: ArgsType = None, **kwargs: Any) -> Cli:
    """Parse and, unless ``run=False``, run.

    Args:
        args: A command line, or with ``run=False`` a mapping.
        **kwargs: For `lightning.pytorch.cli.LightningCLI`.
    """
    kwargs.setdefault("save_config_callback", SaveConfig)
    return Cli(
        Distiller,
        DataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"version": __version__, "description": DESCRIPTION, "exit_on_error": False},
        args=args,
        **kwargs,
    )


def run(args: list[str] | None) -> None:
    """Run one of Lightning's subcommands."""
    make_cli(args, trainer_defaults={"callbacks": [WritePredictions(), ResumeAsBefore()]})
