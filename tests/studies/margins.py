"""ALM-KD against hindsight's best fixed weight: the table of margins, see README.

Every cell is a data set, a scenario and a student. Its yardsticks are the best of the weights 0, 0.1, 0.3, 0.5, 0.7,
0.9 and 1 of KD by mean test accuracy, trained on train and on train + meta, at the best validation epoch or the last,
whichever is better in the mean; ALM-KD is measured at the last. It also reads validation labels, of which fixed weights
make no use but to tell the best epoch. The summary also has all at the best validation epoch, all at the last, and each
seed against what is best on the other seeds. Results are kept cell by cell: run again to go on; without CELL.json,
ALM-KD alone is measured anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from mlps import Mlps, Task, kd_loss, train
from scenarios import EPOCHS, SCENARIOS, ScenarioData, arrays, mlp_teacher
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from lit_kd import ALMKD, KD, Supervised
from lit_kd.data import Batch
from lit_kd.data.sampler import EpochSampler
from lit_kd.data.seeds import derive_seed
from lit_kd.types import Outputs

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
WIDE = ("sym40", "pair30", "clean", "strong")
CIFAR = ("sym40", "pair30", "clean", "strong")
SILENT = ("bad75", "strong40")
"""Where ALM-KD is also given a teacher that always says the same: what does the real one add?"""
KEYS = ("train", "train + meta")
"""What the fixed weights are trained on."""
Cell = tuple[str, str, str]


class Accuracies(Callback):
    """Test accuracy at the best validation epoch and at the last."""

    def __init__(self, test: tuple[Tensor, Tensor]) -> None:
        self.test, self.best, self.at_best, self.last = test, -1.0, 0.0, 0.0

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Lightning calls it in eval mode, after the metrics are known."""
        found, last = float(trainer.callback_metrics["val/accuracy"]), trainer.current_epoch == EPOCHS - 1
        if not last and found <= self.best:
            return
        with torch.no_grad():
            logits = torch.cat([module(x) for x in self.test[0].split(1024)])
        accuracy = float((logits.argmax(-1) == self.test[1]).float().mean())
        if found > self.best:
            self.best, self.at_best = found, accuracy
        self.last = accuracy


class Silent(nn.Module):
    """A teacher that knows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Equal logits."""
        return x.new_zeros(len(x), 10)


class FixedKD(KD):
    """KD whose teacher has been asked already: it is the same at every weight, and images are not augmented."""

    def __init__(self, logits: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.logits = logits

    def outputs(self, batch: Batch) -> tuple[Outputs, list[Outputs]]:
        """The kept logits in training."""
        if not self.training:
            return super().outputs(batch)
        return self.tapped_student(batch.x), [Outputs(self.logits[batch.index], {})]


def fit(model: LightningModule, data: ScenarioData) -> tuple[float, float]:
    """Train by lit_kd itself."""
    accuracies = Accuracies(arrays(data.name, data.folder)[2:])
    Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[accuracies],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(model, data)
    return accuracies.at_best, accuracies.last


def options(student: str, data: ScenarioData) -> dict[str, Any]:
    """Of every training by lit_kd, the same as those of `mlps.train`."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    shape = list(data.input_shape or ())
    return {"student": student, "num_classes": 10, "input_shape": shape, "optimizer": sgd, "lr_scheduler": "cosine"}


def fixed_weights(datas: list[ScenarioData], teachers: list[nn.Module], student: str, meta: bool) -> list[list[float]]:
    """Of every seed, test accuracies with each weight at the best validation epoch, then with each at the last.

    All are trained side by side. They begin where ALM-KD does, and see the rows in the order in which it does: what is
    left of the difference is less by chance.
    """
    tasks = []
    seeds = [data.seed or 0 for data in datas for _ in WEIGHTS]
    width = int(student.split("-")[1])
    nets = Mlps(seeds, datas[0].x("train").shape[1], width, 10)
    for d, (data, teacher) in enumerate(zip(datas, teachers, strict=True)):
        x = torch.cat([data.x("train"), data.x("meta")]) if meta else data.x("train")
        with torch.no_grad():
            logits = teacher(x)
        onehot = F.one_hot(data.labels[: len(x)], 10).float()
        val, test = (data.x("val"), data.parts.val.labels), arrays(data.name, data.folder)[2:]
        tasks += [Task(x, kd_loss(onehot, logits, weight, 4.0), val, test) for weight in WEIGHTS]
        seed_everything(data.seed, verbose=False)
        beginning = Supervised(**options(student, data)).student
        for w in range(len(WEIGHTS)):
            nets.begin_as(d * len(WEIGHTS) + w, beginning)

    def order(seed: int, epoch: int) -> Tensor:
        sampler = EpochSampler(len(tasks[0].x), seed=derive_seed(seed, "order"))
        sampler.set_epoch(epoch)
        return torch.from_numpy(sampler.order())

    accuracies = train(nets, tasks, EPOCHS, order=order)  # at the best epoch, and at the last
    return torch.stack(accuracies).view(2, len(datas), len(WEIGHTS)).transpose(0, 1).flatten(1).tolist()


def convolutional(data: ScenarioData, student: str) -> tuple[nn.Module, list[list[float]]]:
    """The same for one seed and convolutional nets: the teacher, then weights on train and on train + meta."""
    seed_everything(data.seed, verbose=False)
    _, y = data.teacher_data()
    lessons = ScenarioData(data.name, "clean", data.seed or 0, data.folder)
    lessons.setup()
    lessons._partition = lessons.parts.__class__(
        **{**vars(lessons.parts), "given": torch.cat([y, lessons.labels[len(y) :]])}
    )
    teacher = Supervised(**options("cnn-32", data))
    fit(teacher, lessons)
    with torch.no_grad():
        x = torch.cat([data.x("train"), data.x("meta")])
        logits = torch.cat([teacher.student.eval()(part) for part in x.split(256)])
    found = []
    for meta in (False, True):
        data.train_on_meta = meta
        accuracies = []
        for weight in WEIGHTS:
            seed_everything(data.seed, verbose=False)
            model = FixedKD(logits, teacher=teacher.student, weight=weight, **options(student, data))
            accuracies.append(fit(model, data))
        at_best, last = zip(*accuracies, strict=True)
        found.append([*at_best, *last])
    data.train_on_meta = None
    return teacher.student, found


def run(cell: Cell, seeds: list[int], folders: dict[str, Path], out: Path, prepare: bool = False) -> None:
    """Measure what is missing of one cell: yardsticks and teachers first, then, if not to `prepare` only, ALM-KD."""
    path, measure = out / f"{'-'.join(cell)}.json", out / "yardsticks" / f"{'-'.join(cell)}.pt"
    name, scenario, student = cell
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    _check(path, result, seeds)
    silent = scenario in SILENT and "silent" not in result
    if result and not silent:
        return
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    datas = [ScenarioData(name, scenario, seed, folders.get(name)) for seed in seeds]
    for data in datas:
        data.setup()
    if not measure.is_file():
        measure.parent.mkdir(parents=True, exist_ok=True)
        _save(measure, partial(torch.save, yardsticks(datas, student)))
    known = torch.load(measure, weights_only=False)
    _check(measure, known, seeds)
    if prepare:
        return
    if not result:
        result = {"seeds": seeds} | {key: known[key] for key in KEYS} | almkd(datas, known["teachers"], student)
        _save(path, lambda part: part.write_text(json.dumps(result)))
    if silent:
        result["silent"] = almkd(datas, [Silent()] * len(datas), student)["last"]
        _save(path, lambda part: part.write_text(json.dumps(result)))


def almkd(datas: list[ScenarioData], teachers: list[nn.Module], student: str) -> dict[str, Any]:
    """Its test accuracies and what it found, seed by seed."""
    result: dict[str, Any] = {"best": [], "last": [], "auc": [], "rate": []}
    for data, teacher in zip(datas, teachers, strict=True):
        seed_everything(data.seed, verbose=False)
        model = ALMKD(teacher=teacher, **options(student, data))
        at_best, last = fit(model, data)
        result["best"].append(at_best)
        result["last"].append(last)
        assert model.table is not None
        noisy = (data.labels != data.clean_labels)[: data.train_size].numpy()
        clean = model.table["clean_probability"][: data.train_size].numpy()
        result["auc"].append(float(roc_auc_score(noisy, -clean)) if noisy.any() else None)
        result["rate"].append([float(noisy.mean()), float(model.table.shared["noise_rate"])])
    return result


def yardsticks(datas: list[ScenarioData], student: str) -> dict[str, Any]:
    """Every seed's teacher, and its test accuracies with fixed weights."""
    result: dict[str, Any] = {"seeds": [data.seed for data in datas], "train": [], "train + meta": [], "teachers": []}
    if student.startswith("mlp"):
        result["teachers"] = [mlp_teacher(data) for data in datas]
        for meta, key in enumerate(KEYS):
            result[key] = fixed_weights(datas, result["teachers"], student, bool(meta))
        return result
    for data in datas:
        teacher, found = convolutional(data, student)
        result["teachers"].append(teacher)
        result["train"].append(found[0])
        result["train + meta"].append(found[1])
    return result


def _check(path: Path, result: dict[str, Any], seeds: list[int]) -> None:
    if result.get("seeds", seeds) != seeds:
        raise SystemExit(f"{path} is of the seeds {result['seeds']}: give these, or another --out")
    if any(len(of_seed) != 2 * len(WEIGHTS) for key in KEYS for of_seed in result.get(key, [])):
        raise SystemExit(f"{path} lacks the fixed weights' accuracies at the last epoch: give another --out")


def _save(path: Path, write: Callable[[Path], Any]) -> None:
    write(path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def report(cells: list[Cell], out: Path) -> None:
    """The table and its summary, as markdown and csv."""
    rows = []
    summaries: dict[str, list[float]] = {}
    for cell in cells:
        path = out / f"{'-'.join(cell)}.json"
        if not path.is_file():
            continue
        r = json.loads(path.read_text())
        _check(path, r, r["seeds"])
        row, own = [*cell, str(len(r["last"]))], []
        for key in KEYS:
            best = best_column(r[key])
            yardstick = [of_seed[best] for of_seed in r[key]]
            row += [f"{WEIGHTS[best % len(WEIGHTS)]:g}", ("best", "last")[best // len(WEIGHTS)], _percent(yardstick)]
            own.append([100 * (a - b) for a, b in zip(r["last"], yardstick, strict=True)])
        row += [_percent(r["best"]), _percent(r["last"]), *(f"{mean(o):+.1f} ± {stdev(o):.1f}" for o in own)]
        aucs = [a for a in r["auc"] if a is not None]
        added = [100 * (a - b) for a, b in zip(r["last"], r.get("silent", []), strict=False)]
        row += [f"{mean(added):+.1f} ± {stdev(added):.1f}" if added else ""]
        row += [f"{mean(aucs):.2f}" if aucs else "", "{:.2f} / {:.2f}".format(*map(mean, zip(*r["rate"], strict=True)))]
        rows.append(row)
        for key in KEYS:
            half = len(WEIGHTS)
            at_best, at_last = [of_seed[:half] for of_seed in r[key]], [of_seed[half:] for of_seed in r[key]]
            for name, mine, theirs in [
                (f"on {key}, weight and epoch in hindsight", "last", r[key]),
                (f"on {key}, all at the best validation epoch", "best", at_best),
                (f"on {key}, all at the last epoch", "last", at_last),
            ]:
                margins = summaries.setdefault(name, []), summaries.setdefault(f"{name}, of other seeds", [])
                best = best_column(theirs)
                margins[0].append(100 * (mean(r[mine]) - mean(of_seed[best] for of_seed in theirs)))
                margins[1].append(mean(unlucky(r[mine], theirs)))
    head = ["data", "scenario", "student", "seeds", "w, train", "epoch, train", "best on train"]
    head += ["w, + meta", "epoch, + meta", "best on train + meta"]
    head += ["ALM-KD, best epoch", "ALM-KD, last epoch", "margin, train", "margin, + meta", "teacher adds", "AUC"]
    head += ["noise: true / estimated"]
    lines = [head, ["---"] * len(head), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    text += "".join(f"- {name}: {summary(margins)}\n" for name, margins in summaries.items())
    (out / "margins.md").write_text(text)
    with (out / "margins.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    print(text)


def best_column(accuracies: list[list[float]]) -> int:
    """The position of what is best in the mean over seeds."""
    return max(range(len(accuracies[0])), key=lambda w: mean(of_seed[w] for of_seed in accuracies))


def unlucky(found: list[float], accuracies: list[list[float]]) -> list[float]:
    """Margins, in points, over what is best on the other seeds.

    Of several weights that are as good as each other one is the best by luck, which this one does not share.
    """
    margins = []
    for i, mine in enumerate(found):
        others = accuracies[:i] + accuracies[i + 1 :]
        margins.append(100 * (mine - accuracies[i][best_column(others)]))
    return margins


def summary(margins: list[float]) -> str:
    """Of one margin a cell, in points."""
    ok = sum(m >= -0.3 for m in margins) / len(margins)
    return (
        f"mean {mean(margins):+.2f}, worst {min(margins):+.2f}, {100 * ok:.0f}% of {len(margins)} cells not below -0.3"
    )


def _percent(values: Any) -> str:
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def main() -> None:
    """See the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], choices=["digits", "mnist", "fashion", "cifar"])
    parser.add_argument("--fashion", type=Path, help="directory with FashionMNIST/raw, as torchvision reads it")
    parser.add_argument("--cifar", type=Path, help="directory with train/CLASS/*.png and test/CLASS/*.png")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(20, 30)])
    parser.add_argument("--out", type=Path, default=Path("runs/margins"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only the yardsticks, which know nothing of ALM-KD")
    parser.add_argument("--report", action="store_true", help="only write the table of the cells that are done")
    args = parser.parse_args()
    cells: list[Cell] = []
    for name in args.data:
        if name == "cifar":
            cells += [(name, scenario, "cnn-8") for scenario in CIFAR]
        else:
            cells += [(name, scenario, "mlp-32") for scenario in SCENARIOS]
            cells += [(name, scenario, "mlp-128") for scenario in WIDE]
    args.out.mkdir(parents=True, exist_ok=True)
    folders = {"fashion": args.fashion, "cifar": args.cifar}
    if not args.report:
        with ProcessPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, cell, args.seeds, folders, args.out, args.prepare) for cell in cells]
            for cell, job in zip(cells, jobs, strict=True):
                job.result()
                print(*cell, "done", flush=True)
    if not args.prepare:
        report(cells, args.out)


if __name__ == "__main__":
    main()
