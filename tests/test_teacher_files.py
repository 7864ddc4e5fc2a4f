"""Teachers that are files, against networks that say the same, and against what is left out by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import QUIET, call, configs, read_csv, train_teacher, version
from lightning import seed_everything
from methods import CLASSES, METHODS, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from sklearn.datasets import load_digits
from test_every_method import Each
from torch import Tensor

from lit_kd import ALMKD, DKD, KD, CrowdLabels, Distiller, FileTeacher, WeightedDistillation, write_predictions
from lit_kd.data import DistillationDataModule, ImageFolderDataModule
from lit_kd.models.files import write_columns
from lit_kd.teachers.cache import TeacherCache
from lit_kd.terms import BatchCorrelation, Hint
from lit_kd.terms.base import heard, weighted_means
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings import Amal, Paper
from lit_kd.weightings.mean_teacher import as_one

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
Columns = Mapping[str, Sequence[Any]]
ROWS = 120
formats = pytest.mark.parametrize("ending", ["csv", "parquet"])


def data(**options: Any) -> Blobs:
    made = Blobs(**options)
    made.setup()
    return made


def asked(columns: Columns, ending: str = "csv", classes: int = CLASSES, **options: Any) -> Outputs:
    """What the teacher of such a file says of all rows, 0 to 119."""
    path = Path(f"answers.{ending}")
    write_columns(path, columns, overwrite=True)
    module, teacher = data(), FileTeacher(path, **options)
    teacher.width = classes
    teacher.join(module, classes)
    index = torch.tensor([module.parts.ids.index(str(row)) for row in range(ROWS)])
    return teacher.answers(Batch(index, index, index))


def of_rows(rows: Sequence[int], **columns: Sequence[Any]) -> dict[str, Sequence[Any]]:
    return {"id": [str(row) for row in rows], **columns}


def said() -> Tensor:
    """What a trained network says of each row of the pool, probabilities ``(120, C)``."""
    network = trained_teachers()[1]
    with torch.no_grad():
        return network(blobs()[0]).softmax(-1)  # type: ignore[no-any-return]


def as_file(path: Path, rows: Sequence[int] | None = None, p: Tensor | None = None) -> str:
    rows = range(ROWS) if rows is None else rows
    p = said() if p is None else p
    write_columns(path, of_rows(rows, **{f"prob_{c}": p[list(rows), c].tolist() for c in range(CLASSES)}))
    return str(path)


def fit(model: Distiller, module: Any = None, **options: Any) -> Any:
    fitted = trainer(**options)
    fitted.fit(model, module or Blobs())
    seed_everything(0, verbose=False)  # for the next one
    return fitted


def weights(model: Distiller) -> list[Tensor]:
    return [p.detach().clone() for p in model.student.parameters()]


class TestFormats:
    @formats
    def test_probabilities(self, ending: str) -> None:
        """In any order of rows and columns, by class numbers."""
        p, rows = said(), np.random.default_rng(0).permutation(ROWS).tolist()
        found = asked(of_rows(rows, **{f"prob_{c}": p[rows, c].tolist() for c in (2, 0, 1)}), ending)
        assert found.known is None
        torch.testing.assert_close(found.logits.softmax(-1), p, rtol=0, atol=5e-6)

    def test_a_pattern_of_names(self) -> None:
        p = said()
        found = asked(of_rows(range(ROWS), **{f"p({c})": p[:, c].tolist() for c in range(3)}), probabilities="p(*)")
        torch.testing.assert_close(found.logits.softmax(-1), p, rtol=0, atol=5e-6)

    @formats
    def test_labels(self, ending: str) -> None:
        found = asked(of_rows(range(0, ROWS, 2), label=[row % CLASSES for row in range(0, ROWS, 2)]), ending)
        assert found.known is not None
        assert found.known.tolist() == [row % 2 == 0 for row in range(ROWS)]
        expected = F.one_hot(torch.arange(0, ROWS, 2) % CLASSES, CLASSES).float()
        torch.testing.assert_close(found.logits[::2].softmax(-1), expected, rtol=0, atol=3e-6)

    @formats
    @pytest.mark.parametrize("name", ["confidence", "probability"])
    def test_confidence(self, ending: str, name: str) -> None:
        """The rest is spread evenly."""
        sure = np.linspace(0.2, 1, ROWS).tolist()
        found = asked(of_rows(range(ROWS), **{"class": [1] * ROWS, name: sure}), ending).logits.softmax(-1)
        expected = torch.tensor([[(1 - c) / 2, c, (1 - c) / 2] for c in sure])
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)

    @formats
    def test_top_k(self, ending: str) -> None:
        """Of the two likeliest of three, with a row that has one."""
        p = said()
        top, at = p.topk(2)
        logs, second = top.log().tolist(), at[:, 1].tolist()
        columns: dict[str, list[Any]] = {"class_1": at[:, 0].tolist(), "logprob_1": [one for one, _ in logs]}
        columns |= {"class_2": second, "logprob_2": [two for _, two in logs]}
        columns["class_2"][5] = columns["logprob_2"][5] = None
        expected = p.clone()
        expected[5] = (1 - top[5, 0]) / 2
        expected[5, at[5, 0]] = top[5, 0]
        found = asked(of_rows(range(ROWS), **columns), ending)
        torch.testing.assert_close(found.logits.softmax(-1), expected, rtol=0, atol=5e-6)

    def test_several_annotators_in_one_file(self) -> None:
        """Each a column; empty cells, and -1, are no answers; a confidence is that of whom it is said to be."""
        answers = {"anna": [0, 1, 2, None, -1, ""], "ben": ["2", "2.0", "0", "1", "1", "1"], "confidence": [0.5] * 6}
        columns = of_rows(range(ROWS), **{name: 20 * cells for name, cells in answers.items()})
        anna, ben = (asked(columns, label=name) for name in ("anna", "ben"))
        assert anna.speaks[:6].tolist() == [True] * 3 + [False] * 3
        assert anna.logits[:3].argmax(1).tolist() == [0, 1, 2]
        assert ben.logits[:6].argmax(1).tolist() == [2, 2, 0, 1, 1, 1]
        assert float(anna.logits[0].softmax(-1)[0]) > 0.99
        unsure = asked(columns, label="anna", confidence="confidence")
        assert unsure.logits[0].softmax(-1).tolist() == pytest.approx([0.5, 0.25, 0.25])

    def test_names_of_classes_and_files(self, tmp_path: Path) -> None:
        """Of a folder of images; class names are found before numbers."""
        from PIL import Image

        for folder in ("train/ant", "train/bee", "test/ant", "test/bee"):
            (tmp_path / "images" / folder).mkdir(parents=True)
            for k in range(12):
                Image.new("L", (4, 4), 20 * k).save(tmp_path / "images" / folder / f"{k}.png")
        module = ImageFolderDataModule(str(tmp_path / "images"), meta=4, val=4)
        module.setup()
        assert module.class_names == ["ant", "bee"]
        files, path = module.parts.ids, tmp_path / "a.csv"
        write_columns(path, {"file": files, "class": ["bee" if "ant" in file else "ant" for file in files]})
        teacher = FileTeacher(path)
        teacher.width = 2
        assert not teacher.join(module, 2)
        rows = torch.arange(len(files))
        found = teacher.answers(Batch(rows, rows, rows)).logits.argmax(1)
        assert found.tolist() == ["ant" in file for file in files]


LABELS = {"label": [0] * ROWS}
THIRDS = {f"prob_{c}": [1 / 3] * ROWS for c in range(3)}
BAD: dict[str, tuple[Columns, dict[str, Any], str]] = {
    "no ids match": ({"id": [f"x{i}" for i in range(3)], "label": [0] * 3}, {}, r"ids of training rows, such as '\d+'"),
    "duplicates": (of_rows([1, 2, 1], label=[0] * 3), {}, "each id once, found '1' again"),
    "sum": (of_rows(range(ROWS), **(THIRDS | {"prob_0": [0.5] * ROWS})), {}, r"sum to 1, found .* of sum 1\.167 in"),
    "negative": (
        of_rows([1], prob_0=[-0.5], prob_1=[0.5], prob_2=[1.0]),
        {},
        r"of at least 0 that sum to 1, found -0.5, 0.5, 1",
    ),
    "half a row": (of_rows([1], prob_0=[None], prob_1=[0.5], prob_2=[0.5]), {}, "sum to 1, found nan"),
    "no number": (of_rows([1], prob_0=["much"], prob_1=[0.5], prob_2=[0.5]), {}, "numbers from 0 to 1, found 'much'"),
    "unknown class": (of_rows([1], label=["cat"]), {}, r"classes of the data, 0 to 2, found 'cat'"),
    "class out of range": (of_rows([1], label=[3]), {}, r"0 to 2, found '3'"),
    "unknown class of a column": (of_rows([1], prob_0=[1], prob_1=[0], prob_cat=[0]), {}, "0 to 2, found 'cat'"),
    "a class without a column": (of_rows([1], prob_0=[0.5], prob_1=[0.5]), {}, "prob_\\* for each of 3 classes"),
    "empty": ({"id": [], "label": []}, {}, "a table with a head and rows, found an empty one"),
    "no answers": (of_rows([1, 2], label=[None, ""]), {}, "expected answers, found none in 2 rows"),
    "no ids": ({"name": ["1"], "label": [0]}, {}, "a column id or file with the ids of the data's rows"),
    "no such column": (of_rows([1], label=[0]), {"label": "anna"}, "a column anna with classes"),
    "no such id": (of_rows([1], label=[0]), {"id": "key"}, "a column key with the ids"),
    "no such pattern": (of_rows([1], label=[0]), {"probabilities": "p*"}, r"expected columns p\*, one star"),
    "nothing to read": (of_rows([1], what=[0]), {}, r"columns prob_\* with probabilities, or class_1, logprob_1"),
    "confidence": (of_rows([1, 2], label=[0, 0], confidence=[0.5, 1.5]), {}, "from 0 to 1, found 1.5|'1.5' in"),
    "blank confidence": (of_rows([1, 2], label=[0, 0], confidence=[0.5, ""]), {}, "numbers from 0 to 1, found ''"),
    "top-k above 1": (
        of_rows([1], class_1=[0], logprob_1=[-0.1], class_2=[1], logprob_2=[-0.1]),
        {},
        r"at most 1, found classes \[0, 1\] of sum 1.81",
    ),
    "top-k twice": (
        of_rows([1], class_1=[0], logprob_1=[-2], class_2=[0], logprob_2=[-3]),
        {},
        r"classes that differ.*found classes \[0, 0\]",
    ),
    "top-k of nothing": (
        of_rows([1], class_1=[0], logprob_1=["-inf"]),
        {},
        r"sum to more than 0, at most 1, found classes \[0\] of sum 0",
    ),
    "top-k positive": (of_rows([1], class_1=[0], logprob_1=[0.7]), {}, "numbers of at most 0, found '0.7'"),
    "top-k without a class": (of_rows([1], logprob_1=[-1.0]), {}, "column class_1 with the class of logprob_1"),
}


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD)
    def test_is_refused_in_a_sentence(self, case: str) -> None:
        columns, options, match = BAD[case]
        write_columns(Path("bad.csv"), columns)
        model = KD("mlp-8", FileTeacher("bad.csv", **options), **BASE)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=match) as caught:
            fit(model)
        assert str(caught.value).startswith("bad.csv: expected ")
        assert "\n" not in str(caught.value)

    def test_an_empty_file_and_none(self) -> None:
        Path("bad.csv").write_text("")
        with pytest.raises(ValueError, match=r"^bad.csv: expected a table with a head and rows, found an empty one$"):
            fit(KD("mlp-8", "bad.csv", **BASE))
        with pytest.raises(FileNotFoundError, match=r"^none.csv: expected a file of a teacher's answers, found none$"):
            fit(KD("mlp-8", "none.csv", **BASE))

    def test_no_training_row_is_left(self) -> None:
        module = data()
        as_file(Path("a.csv"), [int(one) for one in module.parts.ids[module.train_size :]])
        with pytest.raises(ValueError, match=r"ids of training rows, such as .* \(72 of 72 ids of the data\)"):
            fit(KD("mlp-8", "a.csv", **BASE))

    def test_what_is_missing_or_unknown_is_counted_once(self) -> None:
        module = data()
        ids = [int(one) for one in module.parts.ids]
        as_file(Path("a.csv"), ids[:40] + ids[48:60])
        with Path("a.csv").open("a") as file:
            file.write("other,1,0,0\n")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(KD("mlp-8", "a.csv", **BASE))
        told = [str(one.message) for one in caught if "a.csv" in str(one.message)]
        lacks = "40 of 48 train rows, 12 of 24 meta rows, 0 of 24 val rows, 1 rows that the data do not have"
        assert told == [f"a.csv speaks of {lacks}: what it lacks has no say"]

    @pytest.mark.parametrize(
        "method",
        ["fitnet", "crd", "vid", "srrl", "simkd", "lelp", "mixkd", "adversarial-teacher", "kd-revised", "rkd"],
    )
    def test_methods_that_want_a_network(self, method: str) -> None:
        model = build(method, teachers=[as_file(Path("a.csv"))] * 2)
        with pytest.raises(ValueError, match="a file"):
            fit(model)

    def test_terms_and_options_that_do(self) -> None:
        file = as_file(Path("a.csv"))
        for options, match in (
            ({"extra": [Hint()]}, "expected a network as the teacher, as Hint reads its layers, found a file"),
            ({"mix": "mixup"}, "no mix with a teacher that is a file"),
            ({"select": 0.5}, "no select with a teacher that is a file"),
        ):
            with pytest.raises(ValueError, match=match):
                fit(KD("mlp-8", file, **BASE, **options))  # type: ignore[arg-type]
        as_file(Path("half.csv"), range(0, ROWS, 2))
        model = KD("mlp-8", "half.csv", extra=[BatchCorrelation()], **BASE)
        with pytest.raises(ValueError, match=r"half.csv: expected answers for all .* BatchCorrelation compares"):
            fit(model)
        fit(KD("mlp-8", file, extra=[BatchCorrelation()], **BASE))


FILES = [
    name
    for name in METHODS
    if name.startswith(("kd-teachers", "almkd", "group", "weighted", "slam", "label-revision", "loss", "rad", "glc"))
    or name in ("kd", "adversarial", "dkd", "nkd", "dist", "wsld", "ctkd", "multi-level", "dot", "crowd-labels")
]
FILES = [name for name in FILES if name not in ("almkd-hint", "label-revision-selected", "almkd-revised")]


class TestWholeFiles:
    """A file that says what a network says teaches what the network teaches."""

    @pytest.mark.parametrize("method", FILES)
    def test_the_same_training(self, method: str) -> None:
        found = []
        file = as_file(Path("a.csv"))
        for teachers in ([trained_teachers()[1]] * 2, [file] * 2):
            seed_everything(0, verbose=False)
            model = build(method, teachers=teachers)
            fitted = fit(model, limit_val_batches=1.0)
            found.append((weights(model), dict(fitted.callback_metrics)))
        for theirs, own in zip(*(one for one, _ in found), strict=True):
            torch.testing.assert_close(own, theirs, rtol=2e-2, atol=2e-3)
        assert set(found[0][1]) == set(found[1][1])
        assert found[0][1].get("val/teacher_agreement") == found[1][1].get("val/teacher_agreement")

    def test_augmentation_does_not_matter(self) -> None:
        """The answer belongs to the row."""
        file, seen = as_file(Path("a.csv")), []
        model = KD("mlp-8", file, **BASE)

        def look(hook: str, fitted: Any, module: Any, batch: Batch, *_: Any) -> None:
            seen.append((module.ask(batch._replace(x=torch.randn_like(batch.x)))[0].logits, batch.index))

        module = data()
        fit(model, module, callbacks=Each(look, "on_train_batch_start"))
        rows = [int(one) for one in module.parts.ids]
        for logits, index in seen:
            expected = said()[[rows[i] for i in index.tolist()]]
            torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=5e-6)


class TestMissingRows:
    """Half of the rows are not in the file."""

    even = range(0, ROWS, 2)

    def batch(self, module: Blobs) -> tuple[Batch, Tensor]:
        index = torch.arange(48)
        x = module.parts.rows(index).__getitems__(list(range(48)))
        return x, torch.tensor([int(module.parts.ids[i]) % 2 == 0 for i in range(48)])

    def test_fixed_weights_by_hand(self) -> None:
        """Who is silent gives his share to those who speak, and all to the label where nobody speaks."""
        z = torch.zeros(3, 2)
        one = Outputs(z, {}, torch.tensor([True, True, False]))
        two = Outputs(z, {}, torch.tensor([True, False, False]))
        expected = torch.tensor([[0.1, 0.45, 0.45], [0.1, 0.9, 0], [1, 0, 0]])
        torch.testing.assert_close(heard([0.1, 0.45, 0.45], [one, two]), expected)
        torch.testing.assert_close(heard([1.0, 2.5], [two]), torch.tensor([[1.0, 2.5], [1, 0], [1, 0]]))
        assert heard([0.1, 0.9], [Outputs(z, {})]) == [0.1, 0.9]

    @pytest.mark.parametrize("of", ["probabilities", "logits", "median"])
    def test_means_are_of_those_that_speak(self, of: Any) -> None:
        g = torch.Generator().manual_seed(0)
        logits = [torch.randn(40, CLASSES, generator=g) for _ in range(4)]
        known = [torch.rand(40, generator=g) < 0.6 for _ in range(3)]
        teachers = [*(Outputs(t, {}, k) for t, k in zip(logits, known, strict=False)), Outputs(logits[3], {})]
        found = as_one(teachers[:3], 2.0, of)
        for row in range(40):
            speak = [t[row : row + 1] for t, k in zip(logits, known, strict=False) if k[row]]
            assert bool(found.speaks[row]) == bool(speak)
            if speak:
                expected = as_one([Outputs(t, {}) for t in speak], 2.0, of).logits[0]
                torch.testing.assert_close((found.logits[row] / 2).softmax(-1), (expected / 2).softmax(-1))
        assert as_one(teachers, 2.0, of).speaks.all()

    def test_kd_learns_the_label_there(self) -> None:
        """The loss of a batch, row by row."""
        as_file(Path("a.csv"), self.even)
        model, module, checked = KD("mlp-8", "a.csv", weight=0.7, **BASE), data(), []

        def look(hook: str, fitted: Any, method: Any, batch: Batch, *_: Any) -> None:
            student, teachers = method.outputs(batch)
            found = weighted_means(*method.weighed(student, teachers, batch))["loss"]
            each = []
            for row, (index, y) in enumerate(zip(batch.index.tolist(), batch.y.tolist(), strict=True)):
                z, name = student.logits[row].double(), int(module.parts.ids[index])
                ce = -z.log_softmax(-1)[y]
                p, q = (said()[name].double().log() / 4).softmax(-1), (z / 4).log_softmax(-1)
                kl = 16 * (p * (p.log() - q)).sum()
                each.append(0.3 * ce + 0.7 * kl if name % 2 == 0 else ce)
            assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)
            checked.append(found)

        fit(model, module, callbacks=Each(look, "on_train_batch_start"))
        assert len(checked) == 12

    @pytest.mark.parametrize("method", [name for name in FILES if name not in ("dist", "multi-level")])
    def test_what_stands_there_is_never_learned(self, method: str) -> None:
        """Other nonsense in the rows that are not known changes nothing; all methods train and measure."""
        as_file(Path("a.csv"), self.even)
        trained = []
        for nonsense in (0.0, 5.0):
            file = FileTeacher("a.csv")
            plain = file.answers

            def answers(batch: Batch, training: bool = False, said: Any = plain, high: float = nonsense) -> Outputs:
                out: Outputs = said(batch, training)
                other = high * torch.arange(CLASSES).float().expand_as(out.logits)
                return out._replace(logits=out.logits.where(out.speaks.unsqueeze(1), other))

            file.answers = answers  # type: ignore[method-assign]
            seed_everything(0, verbose=False)
            model = build(method, teachers=[file, file])
            fitted = fit(model, Blobs(noise="symmetric", noise_rate=0.3), max_epochs=3)
            trained.append((weights(model), fitted.callback_metrics["train/loss"]))
            assert fitted.callback_metrics["train/loss"].isfinite()
        for one, other in zip(trained[0][0], trained[1][0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    @pytest.mark.parametrize("rule", ["robust", Paper(warmup_epochs=0, every=1), Amal(warmup_epochs=0, every=1)])
    @pytest.mark.parametrize("beside", [0, 1])
    def test_learned_weights_stay_0(self, rule: Any, beside: int) -> None:
        as_file(Path("a.csv"), self.even)
        model = ALMKD("mlp-8", ["a.csv", *trained_teachers()[:beside]], rule=rule, **BASE)
        module = Blobs(noise="symmetric", noise_rate=0.3)
        fit(model, module, max_epochs=4)
        learned = model.table["weights"]
        silent = torch.tensor([int(one) % 2 == 1 for one in module.parts.ids[: len(learned)]])
        assert (learned[silent, 1] == 0).all()
        if rule != "robust":
            assert (learned[~silent][:, 1] > 0).any()
        if isinstance(rule, Paper):
            torch.testing.assert_close(learned.sum(1), torch.ones(len(learned)))
            if not beside:
                assert (learned[silent, 0] == 1).all()

    def test_robust_counts_only_what_is_said(self) -> None:
        """Errors of student and teacher on the validation rows that the file has; no class for other rows."""
        as_file(Path("a.csv"), self.even)
        model, module = ALMKD("mlp-8", "a.csv", **BASE), Blobs()
        fit(model, module, max_epochs=2)
        ids = [int(one) for one in module.parts.ids]
        val = [row for row in ids[72:96] if row % 2 == 0]
        with torch.no_grad():
            wrong = (model.student(blobs()[0]).argmax(1) != blobs()[1])[val].sum()
        errors = model.table.shared["errors"][-1]
        assert errors[:2, 1].tolist() == [wrong, (said().argmax(1) != blobs()[1])[val].sum()]
        classes = model.table["teacher_class"][:, 0]
        expected = [int(said()[row].argmax()) if row % 2 == 0 else UNLABELED for row in ids[: len(classes)]]
        assert classes.tolist() == expected

    def test_agreement_is_with_those_that_speak(self) -> None:
        as_file(Path("a.csv"), self.even)
        model, module = KD("mlp-8", "a.csv", **BASE), Blobs()
        fitted = fit(model, module)
        [tested] = fitted.test(model, module, verbose=False)
        rows = [row for row in (int(one) for one in module.parts.ids[96:]) if row % 2 == 0]
        with torch.no_grad():
            same = model.student(blobs()[0]).argmax(1) == said().argmax(1)
        assert tested["test/teacher_agreement"] == pytest.approx(same[rows].float().mean().item())

    def test_weighted_judges_by_the_meta_rows_that_it_has(self) -> None:
        as_file(Path("a.csv"), self.even)
        model, module = WeightedDistillation("mlp-8", "a.csv", **BASE), Blobs(labeled=24)
        fit(model, module)
        assert len(model._distortions) == sum(int(one) % 2 == 0 for one in module.parts.ids[48:72])
        ids = data(labeled=24).parts.ids
        Path("b.csv").unlink(missing_ok=True)
        as_file(Path("b.csv"), [int(one) for one in ids[:48]])
        with pytest.raises(ValueError, match="expected a teacher that speaks of meta rows"):
            fit(WeightedDistillation("mlp-8", "b.csv", **BASE), Blobs(labeled=24))


class TestWrappedData:
    """A foreign module's own test rows have no ids."""

    def test_the_file_is_not_heard_there(self) -> None:
        x, y = blobs()
        sets = [torch.utils.data.TensorDataset(x[i::2], y[i::2]) for i in range(2)]
        module = DistillationDataModule.from_datasets(sets[0], sets[1], sets[1], batch_size=8)
        p = said()
        columns = {f"prob_{c}": [*p[::2, c].tolist(), *p[1::2, c].tolist()] for c in range(CLASSES)}
        write_columns(Path("a.csv"), {"id": [*map(str, range(60)), *(f"val/{k}" for k in range(60))], **columns})
        model = KD("mlp-8", "a.csv", **BASE)
        fitted = fit(model, module)
        assert "val/teacher_agreement" in fitted.callback_metrics
        with pytest.warns(UserWarning, match=r"a.csv says nothing of the test rows") as caught:
            [tested] = fitted.test(model, module, verbose=False)
        assert len([one for one in caught if "says nothing" in str(one.message)]) == 1
        assert "test/accuracy" in tested
        assert "test/teacher_agreement" not in tested


class TestCache:
    def test_its_folder_is_a_teacher(self, tmp_path: Path) -> None:
        network = trained_teachers()[1]
        fit(KD("mlp-8", network, teacher_cache=tmp_path / "cache", **BASE))
        [folder] = (tmp_path / "cache").iterdir()
        found = []
        for teacher in (network, str(folder)):
            model = KD("mlp-8", teacher, **BASE)
            fit(model, limit_val_batches=0)
            found.append(weights(model))
        for own, theirs in zip(*found, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)

    def test_a_file_is_heard_as_it_is_now(self, tmp_path: Path) -> None:
        """The cache, beside it of a network, holds nothing of a file, so that a changed one is heard."""
        network, found = trained_teachers()[0], []
        for p in (said(), said().roll(1, 0)):
            for cache in (None, TeacherCache(str(tmp_path / "cache"))):
                Path("a.csv").unlink(missing_ok=True)
                as_file(Path("a.csv"), p=p)
                model = KD("mlp-8", [network, "a.csv"], teacher_cache=cache, **BASE)
                fit(model)
                found.append(weights(model))
        assert len(list((tmp_path / "cache").iterdir())) == 1
        for plain, cached in (found[:2], found[2:]):
            for one, other in zip(plain, cached, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found[0][0], found[2][0], atol=1e-3)

    def test_files_alone_need_no_cache(self) -> None:
        fit(KD("mlp-8", as_file(Path("a.csv")), teacher_cache="memory", **BASE))

    @formats
    def test_written_predictions_are_read_back(self, ending: str) -> None:
        network, path = trained_teachers()[1], Path(f"said.{ending}")
        write_predictions(path, network, Blobs())
        seed_everything(0, verbose=False)
        found = []
        for teacher in (network, str(path)):
            model = DKD("mlp-8", teacher, beta=0.5, **BASE)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*speaks of")
                fit(model)
            found.append(weights(model))
        for own, theirs in zip(*found, strict=True):
            torch.testing.assert_close(own, theirs, rtol=2e-2, atol=1e-3)
        with pytest.raises(FileExistsError):
            write_predictions(path, network, Blobs())


class TestCrowdLabels:
    """A good annotator, one who confuses two classes, one who always names the next class."""

    def files(self) -> list[str]:
        y = blobs()[1]
        votes = {"good": y.clone(), "half": y.where(y != 2, 1), "next": (y + 1) % CLASSES}
        votes["good"][::10] = (y[::10] + 2) % CLASSES
        for name, vote in votes.items():
            write_columns(Path(f"{name}.csv"), of_rows(range(ROWS), label=vote.tolist()), overwrite=True)
        return [f"{name}.csv" for name in votes]

    @pytest.mark.parametrize("vote", ["majority", "dawid_skene"])
    def test_learns_the_vote(self, vote: Any) -> None:
        from lit_kd.trust.votes import dawid_skene, majority_vote

        model, module = CrowdLabels("mlp-8", self.files(), vote=vote, **BASE), Blobs()  # type: ignore[arg-type]
        fit(model, module)
        rows = [int(one) for one in module.parts.ids[:72]]
        y = blobs()[1]
        good = y.clone()
        good[::10] = (y[::10] + 2) % CLASSES
        votes = torch.stack([good, y.where(y != 2, 1), (y + 1) % CLASSES], dim=1)[rows]
        truth = y[rows].where(torch.arange(72) >= 48, UNLABELED)
        expected = {
            "majority": majority_vote(votes, CLASSES),
            "dawid_skene": dawid_skene(votes, CLASSES, truth).classes.argmax(1),
        }[vote]
        assert model.votes.tolist() == [*expected[:48].tolist(), *y[rows][48:].tolist()]

    def test_labels_do_not_matter_where_there_are_votes(self) -> None:
        found = []
        for noise in ({}, {"noise": "symmetric", "noise_rate": 0.9}, {"labeled": 12}):
            model = CrowdLabels("mlp-8", self.files(), **BASE)  # type: ignore[arg-type]
            fit(model, Blobs(**noise))
            found.append(weights(model))
        for clean, *others in zip(*found, strict=True):
            for other in others:
                torch.testing.assert_close(other, clean, rtol=0, atol=0)

    def test_rows_without_votes_keep_their_label_or_are_not_drawn(self) -> None:
        as_file(Path("a.csv"), range(0, ROWS, 2))
        model, module = CrowdLabels("mlp-8", "a.csv", **BASE), Blobs(labeled=24)
        fit(model, module)
        ids = [int(one) for one in module.parts.ids[:48]]
        expected = [
            int(said()[row].argmax()) if row % 2 == 0 else int(label)
            for row, label in zip(ids, module.labels.tolist(), strict=False)
        ]
        assert model.votes[:48].tolist() == expected
        assert set(model.training_rows().tolist()) == {i for i in range(72) if model.votes[i] != UNLABELED}


def test_command_line() -> None:
    """Files beside networks, in a config, with options or without."""
    labels = load_digits(return_X_y=True)[1].tolist()
    write_columns(Path("digits.csv"), {"id": list(range(len(labels))), "label": labels, "anna": labels})
    spec = {"class_path": "lit_kd.FileTeacher", "init_args": {"path": "digits.csv", "label": "anna"}}
    teachers = json.dumps(["digits.csv", str(train_teacher(Path("teacher"))), spec])
    options = ("--model.student=mlp-16", f"--model.teacher={teachers}", "--trainer.max_epochs=2")
    call("fit", *configs("almkd"), *QUIET, *options)
    [last] = [row for row in read_csv(version(0) / "metrics.csv") if row["epoch"] == "1" and row["val/accuracy"]]
    assert float(last["val/teacher_agreement"]) > 0.5
    plain = "[digits.csv, teacher/last.ckpt]"
    call("fit", *configs("kd"), *QUIET, "--model.student=mlp-16", f"--model.teacher={plain}", "--trainer.max_epochs=1")
