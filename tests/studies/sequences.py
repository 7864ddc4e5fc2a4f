"""Sums as text: methods of sequences with right responses, and learned weights of sequences where 30% are wrong.

python tests/studies/sequences.py

writes what each training found to ``results/sequences.csv``, goes on where it stopped, and makes the table of it,
``results/sequences.md``. All students of a seed start from the same weights and take as many updates.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn

from lit_kd import ALMKD, GKD, KD, Distiller, OnlineKD, SequenceKD, SpeculativeKD, StepByStep, Supervised
from lit_kd.data import SumsDataModule
from lit_kd.losses import cross_entropy, divergence
from lit_kd.models.files import write_whole
from lit_kd.models.generate import respond, sampler
from lit_kd.models.taps import Tapped
from lit_kd.terms import OnlineTeacher, Term
from lit_kd.types import IGNORED

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, Any] = {"rows": 4000, "test": 500, "val": 200, "meta": 200, "batch_size": 64}


class LabelsTeacher(OnlineTeacher):
    """The adapter learns from the labels, and not from the student."""

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Of rows, at temperature 1."""
        q, p = (logits.log_softmax(-1) for logits in (student, teacher))
        return divergence(p.detach(), q) + cross_entropy(teacher, y)


class ByLabels(OnlineKD):
    """With an adapter that knows no student."""

    def default_term(self) -> Term:
        """The changed one."""
        return LabelsTeacher(self.width)


class Adapted(nn.Module):
    """The teacher with what its adapter has become."""

    def __init__(self, teacher: nn.Module, model: Distiller) -> None:
        super().__init__()
        self.term = next(term for term in model.modules() if isinstance(term, OnlineTeacher))
        self.tapped = Tapped(teacher, self.term.teacher_taps)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.term.adapted(self.tapped(x))


Made = Callable[[nn.Module, dict[str, Any]], Distiller]
RIGHT: dict[str, Made] = {
    "CE": lambda teacher, base: Supervised(task="tokens", **base),
    "SequenceKD": lambda teacher, base: SequenceKD(teacher=teacher, **base),
    "SequenceKD, the teacher's responses": lambda teacher, base: SequenceKD(
        teacher=teacher, responses="teacher", **base
    ),
    "GKD": lambda teacher, base: GKD(teacher=teacher, **base),
    "SpeculativeKD, top_k 3": lambda teacher, base: SpeculativeKD(teacher=teacher, top_k=3, **base),
    "OnlineKD": lambda teacher, base: OnlineKD(teacher=teacher, **base),
    "OnlineKD, adapter by CE alone": lambda teacher, base: ByLabels(teacher=teacher, **base),
    "StepByStep": lambda teacher, base: StepByStep(**base),
}
half: dict[str, Any] = {"task": "tokens", "temperature": 1.0}
WRONG: dict[str, Made] = {
    "CE": RIGHT["CE"],
    "KD 0.5": lambda teacher, base: KD(teacher=teacher, weight=0.5, **half, **base),
    "CE, trusted rows trained on": RIGHT["CE"],
    "KD 0.5, trusted rows trained on": lambda teacher, base: KD(teacher=teacher, weight=0.5, **half, **base),
    "ALMKD paper, exact": lambda teacher, base: ALMKD(
        teacher=teacher, rule="paper", meta_gradient="exact", **half, **base
    ),
    "ALMKD amal, exact": lambda teacher, base: ALMKD(
        teacher=teacher, rule="amal", meta_gradient="exact", **half, **base
    ),
}
PARTS = {"right": RIGHT, "30% wrong": WRONG}


def adam(rate: float) -> Any:
    """For students and teachers."""
    return partial(torch.optim.Adam, lr=rate)


def trained(model: Distiller, data: SumsDataModule, epochs: int) -> Distiller:
    """After so many epochs on one CPU."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, num_sanity_val_steps=0, limit_val_batches=0, **quiet)
    trainer.fit(model, data)
    return model


@torch.no_grad()
def measured(network: nn.Module, data: SumsDataModule) -> dict[str, float]:
    """Of the test rows: the mean loss of a response's token, and the share of answers that are right, greedily."""
    rows = data.parts.test.__getitems__(list(range(len(data.parts.test))))
    network.eval()
    loss = nn.functional.cross_entropy(network(rows.x).mT, rows.y, ignore_index=IGNORED)
    said = respond(rows.x, rows.y, data.end, sampler(network, 1e-4), torch.full((*rows.y.shape, 2), 0.5))[0]
    assert isinstance(said, torch.Tensor)
    return {"nll": float(loss), "answers": float((said == rows.x).all(1).float().mean())}


def results(part: str, seed: int, epochs: int, done: set[tuple[str, str, int]]) -> Any:
    """What each method finds that is not done, with one teacher."""
    left = [name for name in ("the teacher", *PARTS[part]) if (part, name, seed) not in done]
    if not left:
        return
    options = SIZES | {"wrong": 0.3 * (part != "right"), "seed": seed}
    seed_everything(seed, verbose=False)
    base = {"num_classes": SumsDataModule.num_classes, "lr_scheduler": "cosine"}
    data = SumsDataModule(**options)
    teacher = trained(Supervised("gru-64", task="tokens", optimizer=adam(0.005), **base), data, 3 * epochs)
    for name in left:
        if name == "the teacher":
            yield name, measured(teacher.student, data)
            continue
        seed_everything(seed, verbose=False)
        joined = {"train_on_meta": True} if name.endswith("trained on") else {}
        data = SumsDataModule(**options, **joined)
        model = PARTS[part][name](teacher.student, base | {"student": "gru-24", "optimizer": adam(0.01)})
        own = epochs * (SIZES["rows"] - 900) // (SIZES["rows"] - 700) if joined else epochs
        trained(model, data, own)
        if isinstance(model, OnlineKD):
            yield f"{name}: its teacher", measured(Adapted(teacher.student, model), data)
        yield name, measured(model.student, data)


def table(rows: list[dict[str, str]]) -> str:
    """Means and standard deviations over seeds."""
    lines = []
    for part, methods in PARTS.items():
        lines += [f"| responses: {part} | loss a token | right answers, % |", "| --- | --- | --- |"]
        online = [f"{name}: its teacher" for name in methods if name.startswith("OnlineKD")]
        for name in ["the teacher", *methods, *online]:
            own = [row for row in rows if (row["part"], row["method"]) == (part, name)]
            cells = []
            for key, factor, digits in (("nll", 1, 3), ("answers", 100, 1)):
                found = [factor * float(row[key]) for row in own]
                spread = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
                cells.append(f"{mean(found):.{digits}f}{spread}" if found else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Train what is not done, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=9, help="of a student; a teacher has three times as many")
    parser.add_argument("--output", type=Path, default=RESULTS / "sequences.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = list(csv.DictReader(options.output.open())) if options.output.exists() else []
    done = {(row["part"], row["method"], int(row["seed"])) for row in rows}
    for seed in range(options.seeds):
        for part in PARTS:
            for name, found in results(part, seed, options.epochs, done):
                row = {"part": part, "method": name, "seed": str(seed)} | {k: f"{v:.4f}" for k, v in found.items()}
                new = not options.output.exists()
                with options.output.open("a", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                rows.append(row)
                print(row, flush=True)
    write_whole(options.output.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
