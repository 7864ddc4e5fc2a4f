"""The picture of a cascade."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lit_kd.report.charts import PLAIN, RIGHT, SMALL, new_chart
from lit_kd.report.runs import Arrays
from lit_kd.trust.deferral import deferral_curve

SHARE = 0.2  # deferred, of which the words tell


def deferral_chart(seeds: Sequence[Arrays]) -> tuple[Figure, str]:
    """The accuracy against the share that the teacher answers, of all seeds together; a point of it in words.

    The line is by the score of `lit_kd.terms.Deferral`, the dashed one by the student's own confidence.
    """
    kept = {name: np.concatenate([seed[name] for seed in seeds]) for name in seeds[0]}
    figure, axes = new_chart(SMALL, xlabel="asked of the teacher, %", ylabel="accuracy, %")
    told = ""
    for name, color, line in (("deferral_score", RIGHT, "-"), ("confidence", PLAIN, "--")):
        shares, accuracies = deferral_curve(kept["correct"], kept["teacher_correct"], kept[name])
        axes.plot(100 * shares, 100 * accuracies, line, color=color, lw=1.5)
        told = told or f"{100 * np.interp(SHARE, shares, accuracies):.1f}% with {100 * SHARE:.0f}% deferred"
    return figure, told
