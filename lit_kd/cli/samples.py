"""The commands ``lit-kd inspect`` and ``lit-kd samples``: what a run learned about its training samples."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from lightning import seed_everything
from lightning.fabric.utilities import move_data_to_device
from rich.progress import track
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable
from lit_kd.models import load_student
from lit_kd.models.checkpoint import known_names
from lit_kd.models.files import check_new, check_unused, read_yaml, write_columns, write_whole
from lit_kd.report.samples import (
    any_distrusted,
    as_pictures,
    contact_sheet,
    file_names,
    most_distrusted,
    sample_columns,
    suspects,
    write_samples,
)
from lit_kd.types import logits_of
from lit_kd.weightings.sample_file import read_table


def samples(args: Sequence[str]) -> None:
    """Run ``lit-kd samples`` with the command line after it; it needs no teacher."""
    parser = _parser("samples", "Write what a run learned about each training sample, trusted rows left out.")
    options = _parse(parser, args)
    table, data = read_run(options.config, options.ckpt_path)
    write_samples(options.output, table, data, options.overwrite)
    print(f"{data.train_size} samples written to {options.output}")


def inspect(args: Sequence[str]) -> None:
    """Run ``lit-kd inspect`` with the command line after it; it needs no teacher."""
    parser = _parser(
        "inspect",
        "Find mislabelled data: rank a run's training samples by how little their labels are believed. "
        "Writes a table, and a contact sheet of the most distrusted ones where they are pictures.",
    )
    parser.add_argument("--samples", type=PositiveInt, default=48, help="on the contact sheet; default: 48")
    options = _parse(parser, args)
    output, checkpoint = options.output, options.ckpt_path
    sheet = output.with_suffix(".png")
    check_unused(sheet, options.overwrite)
    table, data = read_run(options.config, checkpoint)
    index = most_distrusted(table, data)
    if not len(index):
        raise ValueError(f"{checkpoint}: expected training samples with a label, found none")
    found = suspects(table, data, index, _predict(checkpoint, data, index))

    names, files = known_names(data.class_names, data.num_classes), file_names(data)
    columns: dict[str, Sequence[Any]] = {"index": [one.index for one in found]}
    if files is not None:
        columns["file"] = [files[one.index] for one in found]
    columns |= {"label": [one.label for one in found], "student_class": [one.believed for one in found]}
    if names:
        columns |= {f"{name}_name": [names[c] for c in columns[name]] for name in ("label", "student_class")}
    columns |= {"student_probability": [one.probability for one in found], "distrust": [one.distrust for one in found]}
    learned = sample_columns(table, data).items()
    columns |= {name: column[index].tolist() for name, column in learned if name not in columns}
    write_columns(output, columns, options.overwrite)
    print(f"{len(found)} training samples, the most distrusted first, written to {output}")

    first = data.parts.rows(index[: options.samples])
    pictures = as_pictures(first.rows.fetch(first.positions.tolist()))
    if pictures is None:
        print("no contact sheet: the samples are no pictures (1 or 3 channels, height and width)")
        return
    order = "the most distrusted first" if any_distrusted(found) else "no label is distrusted"
    title = f"{len(pictures)} of {len(found)} training samples, {order}"
    write_whole(sheet, contact_sheet(pictures, found[: len(pictures)], names, title))
    print(f"the first {len(pictures)} are shown in {sheet}")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    """The options of both commands."""
    parser = argparse.ArgumentParser(f"lit-kd {command}", description=description)
    parser.add_argument("run", type=Path, nargs="?", help="the run's directory: its config.yaml, and last or best.ckpt")
    parser.add_argument("--config", type=Path, help="the run's config.yaml, if it is not in the directory")
    parser.add_argument("--ckpt_path", type=Path, help="a checkpoint of the run, likewise")
    parser.add_argument("--output", type=Path, help=f".csv or .parquet file (default: {command}.csv in the directory)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def _parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """The options, with the files that are not given."""
    options = parser.parse_args(args)
    if options.run is None and None in (options.config, options.ckpt_path, options.output):
        parser.error("expected a run's directory, or --config, --ckpt_path and --output")
    options.output = options.output or options.run / f"{parser.prog.split()[-1]}.csv"
    check_new(options.output, options.overwrite)
    options.config = options.config or find_config(options.run)
    options.ckpt_path = options.ckpt_path or find_checkpoint(options.config, options.run)
    return options


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
    if data.multilabel:
        raise ValueError(f"{config}: expected data of one class a sample, which is believed or not, found several")
    return table, data


def find_config(run: Path) -> Path:
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


def _predict(checkpoint: Path, data: DataModule, index: Tensor) -> Tensor:
    """The student's logits for training samples that are not augmented, ``(n, C)``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, rows, logits = load_student(checkpoint).to(device), data.parts.rows(index), []
    with torch.no_grad():
        for items in track(torch.split(torch.arange(len(index)), data.batch_size), "predicting", transient=True):
            x = move_data_to_device(rows.__getitems__(items.tolist()).x, device)
            logits.append(logits_of(student, x).float().cpu())
    return torch.cat(logits)
