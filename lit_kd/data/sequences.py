"""Sequences of characters that are drawn: prompts, and responses of which some of the training rows may be wrong."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.base import DataModule
from lit_kd.data.labels import count_rows
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.data.seeds import derive_seed
from lit_kd.models.generate import next_tokens


class SumsDataModule(DataModule):
    """Sums as text, ``47+85=132;``: the prompt ends at ``=``, the response at ``;``, which also is the padding.

    Inputs are the characters' numbers in `vocabulary`, int64 ``(B, T)``; labels the next ones, see
    `lit_kd.models.generate.next_tokens`. The problems all differ. They and the test rows are the same under every seed,
    which draws split, wrong responses and order. A wrong response is the sum of two other numbers; it is the input as
    well as the label. Meta, validation and test rows are right.

    Args:
        rows: Number of sums.
        digits: Of both numbers, at most.
        wrong: Share of the training responses that are wrong, in [0, 1].
        test: Size of the test split, a fraction or a count.
        **shared: See `DataModule`.

    Examples:
        >>> data = SumsDataModule(rows=100, wrong=0.3, seed=0)
        >>> data.setup()
        >>> data.decode(data.parts.test[0].x)
        '43+63=106;'
    """

    vocabulary: ClassVar[str] = "0123456789+=?,;"
    end: ClassVar[int] = vocabulary.index(";")
    task = "tokens"
    num_classes = len(vocabulary)

    def __init__(
        self, rows: int = 3000, digits: int = 2, wrong: float = 0.0, test: int | float = 0.2, **shared: Any
    ) -> None:
        super().__init__(**shared)
        if not 0 <= wrong <= 1:
            raise ValueError(f"expected wrong in [0, 1], the share of wrong training responses, found {wrong}")
        if digits < 1 or not 0 < rows <= 100**digits:
            raise ValueError(f"expected digits from 1 and at most 100^digits different sums, found {digits}, {rows}")
        self.rows, self.digits, self.wrong, self.test = rows, digits, wrong, test
        self.class_names = list(self.vocabulary)

    def encode(self, texts: Sequence[str], width: int | None = None) -> Tensor:
        """The characters' numbers, ``(B, T)``; shorter texts end in padding."""
        width = width or max(map(len, texts))
        return torch.tensor([[self.vocabulary.index(c) for c in text.ljust(width, ";")] for text in texts])

    def decode(self, ids: Tensor) -> str:
        """The text of one row, ``(T,)``, without padding."""
        return "".join(self.vocabulary[i] for i in ids).rstrip(";") + ";"

    def batch_of(self, prompts: Sequence[str], responses: Sequence[str], width: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, ``(B, T)`` each."""
        ids = self.encode([f"{a}{b};" for a, b in zip(prompts, responses, strict=True)], width)
        starts = torch.tensor([len(prompt) for prompt in prompts])
        return ids, next_tokens(ids, torch.arange(width) >= starts.unsqueeze(1), self.end)

    def load(self) -> Source:
        """Draw the sums, split them, and make some training responses wrong."""
        most = 10**self.digits
        numbers = np.stack(divmod(np.random.default_rng(42).choice(most**2, self.rows, replace=False), most), axis=1)
        sizes = [count_rows(size, self.rows, name) for name, size in self._sizes.items()]
        tests = sizes[0]
        order = np.random.default_rng(derive_seed(self._seed, "split")).permutation(np.arange(tests, self.rows))
        own_test, meta, val, train = np.split(np.concatenate([np.arange(tests), order]), np.cumsum(sizes))
        pool = np.concatenate([train, meta])
        self._numbers = numbers[pool]

        sums = numbers.sum(1)
        draw = np.random.default_rng(derive_seed(self._seed, "wrong responses"))
        said = sums.copy()
        for row in draw.permutation(train)[: round(self.wrong * len(train))]:
            while said[row] == sums[row]:
                said[row] = draw.integers(most, size=2).sum()
        prompts, width = [f"{a}+{b}=" for a, b in numbers], 3 * self.digits + 4

        def part(rows: Sequence[int] | Any, answers: Any) -> tuple[Tensor, Any]:
            ids, y = self.batch_of([prompts[i] for i in rows], [str(answers[i]) for i in rows], width)
            return ids, y.numpy()

        (x, given), (_, y) = part(pool, said), part(pool, sums)
        (val_x, val_y), (test_x, test_y) = part(val, sums), part(own_test, sums)
        names = [[prompts[i][:-1] for i in rows] for rows in (pool, val, own_test)]
        return Source(
            TensorRows(x),
            TensorRows(x),
            y,
            given=given,
            meta=np.arange(len(train), len(pool)),
            val=TensorRows(val_x),
            val_labels=val_y,
            test=TensorRows(test_x),
            test_labels=test_y,
            ids=names[0],
            val_ids=names[1],
            test_ids=names[2],
            identity=b"sums" + x.numpy().tobytes(),
        )

    @property
    def _sizes(self) -> dict[str, int | float]:
        return {"test": self.test, "meta": self.meta, "val": self.val}

    def rationales(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The way to the right sum of training and meta rows, by index: inputs and labels, ``(B, T)`` each.

        ``47+85?7+5=12,4+8+1=13;``: the prompt ends at ``?``, and each step has the digits from the right and the carry.
        """
        positions = np.concatenate([self.parts.positions["train"], self.parts.positions["meta"]])
        pairs = self._numbers[positions[index.cpu().numpy()]].tolist()
        return self.batch_of(
            [f"{a}+{b}?" for a, b in pairs], [steps(a, b) for a, b in pairs], (2 + 8) * self.digits + 3
        )


def steps(a: int, b: int) -> str:
    """The column addition of two numbers, from the right.

    Examples:
        >>> steps(47, 85), steps(4, 5)
        ('7+5=12,4+8+1=13', '4+5=9')
    """
    found, carry = list[str](), 0
    while a or b or not found:
        (a, left), (b, right) = divmod(a, 10), divmod(b, 10)
        total = left + right + carry
        found.append(f"{left}+{right}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ",".join(found)
