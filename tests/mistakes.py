"""Mistakes that people make, by room: `docs/mistakes.md` says what each is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import QUIET, call, configs
from lightning import LightningDataModule
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler, default_collate

from lit_kd import (
    ALMKD,
    DKD,
    KD,
    Distiller,
    FitNet,
    MixKD,
    MutualLearning,
    RobustActiveDistillation,
    SimKD,
    SLaM,
    Supervised,
    WeightedDistillation,
)
from lit_kd.data import DistillationDataModule, ImageFolderDataModule, MNISTDataModule
from lit_kd.models import adapt, build_model, load_teacher
from lit_kd.terms import KL, CrossEntropy, GeneralizedCrossEntropy, Hint

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def net() -> nn.Module:
    return trained_teachers()[1]


def of_nan() -> nn.Module:
    broken = net()
    torch.nn.init.constant_(next(broken.parameters()), torch.nan)
    return broken


def kd(teacher: Any = None, student: Any = "mlp-8", **options: Any) -> KD:
    return KD(student, net() if teacher is None else teacher, **(BASE | options))


def almkd(student: Any = "mlp-8", **options: Any) -> ALMKD:
    return ALMKD(student, net(), **(BASE | options))


def fit(model: Distiller, data: Any = None, ckpt_path: Any = None, **flags: Any) -> None:
    """Train, on `Blobs` unless it is said on what."""
    data = Blobs(seed=0) if data is None else data
    given = {"datamodule": data} if isinstance(data, LightningDataModule) else {"train_dataloaders": data}
    trainer(**flags).fit(model, **given, ckpt_path=ckpt_path)


def on(**options: Any) -> None:
    """Train KD on data with these options."""
    fit(kd(), Blobs(**options))


def rows(y: Tensor | None = None, x: Tensor | None = None) -> TensorDataset:
    inputs, labels = blobs()
    return TensorDataset(inputs if x is None else x, labels if y is None else y)


def called(*names: str) -> TensorDataset:
    """Rows whose classes have names."""
    made = rows()
    made.classes = list(names)  # type: ignore[attr-defined]
    return made


def marked(missing: int) -> Tensor:
    """Labels of which those of class 0 are missing."""
    y = blobs()[1]
    return y.where(y > 0, missing)


def labelled(y: Any) -> None:
    """Train KD on batches with these labels."""
    fit(kd(), DataLoader(rows(y), 8))


class Items(Dataset[Any]):
    """Rows, each made by a function of an input and a label."""

    def __init__(self, item: Callable[[Tensor, Tensor], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return len(blobs()[0])

    def __getitem__(self, i: int) -> Any:
        return self.item(*(part[i] for part in blobs()))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows())


class Corrupt(Blobs):
    """Training labels that are changed once they are loaded."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change

    def load(self) -> Any:
        source = super().load()
        source.labels = self.change(source.labels)
        return source


class Named(Blobs):
    """Data whose classes have names."""

    def __init__(self, *names: str) -> None:
        super().__init__(seed=0)
        self.class_names = list(names)


class Returns(nn.Module):
    """A network that returns more than logits."""

    def __init__(self, out: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.out = net(), out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.net(x))


def wrap(train: Any = None, val: Any = None, **options: Any) -> None:
    """Train KD on wrapped loaders or data sets."""
    parts = [rows() if train is None else train, rows() if val is None else val]
    loaders = [DataLoader(part, 8) if isinstance(part, Dataset) else part for part in parts]
    fit(kd(), DistillationDataModule.from_loaders(*loaders, **({"meta": 24} | options)))


def checkpoint(model: Distiller | None = None, data: Any = None, **options: Any) -> str:
    """The path of the checkpoint of a training."""
    fitted = trainer(max_steps=1)
    fitted.fit(model or Supervised("mlp-8", **BASE), data or Blobs(seed=0))
    fitted.save_checkpoint("teacher.ckpt", **options)
    return "teacher.ckpt"


def saved(content: Any) -> str:
    torch.save(content, "theirs.pt")
    return "theirs.pt"


def written(name: str, content: str) -> str:
    Path(name).write_text(content)
    return name


def folder(name: str) -> str:
    Path(name).mkdir()
    return name


MISTAKES: dict[str, dict[str, Callable[[], Any]]] = {
    "Data and splits": {
        'ALMKD with `rule="paper"` and `meta=0`': lambda: fit(almkd(rule="paper"), Blobs(meta=0)),
        "ALMKD with `meta=0`": lambda: fit(almkd(), Blobs(meta=0)),
        "a list as size of a split": lambda: on(meta=[24]),
        "`meta=1.5`": lambda: on(meta=1.5),
        "fewer meta rows than classes": lambda: on(meta=2),
        "splits larger than the data": lambda: on(meta=80, val=80),
        "no validation rows, but a best epoch": lambda: fit(
            kd(), Blobs(val=0), callbacks=ModelCheckpoint(monitor="val/accuracy"), enable_checkpointing=True
        ),
        "ALMKD without validation rows": lambda: fit(almkd(), Blobs(val=0)),
        "`drop_last` with a batch larger than the data": lambda: on(batch_size=1000, drop_last=True),
        "`batch_size=0`": lambda: on(batch_size=0),
        "BatchNorm, and a last batch of one row": lambda: fit(kd(student="cnn-2"), Blobs(batch_size=47)),
        "row weights of an unknown kind": lambda: on(row_weights="balance"),
        "too few row weights": lambda: on(row_weights=[1.0] * 4),
        "ALMKD with `train_on_meta=False`": lambda: fit(almkd(), Blobs(train_on_meta=False)),
        "WeightedDistillation with `train_on_meta=True`": lambda: fit(
            WeightedDistillation("mlp-8", net(), **BASE), Blobs(train_on_meta=True)
        ),
        "asked for sizes before `setup`": lambda: Blobs().train_size,
        "an image folder that is not there": lambda: fit(kd(), ImageFolderDataModule(root="gone", image_size=8)),
        "MNIST, which was never downloaded": lambda: fit(kd(), MNISTDataModule(root="gone")),
    },
    "Labels": {
        "counted classes from 1": lambda: labelled(blobs()[1] + 1),
        "the same in a data module of one's own": lambda: fit(kd(), Corrupt(lambda y: y + 1)),
        "marked missing labels by -2": lambda: fit(kd(), Corrupt(lambda y: y - 2 * (y == 0))),
        "marked missing labels by -100": lambda: labelled(marked(-100)),
        "a missing label in validation": lambda: trainer().validate(kd(), DataLoader(rows(marked(-1)), 8)),
        "names of classes as labels": lambda: fit(kd(), DataLoader(Items(lambda x, y: (x, "abc"[y])), 8)),
        "whole numbers, one-hot": lambda: labelled(torch.eye(3).long()[blobs()[1]]),
        "the same in the wrapper": lambda: wrap(rows(torch.eye(3).long()[blobs()[1]])),
        "class numbers of type float": lambda: labelled(blobs()[1].float()),
        "soft labels that sum to more than 1": lambda: labelled(torch.full((120, 3), 0.5)),
        "soft labels with label noise": lambda: wrap(
            rows(torch.full((120, 3), 1 / 3)), noise="symmetric", noise_rate=0.4
        ),
        "class numbers for `task='multilabel'`": lambda: fit(kd(task="multilabel"), DataLoader(rows(), 8)),
        "`num_classes=1`": lambda: kd(num_classes=1),
        "`num_classes='3'`": lambda: kd(num_classes="3"),
        "`num_classes` one too low": lambda: fit(Supervised("mlp-8", **BASE | {"num_classes": 2})),
        "the same, and loaders": lambda: fit(Supervised("mlp-8", **BASE | {"num_classes": 2}), DataLoader(rows(), 8)),
        "`num_classes` one too high": lambda: fit(Supervised("mlp-8", **BASE | {"num_classes": 4})),
        "a noise rate in percent": lambda: on(noise="symmetric", noise_rate=40),
        "noise of an unknown kind": lambda: on(noise="pairflip", noise_rate=0.4),
        "a noise rate without a kind": lambda: on(noise_rate=0.4),
        "a kind of noise without a rate": lambda: on(noise="symmetric"),
        "a transition matrix of other classes": lambda: on(transition=[[0.5, 0.5], [0.5, 0.5]]),
        "pairs of classes as a list": lambda: on(noise="asymmetric", noise_rate=0.4, pairs=[(1, 2)]),
        "kept fewer labels than classes": lambda: on(labeled=2),
        "SLaM where all rows have labels": lambda: fit(SLaM("mlp-8", net(), **BASE)),
    },
    "Networks": {
        "an unknown name": lambda: kd(student="resnet21"),
        "an mlp without `input_shape`": lambda: kd(input_shape=None),
        "a number as `input_shape`": lambda: kd(input_shape=16),
        "a student for other input channels": lambda: fit(kd(student=build_model("cnn-2", 3, (3, 4, 4)))),
        "a teacher of other classes": lambda: fit(kd(build_model("mlp-8", 5, SHAPE))),
        "a student of other classes": lambda: fit(kd(student=build_model("mlp-8", 4, SHAPE))),
        "no teacher": lambda: fit(KD("mlp-8", **BASE)),
        "one network as teacher and student": lambda: (lambda same: fit(kd(same, same)))(net()),
        "a class in place of a network": lambda: kd(student=nn.Linear),
        "a name as teacher": lambda: fit(kd("mlp-8")),
        "a teacher that ends in a softmax": lambda: fit(kd(nn.Sequential(net(), nn.Softmax(-1)))),
        "a network that returns a mapping": lambda: fit(kd(Returns(lambda out: {"out": out}))),
        "a wrong place of the logits": lambda: fit(kd(adapt(Returns(lambda out: (out, out)), logits=4))),
        "a head that is not there": lambda: adapt(net(), head="fc"),
        "inputs with NaN": lambda: fit(kd(), DataLoader(rows(x=blobs()[0] * torch.nan), 8)),
        "a teacher with NaN among its weights": lambda: fit(kd(of_nan())),
        "inputs of type uint8": lambda: fit(kd(), DataLoader(rows(x=blobs()[0].byte()), 8)),
        "a student that is frozen": lambda: fit(kd(student=net().requires_grad_(False))),
        "ALMKD, and no linear layer at the end": lambda: fit(almkd(nn.Sequential(net(), nn.Tanh()), rule="paper")),
        "a layer that is not there": lambda: fit(FitNet("cnn-2", trained_teachers()[0], student_tap="layer_2", **BASE)),
        "a class that cannot be imported": lambda: kd(student="my_project.Net"),
        "`pretrained` for a network of lit_kd": lambda: kd(pretrained=True),
        "a name in place of a list of peers": lambda: MutualLearning("mlp-8", "mlp-8", **BASE),
        "SimKD with two teachers": lambda: SimKD("mlp-8", trained_teachers(), **BASE),
    },
    "Checkpoints": {
        "a teacher's file that is not there": lambda: fit(kd("gone.ckpt")),
        "the same, in a test": lambda: trainer().test(kd("gone.ckpt"), Blobs(), verbose=False),
        "a run's directory as teacher": lambda: fit(kd(folder("run"))),
        "a directory in place of a file": lambda: fit(kd(folder("run.ckpt"))),
        "another file": lambda: fit(kd(written("a.ckpt", "hello"))),
        "a checkpoint of another project": lambda: fit(kd(saved({"state_dict": {"model.a": torch.ones(1)}}))),
        "a pickled network": lambda: fit(kd(saved(net()))),
        "one that was trained as a live network": lambda: fit(kd(checkpoint(Supervised(net(), **BASE)))),
        "one of other classes": lambda: fit(kd(checkpoint(), num_classes=4)),
        "one of another task": lambda: fit(kd(checkpoint(), task="multilabel"), DataLoader(rows(), 8)),
        "one of classes in another order": lambda: fit(
            kd(checkpoint(data=Named("ant", "bee", "cat"))), Named("bee", "cat", "dog")
        ),
        "a wrong prefix": lambda: load_teacher(saved(net().state_dict()), net(), prefix="net."),
        "weights of a network of other widths": lambda: load_teacher(
            saved(build_model("mlp-9", 3, SHAPE).state_dict()), net()
        ),
        "resumed with another student": lambda: fit(Supervised("mlp-9", **BASE), ckpt_path=checkpoint()),
        "resumed ALMKD on other data": lambda: fit(almkd(), Blobs(seed=0, meta=12), ckpt_path=checkpoint(almkd())),
        "resumed ALMKD with another rule": lambda: fit(almkd(rule="amal"), ckpt_path=checkpoint(almkd(rule="paper"))),
        "resumed ALMKD with more teachers": lambda: fit(
            ALMKD("mlp-8", trained_teachers(), **BASE), ckpt_path=checkpoint(almkd())
        ),
        "resumed without the optimizer's state": lambda: fit(
            Supervised("mlp-8", **BASE), ckpt_path=checkpoint(weights_only=True)
        ),
        "resumed from a file that is not there": lambda: fit(kd(), ckpt_path="gone.ckpt"),
        "started weights from a checkpoint without any": lambda: fit(almkd(start_weights=checkpoint())),
        "started weights from a table of other columns": lambda: fit(
            almkd(start_weights=written("w.csv", "index,weight\n0,1\n"))
        ),
    },
    "Loaders and wrappers": {
        "ALMKD with loaders": lambda: fit(almkd(), DataLoader(rows(), 8)),
        "a data set in place of a loader": lambda: fit(kd(), rows()),
        "a loader in the wrapper": lambda: DistillationDataModule(DataLoader(rows())),
        "data of lit_kd in the wrapper": lambda: DistillationDataModule(Blobs()),
        "an IterableDataset in the wrapper": lambda: wrap(Stream()),
        "two training loaders in the wrapper": lambda: wrap([DataLoader(rows())] * 2),
        "several validation loaders in the wrapper": lambda: wrap(val=[DataLoader(rows())] * 2),
        "no validation loader in the wrapper": lambda: fit(
            almkd(), DistillationDataModule.from_loaders(DataLoader(rows(), 8))
        ),
        "training rows among the validation rows": lambda: (lambda same: wrap(same, same))(rows()),
        "a validation loader that draws rows by weight": lambda: wrap(
            val=DataLoader(rows(), 8, sampler=WeightedRandomSampler([1.0] * 120, 120))
        ),
        "a generator for the loader's order": lambda: wrap(
            DataLoader(rows(), 8, shuffle=True, generator=torch.Generator())
        ),
        "`reload_dataloaders_every_n_epochs`": lambda: fit(
            kd(), DistillationDataModule.from_datasets(rows(), rows()), reload_dataloaders_every_n_epochs=1
        ),
        "a collate function that leaves out rows": lambda: wrap(
            DataLoader(rows(), 8, collate_fn=lambda items: default_collate(items[:4]))
        ),
        "a collate function that mixes rows": lambda: wrap(
            DataLoader(rows(), 8, collate_fn=lambda items: default_collate([(x, items[-1][1]) for x, _ in items]))
        ),
        "items that are None": lambda: wrap(Items(lambda x, y: None if y == 1 else (x, y))),
        "batches of inputs alone": lambda: fit(kd(), DataLoader(TensorDataset(blobs()[0]), 8)),
        "labels before inputs": lambda: wrap(TensorDataset(*blobs()[::-1])),
        "labels under a name that nobody knows": lambda: fit(
            kd(), DataLoader(Items(lambda x, y: {"x": x, "klass": y}), 8)
        ),
        "labels under two names": lambda: fit(kd(), DataLoader(Items(lambda x, y: {"x": x, "y": y, "label": y}), 8)),
        "a wrong `label_key`": lambda: wrap(Items(lambda x, y: {"x": x, "y": y}), label_key="target"),
        "classes of validation folders in another order": lambda: wrap(called("ant", "bee"), called("bee", "cat")),
        "the same of test folders": lambda: trainer().test(
            kd(),
            DistillationDataModule.from_datasets(called("ant", "bee"), rows(), called("ant", "cat", "bee"), 8),
            verbose=False,
        ),
        "an empty data set": lambda: wrap(TensorDataset(*(part[:0] for part in blobs()))),
        "`teacher_cache` with loaders": lambda: fit(kd(teacher_cache="memory"), DataLoader(rows(), 8)),
    },
    "Callbacks and trainer flags": {
        "ALMKD with `accumulate_grad_batches`": lambda: fit(almkd(), accumulate_grad_batches=4),
        "ALMKD with `gradient_clip_val`": lambda: fit(almkd(), gradient_clip_val=0.1),
        "ALMKD in half precision": lambda: fit(almkd(), precision="16-true"),
        "ALMKD without `max_epochs`": lambda: fit(almkd(), max_epochs=-1),
        "ALMKD in fewer epochs than its warm-up": lambda: fit(almkd(rule="paper"), max_epochs=1),
        "RAD in fewer epochs than rounds": lambda: fit(
            RobustActiveDistillation("mlp-8", net(), budget=2, rounds=9, **BASE)
        ),
        "ALMKD with `BatchSizeFinder`": lambda: fit(almkd(), callbacks=callbacks.BatchSizeFinder()),
        "ALMKD with `LearningRateFinder`": lambda: fit(almkd(), callbacks=callbacks.LearningRateFinder()),
        "KD with `BackboneFinetuning`": lambda: fit(kd(), callbacks=callbacks.BackboneFinetuning()),
        "ALMKD with `GradientAccumulationScheduler`": lambda: fit(
            almkd(), callbacks=GradientAccumulationScheduler({1: 2})
        ),
        "SimKD with `StochasticWeightAveraging`": lambda: fit(
            SimKD("mlp-8", net(), **BASE), callbacks=callbacks.StochasticWeightAveraging(0.01)
        ),
        "stopped by a metric that is not there": lambda: fit(kd(), callbacks=EarlyStopping("val_loss")),
        "kept the best of a metric that is not there": lambda: fit(
            kd(), callbacks=ModelCheckpoint(monitor="val_acc"), enable_checkpointing=True
        ),
        "`lr_scheduler='cosine'` without an end": lambda: fit(kd(lr_scheduler="cosine"), max_epochs=-1),
        "`ReduceLROnPlateau` that follows nothing": lambda: fit(kd(lr_scheduler=ReduceLROnPlateau)),
        "the data module's class": lambda: trainer().fit(kd(), Blobs),
    },
    "Options of methods and terms": {
        "a weight in percent": lambda: kd(weight=90),
        "a weight in quotes": lambda: kd(weight="0.9"),
        "the same of the data": lambda: on(batch_size="8"),
        "`temperature=0`": lambda: fit(kd(temperature=0)),
        "`revise=1.0`": lambda: kd(revise=1.0),
        "`select=50`": lambda: kd(select=50),
        "an unknown rule": lambda: almkd(rule="almkd"),
        "an unknown kind of meta-gradient": lambda: almkd(meta_gradient="full"),
        "an unknown task": lambda: kd(task="ranking"),
        "an option that is not there": lambda: kd(wieght=0.9),
        "a term's class in place of a term": lambda: kd(term=KL),
        "one term as `extra`": lambda: kd(extra=KL()),
        "a label's term in the teacher's place": lambda: fit(kd(term=CrossEntropy())),
        "a teacher's term in the label's place": lambda: fit(kd(label_term=KL())),
        "a teacher's term where no teacher is": lambda: fit(Supervised("mlp-8", extra=[KL()], **BASE)),
        "ALMKD, and a term of features": lambda: fit(almkd(term=Hint(), rule="paper")),
        "`CrossEntropy(label_smoothing=1.5)`": lambda: CrossEntropy(label_smoothing=1.5),
        "too few class weights": lambda: fit(kd(label_term=CrossEntropy(class_weights=[1.0, 2.0]))),
        "`GeneralizedCrossEntropy(q=0)`": lambda: GeneralizedCrossEntropy(q=0),
        "`DKD(alpha=-1)`": lambda: DKD("mlp-8", net(), alpha=-1, **BASE),
        "MixKD with `teacher_cache`": lambda: fit(MixKD("mlp-8", net(), teacher_cache="memory", **BASE)),
        "`mix` by a name that is none": lambda: kd(mix="cutout"),
        "`mix` with `teacher_cache`": lambda: fit(kd(mix="mixup", teacher_cache="memory")),
        "`mix` of rows that are no images": lambda: fit(kd(mix="mixup"), DataLoader(rows(x=blobs()[0].flatten(1)), 8)),
        "an optimizer by name": lambda: fit(kd(optimizer="adam")),
        "an optimizer that is made already": lambda: fit(kd(optimizer=Adam(net().parameters()))),
        "an unknown scheduler": lambda: fit(kd(lr_scheduler="linear")),
        "an unknown `lr_interval`": lambda: fit(kd(lr_interval="batch")),
        "`accumulate_grad_batches=0` for ALMKD": lambda: almkd(accumulate_grad_batches=0),
        "start weights above 1": lambda: fit(almkd(start_weights=2.0)),
    },
    "Command line": {
        "`lit-kd train`": lambda: call("train"),
        "a config that is not there": lambda: call("fit", "--config", "gone.yaml"),
        "a misspelt method's config": lambda: call("fit", "--config", "methods/kdd"),
        "neither model nor data": lambda: call("fit"),
        "a misspelt method": lambda: call("fit", "--model=KDD"),
        "a misspelt option": lambda: call("fit", *configs("kd"), "--model.wieght=0.3"),
        "a word as weight": lambda: call("fit", *configs("kd"), "--model.weight=high"),
        "an unknown kind of noise": lambda: call("fit", *configs("kd"), "--data.noise=pairflip"),
        "a misspelt flag of the trainer": lambda: call("fit", *configs("kd"), "--trainer.epochs=3"),
        "no teacher": lambda: call("fit", *configs("kd"), *QUIET, "--model.student=mlp-8"),
        "a misspelt network": lambda: call("fit", *configs("supervised"), *QUIET, "--model.student=resnet21"),
        "a checkpoint that is not there": lambda: call(
            "test", *configs("supervised"), *QUIET, "--model.student=mlp-8", "--ckpt_path=gone.ckpt"
        ),
        "weights alone as checkpoint": lambda: call(
            "test", *configs("supervised"), *QUIET, "--model.student=mlp-16", "--ckpt_path", saved(net().state_dict())
        ),
        "a misspelt recipe": lambda: call("compare", "digits_pairs"),
        "a config of `fit` as recipe": lambda: call("compare", written("fit.yaml", "model: {class_path: KD}")),
        "a recipe that is no YAML": lambda: call("compare", written("broken.yaml", "a: [1")),
        "`compare --set` without a part": lambda: call("compare", "digits_pair", "--set", "max_epochs=3"),
        "a run that is not there": lambda: call("audit", "gone"),
        "an unknown format": lambda: call("export", "a.ckpt", "--format=tflite"),
        "a file of another format": lambda: call("export", checkpoint(), "--format=onnx", "--output=s.pt"),
        "images that are not there": lambda: call("predict", "a.ckpt", "images"),
        "a table of an unknown kind": lambda: call("samples", "run", "--output=s.txt"),
    },
}
