"""What each part of `ElementTrust` is worth: the recipes of pixels, tokens, labels and numbers, with one part changed.

python tests/studies/elements.py

keeps each score in ``results/elements.json``, goes on where it stopped, and makes the table of it,
``results/elements.md``. Networks and options are those of the recipes, the seeds others than theirs; teachers and
students are those of the epoch of the best validation score.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lit_kd.data
from lit_kd import Distiller, ElementTrust, Supervised
from lit_kd.losses import cross_entropy
from lit_kd.methods import element_trust
from lit_kd.methods.element_trust import Believed, BelievedNumbers, by_class
from lit_kd.models.files import read_yaml, write_whole
from lit_kd.terms import Term
from lit_kd.trust import elements
from lit_kd.types import IGNORED, Batch, Outputs, full

HERE = Path(__file__).parent
RECIPES = {
    "tags": "tags_wrong_spans", "shapes": "shapes_wrong_masks", "attributes": "attributes_flipped",
    "numbers": "numbers_outliers",
}  # fmt: skip
LABELS, WHOLE, HARD = "labels alone", "ElementTrust", "the likeliest class, or target, alone"
WEIGHTED, REST = "the label, as far as it is right", "and for the rest the teacher's own output"
SOFT = "the teacher's probabilities for its class"
UNTOLD, EVEN = "no trusted rows", "one accuracy for all classes"
BARE, FIXED = "no prior of 10 a class", "no EM: 70% of the labels right (numbers: half)"
FORMS = [LABELS, WHOLE, HARD, WEIGHTED, REST, SOFT, UNTOLD, EVEN, BARE, FIXED]
OF_CLASSES = {SOFT, EVEN, BARE}


def prior(counts: Tensor) -> Tensor:
    """Of which 70% are right, as `lit_kd.trust.elements.teacher_channel` starts from."""
    classes = counts.shape[-1]
    return (0.7 * torch.eye(classes) + 0.3 / classes).expand_as(counts)


def even(counts: Tensor) -> Tensor:
    """The channel of a teacher that is right as often whatever the class, and errs evenly."""
    classes, all_ = counts.shape[-1], counts.sum((-1, -2), keepdim=True)
    right = (counts.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 7) / (all_ + 10)
    return torch.where(torch.eye(classes, dtype=torch.bool), right, (1 - right) / (classes - 1))


CHANGED: dict[str, dict[str, Callable[..., Any]]] = {
    UNTOLD: {
        "teacher_channel": prior,
        "trust_numbers": lambda y, teacher, *trusted: elements.trust_numbers(y, teacher, y, teacher),
    },
    EVEN: {"teacher_channel": even},
    BARE: {"teacher_channel": partial(elements.teacher_channel, prior=1e-6)},
    FIXED: {"label_joint": lambda counts, channel: prior(counts) * elements.normalised(counts.sum(-1)).unsqueeze(-2)},
}
"""What takes the place of an estimate."""


class Classes(Believed):
    """The cross-entropy with what a form believes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """As `Believed` does."""
        assert teacher is not None
        y, kept = batch.y, batch.y != IGNORED
        z, p = (by_class(full(one.logits), y) for one in (student, teacher))
        believed = self.believed(y, p.softmax(-1))
        z = z.masked_fill(~kept.unsqueeze(-1), 0)
        values = cross_entropy(z.flatten(0, -2), believed.flatten(0, -2)).view(y.shape) * kept
        return values.flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)

    def believed(self, y: Tensor, p: Tensor) -> Tensor:
        """``(..., C)``, from labels and the teacher's probabilities."""
        posterior = elements.element_posterior(y, p.argmax(-1), self.channel, self.joint)
        if self.form == HARD:
            return F.one_hot(posterior.argmax(-1), p.shape[-1]).float()
        if self.form == SOFT:
            by_label = elements.element_posterior(y, p.argmax(-1), torch.ones_like(self.channel), self.joint)
            return elements.normalised(by_label * (self.channel @ p.unsqueeze(-1)).squeeze(-1))
        label = F.one_hot(y.clamp(min=0), p.shape[-1]) * (y >= 0).unsqueeze(-1)
        right = (posterior * label).sum(-1, keepdim=True)
        if self.form in (WEIGHTED, REST):
            return right * label + (1 - right) * p * (self.form == REST)
        return posterior


class Numbers(BelievedNumbers):
    """The squared error of what a form believes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """As `BelievedNumbers` does; no target of these data is missing."""
        assert teacher is not None
        z, t = full(student.logits), full(teacher.logits)
        right, means = self.found.believed(batch.y, t)
        right = right.round() if self.form == HARD else right
        rest = (1 - right) * (z - (t if self.form == REST else means)).square() * (self.form != WEIGHTED)
        return (right * (z - batch.y).square() + rest).mean(-1)


class Form(ElementTrust):
    """With one part changed."""

    def __init__(self, form: str, **base: Any) -> None:
        super().__init__(**base)
        self.form = form

    def default_term(self) -> Term:
        """That of the form."""
        return Numbers(self.form) if self.task.name == "regression" else Classes(self.form)

    def on_fit_start(self) -> None:
        """Estimate, with what the form puts in the place of an estimate."""
        steps = 0 if self.form == FIXED else elements.STEPS
        with (
            patch.multiple(element_trust, **CHANGED.get(self.form, {"teacher_channel": elements.teacher_channel})),
            patch.object(elements, "STEPS", steps),
        ):
            super().on_fit_start()


def fitted(make: Callable[..., Distiller], recipe: dict[str, Any], seed: int) -> tuple[nn.Module, float]:
    """The student of the best epoch by validation, and its test score in %."""
    defaults = recipe["defaults"]
    given, data_options = dict(defaults["model"]["init_args"]), defaults["data"].get("init_args", {})
    optimizer = partial(torch.optim.Adam, **given.pop("optimizer")["init_args"])
    seed_everything(seed, verbose=False)
    data = getattr(lit_kd.data, defaults["data"]["class_path"])(seed=seed, **data_options)
    sizes = {"num_classes": data.num_classes, "input_shape": list(data.input_shape), "optimizer": optimizer}
    model = make(given | sizes)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor=f"val/{model.task.score}", mode=model.task.best)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", max_epochs=defaults["trainer"]["max_epochs"], callbacks=[best], **quiet)
        trainer.fit(model, data)
        [found] = trainer.test(model, data, ckpt_path=best.best_model_path, weights_only=False, verbose=False)
    return model.student, 100 * found[f"test/{model.task.score}"]


def forms_of(world: str) -> list[str]:
    """Those that make sense there."""
    return [form for form in FORMS if world != "numbers" or form not in OF_CLASSES]


def table(found: dict[str, float]) -> str:
    """Means and standard deviations over the seeds that are complete."""
    seeds = sorted({key.rsplit(" | ", 1)[1] for key in found})
    keys = [f"{world} | {form}" for world in RECIPES for form in forms_of(world)]
    seeds = [seed for seed in seeds if all(f"{key} | {seed}" in found for key in keys)]
    lines = [f"Seeds {', '.join(seeds)}:\n", "| form | tags | shapes | attributes | numbers, R² |", "| --- " * 5 + "|"]
    for form in ["the teacher", *FORMS]:
        cells = []
        for world in RECIPES:
            own = [found[key] for seed in seeds if (key := f"{world} | {form} | {seed}") in found]
            spread = f" ± {stdev(own):.1f}" if len(own) > 1 else ""
            cells.append(f"{mean(own):.1f}{spread}" if own else "")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not done, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "elements.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[str, float] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in args.seeds:
        for world in args.worlds:
            recipe: Any = read_yaml(HERE.parents[1] / "configs" / "recipes" / f"{RECIPES[world]}.yaml")
            left = [form for form in forms_of(world) if f"{world} | {form} | {seed}" not in found]
            if not left:
                continue
            strong = recipe["teacher"]["model"]["init_args"]
            teacher, score = fitted(lambda base: Supervised(**base | strong), recipe, seed)  # noqa: B023
            found[f"{world} | the teacher | {seed}"] = round(score, 2)
            for form in left:
                make = partial(Supervised) if form == LABELS else partial(Form, form, teacher=teacher)
                score = fitted(lambda base: make(**base), recipe, seed)[1]  # noqa: B023
                found[f"{world} | {form} | {seed}"] = round(score, 2)
                print(world, form, seed, found[f"{world} | {form} | {seed}"], flush=True)
                write_whole(args.output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_whole(args.output.with_suffix(".md"), table(found))


if __name__ == "__main__":
    main()
