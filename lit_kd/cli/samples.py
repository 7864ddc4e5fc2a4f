"""The command ``lit-kd samples``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_kd.models.files import check_checkpoint_file, check_new, read_yaml

if TYPE_CHECKING:
    from lit_kd.data import DataModule
    from lit_kd.data.table import SampleTable


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd samples``; it needs no teacher.

    Args:
        args: Command line after ``samples``.
    """
    parser = argparse.ArgumentParser(
        "lit-kd samples",
        description="Write what a run learned about each training sample, trusted rows left out.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's config.yaml, which tells its data")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="a checkpoint of the run")
    parser.add_argument("--output", type=Path, required=True, help="a .csv or .parquet file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    options = parser.parse_args(args)
    check_new(options.output, options.overwrite)
    table, data = read_run(options.config, options.ckpt_path)

    from lit_kd.weightings.sample_file import write_samples

    write_samples(options.output, table, data, options.overwrite)
    print(f"{data.train_size} samples written to {options.output}")


def read_run(config: Path, checkpoint: Path) -> tuple[SampleTable, DataModule]:
    """The sample table of a run, and its data, set up.

    Args:
        config: The run's config.yaml.
        checkpoint: One of its checkpoints.

    Raises:
        FileNotFoundError: If one of the files is not there.
        ValueError: If one is of another kind, or there is no sample table.
    """
    content = _read_config(config)
    check_checkpoint_file(checkpoint)

    from jsonargparse import ArgumentParser  # heavy, and not needed to find a mistake so far
    from lightning import seed_everything

    from lit_kd.data import DataModule
    from lit_kd.weightings.sample_file import read_table

    table = read_table(checkpoint)
    if not isinstance(content.get("seed_everything", False), bool):
        seed_everything(content["seed_everything"], verbose=False)
    reader = ArgumentParser(exit_on_error=False)
    reader.add_subclass_arguments(DataModule, "data")
    data: DataModule = reader.instantiate_classes(reader.parse_object({"data": content["data"]})).data
    data.setup("fit")
    table.check(len(data.labels), data.fingerprint)
    return table, data


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}: expected the config.yaml that a lit_kd run wrote")
    config = read_yaml(path)
    if not isinstance(config, dict) or "data" not in config:
        raise ValueError(f"{path}: expected the config.yaml that a lit_kd run wrote, found one without data")
    return config
