"""Distillation of language models, token by token."""

from typing import Any, Literal

import torch
from torch import Tensor

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.losses.divergences import Kind
from lit_kd.models import Network
from lit_kd.models.generate import NextToken, ids_of, respond, sampler
from lit_kd.terms import KL, Term, Weights
from lit_kd.types import Batch, Inputs, Outputs, check_choice, evaluating, logits_of
from lit_kd.weightings.mean_teacher import Shares


class SequenceKD(Shares):
    """A student of tokens learns from each next-token distribution of the teacher, and from the next token itself.

    The loss of a sequence is ``(1 - weight) CE + weight D``, each the mean over its response tokens. These are the
    data's, or sampled by the teacher (arXiv 1606.07947, with one sample in the place of a beam search [ours]). Labels
    are as `lit_kd.models.generate.next_tokens` makes them.

    Args:
        student: The network to train, a module or a name: from ids ``(B, T)`` to logits ``(B, T, C)``.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        divergence: D, see `lit_kd.losses.divergence`.
        beta: Of those that mix both distributions, in (0, 1).
        temperature: T > 0 of the term, dimensionless.
        responses: The ``"data"``'s, or the ``"teacher"``'s, drawn anew in each epoch.
        sampling_temperature: T > 0 of the distribution that responses are drawn from.
        top_p: In (0, 1]: they are drawn among the fewest tokens whose probabilities sum up to at least that.
        end: The token that ends a response; ``None``: as the data's attribute ``end`` says.
        task: Tokens.
        **base: See `lit_kd.Distiller`.
    """

    tasks = ("tokens",)
    samples = False  # whether responses are sampled

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        divergence: Kind = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        responses: Literal["data", "teacher"] = "data",
        sampling_temperature: float = 1.0,
        top_p: float = 1.0,
        end: int | None = None,
        task: Literal["tokens"] = "tokens",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, task=task, **base)
        check_choice("responses", responses, ("data", "teacher"))
        check_sampling(sampling_temperature, top_p)
        KL(temperature, 1.0, divergence, beta)  # refuses what is not known
        self.divergence, self.beta, self.temperature = divergence, beta, temperature
        self.responses, self.sampling_temperature, self.top_p = responses, sampling_temperature, top_p
        self.end = end
        self.samples = self.samples or responses == "teacher"
        self.changes_batches = self.changes_batches or self.samples
        self._own = False  # whether the batch's responses are the student's, which teach nothing by themselves

    def default_term(self) -> Term:
        """The divergence of tokens."""
        return KL(self.temperature, 1.0, self.divergence, self.beta)

    def setup(self, stage: str) -> None:
        """Refuse, before the training, what responses cannot be sampled with."""
        super().setup(stage)
        if stage != "fit" or not self.samples:
            return
        self.end = getattr(self.datamodule, "end", None) if self.end is None else self.end
        if self.end is None or not 0 <= self.end < self.num_classes:
            raise ValueError(f"expected as end the token that ends a response, found {self.end}: pass end=...")
        if len(self.teachers) != 1:
            raise ValueError(f"expected one teacher where responses are sampled, found {len(self.teachers)}: give one")

    def prepare_batch(self, batch: Batch) -> Batch:
        """Sample the responses, if wanted."""
        batch = super().prepare_batch(batch)
        if not self.samples:
            return batch
        draws = torch.Generator().manual_seed(
            derive_seed(resolve_seed(None), f"responses/{self.trainer.fit_loop.total_batch_idx}/{self.global_rank}")
        )
        coin = float(torch.rand((), generator=draws))
        uniform = torch.rand(*ids_of(batch.x).shape, 2, generator=draws).to(batch.y.device)
        self._own = self.takes_own(coin)
        chosen = self.next_token(self._own)
        if chosen is None:
            return batch
        assert self.end is not None
        with torch.no_grad(), evaluating(self.student):  # no dropout
            return Batch(*respond(batch.x, batch.y, self.end, chosen, uniform))

    def takes_own(self, coin: float) -> bool:
        """Whether a batch's responses are the student's, from a number that is uniform in [0, 1)."""
        return False

    def next_token(self, own: bool) -> NextToken | None:
        """What draws the tokens of a batch, of the student's `own` responses or others; ``None``: they stay."""
        logits = self.student_logits if own else self.teacher_logits if self.responses == "teacher" else None
        return None if logits is None else sampler(logits, self.sampling_temperature, self.top_p)

    def student_logits(self, x: Inputs) -> Tensor:
        """Of the student, ``(B, T, C)``."""
        return logits_of(self.student, x)

    def teacher_logits(self, x: Inputs) -> Tensor:
        """Of the teacher, ``(B, T, C)``."""
        return self.teachers.one(0, Batch(x, ids_of(x))).logits

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """Labels count nothing where they are the student's own tokens."""
        label, *shares = super().weigh(student, sources, batch)
        return [0.0 if self._own else label, *shares]


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse what tokens cannot be drawn with; a ValueError."""
    if not (temperature > 0 and 0 < top_p <= 1):
        found = f"{temperature} and {top_p}"
        raise ValueError(f"expected a temperature above 0 and top_p in (0, 1] to sample with, found {found}")
