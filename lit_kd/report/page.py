"""The report of a comparison: one HTML page that needs no other file. Words stand in ``templates/compare.html``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from lit_kd.report import charts
from lit_kd.report.deferral import deferral_chart
from lit_kd.report.paired import Verdict, verdict
from lit_kd.report.render import data_url, render, sprites
from lit_kd.report.runs import EVIDENCE, SAMPLES, Arrays, Job, Result, read_metrics, score_of
from lit_kd.report.samples import Suspect, any_distrusted, class_name, to_png

Card = dict[str, Any]  # a picture for the template, ``svg`` or the address of a ``png``, with ``title`` and ``text``
Jobs = Mapping[str, Sequence[Job]]  # the seeds of each method


def write_page(
    path: Path, done: Sequence[tuple[Job, Result]], table: tuple[list[str], list[list[str]]], pictures: dict[str, Path]
) -> None:
    """Write the report of trainings, with a table (head and rows, the best in asterisks) and PNG files by caption."""
    jobs: dict[str, list[Job]] = {}
    accuracies: dict[str, list[float]] = {}
    for job, result in done:
        jobs.setdefault(job.method, []).append(job)
        accuracies.setdefault(job.method, []).append(score_of(result)[1])
    teachers = list(dict.fromkeys(job.method for job, _ in done if job.is_teacher))
    noise = [result["noise_rate"] for _, result in done if result.get("noise_rate")]
    data = [job.config.get("data") or {} for job, _ in done]
    options = [each.get("init_args") or {} for each in data]
    judged, word = verdict(done), score_of(done[0][1])[0]
    believed, sheets = _believed(jobs)
    with mpl.rc_context(charts.PAGE):
        render(
            path,
            "compare.html",
            title=path.parent.resolve().name,
            numbers=judged.numbers,
            students=len(jobs) - len(teachers),
            seeds=len({job.seed for job, _ in done}),
            teachers=teachers,
            module=data[0].get("class_path", "as configured"),
            options={k: v for k, v in options[0].items() if all((k, v) in each.items() for each in options)},
            noise=float(np.mean(noise)) if noise else 0.0,
            reference=judged.reference,
            head=table[0],
            rows=table[1],
            accuracy=[
                *_differences(judged, word),
                _card(f"Test {word}", charts.accuracy_chart(accuracies, teachers, charts.WIDE, word)),
            ],
            by_class=_by_class(jobs),
            curves=list(_curves(jobs, teachers)),
            reliability=list(_evidence(jobs, "confidence", charts.reliability_chart)),
            confidence=list(_evidence(jobs, "teacher_log_odds", charts.confidence_chart)),
            deferral=list(_evidence(jobs, "deferral_score", deferral_chart)),
            weights=list(_weights(jobs)),
            data=believed,
            sheets=sheets,
            knows_wrong=charts.knows_wrong([kept for job, _ in done if (kept := job.arrays(SAMPLES))]),
            distrusted=list(_distrusted(jobs)),
            class_name=class_name,
            pictures=[{"title": title, "png": data_url(file.read_bytes())} for title, file in pictures.items()],
        )


def _card(title: str, figure: Figure, text: str = "") -> Card:
    return {"title": title, "text": text, "svg": charts.to_svg(figure, f"{title}: {text}" if text else title)}


def _differences(judged: Verdict, word: str) -> Iterator[Card]:
    if judged.reference is not None and judged.differences:
        figure = charts.differences_chart(judged.differences, judged.reference, word=word)
        told = "A dot a seed, a bar the mean. The best is chosen in hindsight: small differences may be luck."
        yield _card(f"Against {judged.reference}, at the same seeds", figure, told)


def _by_class(jobs: Jobs) -> dict[str, Any]:
    """The share of each class's test samples that is classified right, of all seeds together, by method."""
    found: dict[str, list[float | None]] = {}
    names: list[str] | None = None
    for method, each in jobs.items():
        seeds = [kept for job in each if "true" in (kept := job.arrays(EVIDENCE))]
        names = names or next(
            (k["class_names"].tolist() for job in each if "class_names" in (k := job.arrays(SAMPLES))), None
        )
        if seeds:
            true, correct = (np.concatenate([seed[name] for seed in seeds]) for name in ("true", "correct"))
            count, right = np.bincount(true), np.bincount(true, correct)
            found[method] = [r / n if n else None for r, n in zip(right.tolist(), count.tolist(), strict=True)]
    classes = max(map(len, found.values()), default=0)
    return {"names": [class_name(names, c) for c in range(classes)], "rows": found}


def _believed(jobs: Jobs) -> tuple[list[dict[str, Any]], list[str]]:
    """For the maps by method: weights of the first seed, histograms of all seeds; and the sheets of pictures."""
    found: list[dict[str, Any]] = []
    sheets: list[str] = []
    made: dict[bytes, tuple[int, int, float]] = {}  # most methods see the same pictures
    for method, each in jobs.items():
        seeds = [kept for job in each if "histograms" in (kept := job.arrays(SAMPLES))]
        if not seeds:
            continue
        kept, rows = seeds[0], seeds[0]["mapped"]
        pixels: npt.NDArray[np.uint8] | None = kept.get("mapped_pictures")
        content = b"" if pixels is None else pixels.tobytes()
        if content not in made:
            drawn = sprites(pixels, 1_500_000)
            made[content] = (256 * len(sheets), drawn.pictured, drawn.aspect)
            sheets += drawn.sheets
        first, pictured, aspect = made[content]
        names = kept["class_names"].tolist() if "class_names" in kept else None
        wrong = kept["noisy"][rows] if charts.knows_wrong([kept]) else np.zeros(len(rows), bool)
        weights, epochs = kept["weights"][rows].astype(float).round(4), min(len(seed["histograms"]) for seed in seeds)
        found.append(
            {
                "method": method,
                "found": charts.wrong_labels(seeds, 2),
                "x": weights[:, 0].tolist(),
                "y": weights[:, 1:].sum(1).tolist(),
                "kind": wrong.astype(int).tolist(),
                "told": [
                    f"label {class_name(names, c)}" if c >= 0 else "no label" for c in kept["label"][rows].tolist()
                ],
                "row": rows.tolist(),
                **{"first": first, "pictured": pictured, "aspect": aspect},
                "histograms": np.sum([seed["histograms"][:epochs] for seed in seeds], axis=0).tolist(),
            }
        )
    return found, sheets


def _curves(jobs: Jobs, teachers: Sequence[str]) -> Iterator[Card]:
    logged = {method: [read_metrics(job.folder) for job in each] for method, each in jobs.items()}
    titles = {"val/accuracy": "Validation accuracy", "val/r2": "Validation R²"}
    for name, title in (titles | {"val/ece": "Calibration error (lower is better)"}).items():
        curves = {
            method: [[(e, row[name]) for e, row in epochs.items() if name in row] for epochs in each]
            for method, each in logged.items()
        }
        curves = {method: seeds for method, seeds in curves.items() if any(seeds)}
        if curves:
            yield _card(title, charts.curves_chart(curves, "epoch", "%", dashed=teachers))


def _evidence(jobs: Jobs, name: str, draw: Callable[[list[Arrays]], tuple[Figure, str]]) -> Iterator[Card]:
    """A card for each method whose seeds have some evidence."""
    for method, each in jobs.items():
        seeds = [kept for job in each if name in (kept := job.arrays(EVIDENCE))]
        if seeds:
            yield _card(method, *draw(seeds))


def _weights(jobs: Jobs) -> Iterator[Card]:
    """For each method whose wrong labels are known, what right and wrong ones weigh by epoch."""
    names = {kind: f"samples/{kind}_label_weight" for kind in ("right", "wrong")}
    for method, each in jobs.items():
        kept = [seed for job in each if (seed := job.arrays(SAMPLES))]
        if not any((seed["label"] >= 0).any() for seed in kept):
            continue
        logged = [read_metrics(job.folder) for job in each]
        told = [{e for e, row in seed.items() if set(names.values()) <= row.keys()} for seed in logged]
        epochs = sorted(set.intersection(*told))
        if epochs:
            means = {kind: [[seed[e][name] for e in epochs] for seed in logged] for kind, name in names.items()}
            figure, axes = charts.new_chart((charts.WIDE, 2.8))
            charts.draw_course(axes, epochs, means)
            yield _card(f"{method}: weights by epoch", figure, charts.wrong_labels(kept, 2))


def _distrusted(jobs: Jobs) -> Iterator[dict[str, Any]]:
    """For each method the samples whose label the first seed's training believes least."""
    for method, each in jobs.items():
        kept = each[0].arrays(SAMPLES)
        if "shown_index" in kept:
            columns = [kept[f"shown_{field.name}"].tolist() for field in fields(Suspect)]
            found = [Suspect(*row) for row in zip(*columns, strict=True)]
            pixels: Any = kept.get("pictures", [])
            pictures = [data_url(to_png(Image.fromarray(one))) for one in pixels] or [""] * len(found)
            names = kept["class_names"].tolist() if "class_names" in kept else None
            samples = list(zip(found, pictures, strict=True))
            yield {"name": method, "none": not any_distrusted(found), "classes": names, "samples": samples}
