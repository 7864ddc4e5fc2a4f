"""What methods for few labels share: they hear the teacher on rows without a label, as far as trusted rows allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from lit_kd.types import UNLABELED

if TYPE_CHECKING:
    from lit_kd.distiller import Distiller


def require_trusted(module: Distiller) -> None:
    """Refuse data without meta rows; warn where every row has a label, so that the teacher is never heard.

    Raises:
        ValueError: If there is no data module of ours, or it has no meta rows.
    """
    data, method = module.data, type(module).__name__
    data.require_meta(method)
    if (data.labels != UNLABELED).all():
        rank_zero_warn(
            f"all training rows have a label: {method} hears its teacher only on those without. Set the data's "
            "argument labeled, e.g. labeled=100"
        )


def warn_of_warmup(warmup: int, epochs: int | None) -> None:
    """Say so where the training, of so many epochs, ends before its warm-up does."""
    if epochs is not None and warmup >= epochs:
        rank_zero_warn(
            f"all {epochs} epochs are warm-up ({warmup} epochs): the teacher is never listened to. Train longer, or "
            "pass a smaller warmup_epochs"
        )
