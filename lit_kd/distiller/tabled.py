"""A method that keeps beliefs about each training sample."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lit_kd.data.table import SampleTable
from lit_kd.distiller.base import Distiller


class TableDistiller(Distiller):
    """The base of methods with a sample table: made for the data, saved with the student, taken up on resume.

    The column ``weights``, ``(N, K + 1)``, tells how much label and teachers count, and ``noise_rate`` among the shared
    values, where there is one, which share of the labels is wrong.
    """

    table: SampleTable | None = None
    """Beliefs about the training samples; column ``weights`` is ``(N, K + 1)``, label first."""
    _table_maker: str | None = None

    @property
    def table_maker(self) -> str:
        """By what the table is made: another one cannot go on with it."""
        return type(self).__name__

    @abstractmethod
    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Add the columns; those of a table that is not fresh but restored keep their values."""

    def on_fit_start(self) -> None:
        """Make the sample table, or go on with a restored one."""
        data, made = self.data, self.table_maker
        size = len(data.labels)
        table = self.table or SampleTable(size, data.fingerprint)
        table.check(size, data.fingerprint)
        if self._table_maker not in (None, made):
            raise ValueError(
                f"expected the rule that the checkpoint's sample table was made by, {self._table_maker}, found {made}: "
                "pass the same rule, or start without the checkpoint"
            )
        self.start_table(table, fresh=self.table is None)
        self.table = table
        self.table.apply(lambda column: column.to(self.device))

    def on_train_epoch_end(self) -> None:
        """Share what each process has written, and log what is believed on average."""
        super().on_train_epoch_end()
        assert self.table is not None
        self.table.sync()
        weights = self.table["weights"][: self.data.train_size].mean(0)
        self.log_dict({"samples/label_weight": weights[0], "samples/teacher_weight": weights[1:].sum()})
        if "noise_rate" in self.table.shared:
            self.log("samples/noise_rate", self.table.shared["noise_rate"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The table goes with the student."""
        super().on_save_checkpoint(checkpoint)
        if self.table is not None:
            self.table.sync()
            checkpoint["sample_table"] = self.table.state_dict()
            checkpoint["sample_table_rule"] = self.table_maker

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the table up again; the data's fingerprint is checked before training."""
        if "sample_table" in checkpoint:
            self.table = SampleTable.from_state_dict(checkpoint["sample_table"])
            self._table_maker = checkpoint["sample_table_rule"]
