"""Learning to reweight and Meta-Weight-Net: which rows to learn from, by trusted rows."""

from typing import Any, Literal

from lit_kd import weightings
from lit_kd.methods.almkd import ALMKD
from lit_kd.models import Network


class L2RW(ALMKD):
    """Learning to reweight (L2RW, arXiv 1803.09050): each batch's rows count as far as they agree with trusted rows.

    This is `ALMKD` with the rule `lit_kd.weightings.L2RW`, and without a teacher unless there is one.

    Args:
        student: The network to train, a module or a name.
        teacher: None, one teacher or a list: modules or checkpoint paths.
        meta_gradient: Through all layers, as published, or ``"last_layer"``, which is cheaper [ours].
        **base: See `ALMKD`.
    """

    needs_teacher = False

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        meta_gradient: Literal["last_layer", "exact", "central"] = "exact",
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, rule=weightings.L2RW(), meta_gradient=meta_gradient, **base)
        self.hparams.pop("rule", None)  # which is no argument here


class MetaWeightNet(ALMKD):
    """Meta-Weight-Net (arXiv 1902.07379): a row's weight is a function of its loss, learned on trusted rows.

    This is `ALMKD` with the rule `lit_kd.weightings.MetaWeightNet`, and without a teacher unless there is one.

    Args:
        student: The network to train, a module or a name.
        teacher: None, one teacher or a list: modules or checkpoint paths.
        meta_gradient: Through all layers, as published, or ``"last_layer"``, which is cheaper [ours].
        net_lr: Learning rate of the function, for Adam [code].
        **base: See `ALMKD`.
    """

    needs_teacher = False

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        meta_gradient: Literal["last_layer", "exact", "central"] = "exact",
        net_lr: float = 1e-3,
        **base: Any,
    ) -> None:
        rule = weightings.MetaWeightNet(net_lr)
        super().__init__(student, teacher, rule=rule, meta_gradient=meta_gradient, **base)
        self.hparams.pop("rule", None)
