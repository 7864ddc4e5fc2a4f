"""The pages in a real browser, at desktop and phone width, with mouse, finger and keyboard."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from lit_kd.report.charts import differences_chart
from lit_kd.report.gallery import write_gallery
from lit_kd.report.label_issues import LabelIssues
from lit_kd.report.page import write_page
from lit_kd.report.paired import signed, verdict
from lit_kd.report.render import sprites
from lit_kd.report.runs import Job, Result

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
NASTY = '</script><script>window.hacked = 1</script>{{ 1 }} "&amp;'
NAMES = ["cat", NASTY, "dog, big"]
IDS = ['a,"b".png', "new\nline", " led", "plain", "__proto__", "é✓", "6", "7", "8", "9", "10", "11"]
GIVEN = np.array([0, 0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 2])
SUGGESTED = np.array([2, 2, 2, 2, 0, 1, 0, 0, 1, 1, 2, 2])
SCORE = np.array([0.01, 0.02, 0.03, 0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
ORDER = np.array([7, 3, 0, 11, 2, 5, 1, 4, 6, 8, 9, 10])


def issues(**other: Any) -> LabelIssues:
    weights = np.column_stack([SCORE, 1 - SCORE])
    made = LabelIssues(
        IDS, ORDER, GIVEN, SUGGESTED, SCORE, SCORE < 0.5, weights, np.where(SCORE < 0.5, SUGGESTED, GIVEN)
    )
    return made._replace(**other)


def noise(count: int, side: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: install it (apt-get install chromium) to test the pages")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())


def opened(browser: Browser, path: Path, size: str = "desktop") -> Page:
    """A page that must not complain, nor ask the network, nor be wider than the window."""
    width, height = SIZES[size]
    phone: Any = {"has_touch": True, "is_mobile": True} if size == "phone" else {}
    page = browser.new_context(viewport={"width": width, "height": height}, **phone).new_page()
    page.set_default_timeout(20_000)
    asked: list[str] = []
    page.on("pageerror", lambda error: asked.append(str(error)))
    page.on("console", lambda message: asked.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.resolve().as_uri())
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    return page


def labels(page: Page, key: str | None = None) -> dict[str, str]:
    """The downloaded file, read back, in its order."""
    with page.expect_download() as loading:
        if key:
            page.keyboard.press(key)
        else:
            page.click("#bar [data-key=s]")
    assert loading.value.suggested_filename == "labels.csv"
    with Path(loading.value.path()).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [(row["id"], row["label"]) for row in reader]
        assert reader.fieldnames == ["id", "label"]
    return dict(rows)


def told(page: Page) -> list[str]:
    return page.locator("#cards .told").all_inner_texts()


BEFORE = {IDS[row]: NAMES[GIVEN[row]] for row in np.argsort(ORDER)}


class TestAudit:
    @pytest.mark.parametrize("size", SIZES)
    def test_by_mouse_or_finger(self, browser: Browser, tmp_path: Path, size: str) -> None:
        write_gallery(tmp_path / "audit.html", issues(), noise(12, 8), NAMES, f"my {NASTY}")
        page = opened(browser, tmp_path / "audit.html", size)
        press = page.tap if size == "phone" else page.click
        assert page.inner_text("h1") == f"my {NASTY}"
        assert page.locator(".numbers b").all_inner_texts() == ["6", "5", "6"]
        assert labels(page) == BEFORE
        assert list(labels(page)) == list(BEFORE)  # in the order of the data
        press('[data-cell="0-2"]')
        assert page.inner_text("#opened") == "label cat → dog, big: 3 rows"
        assert told(page) == ["1%", "2%", "3%"]
        press("#bar [data-key=r]")
        press("#bar [data-key=d]")
        page.select_option("#class", "1")
        assert told(page) == ["→ dog, big", "dropped", f"→ {NASTY}"]
        press("#pairs button >> nth=1")
        press("#bar [data-key=k]")
        press('[data-cell="1-0"]')
        press("#bar [data-key=d]")
        assert page.inner_text("#progress") == "5 of 6 flagged decided"
        expected = BEFORE | {IDS[0]: "dog, big", IDS[1]: "", IDS[2]: NASTY, "__proto__": ""}
        assert labels(page) == expected
        page.reload()
        assert page.inner_text("#progress") == "5 of 6 flagged decided"
        assert labels(page) == expected
        assert page.evaluate("window.hacked") is None

    def test_by_keyboard(self, browser: Browser, tmp_path: Path) -> None:
        write_gallery(tmp_path / "audit.html", issues(), noise(12, 8), NAMES, "audit")
        page = opened(browser, tmp_path / "audit.html")
        page.keyboard.press("Tab")
        for key in ("m", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowRight", "Enter"):  # at the border it stays
            page.keyboard.press(key)
        assert page.inner_text("#opened") == "label cat → dog, big: 3 rows"
        for key in ("ArrowRight", "r", "ArrowLeft", "ArrowLeft", "d", "ArrowRight", "1"):
            page.keyboard.press(key)
        assert told(page) == ["dropped", "→ dog, big", f"→ {NASTY}"]
        page.keyboard.press("u")
        page.keyboard.press("n")  # the next cell with rows to decide is the fullest
        assert labels(page, "s") == BEFORE | {IDS[0]: "", IDS[1]: "dog, big"}
        assert "→" in page.inner_text("#opened")
        page.keyboard.press("k")
        assert told(page)[0] == "kept"
        page.keyboard.press("?")
        assert page.is_visible("text=drop")

    def test_the_frame_in_the_trust_map(self, browser: Browser, tmp_path: Path) -> None:
        write_gallery(tmp_path / "audit.html", issues(true=None), noise(12, 8), NAMES, "audit")
        page = opened(browser, tmp_path / "audit.html")
        page.locator("#map").scroll_into_view_if_needed()
        box = page.locator("#map").bounding_box()
        assert box
        middle, bottom = box["x"] + 42 + (box["width"] - 48) / 2, box["y"] + box["height"] - 39
        page.mouse.move(middle, box["y"] + 7)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 7, bottom)
        page.mouse.up()
        assert page.inner_text("#opened") == "6 rows in the frame"
        assert told(page) == ["60%", "70%", "80%", "90%", "95%", "99%"]
        page.focus("#map")
        for _ in range(40):
            page.keyboard.press("Shift+ArrowUp")
            page.keyboard.press("Shift+ArrowRight")
        assert page.inner_text("#opened").startswith("6 rows")  # the frame goes on from the dragged one
        for _ in range(6):
            page.keyboard.press("ArrowLeft")
        kept = [f"{100 * s:.0f}%" for s in SCORE if s > 0.2]
        assert told(page)[-3:] == kept[-3:]

    def test_without_pictures_weights_or_truth(self, browser: Browser, tmp_path: Path) -> None:
        plain = issues(weights=None, true=None, score=np.where(SCORE == 0.01, np.nan, SCORE))
        write_gallery(tmp_path / "audit.html", plain, None, None, "audit")
        page = opened(browser, tmp_path / "audit.html", "phone")
        assert not page.locator("#map").count()
        page.tap('[data-cell="0-2"]')
        assert page.locator("#cards .name").all_inner_texts() == [" ".join(i.split()) for i in IDS[:3]]
        page.tap("text=Relabel: 2")
        assert labels(page)[IDS[0]] == "2"
        page.check("#all")
        assert page.locator("#heat [data-cell]").count() == len(set(zip(GIVEN, SUGGESTED, strict=True)))

    def test_a_hundred_classes_and_rows_that_share_no_flag(self, browser: Browser, tmp_path: Path) -> None:
        rows = 3000
        draw = np.random.default_rng(0)
        given, suggested = draw.integers(0, 100, (2, rows))
        columns = (np.arange(rows), given, suggested, np.linspace(0, 1, rows), np.zeros(rows, bool), None, None)
        write_gallery(
            tmp_path / "audit.html", LabelIssues([str(i) for i in range(rows)], *columns), None, None, "audit"
        )
        page = opened(browser, tmp_path / "audit.html", "phone")
        assert page.is_checked("#all")
        label, other = int(given[7]), int(suggested[7])
        place = page.locator(f'[data-cell="{label}-{other}"]')
        place.scroll_into_view_if_needed()
        place.click()
        count = int(((given == label) & (suggested == other)).sum())
        assert page.inner_text("#opened") == f"label {label} → {other}: {count} row{'s' if count > 1 else ''}"

    def test_ten_thousand_rows_take_five_megabytes(self, tmp_path: Path) -> None:
        rows = 10_000
        draw = np.random.default_rng(0)
        label = draw.integers(0, 10, rows)
        score = np.linspace(0, 1, rows)
        weights = draw.random((rows, 2))
        ids = [f"train/class {i % 10}/picture_{i:06}.png" for i in range(rows)]
        found = LabelIssues(ids, np.arange(rows), label, label[::-1], score, score < 0.2, weights, label)
        write_gallery(
            tmp_path / "audit.html", found, noise(rows, 32), None, "audit"
        )  # no picture takes more than noise
        text = (tmp_path / "audit.html").read_text()
        assert 3_500_000 < len(text.encode()) < 5_000_000
        [shown] = re.findall(r"The ([\d,]+) rows least believed\s+have pictures", text)
        assert f'"pictured": {shown.replace(",", "")}' in text

    def test_bad_input(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected a name for each of 3 classes, found 1"):
            write_gallery(tmp_path / "audit.html", issues(), None, ["one"], "audit")
        with pytest.raises(ValueError, match="expected a picture a row at most, found 13 for 12 rows"):
            write_gallery(tmp_path / "audit.html", issues(), noise(13, 8), NAMES, "audit")
        assert not (tmp_path / "audit.html").exists()


def test_sprites_are_the_pictures() -> None:
    pictures = noise(300, 9)[:, :5]
    made = sprites(pictures, 10**6)
    assert (len(made.sheets), made.pictured, made.aspect) == (2, 300, 9 / 5)
    sheets = [np.asarray(Image.open(io.BytesIO(b64decode(url.split(",")[1])))) for url in made.sheets]
    for tile in (0, 17, 255, 256, 299):
        row, column = divmod(tile % 256, 16)
        assert (sheets[tile // 256][5 * row : 5 * row + 5, 9 * column : 9 * column + 9] == pictures[tile]).all()
    assert sprites(pictures, len(made.sheets[0])).pictured == 256
    assert sprites(pictures, 10).pictured == 0


ACCURACY = {
    "teacher": [0.9, 0.9, 0.9],
    "KD 0.1": [0.80, 0.82, 0.81],
    "KD 0.9": [0.70, 0.99, 0.60],
    "Labels": [0.84, 0.80, 0.79],
    f"Mine {NASTY}": [0.85, 0.81, 0.86],
}
KIND = {"KD 0.1": "lit_kd.KD", "KD 0.9": "KD", f"Mine {NASTY}": "ALMKD"}


def finished(folder: Path) -> list[tuple[Job, Result]]:
    """Trainings that were never trained."""
    done: list[tuple[Job, Result]] = []
    for method, values in ACCURACY.items():
        for seed, value in enumerate(values):
            place = folder / re.sub(r"\W", "", method) / str(seed)
            place.mkdir(parents=True)
            model = {"model": {"class_path": KIND.get(method, "Supervised")}}
            teachers = ("teacher",) if method in KIND else ()
            done.append((Job(method, seed, place, model, method == "teacher", teachers), {"test_accuracy": value}))
            draw = np.random.default_rng(seed)
            true = draw.integers(0, 3, 60)
            evidence = {"true": true, "correct": draw.random(60) < 0.8, "confidence": draw.random(60)}
            np.savez(place / "evidence.npz", **evidence)
            if method.startswith("Mine"):
                weights = np.column_stack([SCORE, 1 - SCORE])
                counts = np.stack([np.histogram(SCORE[k::2], 40, (0, 2))[0] for k in (0, 1)])
                columns = {"weights": weights, "label": GIVEN, "true": SUGGESTED, "noisy": GIVEN != SUGGESTED}
                columns |= {"teachers": SUGGESTED[:, None], "mapped": np.arange(12), "mapped_pictures": noise(12, 8)}
                histograms = np.stack([counts[:, ::-1], counts])
                np.savez(place / "samples.npz", **columns, histograms=histograms, class_names=np.array(NAMES))
    return done


class TestCompare:
    def test_the_verdict(self, tmp_path: Path) -> None:
        judged = verdict(finished(tmp_path))
        mine, best, labels = (100 * np.array(ACCURACY[name]) for name in (f"Mine {NASTY}", "KD 0.1", "Labels"))
        assert judged.reference == "KD 0.1"
        assert list(judged.differences) == [f"Mine {NASTY}", "Labels", "KD 0.9"]  # KD 0.9 has the best seed
        assert judged.differences[f"Mine {NASTY}"] == pytest.approx(mine - best)
        assert [number for number, _ in judged.numbers] == [
            f"{mine.mean():.1f} ± {mine.std(ddof=1):.1f}%",
            f"+{(mine - best).mean():.1f} ± {(mine - best).std(ddof=1):.1f}",
            f"+{(mine - labels).mean():.1f} ± {(mine - labels).std(ddof=1):.1f}",
        ]
        assert "better in 2 of 3 seeds" in judged.numbers[1][1]
        assert (signed([-1.0, -2.0]), signed([0.0])) == ("−1.5 ± 0.7", "+0.0")
        alone = verdict(
            [(job, result) for job, result in finished(tmp_path / "2") if job.method in ("teacher", "Labels")]
        )
        assert (alone.reference, alone.differences) == ("Labels", {})
        assert [number for number, _ in alone.numbers][1:] == ["–", "–"]
        assert [number for number, _ in verdict([]).numbers] == ["–", "–", "–"]

    def test_a_teacher_in_the_method_s_own_options(self, tmp_path: Path) -> None:
        done = finished(tmp_path)
        expected, other = verdict(done), []
        for job, result in done:
            options = {"init_args": {"teacher": "gpt.csv"}} if job.teachers else {}
            config = {"model": job.config["model"] | options}
            other.append((dataclasses.replace(job, teachers=(), config=config), result))
        assert verdict(other) == expected

    def test_the_chart_of_differences(self, tmp_path: Path) -> None:
        differences = verdict(finished(tmp_path)).differences
        [axes] = differences_chart(differences, "KD 0.1").axes
        for row, (values, dots) in enumerate(zip(differences.values(), axes.lines, strict=False)):
            assert dots.get_data()[0].tolist() == values
            assert set(dots.get_data()[1]) == {row}
        assert axes.lines[-1].get_xdata() == [0, 0]
        assert [bar.get_width() for bar in axes.patches] == [np.mean(values) for values in differences.values()]
        assert [text.get_text()[-4:] for text in axes.get_yticklabels()] == ["+3.0", "+0.0", "-4.7"]

    @pytest.mark.parametrize("size", SIZES)
    def test_the_page(self, browser: Browser, tmp_path: Path, size: str) -> None:
        done = finished(tmp_path)
        write_page(tmp_path / "report.html", done, (["method", "accuracy"], [["teacher", "**90.0**"]]), {})
        page = opened(browser, tmp_path / "report.html", size)
        assert page.evaluate("window.hacked") is None
        for row in page.locator(".sheet tbody tr").all():
            method, *cells = [row.locator("th").inner_text(), *row.locator("td").all_inner_texts()]
            kept = [np.load(job.folder / "evidence.npz") for job, _ in done if job.method == method]
            hits = [np.concatenate([each["correct"][each["true"] == c] for each in kept]).mean() for c in range(3)]
            assert cells == [f"{100 * hit:.0f}" for hit in hits]
        heights = """[...document.querySelectorAll("#histogram rect")].map(bar => bar.getAttribute("height") > 0)"""
        last = page.evaluate(heights)
        counts = [np.histogram(SCORE[k::2], 40, (0, 2))[0] > 0 for k in (0, 1)]
        assert last == np.concatenate(counts).tolist()
        page.locator("#epoch").focus()
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#when") == "1 of 2"
        assert page.evaluate(heights) == np.concatenate([count[::-1] for count in counts]).tolist()
        page.focus("#map")
        for _ in range(30):
            page.keyboard.press("Shift+ArrowUp")
        assert page.inner_text("#framed") == f"{(SCORE <= 0.26).sum()} samples in the frame:"
        first = page.locator("#tiles .card >> nth=0")
        assert first.inner_text().split("\n")[:2] == ["label cat", "weight 0.01"]
        assert "wrong" in str(first.get_attribute("class"))
        assert page.locator("#tiles .tile").count() == (SCORE <= 0.26).sum()
