"""Rules and rivals on convolutional networks: resnet8 taught by resnet20 on small images, with augmentation.

One run is a scenario, a method and a seed; each result is kept as it comes, so run it again to go on. All methods train
on the trusted rows, too; a teacher learned from the labels of its scenario, in half as many epochs, except in
`LESSONS`. Accuracies are those of the last epoch. See docs/experiments.md.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from PIL import Image
from scenarios import noisy
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from lit_kd import ALMKD, GLC, KD, Supervised
from lit_kd.data import DataModule, Source, TensorRows
from lit_kd.data.vision import ImageTransform
from lit_kd.models import build_model
from lit_kd.terms import ELR, GeneralizedCrossEntropy

SCALE = ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
PAIRS = {0: 8, 1: 9, 2: 4, 3: 5, 4: 7, 5: 3, 6: 4, 7: 4, 8: 0, 9: 1}
SCENARIOS: dict[str, dict[str, Any]] = {
    "clean": {},
    "sym20": {"noise": "symmetric", "noise_rate": 0.2},
    "sym40": {"noise": "symmetric", "noise_rate": 0.4},
    "sym60": {"noise": "symmetric", "noise_rate": 0.6},
    "pair30": {"noise": "asymmetric", "noise_rate": 0.3, "pairs": PAIRS},
    "pair40": {"noise": "asymmetric", "noise_rate": 0.4, "pairs": PAIRS},
    "inst30": {"instance": True},
    "long tail": {"long_tail": True},
    "sym40, long tail": {"noise": "symmetric", "noise_rate": 0.4, "long_tail": True},
    "sym40, strong": {"noise": "symmetric", "noise_rate": 0.4},
}
LESSONS = {"sym40, strong": "clean"}
"""Whose labels a teacher learned from, if not from those of the scenario."""
METHODS: dict[str, Callable[..., LightningModule]] = {
    "CE + meta": lambda teacher, **base: Supervised(**base),
    "KD 0.5 + meta": lambda teacher, **base: KD(teacher=teacher, weight=0.5, **base),
    "KD 0.9 + meta": lambda teacher, **base: KD(teacher=teacher, weight=0.9, **base),
    "GCE + meta": lambda teacher, **base: Supervised(label_term=GeneralizedCrossEntropy(), **base),
    "ELR + meta": lambda teacher, **base: Supervised(label_term=ELR(), **base),
    "GLC, teacher's matrix": lambda teacher, **base: GLC(teacher=teacher, **base),
    "ALM-KD robust": lambda teacher, **base: ALMKD(teacher=teacher, **base),
    "ALM-KD paper": lambda teacher, **base: ALMKD(teacher=teacher, rule="paper", **base),
    "ALM-KD amal": lambda teacher, **base: ALMKD(teacher=teacher, rule="amal", **base),
}


PUBLISHED = "ALM-KD paper", "ALM-KD amal"


@cache
def images(path: Path, part: str, size: int) -> tuple[Tensor, Tensor]:
    """All images of a part in the file, bytes ``(n, 3, size, size)``, and labels."""
    file = np.load(path)
    data, starts = file[f"jpg_{part}"], file[f"off_{part}"]
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB")) for a, b in pairwise(starts)]
    )
    x = F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), 32 // size)
    return x.round().byte(), torch.from_numpy(file[f"y_{part}"].astype(np.int64))


class Images(DataModule):
    """Some of the rows, which are the same under every seed of the split."""

    num_classes = 10

    def __init__(
        self, path: Path, rows: int, size: int, instance: bool = False, long_tail: bool = False, **shared: Any
    ) -> None:
        super().__init__(batch_size=64, meta=0.08, val=0.08, drop_last=True, **shared)
        self.path, self.rows, self.size, self.input_shape = path, rows, size, (3, size, size)
        self.instance, self.long_tail = instance, long_tail

    def load(self) -> Source:
        """Read the images."""
        (x, y), (test, test_y) = (images(self.path, part, self.size) for part in ("train", "test"))
        kept = torch.from_numpy(np.random.default_rng(0).permutation(len(y))[: self.rows])
        if self.long_tail:  # the last class has a fiftieth of the first one's rows
            most = self.rows / self.num_classes
            kept = torch.cat([kept[y[kept] == c][: int(most / 50 ** (c / 9))] for c in range(self.num_classes)])
        plain, self.pixels = ImageTransform(*SCALE), x[kept]
        source = TensorRows(x[kept], ImageTransform(*SCALE, self.size // 8, flip=True)), TensorRows(x[kept], plain)
        tests = TensorRows(test[::2], plain), test_y[::2].numpy()  # they may be sorted by class
        identity = f"{self.path.name} {self.rows} {self.long_tail}".encode()
        return Source(*source, y[kept].numpy(), *tests, identity=identity)

    def setup(self, stage: str | None = None) -> None:
        """Spoil labels of instances that a small network finds hard."""
        first = self._partition is None
        super().setup(stage)
        if first and self.instance:
            given, n, g = self.parts.given, self.train_size, torch.Generator().manual_seed(self.seed or 0)
            x = self.pixels[self.parts.positions["train"]].flatten(1) / 255
            given[:n] = noisy("inst30", x, given[:n].clone(), 10, g, self.seed or 0)


def fit(model: LightningModule, data: Images, epochs: int) -> float:
    """Train, and give the test accuracy in percent."""
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    options |= {"max_epochs": epochs, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = Trainer(**options)
    trainer.fit(model, data)
    return 100 * float(trainer.test(model, data, verbose=False)[0]["test/accuracy"])


def run(scenario: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training; the teacher of a scenario and a seed is kept."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    base: dict[str, Any] = {"num_classes": 10, "input_shape": [3, args.size, args.size], "optimizer": sgd}
    base |= {"student": args.student, "lr_scheduler": "cosine"}
    make = partial(Images, args.images, args.rows, args.size, seed=seed)
    lesson = LESSONS.get(scenario, scenario)
    kept = args.out / "teachers" / f"{lesson}-{seed}.pt"
    teacher: nn.Module = build_model(args.teacher, 10, base["input_shape"])
    if not kept.is_file():
        seed_everything(seed, verbose=False)
        learning = Supervised(**(base | {"student": teacher}))
        accuracy = fit(learning, make(**SCENARIOS[lesson]), max(1, args.epochs // 2))
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"net": teacher.state_dict(), "accuracy": accuracy}, kept)
    told = torch.load(kept)
    teacher.load_state_dict(told["net"])
    seed_everything(seed, verbose=False)
    model: Any = METHODS[method](teacher, **base)
    data = make(train_on_meta=None if model.trains_on_meta else True, **SCENARIOS[scenario])
    result: dict[str, Any] = {"accuracy": fit(model, data, args.epochs), "teacher": told["accuracy"]}
    wrong = data.noisy[: data.train_size].numpy()
    if model.table is not None and "clean_probability" in model.table:
        doubt = 1 - model.table["clean_probability"][: data.train_size].cpu().numpy()
        result["noise"] = [float(wrong.mean()), float(model.table.shared["noise_rate"])]
        result["auc"] = float(roc_auc_score(wrong, doubt)) if wrong.any() else None
    return result


def table(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """Means and standard deviations over seeds, as markdown."""
    lines = [["method", *args.scenarios], ["---"] * (1 + len(args.scenarios))]
    for method in args.methods:
        cells = []
        for scenario in args.scenarios:
            runs = [found[key] for seed in args.seeds if (key := f"{scenario} | {method} | {seed}") in found]
            values = [one["accuracy"] for one in runs]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            aucs = [one["auc"] for one in runs if one.get("auc")]
            told = f" (AUC {mean(aucs):.2f})" if aucs else ""
            cells.append(f"{mean(values):.1f}{spread}{told}" if values else "")
        lines.append([method, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """See the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an npz file of JPEG images: jpg_train, off_train, y_train, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/deep"))
    parser.add_argument("--scenarios", nargs="+", default=["sym40", "pair30", "clean"], choices=SCENARIOS)
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m not in PUBLISHED], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--rows", type=int, default=9600)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    args.out /= f"{args.student}-{args.teacher}-{args.rows}x{args.size}-{args.epochs}"  # results of one setting
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "deep.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in args.seeds:
        for scenario in args.scenarios:
            for method in args.methods:
                key = f"{scenario} | {method} | {seed}"
                if key not in found:
                    found[key] = run(scenario, method, seed, args)
                    print(key, found[key], file=sys.stderr, flush=True)
                    part = path.with_suffix(".part")
                    part.write_text(json.dumps(found, indent=1))
                    part.replace(path)
    text = table(found, args)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
