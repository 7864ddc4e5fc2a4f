"""The report of a comparison: one page that needs nothing else, and what it is made from."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from commands import files, read_csv
from comparison import NASTY, TINY, again, compare, trained, training
from PIL import Image
from scipy.stats import linregress

from lit_kd.data import DigitsDataModule
from lit_kd.models import load_student
from lit_kd.report.charts import accuracy_chart, confidence_chart, curves_chart
from lit_kd.report.evidence import evidence

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Reads a page; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def read() -> Page:
    return Page((TINY / "report.html").read_text())


@pytest.fixture
def _again(tmp_path_factory: pytest.TempPathFactory) -> None:
    again(tmp_path_factory)


@pytest.mark.usefixtures("_again")
class TestPage:
    def test_it_needs_no_network(self) -> None:
        page = read()
        for tag, attributes in page.tags:
            assert tag not in ("link", "iframe", "object")
            assert tag != "script" or not attributes.get("src")
            for name in ("src", "href", "xlink:href", "style"):
                value = (attributes.get(name) or "").split(";base64,")[0]
                assert not re.search(r"(https?:)?//|url\((?!#)", value), (tag, name, value[:80])
        style = re.findall(r"<style.*?</style>", (TINY / "report.html").read_text(), flags=re.DOTALL)
        assert not re.search(r"url\((?!#|data:)|@import", "".join(style))

    def test_the_table_is_the_written_one(self) -> None:
        lines = (TINY / "table.md").read_text().splitlines()
        unescaped = [re.sub(r"\\(.)", r"\1", line) for line in (lines[0], *lines[2:])]
        expected = [[c.strip().strip("*") for c in line[1:-1].split("|")] for line in unescaped]
        assert "KD \\<b>&amp; $x\\_1$" in lines[3]
        assert read().rows[:4] == expected
        assert len(expected) == 4

    def test_names_are_text(self) -> None:
        page = read()
        assert [row[0] for row in page.rows[1:4]] == ["teacher", NASTY, "ALM-KD"]
        assert page.text.count(NASTY) >= 5  # table, captions, legends

    def test_pictures_tell_what_they_show(self) -> None:
        page = read()
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        drawings = [a for tag, a in page.tags if tag == "svg" and a.get("id") != "histogram"]  # which a script draws
        assert all(a["alt"] and a["title"] for a in images)
        assert all(a["role"] == "img" for a in drawings)
        titles = [tag for tag, _ in page.tags].count("title")
        assert titles == 1 + len(drawings)
        # differences, accuracy, two curves, reliability of three, confidence of two, course of weights
        assert len(drawings) == 2 + 2 + 3 + 2 + 1
        assert len(images) == 16
        for attributes in images:
            kind, content = str(attributes["src"]).split(",")
            assert kind == "data:image/png;base64"
            assert Image.open(io.BytesIO(base64.b64decode(content))).size == (8, 8)

    def test_the_distrusted_samples(self) -> None:
        kept = np.load(TINY / "alm-kd" / "seed-0" / "samples.npz")
        shown = [str(a["title"]) for tag, a in read().tags if tag == "img"]
        weights = kept["weights"][:, 0]
        assert len(shown) == 16
        for told in shown:
            index, label, weight = re.findall(r"sample (\d+);.*label: (\d).*weight: ([\d.]+);", told)[0]
            assert kept["label"][int(index)] == int(label)
            assert f"{weights[int(index)]:.2f}" == weight
            truly = re.findall(r"truly: (\d)", told)
            assert truly == ([str(kept["true"][int(index)])] if kept["noisy"][int(index)] else [])
        assert sorted(kept["shown_weight"]) == pytest.approx(np.sort(weights)[:16])

    def test_what_the_maps_show(self) -> None:
        for seed in (0, 1):
            kept = np.load(TINY / "alm-kd" / f"seed-{seed}" / "samples.npz")
            assert kept["histograms"].shape == (2, 2, 40)  # epochs, right and wrong labels, bins
            for counts, wrong in zip(kept["histograms"][-1], (False, True), strict=True):
                weights = np.minimum(kept["weights"][kept["noisy"] == wrong, 0], 2)
                assert counts.tolist() == np.histogram(weights, np.linspace(0, 2, 41))[0].tolist()
            data = DigitsDataModule(seed=seed, noise="symmetric", noise_rate=0.3)
            data.setup()
            batch = next(iter(data.train_dataloader()))
            for row, pixels in zip(kept["mapped"].tolist(), kept["mapped_pictures"], strict=True):
                for place in (batch.index == row).nonzero():
                    x = batch.x[place].squeeze().numpy()
                    assert pixels[..., 0] == pytest.approx(255 * (x - x.min()) / np.ptp(x), abs=1)
            assert len(set(kept["mapped"].tolist()) & set(batch.index.tolist())) > 5


@pytest.mark.usefixtures("_again")
class TestAgain:
    def test_without_training_and_with_rows_without_an_epoch_and_unknown_truth(self) -> None:
        (TINY / "report.html").unlink()
        before, results = files(TINY), (TINY / "results.csv").read_bytes()
        compare()
        assert trained(before) == set()
        assert (TINY / "results.csv").read_bytes() == results
        assert "finds wrong labels" in read().text
        for path in TINY.rglob("metrics.csv"):
            head = path.read_text().splitlines()[0].split(",")
            path.write_text(path.read_text() + ",".join("7" if name == "step" else "" for name in head) + "\n")
        for path in TINY.rglob("samples.npz"):
            kept = dict(np.load(path))
            kept |= {"noisy": np.zeros_like(kept["noisy"]), "shown_true": np.full_like(kept["shown_true"], -1)}
            np.savez(path, **kept)
        compare()
        text = read().text
        assert text.lower().count("which labels are wrong is not known") >= 2  # section, and what the maps show
        assert "no label is wrong" not in text


@pytest.mark.usefixtures("_again")
class TestEvidence:
    def test_it_is_what_the_checkpoints_say(self) -> None:
        for row in read_csv(TINY / "results.csv"):
            taught = row["method"] != "teacher"
            run = training(row)
            kept = np.load(run / "evidence.npz")
            data = DigitsDataModule(seed=int(row["seed"]), noise="symmetric", noise_rate=0.3)
            data.setup()
            x, y = (torch.cat(parts) for parts in zip(*((b.x, b.y) for b in data.test_dataloader()), strict=True))
            with torch.no_grad():
                said = load_student(run / "best.ckpt")(x).softmax(1)
                teacher = load_student(TINY / "teacher" / f"seed-{row['seed']}" / "best.ckpt")(x).softmax(1)
            assert kept["confidence"] == pytest.approx(said.amax(1).numpy(), abs=1e-6)
            assert (kept["correct"] == (said.argmax(1) == y).numpy()).all()
            assert (kept["true"] == y.numpy()).all()
            assert kept["correct"].mean() == pytest.approx(float(row["test_accuracy"]), abs=1e-6)
            bins = np.ceil(15 * kept["confidence"]).astype(int)
            gaps = [abs((kept["confidence"] - kept["correct"])[bins == b].sum()) for b in range(1, 16)]
            assert sum(gaps) / len(bins) == pytest.approx(float(row["ece"]), abs=1e-4)
            assert taught == ("teacher_log_odds" in kept)
            if taught:
                named = teacher.argmax(1, keepdim=True)
                logit = torch.logit(teacher.gather(1, named)[:, 0]).numpy()
                assert kept["teacher_log_odds"] == pytest.approx(logit, abs=1e-3)
                assert kept["student_log_odds"] == pytest.approx(torch.logit(said.gather(1, named)[:, 0]), abs=1e-3)
                fit = linregress(*(kept[f"{who}_log_odds"].astype(float) for who in ("teacher", "student")))
                x, y = confidence_chart([kept])[0].axes[0].lines[1].get_data()
                assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx(fit.slope, rel=1e-4)

    def test_the_sure_stay_finite_and_several_teachers_are_averaged(self) -> None:
        logits = torch.tensor([[90.0, 0.0, 0.0]])
        found = evidence(logits, torch.tensor([0]), [logits, logits])
        assert found["student_log_odds"].item() == pytest.approx(90 - np.log(2), abs=1e-4)
        found = evidence(logits, torch.tensor([1]), [torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.full((1, 3), 1 / 3)])
        mean = (0.6 + 1 / 3) / 2
        assert found["teacher_log_odds"].item() == pytest.approx(np.log(mean / (1 - mean)), abs=1e-6)
        assert not found["correct"].item()


@pytest.mark.parametrize("students", [1, 10])
def test_the_accuracy_chart(students: int) -> None:
    accuracies = {"teacher": [0.9]} | {f"method {n}": [0.8 + n / 100, 0.82 + n / 100] for n in range(students)}
    figure = accuracy_chart(accuracies, ["teacher"])
    figure.savefig(io.BytesIO(), format="png")
    [axes] = figure.axes
    assert axes.get_title() == "dashed: teacher 90.0"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"method {n}  {81 + n}.0" for n in range(students)]
    low, high = axes.get_xlim()
    assert low < 80 < 90 < high
    ticks = [tick.get_window_extent().y0 for tick in axes.get_xticklabels()]
    [caption] = figure.texts
    assert caption.get_window_extent().y1 <= min(ticks)


def test_a_name_with_an_underscore_is_in_the_legend() -> None:
    figure = curves_chart({"_own": [[(0, 0.5), (1, 0.6)]], "KD": [[(0, 0.4)]]}, "epoch", "%")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_own", "KD"]
