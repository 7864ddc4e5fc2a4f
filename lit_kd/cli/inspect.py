"""The command ``lit-kd inspect``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_kd.cli.samples import read_run
from lit_kd.models.files import check_new, read_yaml, write_columns, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from lit_kd.data import DataModule


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd inspect``; it needs no teacher.

    Args:
        args: Command line after ``inspect``.
    """
    parser = argparse.ArgumentParser(
        "lit-kd inspect",
        description="Find mislabelled data: rank a run's training samples by how little their labels are believed. "
        "Writes a table, and a contact sheet of the most distrusted ones where they are pictures.",
    )
    parser.add_argument("run", type=Path, nargs="?", help="the run's directory: its config.yaml, and last or best.ckpt")
    parser.add_argument("--config", type=Path, help="the run's config.yaml, if it is not in the directory")
    parser.add_argument("--ckpt_path", type=Path, help="a checkpoint of the run, likewise")
    parser.add_argument("--output", type=Path, help="a .csv or .parquet file (default: inspect.csv in the directory)")
    parser.add_argument("--samples", type=int, default=48, help="how many the contact sheet shows (default: 48)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(args)
    run, output = options.run, options.output
    if run is None and None in (options.config, options.ckpt_path, output):
        parser.error("expected a run's directory, or --config, --ckpt_path and --output")
    if options.samples < 1:
        parser.error(f"expected --samples of at least 1, found {options.samples}")
    config = options.config or find_config(run)
    checkpoint = options.ckpt_path or find_checkpoint(*_folders(config, run))
    output = output or run / "inspect.csv"
    sheet = output.with_suffix(".png")
    check_new(output, options.overwrite)
    if sheet.exists() and not options.overwrite:
        raise FileExistsError(f"{sheet} is there already: give another --output, or --overwrite")
    table, data = read_run(config, checkpoint)

    from lit_kd.models import load_student
    from lit_kd.models.plain import known_names
    from lit_kd.report.distrust import any_distrusted, as_pictures, file_names, most_distrusted, rows_of, suspects
    from lit_kd.report.pictures import contact_sheet, image_to_png
    from lit_kd.weightings.sample_file import sample_columns

    index = most_distrusted(table, data)
    if not len(index):
        raise ValueError(f"{checkpoint}: expected training samples with a label, found none: there is none to distrust")
    found = suspects(table, data, index, _predict(load_student(checkpoint), data, index))
    names, files = known_names(data.class_names, data.num_classes), file_names(data)
    columns: dict[str, Sequence[Any]] = {"index": [one.index for one in found]}
    if files is not None:
        columns["file"] = [files[one.index] for one in found]
    columns["label"] = [one.label for one in found]
    columns["student_class"] = [one.believed for one in found]
    if names:
        columns |= {f"{name}_name": [names[c] for c in columns[name]] for name in ("label", "student_class")}
    columns["student_probability"] = [one.probability for one in found]
    columns["distrust"] = [one.distrust for one in found]
    known = sample_columns(table, data).items()
    columns |= {name: column[index].tolist() for name, column in known if name not in columns}
    write_columns(output, columns, options.overwrite)
    print(f"{len(found)} training samples, the most distrusted first, written to {output}")

    first = rows_of(data, index[: options.samples])
    pictures = as_pictures(first.rows.fetch(first.positions.tolist()))
    if pictures is None:
        print("no contact sheet: the samples are no pictures (1 or 3 channels, height and width)")
        return
    order = "the most distrusted first" if any_distrusted(found) else "no label is distrusted"
    title = f"{len(pictures)} of {len(found)} training samples, {order}"
    write_whole(sheet, image_to_png(contact_sheet(pictures, found[: len(pictures)], names, title)))
    print(f"the first {len(pictures)} are shown in {sheet}")


def find_config(run: Path) -> Path:
    """The config.yaml in a run's directory, or the only one of a logged run below it, whatever the logger.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"no directory at {run}: expected one that a lit_kd run wrote")
    if (run / "config.yaml").is_file():
        return run / "config.yaml"
    below = sorted([*run.glob("*/config.yaml"), *run.glob("*/*/config.yaml")], key=_by_number)
    if not below:
        raise FileNotFoundError(f"no config.yaml in {run}: expected the directory of a lit_kd run, or give --config")
    if len(below) > 1:
        raise ValueError(f"{run}: expected one run, found {len(below)}: give one of them, e.g. {below[-1].parent}")
    return below[0]


def find_checkpoint(*folders: Path) -> Path:
    """The last checkpoint of a run, else its best one; in the first of some folders that has one.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are those of several runs.
    """
    for folder in folders:
        for path in (f / name for f in (folder, folder / "checkpoints") for name in ("last.ckpt", "best.ckpt")):
            if path.is_file():
                later = sorted(path.parent.glob("*-v[0-9]*.ckpt"), key=_by_number)
                if later:
                    raise ValueError(
                        f"{path.parent}: expected the checkpoints of one run, found {path.name} and {later[-1].name}, "
                        "which a later fit into the same directory wrote: give the one that belongs to the config as "
                        "--ckpt_path"
                    )
                return path
    looked = " and ".join(dict.fromkeys(str(folder) for folder in folders))
    raise FileNotFoundError(f"no last.ckpt or best.ckpt in {looked}, nor in checkpoints/ there: give --ckpt_path")


def _folders(config: Path, run: Path | None) -> list[Path]:
    """Where a run's checkpoints may lie: beside its config, in its directory, or where the config sends them."""
    content = read_yaml(config) if config.is_file() else None
    options = content.get("checkpoint") if isinstance(content, dict) else None
    sent = options.get("dirpath") if isinstance(options, dict) else None
    return [config.parent, *([run] if run else []), *([Path(sent)] if sent else [])]


def _by_number(path: Path) -> list[str | int]:
    """Sorts version_10 after version_9."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", str(path))]


def _predict(student: Any, data: DataModule, index: Tensor) -> Tensor:
    """The student's logits for training samples that are not augmented, ``(n, C)``."""
    import torch
    from lightning.fabric.utilities import move_data_to_device
    from rich.progress import track

    from lit_kd.models.taps import Tapped
    from lit_kd.report.distrust import rows_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, rows, logits = Tapped(student.to(device)), rows_of(data, index), []
    firsts = range(0, len(index), data.batch_size)
    with torch.no_grad():
        for first in track(firsts, "predicting", transient=True):
            batch = rows.__getitems__(list(range(first, min(first + data.batch_size, len(index)))))
            logits.append(model(move_data_to_device(batch.x, device)).logits.float().cpu())
    return torch.cat(logits)
