"""Is a teacher worth it? What a student would gain, predicted from a rehearsal of seconds. [ours]

A `lit_kd.trust.probe.Probe` stands for the student. It learns from the labels, from teachers and labels as `lit_kd.KD`
does, and from the trusted rows alone; trusted rows tell which did better. How this translates to networks was fitted to
students of other data sets: `tests/studies/verdicts.py`, docs/trust.md.
"""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from lit_kd.trust.probe import Probe
from lit_kd.trust.teachers import Interval, wrong_share

WEIGHT = 0.9
"""Of the teachers beside the labels: as of the shipped config of KD."""
GAIN_LEVEL = 0.9
"""Of the intervals of gains, on the data sets of the fit; on others they held 73%, see docs/trust.md."""
LITTLE = 0.01
"""A gain that is not worth a teacher."""
ROUGH = 0.03
"""Half an interval: where the number of trusted rows leaves a gain so unsure, there are too few of them."""
Way = Literal["distil", "learned weights", "trusted rows"]
"""`lit_kd.KD`; `lit_kd.ALMKD`, which learns weights; `lit_kd.Supervised` on the trusted rows alone."""


class Law(NamedTuple):
    """A gain is a constant, then a multiple of each clue: the median, and what 5% and 95% of the students had."""

    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


LAWS: dict[Way, Law] = {
    "distil": Law((-0.002, 0.985), (-0.046, 0.953), (0.056, 0.981)),
    "learned weights": Law((0.0, 0.045, 0.674), (-0.005, 0.016, 0.429), (0.021, 0.104, 1.251)),
    "trusted rows": Law((-0.021, 1.037), (-0.128, 1.015), (0.015, 2.175)),
}
"""By way of training."""


class Rehearsal(NamedTuple):
    """What a probe found."""

    accuracy: float  # on trusted rows, of what learned from the labels
    distilled: float  # how much better is what learned from teachers and labels
    distilled_error: float  # standard error of that difference, over trusted rows
    alone: float  # how much better is what learned from trusted rows alone
    alone_error: float
    wrong: Interval  # share of wrong training labels
    trusted: int  # M


class Verdict(NamedTuple):
    """What to do."""

    advice: Literal["distil", "learned weights", "labels", "trusted rows", "more rows", "unclear"]
    gains: dict[Way, Interval]  # over training on labels, in accuracy
    rows: int | None  # how many trusted rows there should be, if there are too few


def rehearse(x: Tensor, y: Tensor, trusted: Tensor, taught: Tensor, seed: int) -> Rehearsal:
    """Train and compare the probes.

    Args:
        x: Inputs of training and trusted rows, ``(N, ...)``.
        y: Their labels, ``(N,)``, in [0, C).
        trusted: Which are trusted, bool ``(N,)``.
        taught: The mean of the teachers' probabilities, ``(N, C)``.
        seed: Of the probe.
    """
    probe, labels = Probe(x, seed), F.one_hot(y, taught.shape[1]).to(taught)
    by_labels = probe(labels).argmax(1) == y
    distilled = probe((1 - WEIGHT) * labels + WEIGHT * taught).argmax(1) == y
    alone = probe(labels, trusted.to(taught)).argmax(1) == y
    right = by_labels[trusted]
    paired = [(other[trusted].float() - right.float()) for other in (distilled, alone)]
    found = [(float(d.mean()), float((d.var() / len(d)).sqrt())) for d in paired]
    wrong = wrong_share(right, by_labels[~trusted], taught.shape[1])
    return Rehearsal(float(right.float().mean()), *found[0], *found[1], wrong, len(right))


def clues(way: Way, found: Rehearsal) -> tuple[list[float], float]:
    """What a gain is predicted from, and the standard error of the last clue."""
    if way == "trusted rows":
        return [found.alone], found.alone_error
    if way == "distil":
        return [found.distilled], found.distilled_error
    wrong = 0.5 if found.wrong.estimate != found.wrong.estimate else found.wrong.estimate
    return [wrong, max(found.distilled, 0.0)], found.distilled_error


def predicted(way: Way, found: Rehearsal, law: Law | None = None) -> tuple[Interval, float]:
    """The gain of a way over labels, with an interval of 90%, and the part of it that more trusted rows would end.

    That part, in units of the half interval squared, is the sampling error of the clue.
    """
    law = LAWS[way] if law is None else law
    values, error = clues(way, found)
    middle, low, high = (part[0] + sum(a * b for a, b in zip(part[1:], values, strict=True)) for part in law)
    sampled = (float(norm.ppf((1 + GAIN_LEVEL) / 2)) * law.median[-1] * error) ** 2
    below, above = ((max(0.0, apart) ** 2 + sampled) ** 0.5 for apart in (middle - low, high - middle))
    return Interval(middle, middle - below, middle + above), sampled


def decide(found: Rehearsal, laws: dict[Way, Law] = LAWS) -> Verdict:
    """The advice: what surely gains; else labels, or trusted rows, if nothing promises enough; else none can tell.

    A fixed weight is preferred to learned ones where these promise less than `LITTLE` more.
    """
    told = {way: predicted(way, found, law) for way, law in laws.items()}
    gains = {way: gain for way, (gain, _) in told.items()}
    fixed, learned = gains["distil"], gains["learned weights"]
    if fixed.low > 0 and fixed.estimate >= learned.estimate - LITTLE:
        return Verdict("distil", gains, None)
    if learned.low > 0:
        return Verdict("learned weights", gains, None)
    sampled = told["distil"][1]
    if fixed.high > 0 and sampled > ROUGH**2:
        return Verdict("more rows", gains, round(found.trusted * sampled / ROUGH**2 + 0.5))
    if max(fixed.estimate, learned.estimate) < LITTLE:
        return Verdict("trusted rows" if gains["trusted rows"].low > 0 else "labels", gains, None)
    return Verdict("unclear", gains, None)
