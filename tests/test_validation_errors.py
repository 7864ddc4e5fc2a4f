"""What ALM-KD tells its rule of the validation rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from sklearn.metrics import zero_one_loss
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD
from lit_kd.data.table import SampleTable
from lit_kd.weightings import Paper, Rule


class Recording(Paper):
    """Keeps what it is told."""

    wants_validation = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[list[list[int]], int]] = []

    def validated(self, table: SampleTable, wrong: Tensor, rows: Tensor) -> None:
        """Take it down."""
        self.told.append((wrong.tolist(), int(rows)))


def almkd(rule: Rule | str, teachers: int = 2) -> ALMKD:
    return ALMKD("mlp-8", trained_teachers()[:teachers], rule=rule, num_classes=CLASSES, input_shape=list(SHAPE))  # type: ignore[arg-type]


def test_counts_after_each_epoch() -> None:
    """Against scikit-learn, of the student as it is at the end; a sanity check and later validations do not count."""
    model, data = almkd(Recording()), Blobs(batch_size=10, val=23)
    run = trainer(max_epochs=3, num_sanity_val_steps=2)
    run.fit(model, data)
    rule: Any = model.rule
    assert len(rule.told) == 3
    rows = data.parts.val.__getitems__(list(range(23)))
    nets = [model.student.eval(), *trained_teachers()]
    with torch.no_grad():
        said = [net(rows.x).softmax(-1) for net in nets]
    alone, together = (
        [zero_one_loss(rows.y, one.argmax(-1), normalize=False) for one in each]
        for each in (said, [0.75 * said[0] + 0.25 * one for one in said])
    )
    assert rule.told[-1] == ([[alone[0]] * 3, alone, together], 23)  # all speak of all rows
    run.validate(model, data, verbose=False)
    assert len(rule.told) == 3


def test_the_rule_robust_keeps_the_two_latest() -> None:
    """A student that learns slowly; errors are counted anew here."""
    wrong: list[float] = []
    data = Blobs(val=60)

    class Watched(ALMKD):
        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            rows = data.parts.val.__getitems__(list(range(60)))
            with torch.no_grad():
                wrong.append(zero_one_loss(rows.y, self.student.eval()(rows.x).argmax(-1), normalize=False))
            self.student.train()

    slow = partial(torch.optim.SGD, lr=3e-2)
    model = Watched("mlp-8", trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE), optimizer=slow)
    trainer(max_epochs=6).fit(model, data)
    assert model.table is not None
    assert wrong[-2] != wrong[-1]
    errors = model.table.shared["errors"]
    assert errors[:, :2].tolist() == [[[each] * 2, [each, 0]] for each in wrong[-2:]]  # the teacher errs on none
    assert (errors[:, 2, 1] < errors[:, 2, 0]).all()


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 3}])
def test_without_validation_labels_are_heard_alone(options: dict[str, Any]) -> None:
    model = almkd("robust", teachers=1)
    with pytest.warns(UserWarning, match="compares teachers and student on validation rows"):
        trainer(max_epochs=3, **options).fit(model, Blobs())
    assert model.table is not None
    assert not model.table["weights"][:, 1].any()
    assert (model.table["weights"][:, 0] > 0.9).all()


def test_a_loader_of_ones_own() -> None:
    """Its rows count, however many the data module has, in each of several validations an epoch."""

    class Own(Blobs):
        def val_dataloader(self) -> Any:
            x = torch.randn(7, *SHAPE)
            return DataLoader(TensorDataset(x, torch.zeros(7, dtype=torch.int64)), batch_size=3)

    model = almkd(Recording())
    trainer(max_epochs=2, val_check_interval=2, limit_train_batches=4).fit(model, Own(val=0))
    rule: Any = model.rule
    assert [counted for _, counted in rule.told] == [7] * 4
