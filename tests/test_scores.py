"""Comparisons of trainings whose score is no accuracy."""

from __future__ import annotations

from pathlib import Path

from lit_kd.report.comparison import write_report
from lit_kd.report.runs import Job


def test_a_regression_is_compared_by_r2(tmp_path: Path) -> None:
    done = []
    for method, value in (("teacher", 0.5), ("Supervised", 0.25), ("KD 0.5", 0.375)):
        taught = ("teacher",) if method == "KD 0.5" else ()
        model = {"model": {"class_path": method.split()[0]}, "data": {"class_path": "OutliersDataModule"}}
        job = Job(method, 0, tmp_path / method, model, method == "teacher", taught)
        job.folder.mkdir()
        found = {
            "method": method,
            "seed": 0,
            "test_r2": value,
            "test_r2_last": value - 0.125,
            "nll": 1.0,
            "seconds": 2.0,
        }
        done.append((job, {**found, "ece": None, "teacher_agreement": None}))
    write_report(tmp_path, done)
    head = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert head == "method,seed,test_r2,test_r2_last,ece,teacher_agreement,seconds,nll"
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| method | R² | at last | time, s |"
    assert table[-1] == "| KD 0.5 | **37.5** | **25.0** | 2 |"
    page = (tmp_path / "report.html").read_text()
    assert "Test R²" in page
    assert "test R² of the best student, KD 0.5" in page
    assert "accuracy of the best" not in page
    assert (tmp_path / "r2.png").is_file()
    assert not (tmp_path / "accuracy.png").exists()
