"""How alike classes are: matrices ``(C, C)`` whose rows are distributions, for `lit_kd.terms.SmoothedCrossEntropy`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rows = Tensor | Sequence[Sequence[float]] | Mapping[str, Sequence[float]]
"""Numbers of each class, ``(C, d)``, in the order of the classes; or by the class's name."""


def shared_attributes(table: Rows, classes: Sequence[str] | None = None) -> Tensor:
    """Each class gives to each other, and to itself, as many parts as they have attributes in common [ours].

    So actions that share their verb or their noun share labels (arXiv 2004.07711).

    Args:
        table: What each class has, 1 or 0: ``(C, attributes)``.
        classes: The names of the classes in their order, with a mapping.

    Examples:
        >>> shared_attributes({"cut": [0, 1], "cut bread": [1, 1]}, classes=["cut bread", "cut"])
        tensor([[0.6667, 0.3333],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    rows = _rows(table, classes)
    if (rows < 0).any():
        raise ValueError(f"expected attributes of at least 0, found {rows.min().item()}")
    return _shares(rows @ rows.mT, "an attribute")


def vector_similarity(vectors: Rows, classes: Sequence[str] | None = None) -> Tensor:
    """Shares in proportion to the cosine of two classes' vectors, such as those of their names, where above 0 [ours].

    Args:
        vectors: One of each class, ``(C, d)``.
        classes: The names of the classes in their order, with a mapping.

    Examples:
        >>> vector_similarity([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        tensor([[0.6250, 0.3750, 0.0000],
                [0.3750, 0.6250, 0.0000],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    rows = torch.nn.functional.normalize(_rows(vectors, classes))
    return _shares((rows @ rows.mT).clamp(min=0), "a vector other than 0")


def _rows(given: Rows, classes: Sequence[str] | None) -> Tensor:
    """Finite numbers ``(C, d)`` in the order of the classes; a ValueError if there are none."""
    if isinstance(given, Mapping):
        if classes is None or set(classes) != set(given) or len(set(classes)) != len(classes):
            named = "no names" if classes is None else list(classes)
            raise ValueError(f"expected as classes the names {sorted(given)} in their order, found {named}")
        given = [given[name] for name in classes]
    elif classes is not None and len(classes) != len(given):
        raise ValueError(f"expected one row for each of {len(classes)} classes, found {len(given)}")
    return as_rows(given)


def as_rows(given: Tensor | Sequence[Sequence[float] | Tensor]) -> Tensor:
    """Rows ``(C, d)`` in float64 and without a graph; a ValueError where their lengths differ, or one is not finite."""
    rows = [torch.as_tensor(row).detach().double().cpu() for row in given]
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) != 1 or rows[0].dim() != 1:
        raise ValueError(f"expected one row of numbers a class, all as long, found rows of shapes {sorted(shapes)}")
    for i, row in enumerate(rows):
        if not row.isfinite().all():
            raise ValueError(f"expected finite numbers, found {row.tolist()} in row {i}")
    return torch.stack(rows)


def _shares(alike: Tensor, what: str) -> Tensor:
    """The rows, divided by their sums."""
    empty = (alike.diagonal() == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"expected {what} of each class, found none of class {empty[0]}")
    return alike / alike.sum(1, keepdim=True)
