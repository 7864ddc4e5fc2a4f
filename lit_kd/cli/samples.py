"""The command ``lit-kd samples``: what a run learned about its training samples; and how a run is read."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from lightning import seed_everything

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable
from lit_kd.models.files import check_new, read_yaml
from lit_kd.report.samples import (
    write_samples,
)
from lit_kd.weightings.sample_file import read_table


def samples(args: Sequence[str]) -> None:
    """Run ``lit-kd samples`` with the command line after it; it needs no teacher."""
    parser = argparse.ArgumentParser(
        "lit-kd samples",
        description="Write what a run learned about each training sample, trusted rows left out.",
    )
    parser.add_argument("run", type=Path, nargs="?", help="the run's directory: its config.yaml, and last or best.ckpt")
    parser.add_argument("--config", type=Path, help="the run's config.yaml, if it is not in the directory")
    parser.add_argument("--ckpt_path", type=Path, help="a checkpoint of the run, likewise")
    parser.add_argument("--output", type=Path, help=".csv or .parquet file (default: samples.csv in the directory)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(args)
    if options.run is None and None in (options.config, options.ckpt_path, options.output):
        parser.error("expected a run's directory, or --config, --ckpt_path and --output")
    output = options.output or options.run / "samples.csv"
    check_new(output, options.overwrite)
    config = options.config or run_config(options.run)
    table, data = read_run(config, options.ckpt_path or find_checkpoint(config, options.run))
    write_samples(output, table, data, options.overwrite)
    print(f"{data.train_size} samples written to {output}")


def read_run(config: Path, checkpoint: Path) -> tuple[SampleTable, DataModule]:
    """The sample table in a run's checkpoint, and the data of its config.yaml, set up; refuses what does not fit."""
    content = read_yaml(config)
    if not isinstance(content, dict) or "data" not in content:
        raise ValueError(f"{config}: expected the config.yaml that a lit_kd run wrote, found one without data")
    table = read_table(checkpoint)
    if not isinstance(content.get("seed_everything", False), bool):
        seed_everything(content["seed_everything"], verbose=False)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DataModule, "data")
    data: DataModule = parser.instantiate_classes(parser.parse_object({"data": content["data"]})).data
    data.setup("fit")
    table.check(len(data.labels), data.fingerprint)
    if data.task != "classification":
        raise ValueError(f"{config}: expected data of one class a sample, which is believed or not, found several")
    return table, data


def run_config(run: Path) -> Path:
    """The config.yaml in a run's directory, or the only one of a logged run below it, whatever the logger."""
    below = sorted([*run.glob("*/config.yaml"), *run.glob("*/*/config.yaml")])
    found = [run / "config.yaml"] if (run / "config.yaml").is_file() else below
    if not found:
        raise FileNotFoundError(f"no config.yaml in {run}: expected the directory of a lit_kd run, or give --config")
    if len(found) > 1:
        raise ValueError(f"{run}: expected one run, found {len(found)}: give one of them, e.g. {found[-1].parent}")
    return found[0]


def find_checkpoint(config: Path, run: Path | None) -> Path:
    """The last checkpoint of a run, else its best one: beside its config, in its directory, or where it was sent."""
    sent = (read_yaml(config).get("checkpoint") or {}).get("dirpath")
    folders = [config.parent, *([run] if run else []), *([Path(sent)] if sent else [])]
    places = [each for folder in folders for each in (folder, folder / "checkpoints")]
    found = [place / name for place in places for name in ("last.ckpt", "best.ckpt") if (place / name).is_file()]
    if not found:
        looked = ", ".join(map(str, dict.fromkeys(places)))
        raise FileNotFoundError(f"expected last.ckpt or best.ckpt in one of {looked}; found none: give --ckpt_path")
    later = sorted(found[0].parent.glob("*-v[0-9]*.ckpt"))
    if later:
        raise ValueError(
            f"{found[0].parent}: expected the checkpoints of one run, found {found[0].name} and {later[-1].name}, "
            "which a later fit wrote: give the one that belongs to the config as --ckpt_path"
        )
    return found[0]
