"""Three annotators of unlike quality and 50 trusted rows, no other labels: learned weights against votes.

python tests/studies/annotators.py --data digits --data mnist=mnist_5k.csv.gz

writes what each training found to ``results/annotators.csv``, goes on where it stopped, and makes the table of it,
``results/annotators.md``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning import Trainer, seed_everything
from scenarios import Data, load
from torch import Tensor

from lit_kd import ALMKD, CrowdLabels, Distiller, Supervised
from lit_kd.data import UNLABELED, DataModule, Source, TensorRows
from lit_kd.data.seeds import derive_seed
from lit_kd.models.files import write_columns, write_whole

RESULTS = Path(__file__).parent / "results"
TRUSTED, EPOCHS, MISSING, ROWS = 50, 30, 0.2, 2000
Options = dict[str, Any]
METHODS: dict[str, tuple[int, Callable[[list[str], Options], Distiller]]] = {
    # of the trusted rows so many are trained on; the others validate
    "ALMKD": (TRUSTED // 2, lambda files, base: ALMKD(teacher=files, **base)),
    "Dawid-Skene": (TRUSTED - 1, lambda files, base: CrowdLabels(teacher=files, **base)),
    "majority vote": (TRUSTED - 1, lambda files, base: CrowdLabels(teacher=files, vote="majority", **base)),
    "the trusted rows alone": (TRUSTED - 1, lambda files, base: Supervised(**base)),
    "the good annotator alone": (TRUSTED - 1, lambda files, base: CrowdLabels(teacher=files[:1], **base)),
}
"""The last one knows who is good."""


class Annotated(DataModule):
    """Training rows without labels, and trusted rows."""

    def __init__(self, data: Data, rows: Tensor, trusted: Tensor, **options: Any) -> None:
        super().__init__(batch_size=128, val=0, **options)
        self.all, self.rows, self.trusted_rows = data, rows, trusted
        self.num_classes, self.input_shape = data.classes, (data.x.shape[1],)

    def load(self) -> Source:
        """The first validate, and are cut from."""
        data, train = self.all, TensorRows(self.all.x[self.rows])
        labels, own = torch.full((len(self.rows),), UNLABELED).numpy(), data.y[self.trusted_rows].numpy()
        source = Source(train, train, labels, val=TensorRows(data.x[self.trusted_rows]), val_labels=own)
        source.test, source.test_labels = TensorRows(data.test_x), data.test_y.numpy()
        source.identity = data.name.encode()
        return source


def annotators(y: Tensor, classes: int, g: torch.Generator) -> dict[str, Tensor]:
    """Votes, with gaps: right for 85%; wrong for 80% of the rows of two classes in five; wrong for 80% of all rows."""

    def chance(p: float) -> Tensor:
        return torch.rand(len(y), generator=g) < p

    following = (y + 1) % classes
    hard = torch.isin(y, torch.randperm(classes, generator=g)[: 2 * classes // 5])
    votes = {
        "good": y.where(chance(0.85), torch.randint(classes, y.shape, generator=g)),
        "bad on some": following.where(hard & chance(0.8), y.where(chance(0.9), following)),
        "adversarial": following.where(chance(0.8), y),
    }
    return {name: vote.where(~chance(MISSING), UNLABELED) for name, vote in votes.items()}


def accuracy(data: Data, method: str, seed: int, folder: Path) -> float:
    """On the test rows, after the last epoch."""
    g = torch.Generator().manual_seed(derive_seed(seed, f"annotators of {data.name}"))
    order = torch.randperm(len(data.y), generator=g)
    trusted, rows = stratified(data.y[order], order, data.classes)
    files = []
    for name, vote in annotators(data.y, data.classes, g).items():
        ids = [*map(str, range(len(rows))), *(f"val/{k}" for k in range(len(trusted)))]
        path = folder / f"{data.name}-{seed}-{name}.csv"
        write_columns(path, {"id": ids, "label": vote[torch.cat([rows, trusted])].tolist()}, overwrite=True)
        files.append(str(path))
    seed_everything(seed, verbose=False)
    meta, make = METHODS[method]
    module = Annotated(data, rows, trusted, meta=meta, seed=seed, train_on_meta=None if method == "ALMKD" else True)
    model = make(files, {"student": "mlp-64", "num_classes": data.classes, "input_shape": [data.x.shape[1]],
                         "lr_scheduler": "cosine"})  # fmt: skip
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, num_sanity_val_steps=0, **quiet)
    trainer.fit(model, module)
    with torch.no_grad():
        return float((model(data.test_x).argmax(1) == data.test_y).float().mean())


def stratified(y: Tensor, order: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Trusted rows, two of each class and others at random, and the rest."""
    first = torch.cat([order[y == c][:2] for c in range(classes)])
    others = order[~torch.isin(order, first)]
    trusted = torch.cat([first, others])[:TRUSTED]
    return trusted, order[~torch.isin(order, trusted)]


def table(rows: list[dict[str, str]]) -> str:
    """Means and standard deviations over seeds, in percent."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for method in METHODS:
        cells = []
        for name in names:
            found = [100 * float(row["accuracy"]) for row in rows if (row["data"], row["method"]) == (name, method)]
            cells.append(f"{mean(found):.1f} ± {stdev(found):.1f}" if len(found) > 1 else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not done, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", required=True, help="digits, or NAME=FILE of scenarios.load")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "annotators.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = list(csv.DictReader(options.output.open())) if options.output.exists() else []
    done = {(row["data"], row["method"], int(row["seed"])) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for given in options.data:
            name, _, path = given.partition("=")
            data = load(name, Path(path) if path else None)
            data = data._replace(x=data.x[:ROWS], y=data.y[:ROWS])
            for seed in range(options.seeds):
                for method in METHODS:
                    if (name, method, seed) in done:
                        continue
                    found = accuracy(data, method, seed, Path(folder))
                    rows.append({"data": name, "method": method, "seed": str(seed), "accuracy": f"{found:.4f}"})
                    print(*rows[-1].values(), flush=True)
                    columns = {key: [row[key] for row in rows] for key in rows[0]}
                    write_columns(options.output, columns, overwrite=True)
    write_whole(options.output.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
