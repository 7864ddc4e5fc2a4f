"""MixKD: the teacher is also asked about mixtures of samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.models.generate import ids_of
from lit_kd.types import Batch, Inputs, Outputs, distributions


class MixedTokens(Batch):
    """Rows of tokens, ``x`` of B rows, and the labels of these and of their mixtures, ``y`` of 2 B.

    Each network mixes its own embeddings of the tokens.
    """

    share: Tensor  # of the row itself in its mixture, (B,)
    partner: Tensor  # the other row, (B,)

    def outputs(self, model: nn.Module, run: Callable[[Inputs], Outputs]) -> Outputs:
        """What ``run`` gives with the model for the rows, and behind them for their mixtures."""
        plain, mixed = run(self.x), run(self.mixture(model))
        features = {tap: torch.cat([found, mixed.features[tap]]) for tap, found in plain.features.items()}
        return Outputs(torch.cat([plain.logits, mixed.logits]), features)

    def mixture(self, model: nn.Module) -> dict[str, Tensor]:
        """The mixtures as a model embeds them: a position is attended to where a row with a share in it has a token."""
        embed = getattr(model, "get_input_embeddings", None)
        if embed is None:
            raise ValueError(
                "expected networks of Hugging Face, as MixKD mixes what get_input_embeddings() makes of tokens, found "
                f"{type(model).__name__}: give it that method, and let its forward take inputs_embeds"
            )
        own = embed()(ids_of(self.x))
        inputs = {} if isinstance(self.x, Tensor) else {name: x for name, x in self.x.items() if name != "input_ids"}
        if (mask := inputs.get("attention_mask")) is not None:
            there = (mask * (self.share > 0).unsqueeze(1), mask[self.partner] * (self.share < 1).unsqueeze(1))
            inputs["attention_mask"] = torch.maximum(*there)
        return {**inputs, "inputs_embeds": mix(own, self.share, self.partner)}


def mix(values: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """Each row times its share, and its partner times the rest."""
    return values[partner].lerp(values, share.to(values).view(-1, *[1] * (values.dim() - 1)))


class MixKD(KD):
    """MixKD (arXiv 2011.00593): `KD` on each batch and on a mixture of it, ``x' = l x_i + (1 - l) x_j`` [text].

    l is drawn for each row from ``Beta(alpha, alpha)``, j from the batch of the same process. On x' the student learns
    from the teacher's answer about x', and, if wanted, from the mixed label, of which a missing label adds nothing. The
    loss is the mean over both halves [ours]. Inputs are floating-point tensors, or tokens ``(B, T)``, alone or as
    ``input_ids``: then x is what each network's ``get_input_embeddings()`` makes of them, and x' its ``inputs_embeds``,
    as in models of Hugging Face. A mixture is no row of the data.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        alpha: Above 0: the larger, the more even the mixtures [ours].
        mixed_labels: Whether mixed labels are learned from, too.
        **base: See `KD` and `lit_kd.Distiller`; without ``revise`` and ``select``.
    """

    changes_batches = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        alpha: float = 0.4,
        mixed_labels: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not alpha > 0:
            raise ValueError(f"expected an alpha above 0, found {alpha}")
        if self.task.name != "classification" or (self.revise, self.select, self.mix) != (None, None, None):
            raise ValueError("expected MixKD with one class a sample, without revise, select and mix: labels are mixed")
        self.alpha, self.mixed_labels = alpha, mixed_labels

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch, and its mixture behind it."""
        x = batch.x
        given = x if isinstance(x, Tensor) else x.get("input_ids", torch.zeros(0))
        numbers = given is x and given.is_floating_point()
        if not numbers and given.dim() != 2:
            found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(x, Tensor) else sorted(x)
            raise ValueError(
                "expected inputs to mix, a floating-point tensor, or tokens (B, T), alone or as input_ids, found "
                f"{found}: use another method"
            )
        y = distributions(batch.y, self.num_classes).to(given.dtype if numbers else torch.float)
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(y),)).to(y)
        partner = torch.randperm(len(y)).to(y.device)
        soft = torch.cat([y, mix(y, share, partner) * self.mixed_labels])
        if numbers:
            return Batch(torch.cat([given, mix(given, share, partner)]), soft)
        made = MixedTokens(x, soft)
        made.share, made.partner = share, partner
        return made

    def ask(self, batch: Batch) -> list[Outputs]:
        """The teachers' outputs, of which each mixes what it embeds."""
        if not isinstance(batch, MixedTokens):
            return super().ask(batch)

        def one(k: int) -> Outputs:
            return batch.outputs(self.teachers.models[k], lambda x: self.teachers.one(k, Batch(x, batch.y)))

        return [one(k) for k in range(len(self.teachers))]

    def outputs(self, batch: Batch, student: Outputs | None = None) -> tuple[Outputs, list[Outputs]]:
        """The student's, which does so too, and the teachers'."""
        own = batch.outputs(self.student, self.tapped_student) if isinstance(batch, MixedTokens) else student
        return super().outputs(batch, own)
