"""Who takes part: the same distillation of resnet56 into resnet20, or of a tiny network, written in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from turns import Source, Turns

from lit_kd import KD, Distiller
from lit_kd.data import DataModule, TensorRows
from lit_kd.data import Source as Rows
from lit_kd.models import build_model

CLASSES, TEMPERATURE, WEIGHT, LR = 10, 4.0, 0.9, 0.05


class Setting(NamedTuple):
    """What is trained.

    Attributes:
        student: A model's name.
        teacher: Likewise.
        shape: Of an input.
        batch_size: B.
        device: ``"cpu"`` or ``"cuda"``.
    """

    student: str
    teacher: str
    shape: tuple[int, ...]
    batch_size: int
    device: str

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, with the same weights each time."""
        torch.manual_seed(0)
        student, teacher = (build_model(n, CLASSES, self.shape).to(self.device) for n in (self.student, self.teacher))
        return student, teacher.eval().requires_grad_(False)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        draw = torch.Generator().manual_seed(0)
        count = 48 * self.batch_size
        return torch.randn(count, *self.shape, generator=draw), torch.arange(count) % CLASSES

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, from a loader as it is usually written."""
        loader = DataLoader(TensorDataset(*self.rows()), self.batch_size, shuffle=True)
        while True:
            for x, y in loader:
                yield x.to(self.device), y.to(self.device)


def losses(logits: Tensor, taught: Tensor, y: Tensor, reduction: str = "batchmean") -> tuple[Tensor, Tensor]:
    """Label and teacher term: means over the batch, or ``reduction="none"`` per sample."""
    student, teacher = F.log_softmax(logits / TEMPERATURE, 1), F.softmax(taught / TEMPERATURE, 1)
    divergence = F.kl_div(student, teacher, reduction=reduction)
    label = F.cross_entropy(logits, y, reduction="mean" if reduction == "batchmean" else reduction)
    return label, TEMPERATURE**2 * (divergence.sum(1) if reduction == "none" else divergence)


def sgd(student: nn.Module) -> torch.optim.SGD:
    """As a bare loop has it."""
    return torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4)


def bare(setting: Setting) -> Callable[[Turns], None]:
    """A loop as it is usually written: first the student, then the teacher."""

    def loop(turns: Turns) -> None:
        student, teacher = setting.networks()
        optimizer = sgd(student)
        for x, y in turns.batches(setting.batches()):
            logits = student(x)
            with torch.no_grad():
                taught = teacher(x)
            label, distilled = losses(logits, taught, y)
            optimizer.zero_grad()
            ((1 - WEIGHT) * label + WEIGHT * distilled).backward()
            optimizer.step()

    return loop


class PlainKD(LightningModule):
    """The same as a LightningModule, which logs each term and the loss of steps, or the epoch's means."""

    def __init__(self, setting: Setting, logs: Literal["steps", "means"] | None) -> None:
        super().__init__()
        self.student, teacher = setting.networks()
        self.teacher = [teacher]
        self.logs = logs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.student(x)
        with torch.no_grad():
            taught = self.teacher[0](x)
        label, distilled = losses(logits, taught, y)
        loss = (1 - WEIGHT) * label + WEIGHT * distilled
        if self.logs:
            kind: dict[str, Any] = {"on_step": False, "on_epoch": True} if self.logs == "means" else {}
            self.log_dict({"train/label": label, "train/teacher": distilled}, batch_size=len(y), **kind)
            self.log("train/loss", loss, prog_bar=True, batch_size=len(y), **kind)
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(self.student)


def trainer(setting: Setting, bar: ProgressBar | None) -> Trainer:
    """A trainer that writes no checkpoints; with a progress bar, also Lightning's default logger."""
    quiet = {"logger": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu" if setting.device == "cpu" else "gpu",
        devices=1,
        max_epochs=10**6,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir="runs/bench",
        **(quiet if bar is None else {"callbacks": [bar]}),
    )


def plain(setting: Setting, logs: Literal["steps", "means"] | None = None) -> Callable[[Turns], None]:
    """Plain Lightning."""

    def loop(turns: Turns) -> None:
        bar = terminal_bar() if logs else None
        trainer(setting, bar).fit(PlainKD(setting, logs), Source(turns, setting.batches()))

    return loop


class Data(DataModule):
    """The rows as a data module of lit_kd."""

    num_classes = CLASSES

    def __init__(self, setting: Setting, turns: Turns) -> None:
        super().__init__(batch_size=setting.batch_size, meta=4 * setting.batch_size, val=2 * setting.batch_size, seed=0)
        self.setting, self.turns, self.input_shape = setting, turns, setting.shape

    def load(self) -> Rows:
        x, y = self.setting.rows()
        rows = TensorRows(x)
        return Rows(rows, rows, y.numpy(), test_size=2 * self.setting.batch_size, identity=b"bench")

    def train_dataloader(self) -> Any:
        return Source(self.turns, super().train_dataloader())


def terminal_bar() -> ProgressBar:
    """The progress bar of ``lit-kd fit`` in a terminal."""
    return RichProgressBar(console_kwargs={"force_terminal": True})


def ours(setting: Setting, method: type[Distiller] = KD, logs: bool = False, **options: Any) -> Callable[[Turns], None]:
    """lit_kd, as its users run it: a method, a data module, a trainer."""

    def loop(turns: Turns) -> None:
        student, teacher = setting.networks()
        model = method(student, teacher, num_classes=CLASSES, **({"weight": WEIGHT} if method is KD else {}), **options)
        trainer(setting, terminal_bar() if logs else None).fit(model, Data(setting, turns))

    return loop


def torchdistill(setting: Setting) -> Callable[[Turns], None]:
    """Its distillation box, without hooks on inner layers."""
    from torchdistill.core.distillation import DistillationBox

    def loop(turns: Turns) -> None:
        student, teacher = setting.networks()
        kd = {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": 1 - WEIGHT,
        }
        config = {
            "num_epochs": 1,
            "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only", "sequential": []},
            "optimizer": {
                "key": "SGD",
                "kwargs": {"lr": LR, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            },
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
            },
        }
        device = torch.device(setting.device)
        box = DistillationBox(teacher, student, {}, config, device, None, False, 1)
        box.pre_epoch_process(epoch=0)
        for x, y in turns.batches(setting.batches()):
            box.pre_forward_process()
            loss = box.forward_process(x, y, None)
            box.post_forward_process(loss=loss)

    return loop


Meta = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Student, inputs, labels, teacher's logits, weights, meta inputs and labels; gives the derivative by the weights."""


def weighted(logits: Tensor, taught: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The inner loss."""
    return (torch.stack(losses(logits, taught, y, "none"), 1) * weights).sum(1).mean()


def double_backward(student, x, y, taught, weights, meta_x, meta_y):  # type: ignore[no-untyped-def]
    """The meta-gradient by a graph of second order, by PyTorch alone."""
    names, theta = zip(*student.named_parameters(), strict=True)
    inner = weighted(student(x), taught, y, weights)
    gradients = torch.autograd.grad(inner, theta, create_graph=True)
    fast = {n: p - LR * g for n, p, g in zip(names, theta, gradients, strict=True)}
    student.eval()
    outer = F.cross_entropy(functional_call(student, fast, (meta_x,)), meta_y)
    student.train()
    return torch.autograd.grad(outer, weights)[0]


def with_higher(student, x, y, taught, weights, meta_x, meta_y):  # type: ignore[no-untyped-def]
    """The same by higher."""
    import higher

    with higher.innerloop_ctx(student, torch.optim.SGD(student.parameters(), lr=LR)) as (functional, optimizer):
        optimizer.step(weighted(functional(x), taught, y, weights))
        functional.eval()
        return torch.autograd.grad(F.cross_entropy(functional(meta_x), meta_y), weights)[0]


def with_torchopt(student, x, y, taught, weights, meta_x, meta_y):  # type: ignore[no-untyped-def]
    """The same by torchopt."""
    import torchopt

    optimizer = torchopt.MetaSGD(student, lr=LR)
    before = torchopt.extract_state_dict(student, by="reference")
    optimizer.step(weighted(student(x), taught, y, weights))
    student.eval()
    outer = F.cross_entropy(student(meta_x), meta_y)
    student.train()
    gradient = torch.autograd.grad(outer, weights)[0]
    torchopt.recover_state_dict(student, before)
    return gradient


def with_meta(setting: Setting, meta: Meta) -> Callable[[Turns], None]:
    """The bare loop with a meta-gradient in each step."""

    def loop(turns: Turns) -> None:
        student, teacher = setting.networks()
        optimizer, meta_batches = sgd(student), setting.batches()
        weights = torch.tensor([1 - WEIGHT, WEIGHT], device=setting.device).repeat(setting.batch_size, 1)
        for x, y in turns.batches(setting.batches()):
            with torch.no_grad():
                taught = teacher(x)
            meta(student, x, y, taught, weights.requires_grad_(), *next(meta_batches))
            loss = weighted(student(x), taught, y, weights.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return loop


def installed(package: str) -> bool:
    """Whether a package that is only wanted for the benchmark is there; if not, says so."""
    found = find_spec(package) is not None
    if not found:
        print(f"{package} is not installed and takes no part: pip install 'lit_kd[bench]'")
    return found
