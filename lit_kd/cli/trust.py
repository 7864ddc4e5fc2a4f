"""The command ``lit-kd trust``: is a teacher worth it?"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lit_kd import KD
from lit_kd.cli.main import find_config
from lit_kd.data import DataModule
from lit_kd.data.rows import Indexed
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.models.checkpoint import known_names, read_checkpoint
from lit_kd.models.files import CHECKPOINTS, check_unused, read_yaml, write_whole
from lit_kd.report.trust import ADVICE, EXIT, Asked, percent, summary, write_verdict
from lit_kd.trust.probe import shrunk
from lit_kd.trust.verdict import decide, rehearse
from lit_kd.types import UNLABELED

MOST = 20_000
"""Training rows that are looked at; of more, so many are drawn."""
UNKNOWN = "they are cut from the training rows, and nothing says that their labels are right"
OTHER_DATA = (
    "{} was trained on another split, or on other labels, than these data have: if some of its training rows are "
    "trusted rows here, its accuracy and all gains are too high. Give the seed and the split of its training"
)


def trust(args: Sequence[str]) -> None:
    """Run ``lit-kd trust`` with the command line after it; exits with the code of the advice."""
    words, data_words = _apart(args)
    parser = argparse.ArgumentParser(
        "lit-kd trust",
        description="Is my teacher worth it? Looks at teachers on trusted rows, before any training: the meta rows, "
        "and validation rows unless their labels may be wrong. Exit code 0: distil; 3: do not; 4: cannot tell; "
        "1: an error.",
    )
    parser.add_argument("teacher", nargs="+", help="what --model.teacher of lit-kd fit takes: checkpoints, files")
    parser.add_argument("--config", action="append", default=[], help="YAML with data, by path or name: data/digits")
    parser.add_argument("--seed_everything", type=int, default=0, help="as of lit-kd fit; default: 0")
    parser.add_argument("--output", type=Path, help="a directory for trust.json and trust.html")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--json", action="store_true", help="print trust.json instead of a table")
    parser.add_argument("--data...", metavar="CLASS", help="and --data.OPTION, as of lit-kd fit")
    options = parser.parse_args(words)
    files = [options.output / f"trust.{kind}" for kind in ("json", "html")] if options.output else []
    for file in files:
        check_unused(file, options.overwrite)
    seed_everything(options.seed_everything, verbose=False)
    asked, x = ask(options.teacher, read_data(options.config, data_words))
    heard = asked.known.unsqueeze(-1)
    taught = (asked.logits.softmax(-1) * heard).sum(0) / heard.sum(0).clamp(min=1)
    # as in a training: the label where all are silent
    taught = taught.where(heard.any(0), one_hot(asked.y, taught.shape[1]))
    found = rehearse(x, asked.y, asked.trusted, taught, derive_seed(resolve_seed(None), "probe"))
    verdict = decide(found)
    told = summary(asked, found, verdict)
    text = json.dumps(told, indent=1)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_whole(files[0], text)
        write_verdict(files[1], told)
    if options.json:
        print(text)
    else:
        show(told)
    for file in files:
        print(f"written to {file}", file=sys.stderr)
    sys.exit(EXIT[verdict.advice])


def show(told: dict[str, Any]) -> None:
    """Print the verdict, and a table of the teachers."""
    console = Console()
    console.print(f"[bold]{ADVICE[told['verdict']]}.[/bold] {told['words']}\n")
    table = Table("teacher", "right on trusted rows", "calibration error", "names the label", "repeats wrong labels")
    for one in told["teachers"]:
        shares = percent(one["accuracy"]), f"{100 * one['ece']:.1f}%", f"{100 * one['agrees_with_labels']:.1f}%"
        table.add_row(one["name"], *shares, percent(one["repeats_wrong_labels"]))
    console.print(table)
    rows = f"{told['trusted_rows']} rows, whose labels are taken to be right, and {told['training_rows']} training rows"
    console.print(f"{rows}; wrong labels: {percent(told['wrong_labels'])}")
    for note in told["notes"]:
        console.print(f"note: {note}", style="yellow")


def _apart(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of our own, and those of the data module."""
    own: list[str] = []
    of_data: list[str] = []
    rest: Iterator[str] = iter(args)
    for word in rest:
        if word == "--data" or word.startswith(("--data.", "--data=")):
            of_data.append(word if "=" in word else f"{word}={next(rest, '')}")
        else:
            own.append(word)
    return own, of_data


def read_data(configs: Sequence[str], words: Sequence[str]) -> DataModule:
    """The data module of configs, whose other parts do not matter here, and of options that count more; set up."""
    given = []
    for name in configs:
        content = read_yaml(find_config(name, "data"))
        if isinstance(content, dict) and "data" in content:
            given.append(f"--data={json.dumps(content['data'])}")
    if not given and not words:
        raise ValueError("expected data, found none: give --data CLASS, or --config with a file that has data")
    parser = ArgumentParser("lit-kd trust", exit_on_error=False)
    parser.add_subclass_arguments(DataModule, "data", required=True)
    data: DataModule = parser.instantiate_classes(parser.parse_args([*given, *words])).data
    data.setup("fit")
    if data.task != "classification":
        raise ValueError("expected data of one class a sample, found several: lit-kd trust cannot judge these")
    return data


class Silent(nn.Module):
    """The student of nobody: teachers are asked as a training asks them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """The same logits for all, ``(B, C)``."""
        return self.logits.expand(len(next(iter([*args, *named.values()]))), -1)


class Listen(Callback):
    """Keeps what the teachers say of chosen rows."""

    def __init__(self, parts: Sequence[Indexed]) -> None:
        self.parts, self.logits, self.known = parts, torch.empty(0), torch.empty(0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask them."""
        assert isinstance(pl_module, KD)
        said = [*zip(*(pl_module.predict_rows(part).teachers for part in self.parts), strict=True)]
        self.logits = torch.stack([torch.cat([out.logits for out in each]) for each in said]).float().cpu()
        self.known = torch.stack([torch.cat([out.speaks for out in each]) for each in said]).cpu()


def ask(teachers: Sequence[str], data: DataModule) -> tuple[Asked, Tensor]:
    """What teachers say of training and trusted rows, and the inputs of these, ``(N + M, ...)``."""
    labels, n = data.labels, data.train_size
    labelled = (labels[:n] != UNLABELED).nonzero().flatten()
    notes = []
    if not len(labelled):
        raise ValueError(f"expected training rows with labels, found none in {n} rows: give the data labels")
    if len(labelled) < n:
        notes.append(f"{n - len(labelled)} training rows without a label are left out: what they add is not predicted")
    if len(labelled) > MOST:
        draw = torch.Generator().manual_seed(derive_seed(resolve_seed(data.seed), "trust"))
        notes.append(f"{MOST} of {len(labelled)} training rows were drawn")
        labelled = labelled[torch.randperm(len(labelled), generator=draw)[:MOST]].sort().values
    index = torch.cat([labelled, torch.arange(n, len(labels))])
    parts = [data.parts.rows(index), *([data.parts.val] if len(data.parts.val) else [])]
    if len(parts) > 1 and not vouched(data):
        notes.append(f"{len(parts.pop())} validation rows are left out: {UNKNOWN}")
    y = torch.cat([part.labels for part in parts])
    trusted = torch.arange(len(y)) >= len(labelled)
    if trusted.sum() < 2:
        found = int(trusted.sum())
        raise ValueError(f"expected trusted rows, found {found}: give the data a meta or a val split with right labels")
    for path in teachers:
        if Path(path).suffix in CHECKPOINTS and Path(path).is_file():
            before = (read_checkpoint(Path(path)).get("data") or {}).get("fingerprint")
            notes += [OTHER_DATA.format(path)] if before not in (None, data.fingerprint) else []
    listen = Listen(parts)
    shape = list(data.input_shape) if data.input_shape else None
    model = KD(Silent(data.num_classes), list(teachers), num_classes=data.num_classes, input_shape=shape)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        Trainer(max_epochs=0, callbacks=[listen], devices=1, **quiet).fit(model, data)  # type: ignore[arg-type]
    names = known_names(data.class_names, data.num_classes) or [str(c) for c in range(data.num_classes)]
    x = torch.cat([inputs(part, data.batch_size) for part in parts])
    return Asked(list(teachers), listen.logits, listen.known, y, trusted, names, notes), x


def vouched(data: DataModule) -> bool:
    """Whether labels of validation rows are known to be as right as those of meta rows.

    They are if the data have a validation set of their own, from which both are cut, or if both are drawn from the same
    rows: these get no noise. They are not if a column marks the meta rows, or if a file corrects labels.
    """
    source = data.parts.source
    return source.val is not None or (source.meta is None and data.labels_file is None)


def inputs(rows: Indexed, size: int) -> Tensor:
    """The inputs of rows, small enough for the probe; a ValueError if they are no tensor."""
    found = []
    for some in torch.split(torch.arange(len(rows)), size):
        x = rows.__getitems__(some.tolist()).x
        if not isinstance(x, Tensor):
            raise ValueError(f"expected inputs that are one tensor, found {[*x]}: lit-kd trust cannot learn from these")
        found.append(shrunk(x))
    return torch.cat(found)
