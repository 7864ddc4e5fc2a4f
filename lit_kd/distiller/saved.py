"""What a checkpoint of every method holds besides the student, and how it is read: without running what is in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

from lightning import LightningModule, Trainer

from lit_kd.data.labels import known_names
from lit_kd.models.checkpoint import read_checkpoint
from lit_kd.models.images import ImageInput
from lit_kd.weightings.manual import SHARDED

FILES = {"student", "teacher", "start_weights", "teacher_cache", "where"}
"""Options that may name a file or a directory, and never a class."""


class Saved(LightningModule):
    """Saves what is known of the data, and reads back tensors and plain values only."""

    num_classes: int

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Under ``data``, what who uses the student must know; an override calls ``super().on_save_checkpoint``."""
        data = getattr(self.trainer, "datamodule", None)
        names, shape, images = (getattr(data, name, None) for name in ("class_names", "input_shape", "image_input"))
        checkpoint["data"] = {
            "class_names": known_names(names, self.num_classes),
            "input_shape": [int(size) for size in shape] if shape else None,
            "image_input": images.plain() if isinstance(images, ImageInput) else None,
        }

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, which see; but no code that the file may hold is run, unless ``weights_only=False``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, or holds more than tensors and plain values.
        """
        weights_only = weights_only is not False
        if weights_only and isinstance(checkpoint_path, (str, os.PathLike)):
            found = check_checkpoint(checkpoint_path)
            _check_imports(found.get("hyper_parameters", {}), os.fspath(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)


def check_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, or refuse it, with a message of one line, if it is none or could run code.

    Directories (of sharded strategies) and addresses are left to Lightning: of them nothing is returned.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is unfit.
    """
    left = "://" in os.fspath(path) or Path(path).is_dir()
    return {} if left else read_checkpoint(Path(path))


def distrust_files(trainer: Trainer) -> None:
    """Let the trainer load checkpoints with ``weights_only=True``, whatever the environment says of the default.

    Only an explicit ``weights_only=False`` is heeded. What is refused is refused with a message of one line.
    """
    files = getattr(trainer.strategy, "checkpoint_io", None)  # none in strategies that save by themselves
    if files is not None and not isinstance(files.load_checkpoint, partial):
        setattr(files, "load_checkpoint", partial(_load, files.load_checkpoint))  # noqa: B010 - a method, says mypy
    strategy = trainer.strategy
    if isinstance(strategy, SHARDED) and not isinstance(strategy.load_checkpoint, partial):
        # they open files by themselves
        setattr(strategy, "load_checkpoint", partial(_load_checked, strategy.load_checkpoint))  # noqa: B010


def _load(
    load: Callable[..., dict[str, Any]],
    path: str | os.PathLike[str],
    *args: Any,
    weights_only: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    try:
        return load(path, *args, weights_only=weights_only is not False, **kwargs)
    except Exception:
        check_checkpoint(path)  # tells better what is wrong
        raise


def _load_checked(
    load: Callable[..., dict[str, Any]], checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
) -> dict[str, Any]:
    if weights_only is not False and Path(checkpoint_path).is_file():
        check_checkpoint(checkpoint_path)
    return load(checkpoint_path, weights_only=weights_only)


def _check_imports(value: Any, path: str, key: object = None) -> None:
    """Refuse hyperparameters that name a class of a module not imported yet: making the class would import it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_imports(inner, path, name)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_imports(inner, path, key)
    elif isinstance(value, str) and key not in FILES and "." in value:
        module = value.split(".")[0]
        if module.isidentifier() and module not in sys.modules and find_spec(module) is not None:
            raise ValueError(
                f"{path}: expected classes of modules that are imported already, found {value} as {key}: importing it "
                f"would run its code. If you trust the file, import {module} first"
            )
