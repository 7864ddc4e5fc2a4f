"""The median of teachers, MCMI and adapted teachers, against loops, limits and invariances."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, seed_everything
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_kd import KD, MCMI, Supervised
from lit_kd.data import DistillationDataModule, draw_soft_labels
from lit_kd.losses import class_information, class_log_means, mean_teacher, median_shares, median_teacher
from lit_kd.models import adapt, last_linear
from lit_kd.teachers import AdaptedTeacher
from lit_kd.teachers.modules import Teachers
from lit_kd.terms import ClassInformation
from lit_kd.types import UNLABELED, Batch, Outputs

B, C = 7, 5
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def some(teachers: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(teachers)]


class TestMedian:
    @pytest.mark.parametrize("teachers", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_by_class(self, teachers: int, temperature: float) -> None:
        given = some(teachers)
        found = median_teacher(given, temperature)
        for i in range(B):
            logs = np.array([log_softmax(t[i].numpy() / temperature) for t in given])
            np.testing.assert_allclose(found[i].numpy(), temperature * np.median(logs, 0), rtol=1e-10, atol=1e-12)
        same = mean_teacher(given, temperature, "median")
        torch.testing.assert_close((same / temperature).softmax(-1), (found / temperature).softmax(-1))

    def test_a_minority_cannot_move_it_beyond_the_others(self) -> None:
        honest = some(3)
        logs = torch.stack(honest).log_softmax(-1)
        for seed in range(20):
            liars = [size * one for size, one in zip((1e3, -1e4), some(2, seed + 1), strict=True)]
            found = median_teacher([liars[0], *honest, liars[1]])
            assert (found >= logs.amin(0)).all()
            assert (found <= logs.amax(0)).all()

    def test_order_and_constants_do_not_count(self) -> None:
        a, b, c, d = some(4)
        torch.testing.assert_close(median_teacher([c, a, d, b]), median_teacher([a, b, c, d]), rtol=0, atol=0)
        torch.testing.assert_close(median_teacher([a + 9, b, c - 5]), median_teacher([a, b, c]))
        plain = torch.stack([a + 9, b, c - 5]).median(0).values  # of logits, as published
        assert not torch.allclose(plain.softmax(-1), torch.stack([a, b, c]).median(0).values.softmax(-1))

    def test_of_an_even_number_it_is_not_the_lower_middle(self) -> None:
        given = some(4)
        lower = torch.stack(given).log_softmax(-1).median(0).values
        found = median_teacher(given)
        assert (found >= lower).all()
        assert (found > lower).any()

    @pytest.mark.parametrize("teachers", [2, 3, 4, 5])
    def test_shares(self, teachers: int) -> None:
        given = some(teachers)
        counts = np.zeros(teachers)
        for i in range(B):
            logs = np.array([log_softmax(t[i].numpy()) for t in given])
            for c in range(C):
                ranked = np.argsort(logs[:, c])
                for middle in {(teachers - 1) // 2, teachers // 2}:
                    counts[ranked[middle]] += 1
        found = median_shares(given)
        np.testing.assert_allclose(found.numpy(), counts / counts.sum(), rtol=1e-6)
        assert found.sum().item() == pytest.approx(1)
        torch.testing.assert_close(median_shares(given[::-1]), found.flip(0))

    def test_equal_teachers_share_equally_and_an_outlier_has_nothing(self) -> None:
        a, b = some(2)
        torch.testing.assert_close(median_shares([a, a, a]), torch.full((3,), 1 / 3))
        two = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[-9.0, 0.0]])
        torch.testing.assert_close(median_shares(two), torch.tensor([0.0, 1.0, 0.0]))
        assert median_shares([b]).tolist() == [1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_far_logits(self, dtype: torch.dtype) -> None:
        given = [torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype), torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)]
        assert median_teacher(given).isfinite().all()
        assert median_shares(given).isfinite().all()

    def test_it_trains_and_logs_who_supplies_it(self) -> None:
        fitted = trainer(max_epochs=1)
        teachers = [*trained_teachers(), trained_teachers()[0]]
        fitted.fit(KD("mlp-8", teachers, average="median", **BASE), Blobs())
        shares = [fitted.callback_metrics[f"teachers/median_share_{k}"].item() for k in range(3)]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert shares[0] == pytest.approx(shares[2], abs=1e-5)  # which are the same

    def test_what_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected as average one of"):
            KD("mlp-8", average="mode", **BASE)
        with pytest.raises(ValueError, match="neither drop nor average"):
            KD("mlp-8", ["a", "b"], average="median", task="multilabel", **BASE)


class TestMCMI:
    def test_the_mean_is_the_conditional_mutual_information(self) -> None:
        """``I(X; Y^ | Y) = H(Y^ | Y) - H(Y^ | X)``, by scipy's entropies."""
        z = torch.cat([one[:, :3] for one in some(6)])
        y = torch.arange(len(z)) % 3
        p = softmax(z.numpy(), axis=1)
        given_y = sum((y == c).double().mean().item() * entropy(p[y.numpy() == c].mean(0)) for c in range(3))
        expected = given_y - entropy(p, axis=1).mean()
        found = class_information(z, y, class_log_means(z, y))
        assert found.mean().item() == pytest.approx(expected, rel=1e-10)
        assert (found >= 0).all()

    def test_gradient_pushes_away_from_the_mean_which_has_none(self) -> None:
        z = some(1)[0].requires_grad_()
        y = torch.arange(B) % C
        log_q = class_log_means(z, y).detach()
        loss = -class_information(z, y, log_q).sum()
        loss.backward()
        assert z.grad is not None
        after = class_information(z.detach() - 0.1 * z.grad, y, log_q)
        assert (after >= class_information(z.detach(), y, log_q)).all()
        alone = class_information(log_q, torch.arange(C), log_q)
        torch.testing.assert_close(alone, torch.zeros_like(alone), atol=1e-12, rtol=0)

    def test_rows_without_a_label_and_classes_without_rows(self) -> None:
        z, y = some(1)[0], torch.tensor([0, 0, 1, UNLABELED, 1, 3, 3])
        log_q = class_log_means(z, y)
        torch.testing.assert_close(log_q[2].exp(), torch.full((C,), 1 / C, dtype=z.dtype))
        torch.testing.assert_close(log_q.exp().sum(1), torch.ones(C, dtype=z.dtype))
        assert class_information(z, y, log_q)[3] == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_far_logits(self, dtype: torch.dtype) -> None:
        z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
        y = torch.tensor([0, 0])
        found = class_information(z, y, class_log_means(z.detach(), y).float())
        found.sum().backward()
        assert found.isfinite().all()
        assert z.grad is not None
        assert z.grad.isfinite().all()

    def test_the_means_are_of_the_network_as_it_came_and_stay(self) -> None:
        teacher = trained_teachers()[0].eval()
        before, data, seen = copy.deepcopy(teacher), Blobs(), []
        model = MCMI(teacher, weight=0.5, **BASE)
        model.on_train_epoch_end = lambda: seen.append(model.terms.extra[0][0].log_means.clone())  # type: ignore
        trainer(max_epochs=2).fit(model, data)
        rows = data.parts.rows(torch.arange(data.train_size)).__getitems__(list(range(data.train_size)))
        p = softmax(before(rows.x).detach().double().numpy(), axis=1)
        expected = torch.tensor(np.array([p[rows.y.numpy() == c].mean(0) for c in range(CLASSES)]))
        for log_means in seen:
            torch.testing.assert_close(log_means.double().exp(), expected, rtol=1e-5, atol=1e-7)

    def test_it_raises_the_information(self) -> None:
        def information(weight: float) -> float:
            torch.manual_seed(0)
            model = MCMI(trained_teachers()[1], weight=weight, optimizer=lambda p: torch.optim.SGD(p, 0.05), **BASE)
            trainer(max_epochs=10).fit(model, Blobs())
            x, y = blobs()
            z = model.student.eval()(x).detach()
            return class_information(z, y, class_log_means(z, y)).mean().item()

        assert information(0.25) > information(0.0)

    def test_bad_weight(self) -> None:
        with pytest.raises(ValueError, match="weight of at least 0"):
            MCMI("mlp-8", weight=-1.0, **BASE)
        assert ClassInformation().couples_batch is False

    def test_a_random_network_is_told(self) -> None:
        with pytest.warns(UserWarning, match="the student is a model name: its weights are random"):
            trainer(max_epochs=1).fit(MCMI("mlp-8", **BASE), Blobs())

    def test_float32_under_autocast(self) -> None:
        z, y, term = torch.randn(6, 3).bfloat16(), torch.arange(6) % 3, ClassInformation()
        term.build(Outputs(z, {}), None)
        term.log_means.copy_(class_log_means(z.float(), y))
        expected = term(Outputs(z.float(), {}), None, Batch(z, y))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(term(Outputs(z, {}), None, Batch(z, y)), expected, rtol=1e-6, atol=1e-7)


class Normal(nn.Module):
    """BatchNorm, dropout, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(x)))


def normal() -> tuple[Normal, Batch]:
    torch.manual_seed(0)
    return Normal().double(), Batch(3 * torch.randn(8, 4, dtype=torch.float64) + 1, torch.zeros(8).long())


class TestAdapted:
    def test_by_hand(self) -> None:
        """The batch's statistics in training, the running ones in evaluation, and never dropout."""
        net, batch = normal()
        teachers = Teachers([AdaptedTeacher(net)])
        mean, std = batch.x.mean(0), batch.x.std(0, unbiased=False)  # type: ignore[union-attr]
        weight, bias = net.fc.weight, net.fc.bias
        for _ in range(3):
            [found] = teachers.trained_on(batch)
            expected = (batch.x - mean) / (std**2 + 1e-5).sqrt() @ weight.T + bias
            torch.testing.assert_close(found.logits, expected)
        running = mean * (1 - 0.9**3)
        variance = 0.9**3 + (1 - 0.9**3) * batch.x.var(0)  # type: ignore[union-attr]
        [found] = teachers(batch)
        expected = (batch.x - running) / (variance + 1e-5).sqrt() @ weight.T + bias
        torch.testing.assert_close(found.logits, expected)

    def test_data_of_another_scale_and_offset(self) -> None:
        net, batch = normal()
        shifted = batch._replace(x=100 * batch.x - 40)
        plain, other = (Teachers([AdaptedTeacher(net)]).trained_on(one)[0].logits for one in (batch, shifted))
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(Teachers([net])(shifted)[0].logits, plain, rtol=0.1)

    def test_a_copy_is_changed_and_no_parameter(self) -> None:
        given = trained_teachers()[0]
        before, adapted = copy.deepcopy(given.state_dict()), AdaptedTeacher(given)
        model = KD("mlp-8", adapted, **BASE)
        trainer().fit(model, Blobs())
        assert all(torch.equal(given.state_dict()[name], value) for name, value in before.items())
        assert all(torch.equal(p, q) for p, q in zip(adapted.parameters(), given.parameters(), strict=True))
        assert not torch.equal(
            *(next(m for m in n.modules() if isinstance(m, nn.BatchNorm2d)).running_mean for n in (given, adapted))
        )
        assert not any(part.training for part in adapted.modules())

    def test_without_batch_norm_nothing_changes(self) -> None:
        def losses(teacher: nn.Module) -> float:
            torch.manual_seed(0)
            fitted = trainer()
            fitted.fit(build("kd", teachers=[teacher]), Blobs())
            return fitted.callback_metrics["train/loss"].item()

        assert losses(AdaptedTeacher(trained_teachers()[1])) == losses(trained_teachers()[1])

    def test_evaluation_and_a_pass_over_rows_leave_it(self) -> None:
        adapted, data = AdaptedTeacher(trained_teachers()[0]), Blobs()
        model, fitted = KD("mlp-8", adapted, **BASE), trainer(max_epochs=1)
        fitted.fit(model, data)
        before = copy.deepcopy(adapted.state_dict())
        fitted.test(model, data, verbose=False)
        model.predict_rows(data.parts.rows(torch.arange(9)))
        assert all(torch.equal(adapted.state_dict()[name], value) for name, value in before.items())

    def test_a_single_row(self) -> None:
        net, batch = normal()
        [found] = Teachers([AdaptedTeacher(net)]).trained_on(Batch(batch.x[:1], batch.y[:1]))  # type: ignore[index]
        torch.testing.assert_close(found.logits, net.eval()(batch.x)[:1])

    def test_what_was_told_of_the_network(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.second(x), self.first(x)

        wrapped, x = AdaptedTeacher(adapt(Two(), logits=1, head="first")), torch.randn(2, 4)
        torch.testing.assert_close(wrapped(x), wrapped.network.first(x))
        assert last_linear(wrapped)[0] == "network.first"

    def test_as_a_config_gives_it(self, teacher_file: Path) -> None:
        spec = {"class_path": "lit_kd.teachers.AdaptedTeacher", "init_args": {"network": str(teacher_file)}}
        model = KD("mlp-8", spec, **BASE)
        trainer(max_epochs=1).fit(model, Blobs())
        [found] = model.teachers.models
        assert isinstance(found, AdaptedTeacher)

    def test_what_is_refused(self) -> None:
        model = KD("mlp-8", AdaptedTeacher(trained_teachers()[0]), teacher_cache="memory", **BASE)
        with pytest.raises(ValueError, match="no teacher_cache with an AdaptedTeacher"):
            trainer().fit(model, Blobs())
        with pytest.raises(ValueError, match="expected a network"):
            AdaptedTeacher("mlp-8")


class TestBank:
    def test_of_one_hot_rows_gives_the_labels_back_and_trains_as_they_do(self) -> None:
        x, y = blobs(90)
        bank = torch.eye(CLASSES).repeat(2, 1)
        soft = torch.from_numpy(draw_soft_labels(bank, [0, 1, 2, 0, 1, 2], y, seed=0)).float()
        assert torch.equal(soft.argmax(1), y)
        networks = []
        for labels in y, soft:
            seed_everything(1)
            inner = LightningDataModule.from_datasets(TensorDataset(x, labels), TensorDataset(x, y), batch_size=15)
            model = Supervised("mlp-8", num_classes=CLASSES, input_shape=list(SHAPE))
            trainer().fit(model, DistillationDataModule(inner, num_classes=CLASSES))
            networks.append(model.student)
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(one, other)

    def test_each_row_of_a_class_is_drawn_as_often(self) -> None:
        bank, of, y = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), [0, 0, 1], np.arange(4000) % 2
        found = draw_soft_labels(bank, of, y, seed=3)
        assert (found[y == 1] == bank[2]).all()
        assert (found[y == 0] == bank[0]).all(1).mean() == pytest.approx(0.5, abs=0.04)
        np.testing.assert_array_equal(found, draw_soft_labels(bank, of, y, seed=3))

    def test_bad_banks(self) -> None:
        with pytest.raises(ValueError, match="found none of class 2"):
            draw_soft_labels(np.eye(3)[:2], [0, 1], [0, 2], seed=0)
        with pytest.raises(ValueError, match=r"probabilities \(m, C\) and m classes, found \(3, 3\) and \(2,\)"):
            draw_soft_labels(np.eye(3), [0, 1], [0], seed=0)
