"""The command ``lit-kd audit``: which labels are wrong, by a run that is there or by one training."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer
from lightning.fabric.utilities import move_data_to_device
from rich.progress import track
from torch import Tensor

from lit_kd.cli.main import with_paths
from lit_kd.cli.samples import find_checkpoint, read_run, run_config
from lit_kd.data import DataModule
from lit_kd.distiller import Distiller
from lit_kd.models import load_student
from lit_kd.models.checkpoint import known_names
from lit_kd.models.files import check_unused, optional, read_yaml
from lit_kd.report.audit import by_cleanlab, compared, quiet_trainer
from lit_kd.report.gallery import write_gallery
from lit_kd.report.label_issues import LabelIssues, find_issues, write_audit
from lit_kd.report.samples import as_pictures
from lit_kd.types import logits_of

USAGE = """lit-kd audit RUN [--output DIR] ...
       lit-kd audit --data ... [--student NAME] [--teacher NAME] [--trusted SIZE] --output DIR ..."""
TEXT = """Tell which labels are wrong: by a run of a method that weighs samples, or by one training that is done first,
with any option of lit-kd fit, such as --data, --model.optimizer and --trainer.max_epochs (default: 30). DIR gets
label_issues.csv, the least believed label first; labels.csv, the corrections, for --data.labels; and label_issues.html,
a page to look at the labels and decide."""
MOST = 10_000
"""Pictures that are read for the page, which shows as many as have room."""


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd audit`` with the command line after it."""
    parser = argparse.ArgumentParser("lit-kd audit", usage=USAGE, description=TEXT, allow_abbrev=False)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the run's directory)")
    parser.add_argument("--overwrite", action="store_true", help="replace the tables and the page that are there")
    parser.add_argument("--against", choices=["cleanlab"], help="also ask cleanlab, in 5 trainings, and compare")
    line: list[str] = []  # what is for the training
    trained = bool(args) and not args[0].startswith("-")
    if trained:
        parser.add_argument("run", type=Path, help="the run's directory: its config.yaml, and last or best.ckpt")
        parser.add_argument("--config", type=Path, help="the run's config.yaml, if it is not in the directory")
        parser.add_argument("--ckpt_path", type=Path, help="a checkpoint of the run, likewise")
        options = parser.parse_args(args)
    else:
        parser.add_argument("--student", default="mlp-128", help="the network that learns; default: mlp-128")
        parser.add_argument(
            "--teacher", nargs="+", help="networks, checkpoints or files that are heard where they help"
        )
        text = "the size of the data's meta split, whose labels are right; 0: nobody has checked any label"
        parser.add_argument("--trusted", metavar="SIZE", help=text)
        options, line = parser.parse_known_args(args)
        if options.output is None or not line:
            lacks = "--output DIR, for what is found" if line else "a run's directory, or --data and --output"
            parser.error(f"expected {lacks}")
    output: Path = options.output or options.run
    files = [output / name for name in ("label_issues.csv", "labels.csv", "label_issues.html")]
    for file in files:
        check_unused(file, options.overwrite)
    if options.against:
        optional("cleanlab.filter", "cleanlab", "--against cleanlab")
    seconds = None
    if not trained:
        seconds, options.run, options.config, options.ckpt_path = _train(output, options, line), output, None, None
    config = options.config or run_config(options.run)
    checkpoint = options.ckpt_path or find_checkpoint(config, options.run)
    table, data = read_run(config, checkpoint)
    estimates = "memory" in table  # else the student must be asked
    said = torch.empty(0) if estimates else _predict(checkpoint, data, torch.arange(data.train_size)).softmax(-1)
    issues = find_issues(table, data, said)
    _tell(issues, data, write_audit(output, issues, data, options.overwrite))
    names = known_names(data.class_names, data.num_classes)
    write_gallery(files[2], issues, _pictures(issues, data), names, f"Labels of {output.resolve().name}")
    print(f"look at them, and decide: {files[2]}, in a browser")
    if options.against:
        content = read_yaml(config)
        found = by_cleanlab(issues, data, *_again(content, data))
        print(compared(issues, found, seconds))


def _train(output: Path, options: argparse.Namespace, line: Sequence[str]) -> float:
    """Train as ``lit-kd fit`` does, in a directory, and return the seconds it took."""
    from lit_kd.cli.lightning import run

    check_unused(output / "config.yaml", False)
    ours = [
        *("--model=ALMKD", f"--model.student={options.student}", "--model.lr_scheduler=cosine"),
        *("--trainer.max_epochs=30", "--trainer.logger=false", "--show.every_n_epochs=0"),
        "--checkpoint.save_top_k=0",  # the last epoch counts
    ]
    asked = [f"--trainer.default_root_dir={output}"]
    named = any(word.startswith("--model.teacher") for word in line)
    # without a teacher nothing is learned from validation rows
    ours += [] if named or options.teacher else ["--trainer.limit_val_batches=0"]
    asked += [] if named else [f"--model.teacher=[{', '.join(options.teacher or [])}]"]
    asked += [] if options.trusted is None else [f"--data.meta={options.trusted}"]
    before, start = sys.argv[1:], time.perf_counter()
    sys.argv[1:] = ["fit", *ours, *with_paths(line), *asked]  # Lightning reads them, and starts processes with them
    try:
        run(None)
    except BaseException:
        if output.is_dir() and not any(output.rglob("*.ckpt")):  # a training that could not begin may be tried again
            (output / "config.yaml").unlink(missing_ok=True)
        raise
    finally:
        sys.argv[1:] = before
    return time.perf_counter() - start


def _tell(issues: LabelIssues, data: DataModule, files: Sequence[Path]) -> None:
    """What was found, and what was not looked at."""
    rows, wrong = len(issues.ids), int(issues.is_issue.sum())
    found = f"{issues.expected:.0f} are expected to be wrong, of all labels {(1 - issues.score).sum():.0f}"
    print(
        f"{wrong} of {rows} labels are taken for wrong (label_score below 0.5): of these {found}"
        if issues.probable
        else f"{rows} labels are ranked; weights of this method are no probabilities, so none is taken for wrong",
        end="",
    )
    left = {"without a label": data.train_size - rows, "trusted": data.meta_size, "validation": len(data.parts.val)}
    told = ", ".join(f"{count} {kind}" for kind, count in (left | {"test": len(data.parts.test)}).items() if count)
    print(f"\nnot audited: {told} rows" if told else "")
    if data.meta_size and data.parts.source.meta is None:  # none are marked by the data
        cure = "say --trusted 0, or train the run again with --data.meta 0"
        print(f"{data.meta_size} trusted rows were taken to be right: if nobody has checked them, {cure}")
    if issues.note:
        print(f"note: {issues.note}")
    print(f"written: {', '.join(map(str, files))}")


def _pictures(issues: LabelIssues, data: DataModule) -> npt.NDArray[np.uint8] | None:
    """The first rows as pictures, if they are images."""
    rows, found = data.parts.rows(torch.from_numpy(issues.index[:MOST])), []
    for some in np.split(rows.positions, range(data.batch_size, len(rows.positions), data.batch_size)):
        found.append(as_pictures(rows.rows.fetch(some.tolist())))
        if found[-1] is None:
            return None
    return np.concatenate([part for part in found if part is not None])


def _predict(checkpoint: Path, data: DataModule, index: Tensor) -> Tensor:
    """The student's logits for training samples that are not augmented, ``(n, C)``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, rows, logits = load_student(checkpoint).to(device), data.parts.rows(index), []
    with torch.no_grad():
        for items in track(torch.split(torch.arange(len(index)), data.batch_size), "predicting", transient=True):
            x = move_data_to_device(rows.__getitems__(items.tolist()).x, device)
            logits.append(logits_of(student, x).float().cpu())
    return torch.cat(logits)


def _again(content: Any, data: DataModule) -> tuple[Callable[[], Distiller], Callable[[], Trainer]]:
    """Makes the student of a run's config, to learn from labels alone, and a trainer that trains as long."""
    model, length = content["model"], content["trainer"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Distiller, "model")
    kept = ("student", "optimizer", "lr_scheduler", "lr_interval", "pretrained")
    own = {name: model["init_args"][name] for name in kept if model["init_args"].get(name) is not None}
    own |= {"num_classes": data.num_classes, "input_shape": data.input_shape and list(data.input_shape)}
    config = {"model": {"class_path": "lit_kd.Supervised", "init_args": own}}
    return (
        lambda: parser.instantiate_classes(parser.parse_object(config)).model,
        lambda: quiet_trainer(length["max_epochs"], max_steps=length["max_steps"], accelerator=length["accelerator"],
                              limit_train_batches=length["limit_train_batches"], limit_val_batches=0),
    )  # fmt: skip
