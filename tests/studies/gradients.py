"""The meta-gradient through all layers beside that of the last layer alone: how alike, at what cost, see README.

Students are trained on digits with 30% pair noise; then the alignment of every label's gradient with the validation
gradient is taken both ways on the same batches. The cost is that of a whole training step, both ways taken in turn.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.func import functional_call

from lit_kd import ALMKD, KD, Supervised
from lit_kd.data import Batch, DigitsDataModule
from lit_kd.data.rows import Indexed
from lit_kd.losses import cross_entropy
from lit_kd.models import last_linear
from lit_kd.models.taps import Tapped
from lit_kd.trust.exact import exact_derivative, gradient
from lit_kd.trust.meta import Head, MetaRows, alignment, last_layer_derivative, logit_gradient
from lit_kd.types import PENULTIMATE
from lit_kd.weightings import Paper


def data(seed: int) -> DigitsDataModule:
    """With 30% pair noise."""
    return DigitsDataModule(noise="asymmetric", noise_rate=0.3, seed=seed)


def trainer(epochs: int) -> Trainer:
    """Silent, on one CPU."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **quiet)  # type: ignore[arg-type]


class Clock(Callback):
    """The time of every epoch's training."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first batch."""
        self.times.append(-time.perf_counter())

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last batch."""
        self.times[-1] += time.perf_counter()


def rows(part: Indexed, index: Tensor) -> Batch:
    """A batch of chosen rows."""
    return part.__getitems__(index.tolist())


def both(student: torch.nn.Module, train: Batch, meta: Batch) -> list[Tensor]:
    """Alignment of the labels' gradients, ``(B,)``, at the last layer and through all."""
    student.eval()
    head, theta = Head.of(last_linear(student)[1]), dict(student.named_parameters())
    outputs, of_meta = (Tapped(student, (PENULTIMATE,))(batch.x) for batch in (train, meta))
    rows = MetaRows(of_meta.features[PENULTIMATE], meta.y, torch.ones(len(meta.y), dtype=torch.bool))
    gradients = logit_gradient(cross_entropy, outputs.logits, train.y).unsqueeze(1)
    last = alignment(gradients, last_layer_derivative(head, outputs.features[PENULTIMATE], rows))[:, 0]
    v = gradient(cross_entropy(of_meta.logits, meta.y).mean(), theta)
    through_all = exact_derivative(
        lambda p: cross_entropy(functional_call(student, dict(p), (train.x,)), train.y), theta, v
    )
    return [last.detach(), through_all]


def main() -> None:
    """See the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["mlp-32", "cnn-16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| student | cosine | exact / last-layer step | exact / KD step |\n| --- | --- | --- | --- |")
    for name in args.students:
        cosines, costs = [], []
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            split = data(seed)
            base = {"num_classes": 10, "input_shape": [1, 8, 8]}
            teacher = Supervised("mlp-64", **base)
            trainer(args.epochs).fit(teacher, split)
            student = KD(name, teacher.student, weight=0.5, **base)
            trainer(args.epochs).fit(student, split)
            train, meta = split.parts.train_rows(False), split.parts.meta_rows()
            pairs = both(student.student, rows(train, torch.arange(len(train))), rows(meta, torch.arange(len(meta))))
            cosines.append(float(F.cosine_similarity(*pairs, dim=0)))
            costs.append(seconds(name, teacher.student, seed))
        cells = [f"{mean(cosines):.2f} ± {stdev(cosines):.2f}"]
        for other in (0, 2):
            ratios = [cost[1] / cost[other] for cost in costs]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def seconds(name: str, teacher: torch.nn.Module, seed: int) -> list[float]:
    """An epoch with the meta-step at the last layer, through all layers, and of plain KD."""
    found = []
    rule = Paper(warmup_epochs=0, every=1, repeats=1)
    for method, options in (
        (ALMKD, {"rule": rule, "meta_gradient": "last_layer"}),
        (ALMKD, {"rule": rule, "meta_gradient": "exact"}),
        (KD, {}),
    ):
        seed_everything(seed, verbose=False)
        model = method(name, teacher, num_classes=10, input_shape=[1, 8, 8], **options)
        clock = Clock()
        run = trainer(5)
        run.callbacks.append(clock)
        run.fit(model, data(seed))
        found.append(min(clock.times[2:]))
    return found


if __name__ == "__main__":
    main()
