"""Losses for wrong labels that keep something, against their papers' equations and code written anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import QUIET, call, configs, read_csv, version
from lightning import seed_everything
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from test_every_method import Each
from torch import Tensor, nn

from lit_kd import ALMKD, GLC, KD, Batch, MutualLearning, Outputs, Supervised
from lit_kd.data import Source, TensorRows
from lit_kd.data.table import SampleTable
from lit_kd.losses import corrected_cross_entropy, overparameterized_loss
from lit_kd.models import build_model
from lit_kd.teachers.modules import Teachers
from lit_kd.terms import ELR, SOP, CrossEntropy, ForwardCorrection, Term
from lit_kd.trust.transition import anchor_transition, gold_transition
from lit_kd.types import UNLABELED
from lit_kd.weightings import Paper

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
C, B, N = 4, 6, 9


def draw(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def noise(seed: int = 0) -> Tensor:
    """A transition matrix that can be undone."""
    rows = torch.rand(C, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.6 * torch.eye(C, dtype=torch.float64) + 0.4 * rows / rows.sum(1, keepdim=True)


def started(term: Term) -> Term:
    """A term with a table of N rows in float64."""
    term.build(Outputs(torch.zeros(1, C), {}), None)
    table = SampleTable(N, "")
    term.start(table, torch.zeros(N, dtype=torch.int64))
    table.apply(Tensor.double)
    return term


class TestForward:
    def test_by_its_formula(self) -> None:
        z, y, t = draw(B, C), torch.tensor([0, 1, 2, 3, UNLABELED, 1]), noise()
        found = ForwardCorrection(t.tolist()).double().loss(z, y)
        for b in range(B):
            p = np.exp(z[b].numpy()) / np.exp(z[b].numpy()).sum()
            expected = -math.log(sum(t[i, y[b]] * p[i] for i in range(C))) if y[b] != UNLABELED else 0
            assert found[b].item() == pytest.approx(expected, rel=1e-6)

    def test_of_no_noise_is_cross_entropy(self) -> None:
        z, y = draw(B, C, scale=20.0).requires_grad_(), torch.arange(B) % C
        plain, found = F.cross_entropy(z, y, reduction="none"), ForwardCorrection(torch.eye(C)).double().loss(z, y)
        torch.testing.assert_close(found, plain)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), z), torch.autograd.grad(plain.sum(), z))

    def test_its_minimiser_is_the_clean_posterior(self) -> None:
        posterior, t = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64), noise(1)
        given, z = posterior @ t, torch.zeros(C, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")
        term = ForwardCorrection(t).double()
        term.matrix = t

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (given * term.loss(z.expand(C, C), torch.arange(C))).sum()
            value.backward()
            return value

        optimizer.step(loss)
        torch.testing.assert_close(z.softmax(0).detach(), posterior, rtol=1e-4, atol=1e-5)

    def test_a_label_that_cannot_be_teaches_nothing(self) -> None:
        z = torch.randn(2, C, requires_grad=True)
        loss = corrected_cross_entropy(z, torch.tensor([[0.0] * C, [0.5, 0.0, 0.0, 0.0]]))
        [gradient] = torch.autograd.grad(loss.sum(), z)
        assert loss.isfinite().all()
        torch.testing.assert_close(gradient[0], torch.zeros(C), rtol=0, atol=1e-5)
        assert gradient[1, 0] < -0.1

    def test_anchors_by_a_loop(self) -> None:
        """Where many rows are left out, a row left out for one class may be the anchor of another, unchanged."""
        for drop in (0.0, 0.03, 0.6):
            p = draw(100, C).softmax(1)
            before, expected = p.clone(), []
            for i in range(C):
                order = sorted(range(100), key=lambda row, i=i: -float(p[row, i]))
                expected.append(p[order[int(drop * 100)]])
            assert torch.equal(anchor_transition(p, drop), torch.stack(expected))
            assert torch.equal(p, before)

    def test_anchors_of_a_perfect_network(self) -> None:
        clean = torch.cat([torch.eye(C).double().repeat(10, 1), draw(50, C).softmax(1)])
        torch.testing.assert_close(anchor_transition(clean @ noise(), 0.03), noise())

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: ForwardCorrection([[0.9, 0.2], [0.0, 1.0]]), "whose rows are at least 0 and sum to 1"),
            (lambda: ForwardCorrection([[0.9, 0.1]]), "a 1 x 1 transition matrix, found shape"),
            (
                lambda: ForwardCorrection(torch.eye(3)).loss(torch.zeros(2, 4), torch.tensor([0, 1])),
                "expected 3 logits",
            ),
            (
                lambda: ForwardCorrection(torch.eye(2)).loss(torch.zeros(2, 2), torch.eye(2)),
                "found 2 logits and labels of torch.float32",
            ),
            (lambda: anchor_transition(torch.eye(2), 1.0), r"drop in \[0, 1\)"),
            (lambda: anchor_transition(torch.zeros(0, 2)), "expected rows"),
            (lambda: ELR(decay=1.0), "found 1.0 and 3.0"),
            (lambda: ELR(strength=-1.0), "found 0.7 and -1.0"),
            (lambda: SOP(lr_u=-1.0), "found -1.0 and 10.0"),
            (lambda: overparameterized_loss(torch.eye(2), torch.eye(2), torch.ones(2), torch.ones(2, 2)), "for SOP"),
            (lambda: Supervised("mlp-8", task="multilabel", label_term=ELR(), **BASE).make_terms(), "for multilabel"),
            (lambda: MutualLearning("mlp-8", ["mlp-12"], label_term=SOP(), **BASE), "SOP"),
            (lambda: GLC("mlp-8", label_term=CrossEntropy(), **BASE), "no label_term: GLC has its own"),
        ],
    )
    def test_what_is_refused(self, make: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make()


class TestELR:
    def test_equals_a_loop(self) -> None:
        """Whole trainings, with the running mean renewed before the loss as in the authors' code."""
        seed_everything(0, verbose=False)
        net = build_model("mlp-8", CLASSES, SHAPE)
        student = build_model("mlp-8", CLASSES, SHAPE)
        student.load_state_dict(net.state_dict())
        data = Blobs(noise="symmetric", noise_rate=0.4)
        model = build("supervised", student, label_term=ELR(), optimizer=lambda p: torch.optim.SGD(p, 0.1))
        trainer(max_epochs=3).fit(model, data)
        optimizer, targets, loader = torch.optim.SGD(net.parameters(), 0.1), np.zeros((48, 3)), data.train_dataloader()
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            for x, y, index in loader:
                loss = torch.zeros(())
                for i, row in enumerate(index.tolist()):
                    p = net(x[i : i + 1])[0].softmax(0)
                    own = p.clamp(1e-4, 1 - 1e-4)
                    targets[row] = 0.7 * targets[row] + 0.3 * (own / own.sum()).detach().numpy()
                    q = torch.tensor(targets[row], dtype=torch.float32)
                    loss = loss + (-p[y[i]].log() + 3 * (1 - (q * own).sum()).log()) / len(y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(student.state_dict(), net.state_dict(), rtol=1e-4, atol=1e-5)
        assert model.table is not None
        found = model.table["label_elr_0"][:48].double().numpy()
        torch.testing.assert_close(found, targets, rtol=1e-4, atol=1e-5)

    def test_its_gradient_and_rows_without_a_label(self) -> None:
        """The regulariser's by z_c is ``-p_c (q_c - s) / (1 - s)`` with ``s = <q, p>`` [derived]."""
        term, z, index = started(ELR(0.7, 2.0)), draw(B, C, scale=1.0).requires_grad_(), torch.arange(B) + 2
        term.table["elr"] = draw(N, C).softmax(1)
        before, batch = term.table["elr"].clone(), Batch(z, torch.full((B,), UNLABELED), index)
        loss = term(Outputs(z, {}), None, batch)
        [found] = torch.autograd.grad(loss.sum(), z)
        assert torch.equal(term.table["elr"], before)  # no side effects
        p = z.detach().softmax(1)
        q = 0.7 * before[index] + 0.3 * p
        s = (q * p).sum(1, keepdim=True)
        torch.testing.assert_close(loss.detach(), 2 * (1 - s).log().squeeze(1))
        torch.testing.assert_close(found, -2 * p * (q - s) / (1 - s))
        term.update(Outputs(z.detach(), {}), None, batch)
        torch.testing.assert_close(term.table["elr"][index], q)
        torch.testing.assert_close(term.table["elr"][:2], before[:2])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_bounded_below(self, dtype: torch.dtype) -> None:
        term, batch = started(ELR(0.0, 1.0)), Batch(torch.zeros(1), torch.tensor([0]), torch.tensor([0]))
        term.table.apply(Tensor.float)
        sure = Outputs(torch.tensor([[100.0, 0, 0, 0]], dtype=dtype), {})
        most = 1 - 1e-4
        expected = math.log(1 - most * most / (most + 3e-4))
        assert term(sure, None, batch).item() == pytest.approx(expected, rel=1e-3)


class Published(nn.Module):
    """SOP's loss as the authors write it: parameters of all rows, the mean over a batch."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(u.clone()), nn.Parameter(v.clone())

    def forward(self, index: Tensor, z: Tensor, label: Tensor) -> Tensor:
        u_square = torch.clamp(self.u[index] ** 2 * label, 0, 1)
        v_square = torch.clamp(self.v[index] ** 2 * (1 - label), 0, 1)
        p = F.softmax(z, dim=1)
        shifted = F.normalize(torch.clamp(p + u_square - v_square.detach(), min=1e-4), p=1, eps=1e-4)
        shifted = torch.clamp(shifted, min=1e-4, max=1.0)
        hard = F.one_hot(p.argmax(1), C).double()
        mse = F.mse_loss(hard + u_square - v_square, label, reduction="sum") / len(label)
        return torch.mean(-torch.sum(label * torch.log(shifted), dim=-1)) + mse


class TestSOP:
    def test_equals_the_published_loss_and_optimizers(self) -> None:
        """Losses and u, v, also where squares exceed 1 and entries fall below the least."""
        term, y = started(SOP(lr_u=0.7, lr_v=1.3)), torch.randint(C, (N,))
        term.table["sop_u"], term.table["sop_v"] = draw(N, scale=0.5), draw(N, C, scale=0.5)
        term.table["sop_u"][0] = term.table["sop_v"][1] = 1.2
        theirs = Published(term.table["sop_u"].unsqueeze(1), term.table["sop_v"])
        steps = [torch.optim.SGD([theirs.u], 0.7), torch.optim.SGD([theirs.v], 1.3)]
        for _ in range(5):
            index, z = torch.randperm(N)[:B], draw(B, C, scale=4.0).requires_grad_()
            batch, out = Batch(z, y[index], index), Outputs(z, {})
            found, expected = term(out, None, batch).mean(), theirs(index, z, F.one_hot(y[index], C).double())
            torch.testing.assert_close(found, expected)
            mine = torch.autograd.grad(found, z)
            [step.zero_grad() for step in steps]
            expected.backward()
            torch.testing.assert_close(mine[0], z.grad)
            with torch.no_grad():
                term.update(out, None, batch)
            [step.step() for step in steps]
            torch.testing.assert_close(term.table["sop_u"], theirs.u.squeeze(1).detach())
            torch.testing.assert_close(term.table["sop_v"], theirs.v.detach())

    def test_from_zero_it_is_cross_entropy_and_stays(self) -> None:
        term, z, y = started(SOP()), draw(B, C, scale=1.0), torch.tensor([0, 1, 2, 3, 0, UNLABELED])
        batch, out = Batch(z, y, torch.arange(B)), Outputs(z, {})
        assert 1e-9 < term.table["sop_u"].std() < 1e-7
        random = term.table["sop_u"].clone()
        term.update(out, None, batch)
        moved = (term.table["sop_u"] != random)[:B]
        assert moved.tolist() == [True] * 5 + [False]  # a row without a label learns nothing
        for name in ("sop_u", "sop_v"):
            term.table[name] = torch.zeros_like(term.table[name])
        constant = 2.0 * (z.argmax(1) != y)
        expected = (F.cross_entropy(z, y, reduction="none", ignore_index=UNLABELED) + constant) * (y != UNLABELED)
        torch.testing.assert_close(term(out, None, batch), expected)
        term.update(out, None, batch)
        assert not term.table["sop_u"].any()
        assert not term.table["sop_v"].any()


class TestGLC:
    def test_matrix_by_a_loop(self) -> None:
        p, y = draw(20, C).softmax(1), torch.arange(20) % 3  # no row of the last class
        found = gold_transition(p, y)
        for i in range(3):
            rows = [p[m] for m in range(20) if y[m] == i]
            torch.testing.assert_close(found[i], sum(rows, torch.zeros(C)) / len(rows))
        assert found[3].tolist() == [0, 0, 0, 1]
        torch.testing.assert_close(found.sum(1), torch.ones(C).double())

    def test_both_halves(self) -> None:
        """Untrusted rows alone, then all of them, from the same weights, with what the student said in between."""
        student = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))
        initial = {name: value.clone() for name, value in student.state_dict().items()}
        drawn: dict[int, set[int]] = {}
        said: list[Tensor] = []
        anew: list[int] = []

        def before(_: str, t: Any, module: Any, batch: Batch, batch_idx: int) -> None:
            assert batch.index is not None
            drawn.setdefault(t.current_epoch, set()).update(batch.index.tolist())
            if all(torch.equal(value, initial[name]) for name, value in student.state_dict().items()):
                anew.append(t.global_step)

        def after(_: str, t: Any, module: Any) -> None:
            if t.current_epoch == 1:
                x = data.parts.meta_rows().__getitems__(list(range(24))).x
                said.append(student.eval()(x).softmax(1).detach())
                student.train()

        data = Blobs(noise="symmetric", noise_rate=0.5)
        watch = [Each(before, "on_train_batch_start"), Each(after, "on_train_epoch_end")]
        model, fitted = GLC(student, **BASE), trainer(max_epochs=4, callbacks=watch)
        fitted.fit(model, data)
        assert drawn[0] | drawn[1] == set(range(48))
        assert drawn[2] | drawn[3] == set(range(72))
        assert anew == [0, 2 * fitted.num_training_batches]
        table, y = model.table, data.labels
        t = torch.stack([said[0][data.labels[48:] == i].mean(0) for i in range(CLASSES)])
        torch.testing.assert_close(table.shared["transition"], t)
        torch.testing.assert_close(table["likelihood"][:48], t.T[y[:48]])
        assert torch.equal(table["likelihood"][48:], torch.eye(CLASSES)[y[48:]])
        assert fitted.callback_metrics["samples/noise_rate"] == pytest.approx(1 - t.diagonal().mean().item())
        z = torch.randn(72, CLASSES)
        index = torch.arange(72)
        loss = model.terms.label[0](Outputs(z, {}), None, Batch(z, y, index))  # type: ignore[union-attr]
        p = z.softmax(1)
        expected = [-math.log(p[i] @ t[:, y[i]] if i < 48 else p[i, y[i]]) for i in range(72)]
        torch.testing.assert_close(loss, torch.tensor(expected))

    def test_a_teacher_takes_the_place_of_the_first_half(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it says of the trusted rows is read off; then nobody asks it."""
        teacher, data, drawn = trained_teachers()[0], Blobs(noise="symmetric", noise_rate=0.5), set[int]()
        asked, one = list[int](), Teachers.one
        monkeypatch.setattr(
            Teachers, "one", lambda self, k, batch: (asked.append(len(batch.y)), one(self, k, batch))[1]
        )
        watch = Each(lambda _, t, m, batch, i: drawn.update(batch.index.tolist()), "on_train_batch_start")
        model, fitted = GLC("mlp-8", teacher, **BASE), trainer(max_epochs=1, limit_val_batches=0, callbacks=watch)
        fitted.fit(model, data)
        assert drawn == set(range(72))
        assert asked == [8, 8, 8]
        p, y = teacher(data.parts.meta_rows().__getitems__(list(range(24))).x).softmax(1), data.labels[48:]
        expected = torch.stack([p[y == i].mean(0) for i in range(CLASSES)])
        torch.testing.assert_close(model.table.shared["transition"], expected)
        torch.testing.assert_close(model.table["likelihood"][:48], expected.T[data.labels[:48]])

    def test_a_class_without_trusted_rows(self) -> None:
        model = GLC("mlp-8", **BASE)
        with pytest.warns(UserWarning, match=r"no meta row has a class of \[2\]"):
            trainer().fit(model, Absent())
        assert model.table.shared["transition"][2].tolist() == [0, 0, 1]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_rows_without_a_label_are_not_drawn_and_meta_rows_are_needed(self) -> None:
        drawn: set[int] = set()
        watch = Each(lambda _, t, m, batch, i: drawn.update(batch.y.tolist()), "on_train_batch_start")
        model = GLC("mlp-8", **BASE)
        trainer(callbacks=watch).fit(model, Blobs(labeled=0.5))
        assert drawn == {0, 1, 2}
        missing = model.data.labels == UNLABELED
        assert (model.table["likelihood"][missing] == 1).all()
        with pytest.raises(ValueError, match="expected a meta split for GLC"):
            trainer().fit(GLC("mlp-8", **BASE), Blobs(meta=0))


class Absent(Blobs):
    """No trusted row has the last class."""

    def load(self) -> Source:
        x, y = blobs()
        rest = torch.arange(48, 120)[y[48:] != 2]
        train, trusted = TensorRows(x[:48]), TensorRows(x[rest])
        return Source(train, train, y[:48].numpy(), val=trusted, val_labels=y[rest].numpy())


@pytest.mark.parametrize("term", [ELR(), SOP(), ForwardCorrection(torch.eye(CLASSES))], ids=lambda term: term.name)
def test_any_weights_take_them(term: Term) -> None:
    teacher = trained_teachers()[0]
    for model in (
        KD("mlp-8", teacher, weight=0.5, label_term=term, **BASE),
        KD("mlp-8", teacher, extra=[term], **BASE),
        ALMKD("mlp-8", teacher, label_term=term, **BASE),
        ALMKD("mlp-8", teacher, label_term=term, rule=Paper(warmup_epochs=1, every=1), meta_gradient="exact", **BASE),
    ):
        fitted = trainer(max_epochs=3)
        fitted.fit(model, Blobs(labeled=0.8))
        assert fitted.callback_metrics["val/accuracy"] > 0.8


def test_on_the_command_line(tmp_path: Path) -> None:
    matrix = [[0.91 if i == j else 0.01 for j in range(10)] for i in range(10)]
    for given in (
        ("ELR", "--model.label_term.strength=7"),
        ("SOP", "--model.label_term.lr_u=1"),
        ("ForwardCorrection", f"--model.label_term.matrix={matrix}"),
    ):
        short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
        call("fit", *configs("supervised"), *QUIET, *short, f"--model.label_term={given[0]}", given[1])
    for k in range(3):
        losses = [row["train/loss"] for row in read_csv(version(k) / "metrics.csv") if row["train/loss"]]
        assert [math.isfinite(float(loss)) for loss in losses] == [True]
