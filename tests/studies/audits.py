"""Which labels are wrong: `lit_kd.audit`, in one training, against cleanlab, in five. The tables of docs/audit.md.

    python tests/studies/audits.py --data digits mnist=mnist_5k.csv.gz pendigits=pendigits.csv letter=letter.data

trains perceptrons with 64 hidden units for 20 epochs on 2000 rows, or what there is, of which some labels are wrong. A
twentieth as many rows are trusted: all train on them, too. Times are those of one process. Results are kept: run again
to go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from scenarios import Data, load, noisy
from torch import Tensor

from lit_kd import Supervised, audit
from lit_kd.data import DataModule, Source, TensorRows
from lit_kd.data.seeds import derive_seed
from lit_kd.report.audit import by_cleanlab, precision, quiet_trainer
from lit_kd.report.label_issues import LabelIssues

NOISES = {"sym40": "symmetric", "pair30": "pair", "inst30": "instance-dependent"}
"""As in `scenarios`: redrawn from all classes, taken for another class, taken for what a weak model takes it for."""
ROWS, EPOCHS, STUDENT = 2000, 20, "mlp-64"
WAYS = {"audit": "lit_kd", "unaided": "lit_kd, nothing trusted", "self_confidence": "cleanlab, self-confidence"}
WAYS |= {"normalized_margin": "cleanlab, normalised margin"}


class Labelled(DataModule):
    """Training rows, of which some labels are wrong, trusted rows, and test rows."""

    def __init__(self, train: tuple[Tensor, Tensor], trusted: tuple[Tensor, Tensor], of: Data, **shared: Any) -> None:
        super().__init__(**shared)
        self.rows, self.checked, self.of = train, trusted, of
        self.num_classes, self.input_shape = of.classes, (train[0].shape[1],)

    def load(self) -> Source:
        (x, y), (held, held_y) = self.rows, self.checked
        test = TensorRows(self.of.test_x), self.of.test_y.numpy()
        return Source(TensorRows(x), TensorRows(x), y.numpy(), *test, val=TensorRows(held), val_labels=held_y.numpy())


def trainer() -> Any:
    """Without validation, which costs time and tells nothing here."""
    return quiet_trainer(EPOCHS, accelerator="cpu", limit_val_batches=0)


def measured(issues: LabelIssues, true: Tensor, seconds: float) -> dict[str, Any]:
    """Of one audit."""
    right = true.numpy()[issues.index]
    wrong, flagged = issues.given != right, issues.is_issue
    found = {"flagged": int(flagged.sum()), "expected": issues.expected, "wrong": int((wrong & flagged).sum())}
    found["class"] = float((issues.suggested == right)[flagged].mean()) if flagged.any() else None
    return found | {"precision": precision(wrong, issues.score), "seconds": seconds}


def accuracy(data: Labelled, seed: int) -> float:
    """On test rows, of a student that learns the given labels, and trusted rows."""
    seed_everything(seed, verbose=False)
    fitted, model = trainer(), Supervised(STUDENT, **sizes(data))
    fitted.fit(model, data)
    return float(fitted.test(model, data, verbose=False)[0]["test/accuracy"])


def sizes(data: Labelled) -> dict[str, Any]:
    """Options of every student."""
    return {"num_classes": data.num_classes, "input_shape": list(data.input_shape or ()), "lr_scheduler": "cosine"}


def cell(of: Data, noise: str, seed: int) -> dict[str, Any]:
    """All that is measured with one kind of wrong labels and one seed."""
    g = torch.Generator().manual_seed(derive_seed(seed, "audits"))
    order = torch.randperm(len(of.y), generator=g)
    trusted = min(ROWS, round(0.9 * len(of.y))) // 20
    held, rows = order[: 2 * trusted], order[2 * trusted :][:ROWS]
    true = of.y[rows]
    y = noisy(noise, of.x[rows], true, of.classes, g, seed)

    def data(labels: Tensor, meta: float = 0.5, **options: Any) -> Labelled:
        return Labelled(
            (of.x[rows], labels), (of.x[held], of.y[held]), of, meta=meta, seed=seed, batch_size=128, **options
        )

    found: dict[str, Any] = {"rows": len(rows), "wrong": int((y != true).sum())}
    for name, meta in (("audit", 0.5), ("unaided", 0.0)):
        seed_everything(seed, verbose=False)
        start = time.perf_counter()
        issues = audit(data(y, meta), STUDENT, trainer=trainer)
        found[name] = measured(issues, true, time.perf_counter() - start)
        if name == "audit":
            ours = issues
    seed_everything(seed, verbose=False)
    split = data(y)
    split.setup()
    theirs = by_cleanlab(ours, split, lambda: Supervised(STUDENT, **sizes(split)), trainer)
    wrong = ours.given != true.numpy()[ours.index]
    found["cleanlab"] = {"flagged": int(theirs.is_issue.sum()), "wrong": int((wrong & theirs.is_issue).sum())}
    for name, score in theirs.scores.items():
        found[name] = {"precision": precision(wrong, score), "seconds": theirs.seconds}
    better = y.clone()
    better[torch.from_numpy(ours.index[ours.is_issue])] = torch.from_numpy(ours.suggested[ours.is_issue])
    found["before"], found["after"] = (accuracy(data(labels, train_on_meta=True), seed) for labels in (y, better))
    return found | {"still_wrong": int((better != true).sum())}


def spread(values: Any, unit: float = 1.0, digits: int = 3) -> str:
    """Mean and standard deviation."""
    array = unit * np.array(values)
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1):.{digits}f}" if len(array) > 1 else f"{array[0]:.{digits}f}"


def report(known: dict[str, dict[str, Any]]) -> str:
    """The tables as markdown; of cells by ``DATA NOISE SEED``."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, one in known.items():
        name, noise, _ = key.split()
        groups.setdefault((name, NOISES[noise]), []).append(one)
    text = ""
    for title, number in (("Average precision", 1), ("Precision at k, the number of wrong labels", 0)):
        text += f"{title}, mean ± standard deviation over seeds.\n\n"
        lines = [["data", "wrong labels", "share", *WAYS.values()]]
        for (name, noise), cells in groups.items():
            share = f"{100 * np.mean([one['wrong'] / one['rows'] for one in cells]):.0f}%"
            lines.append([name, noise, share, *(spread([one[w]["precision"][number] for one in cells]) for w in WAYS)])
        text += table(lines)
    text += "Labels that are taken for wrong: how many, the expected and the true number of wrong ones among them.\n\n"
    head = ["found", "expected", "true", "suggested class is right", "cleanlab: found", "true"]
    head += ["test accuracy before", "relabelled", "time / cleanlab's"]
    lines = [["data", "wrong labels", "k", *head]]
    for (name, noise), cells in groups.items():
        ours = [one["audit"] for one in cells]
        means = [f"{np.mean([one[key] for one in ours]):.0f}" for key in ("flagged", "expected", "wrong")]
        line = [f"{np.mean([one['wrong'] for one in cells]):.0f}", *means]
        line.append(f"{100 * np.mean([one['class'] for one in ours]):.0f}%")
        line += [f"{np.mean([one['cleanlab'][key] for one in cells]):.0f}" for key in ("flagged", "wrong")]
        line += [spread([one[key] for one in cells], 100, 1) for key in ("before", "after")]
        ratio = np.median([one["audit"]["seconds"] / one["self_confidence"]["seconds"] for one in cells])
        lines.append([name, noise, *line, f"{ratio:.2f}"])  # a median: other work may have held one of both up
    return text + table(lines)


def table(lines: list[list[str]]) -> str:
    """A markdown table, the first line its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """See the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "digits; NAME=PATH: mnist (csv or csv.gz of pixels, then label), or a csv with a header, label first or last"
    parser.add_argument("--data", nargs="+", default=["digits"], metavar="NAME=PATH", help=text)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--noises", nargs="+", default=[*NOISES], choices=NOISES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "audits.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    paths = {name: Path(path) if path else None for name, _, path in (given.partition("=") for given in args.data)}
    for seed in args.seeds:
        for name, path in paths.items():
            for noise in args.noises:
                key = f"{name} {noise} {seed}"
                if key in known:
                    continue
                known[key] = cell(load(name, path), noise, seed)
                file.with_suffix(".part").write_text(json.dumps(known, indent=1))
                file.with_suffix(".part").replace(file)
                print(key, flush=True)
    (args.out / "audits.md").write_text(report(known))
    print(report(known))


if __name__ == "__main__":
    main()
