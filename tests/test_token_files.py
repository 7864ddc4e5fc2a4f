"""Files with what a teacher said of tokens: against the network that said it, and against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sequences import C, fit, made, net, sums, weights

from lit_kd import ALMKD, GKD, KD, FileTeacher, OnlineKD, SequenceKD, write_predictions
from lit_kd.models.files import read_columns, write_columns
from lit_kd.teachers.answers import Options, read_answers
from lit_kd.teachers.cache import TeacherCache
from lit_kd.teachers.likeliest import Source
from lit_kd.types import IGNORED

formats = pytest.mark.parametrize("ending", ["csv", "parquet"])
PAPER = {"task": "tokens", "rule": "paper", "meta_gradient": "exact"}
Rows = dict[str, list[tuple[list[int], list[float]]]]


def ready() -> Any:
    data = sums()
    data.setup()
    return data


def said(teacher: Any, k: int) -> Rows:
    """By id the k likeliest tokens at each response token, and their log-probabilities, as APIs tell them."""
    data, found = ready(), {}
    parts = data.parts
    for rows in (parts.rows(torch.arange(len(data.labels))), parts.val, parts.test):
        for item in rows:
            with torch.no_grad():
                log = teacher(item.x.unsqueeze(0))[0].double().log_softmax(-1)
            top = log.topk(k)
            kept = (item.y != IGNORED).nonzero().flatten().tolist()
            found[parts.ids[int(item.index)]] = [(top.indices[t].tolist(), top.values[t].tolist()) for t in kept]
    return found


def write(path: Path, rows: Rows) -> str:
    lists = [[[place[i] for place in places] for places in rows.values()] for i in (0, 1)]
    cells = [[json.dumps(cell) for cell in column] for column in lists] if path.suffix == ".csv" else lists
    write_columns(path, {"id": list(rows), "tokens": cells[0], "logprobs": cells[1]}, overwrite=True)
    return str(path)


@formats
def test_the_whole_vocabulary_is_the_network(ending: str, tmp_path: Path) -> None:
    """Of sequences of differing length; also their agreement, and the sums of ALM-KD."""
    teacher = net(12, 2)
    file = write(tmp_path / f"said.{ending}", said(teacher, C))
    for kind, options in ((SequenceKD, {}), (KD, {"task": "tokens"}), (ALMKD, PAPER)):
        live, read = (made(kind, teacher=one, **options) for one in (teacher, file))
        logged = [fit(model, max_epochs=2).callback_metrics for model in (live, read)]
        torch.testing.assert_close(weights(read), weights(live), atol=1e-5, rtol=1e-4)
        assert logged[1]["val/teacher_agreement"] == logged[0]["val/teacher_agreement"]


@formats
def test_the_likeliest(ending: str, tmp_path: Path) -> None:
    """What is left is for the others; one place tells fewer, one a probability of 0."""
    rows = said(net(12, 2), 3)
    name = ready().parts.ids[0]
    rows[name][0] = ([4], [math.log(0.4)])
    rows[name][1] = ([1, 2], [math.log(1 - 1e-9), -9999.0])
    data, teacher = ready(), FileTeacher(write(tmp_path / f"said.{ending}", rows))
    teacher.width = C
    teacher.join(data, C, tokens=True)
    batch = data.parts.train_rows(False).__getitems__(list(range(12)))
    found = teacher.answers(batch).logits.softmax(-1)
    for i, row in enumerate(batch.index.tolist()):
        for t, (tokens, logs) in zip(
            (batch.y[i] != IGNORED).nonzero().flatten(), rows[data.parts.ids[row]], strict=True
        ):
            p = [math.exp(log) for log in logs]
            expected = torch.full((C,), (1 - sum(p)) / (C - len(p)))
            expected[tokens] = torch.tensor(p)
            torch.testing.assert_close(found[i, t], expected, rtol=0, atol=2e-5)
    assert teacher.answers(batch).logits.isfinite().all()
    assert (teacher.answers(batch).logits[batch.y == IGNORED] == 0).all()


@formats
def test_written_predictions(ending: str, tmp_path: Path) -> None:
    teacher, path = net(12, 2), tmp_path / f"said.{ending}"
    write_predictions(path, teacher, ready(), top_k=3)
    columns, expected = read_columns(path), said(teacher, 3)
    assert columns["id"] == list(expected)
    for tokens, logs, places in zip(columns["tokens"], columns["logprobs"], expected.values(), strict=True):
        both = [json.loads(cell) if ending == "csv" else cell for cell in (tokens, logs)]
        assert both[0] == [place[0] for place in places]
        for found, (_, wanted) in zip(both[1], places, strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="expected top_k of at least 1, found 0"):
        write_predictions(tmp_path / "other.csv", teacher, ready(), top_k=0)


def test_a_long_response_in_one_cell(tmp_path: Path) -> None:
    path = tmp_path / "said.csv"
    cell = json.dumps([[1, 2, 3]] * 100_000)
    write_columns(path, {"id": ["a"], "tokens": [cell]})
    assert read_columns(path)["tokens"] == [cell]


def test_rows_that_are_missing_learn_the_label(tmp_path: Path) -> None:
    """Put together by hand from a batch; the agreement is over the rows that are there."""
    teacher, rows = net(12, 2), said(net(12, 2), C)
    parts = ready().parts
    for name in parts.ids[::3]:
        del rows[name]
    model = made(SequenceKD, teacher=write(tmp_path / "said.csv", rows), weight=0.7)
    with pytest.warns(UserWarning, match="what it lacks has no say"):
        fitted = fit(model, limit_train_batches=1)
    same = []
    for item in (item for item in parts.val if parts.ids[int(item.index)] in rows):
        kept, x = item.y != IGNORED, item.x.unsqueeze(0)
        same += (model.student(x).argmax(-1) == teacher(x).argmax(-1))[0, kept].tolist()
    assert fitted.callback_metrics["val/teacher_agreement"] == pytest.approx(sum(same) / len(same))
    batch = model.data.parts.train_rows(False).__getitems__(list(range(72)))
    fitted.training = True
    student, taught = model.outputs(batch)
    losses, given, _ = model.weighed(student, taught, batch)
    expected = []
    for i, row in enumerate(batch.index.tolist()):
        kept = batch.y[i] != IGNORED
        z, p = student.logits[i, kept].log_softmax(-1), teacher(batch.x[i : i + 1])[0, kept].log_softmax(-1)
        ce = -z.gather(1, batch.y[i, kept].unsqueeze(1)).mean()
        kl = (p.exp() * (p - z)).sum(-1).mean()
        expected.append(0.3 * ce + 0.7 * kl if parts.ids[row] in rows else ce)
    found = sum(given[:, k] * losses[k] for k in range(2))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert any(parts.ids[row] not in rows for row in batch.index)


def test_a_folder_of_the_cache_is_a_teacher(tmp_path: Path) -> None:
    live = made(SequenceKD, teacher=net(12, 2), teacher_cache=TeacherCache(str(tmp_path)))
    fit(live)
    [folder] = tmp_path.iterdir()
    read = made(SequenceKD, teacher=str(folder))
    fit(read)
    assert weights(read).equal(weights(live))


def test_a_large_vocabulary_keeps_what_is_left(tmp_path: Path) -> None:
    """Of a hundred thousand others, whose probabilities are far below one in a million."""
    for left in (0.01, 0.0):
        write_columns(tmp_path / "a.csv", one([[7]], [[math.log(1 - left)]]), overwrite=True)
        told = read_answers(Source(tmp_path / "a.csv", 100_001, None, tokens=True), Options())
        assert told.rest is not None
        assert (told.rest.double().exp() * 100_000).item() == pytest.approx(max(left, 1e-6), rel=1e-4)


def test_options_of_classes(tmp_path: Path) -> None:
    teacher = FileTeacher(write(tmp_path / "said.csv", said(net(12, 2), 2)), label="anna")
    with pytest.raises(ValueError, match="neither label, confidence nor probabilities for tokens, found"):
        fit(made(SequenceKD, teacher=teacher))


def one(tokens: Any, logs: Any) -> dict[str, list[Any]]:
    return {"id": [ready().parts.ids[0]], "tokens": [json.dumps(tokens)], "logprobs": [json.dumps(logs)]}


BAD: dict[str, tuple[Any, str]] = {
    "no lists": (lambda: one([1, 2], [-1, -1]), "lists of lists, of numbers from 0 to 14"),
    "no JSON": (lambda: one(0, 0) | {"tokens": ["[[1,"]}, r"lists of lists.*found '\[\[1,'"),
    "other lengths": (lambda: one([[1, 2]], [[-1]]), "of as many numbers"),
    "other places": (lambda: one([[1], [2]], [[-1]]), "of as many numbers"),
    "no token": (lambda: one([[]], [[]]), "lists of lists"),
    "unknown token": (lambda: one([[C]], [[-1]]), r"from 0 to 14.*found '\[\[15\]\]'"),
    "half a token": (lambda: one([[0.5]], [[-1]]), "from 0 to 14"),
    "a word": (lambda: one([["a"]], [[-1]]), "from 0 to 14"),
    "positive": (lambda: one([[1]], [[0.7]]), "numbers of at most 0"),
    "not a number": (lambda: one([[1]], [[math.nan]]), "numbers of at most 0"),
    "twice": (lambda: one([[1, 1]], [[-2, -2]]), r"classes that differ.*found classes \[1, 1\]"),
    "above 1": (lambda: one([[1, 2]], [[-0.1, -0.1]]), "sum to more than 0, at most 1"),
    "nothing said": (lambda: one([], []), "expected answers, found none in 1 rows"),
    "too few": (lambda: one([[1]], [[-1]]), r"a list for each of the \d tokens of a row's response, found 1 for '\d"),
    "no column": (
        lambda: {"id": ["1+1"], "tokens": ["[[1]]"]},
        "a column logprobs with their log-probabilities, list",
    ),
    "classes": (lambda: {"id": ["1+1"], "label": [1]}, "expected a column tokens with token numbers, lists of them"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    columns, match = BAD[case]
    write_columns(tmp_path / "bad.csv", columns())
    with pytest.raises(ValueError, match=match) as caught:
        fit(made(SequenceKD, teacher=str(tmp_path / "bad.csv")))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda file: made(GKD, teacher=file), "expected no mix with a teacher that is a file, as GKD asks it"),
        (lambda file: made(SequenceKD, teacher=file, responses="teacher"), "as SequenceKD asks it"),
        (lambda file: made(OnlineKD, teacher=file), "as OnlineTeacher reads its layers, found a file"),
        (lambda file: made(OnlineKD, teacher=file, lora=2), "a network with linear layers inside it"),
    ],
)
def test_refused(make: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        fit(make(write(tmp_path / "said.csv", said(net(12, 2), 2))))
