"""How a student deviates from its teacher, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import linregress

from lit_kd.report.charts import confidence_chart
from lit_kd.report.deviations import deviations


def test_by_quartile() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=80)
    y = 0.5 * x + draw.normal(size=80)
    found = deviations({"teacher_log_odds": x, "student_log_odds": y})
    order = np.argsort(x)
    for part, rows in (("unsure", order[:20]), ("sure", order[-20:])):
        fit = linregress(x[rows], y[rows])
        assert found[f"slope_{part}"] == pytest.approx(fit.slope, abs=1e-5)
        assert found[f"offset_{part}"] == pytest.approx(fit.intercept, abs=1e-5)


def test_the_same_network_and_one_that_exaggerates() -> None:
    x = np.random.default_rng(1).normal(size=100)
    same = deviations({"teacher_log_odds": x, "student_log_odds": x})
    assert same == pytest.approx({"slope_unsure": 1, "offset_unsure": 0, "slope_sure": 1, "offset_sure": 0}, abs=1e-6)
    middle = np.median(x)
    bent = np.where(x < middle, 3 * x - 2 * middle, x + 1)  # even less sure where the teacher is unsure
    found = deviations({"teacher_log_odds": x, "student_log_odds": bent})
    expected = {"slope_unsure": 3, "offset_unsure": -2 * middle, "slope_sure": 1, "offset_sure": 1}
    assert found == pytest.approx(expected, abs=1e-5)


def test_without_a_teacher_and_where_it_is_equally_sure_of_all() -> None:
    assert deviations({"confidence": np.ones(3)}) == {}
    alike = {"teacher_log_odds": np.array([2.0] * 4 + [3.0]), "student_log_odds": np.arange(5.0)}
    found = deviations(alike)
    assert found["slope_unsure"] is None
    assert found["offset_unsure"] is None


def test_infinite_numbers_are_left_out() -> None:
    x = np.random.default_rng(1).normal(size=40)
    given = {"teacher_log_odds": np.append(x, [np.inf, 0.0]), "student_log_odds": np.append(2 * x, [1.0, -np.inf])}
    assert deviations(given) == deviations({"teacher_log_odds": x, "student_log_odds": 2 * x})
    assert confidence_chart([given])[1].startswith("slope 2.00")
    for few in ([], [np.inf] * 3, [1.0]):
        found = deviations({"teacher_log_odds": np.array(few), "student_log_odds": np.array(few)})
        assert found == dict.fromkeys(["slope_unsure", "offset_unsure", "slope_sure", "offset_sure"])


def test_picture_and_words() -> None:
    x = np.random.default_rng(2).normal(size=60).astype(np.float32)
    figure, told = confidence_chart([{"teacher_log_odds": x, "student_log_odds": 2 * x}])
    assert told == "slope 2.00; where the teacher is unsure 2.00; where the teacher is sure 2.00"
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    for line, quantiles in zip(dotted, ((0, 0.25), (0.75, 1)), strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.quantile(x, quantiles), rtol=1e-5)
        np.testing.assert_allclose(line.get_ydata(), 2 * np.quantile(x, quantiles), rtol=1e-3)
