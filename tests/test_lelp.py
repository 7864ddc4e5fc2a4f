"""LELP: subclasses of known shape, limits and invariances, and the student that folds them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_kd import CATKD, CRD, KD, LELP, SDD, SRRL, ComparativeKD, Distilled, LabelRevision, SimKD
from lit_kd.losses import kd_loss
from lit_kd.models import adapt, build_model, last_linear, load_student
from lit_kd.models.checkpoint import completed, read_student, student_name
from lit_kd.models.export import export_student
from lit_kd.models.subclasses import Subclassed
from lit_kd.models.taps import Tapped
from lit_kd.terms import KL, Subclasses
from lit_kd.terms.subclasses import project, projections, sharpness, subclass_log_probabilities
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs

N, C, D, S = 300, 3, 9, 4
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher() -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and head."""
    features, head = draw(N, D) * torch.linspace(1, 3, D, dtype=torch.float64), draw(C, D, seed=1)
    return features, features @ head.T, head


def fitted(subclasses: int = S) -> tuple[Subclasses, Outputs]:
    """A term, and its teacher's outputs."""
    features, logits, head = teacher()
    out, term = Outputs(logits, {PENULTIMATE: features}), Subclasses("head", subclasses)
    term.build(out, out)
    assert not term.fitted
    term.fit(features, logits, head)
    assert term.fitted
    return term, out


class TestProjections:
    def test_by_class_with_numpy(self) -> None:
        """The first components of what lies in the null space, but for a rotation."""
        features, logits, head = teacher()
        classes = logits.argmax(1)
        centres, directions = projections(features, classes, head, S)
        apart = (head - head.mean(0)).numpy()
        blind = np.eye(D) - np.linalg.pinv(apart) @ apart
        for c in range(C):
            own = features[classes == c].numpy()
            np.testing.assert_allclose(centres[c], own.mean(0), rtol=1e-10)
            leading = np.linalg.svd((own - own.mean(0)) @ blind)[2][:S]
            # the same subspace, with directions of one length
            length = np.linalg.norm(directions[c].numpy(), axis=0)
            np.testing.assert_allclose(length, length[0], rtol=1e-10)
            unit = directions[c].numpy() / length
            np.testing.assert_allclose(unit.T @ unit, np.eye(S), atol=1e-10)
            np.testing.assert_allclose(unit @ unit.T, leading.T @ leading, atol=1e-8)

    def test_what_logits_tell_is_left_out(self) -> None:
        features, logits, head = teacher()
        centres, directions = projections(features, logits.argmax(1), head, S)
        moved = features + draw(N, C, seed=2) @ (head - head.mean(0))
        torch.testing.assert_close(project(moved, centres, directions), project(features, centres, directions))

    def test_rotated_at_random_from_the_seed(self) -> None:
        features, logits, head = teacher()
        found = []
        for seed in 0, 0, 1:
            torch.manual_seed(seed)
            found.append(projections(features, logits.argmax(1), head, S)[1])
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2])

    def test_memory(self) -> None:
        """Not all directions for each row."""
        sizes = []

        class Sizes(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = function(*args, **(kwargs or {}))
                sizes.append(made.numel() if isinstance(made, Tensor) else 0)
                return made

        features, logits, head = teacher()
        with Sizes():
            projections(features, logits.argmax(1), head, S)
        assert max(sizes) == N * D

    @pytest.mark.parametrize("subclasses", [2, 3, 4])
    def test_entropy(self, subclasses: int) -> None:
        features, logits, head = teacher()
        classes = logits.argmax(1)
        centres, directions = projections(features, classes, head, subclasses)
        own = np.stack(
            [
                softmax((f - centres[c].numpy()) @ directions[c].numpy())
                for f, c in zip(features.numpy(), classes.tolist(), strict=True)
            ]
        )
        assert entropy(own, axis=1).mean() == pytest.approx(0.5 * math.log(subclasses), rel=1e-6)

    def test_parts_of_a_class_are_found(self) -> None:
        """Each class has two parts, far apart in what the logits do not tell."""
        g = torch.Generator().manual_seed(0)
        y, part = torch.arange(N) % 2, torch.arange(N) // 2 % 2
        features = 0.3 * torch.randn(N, 5, generator=g)
        features[:, 0] += 4.0 * y - 2
        features[:, 3] += 4.0 * part - 2
        head = torch.tensor([[-1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]])
        centres, directions = projections(features, y, head, 2)
        for c in 0, 1:
            unit = directions[c] / directions[c].norm(dim=0)
            assert (unit @ unit.T)[3, 3] > 0.95
            assert (unit @ unit.T)[0, 0] < 1e-12
            said = project(features.double(), centres, directions)[y == c, c].softmax(-1)[:, 0]
            own = part[y == c] == 1
            assert (said[own].mean() - said[~own].mean()).abs() > 0.2

    def test_refused(self) -> None:
        features, logits, head = teacher()
        with pytest.raises(ValueError, match=r"expected at most as many subclasses as .* 9 - 2 = 7, found 8"):
            projections(features, logits.argmax(1), head, 8)
        with pytest.raises(ValueError, match=r"9 - 9 = 0, found 1"):  # C - 1 is the width
            projections(features, logits.argmax(1), draw(10, D), 1)
        classes = logits.argmax(1)
        classes[(classes == 2).nonzero()[S:]] = 0
        with pytest.raises(ValueError, match=r"expected more than 4 training rows that .*, found 4 in class 2"):
            projections(features, classes, head, S)
        with pytest.raises(ValueError, match="expected features of the teacher that vary within a class"):
            sharpness(torch.zeros(5, 2))


class TestTerm:
    def test_by_row(self) -> None:
        term, out = fitted()
        z = draw(N, C * S, seed=3)
        found = term(Outputs(draw(N, C), {"head": z}), out, Batch(z, torch.zeros(N)))
        centres, directions = term.centres.numpy(), term.directions.numpy()
        for i in range(0, N, 37):
            f, total = out.features[PENULTIMATE][i].numpy(), 0.0
            for c in range(C):
                parts = softmax([(f - centres[c]) @ directions[c][:, s] for s in range(S)])
                for s in range(S):
                    p = softmax(out.logits[i].numpy())[c] * parts[s]
                    total += p * (np.log(p) - log_softmax(z[i].numpy())[c * S + s])
            assert found[i].item() == pytest.approx(total, rel=1e-10)

    def test_one_subclass_is_kd(self) -> None:
        term, out = fitted(1)
        z = draw(N, C, seed=3)
        found = term(Outputs(z, {"head": z}), out, Batch(z, torch.zeros(N)))
        torch.testing.assert_close(found, kd_loss(z, out.logits), rtol=1e-10, atol=1e-12)

    def test_subclasses_sum_to_classes(self) -> None:
        logits, parts = draw(N, C), draw(N, C, S, seed=1)
        found = subclass_log_probabilities(logits, parts).exp()
        torch.testing.assert_close(found.view(N, C, S).sum(-1), logits.softmax(-1), rtol=1e-10, atol=0)

    def test_names_of_subclasses_do_not_count(self) -> None:
        term, out = fitted()
        z = draw(N, C, S, seed=3)
        value = lambda z: term(Outputs(z, {"head": z.flatten(1)}), out, Batch(z, torch.zeros(N)))  # noqa: E731
        found, order = value(z), torch.tensor([2, 0, 3, 1])
        term.directions[1] = term.directions[1][:, order]
        z = z.clone()
        z[:, 1] = z[:, 1][:, order]
        torch.testing.assert_close(value(z), found)

    def test_nothing_to_learn_at_the_target(self) -> None:
        term, out = fitted()
        projected = project(out.features[PENULTIMATE], term.centres, term.directions)
        z = (subclass_log_probabilities(out.logits, projected) + draw(N, 1)).requires_grad_()
        found = term(Outputs(z, {"head": z}), out, Batch(z, torch.full((N,), UNLABELED)))
        found.sum().backward()
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-10, rtol=0)
        torch.testing.assert_close(z.grad, torch.zeros_like(z), atol=1e-10, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extreme_values(self, dtype: torch.dtype) -> None:
        term, out = fitted()
        z = (1e4 * draw(N, C * S)).to(dtype).requires_grad_()
        far = Outputs(1e4 * out.logits.to(dtype), {PENULTIMATE: 1e4 * out.features[PENULTIMATE].to(dtype)})
        found = term.to(dtype)(Outputs(z, {"head": z}), far, Batch(z, torch.zeros(N)))
        found.sum().backward()
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert z.grad is not None
        assert z.grad.isfinite().all()


def tapped(student: nn.Module, x: Tensor) -> Tensor:
    """The outputs of all subclasses."""
    head = last_linear(student)[0]
    return Tapped(student, (head,))(x).features[head]


class TestSubclassed:
    @pytest.mark.parametrize("name", ["mlp-8", "cnn-2", "resnet8"])
    def test_folds_its_outputs_and_begins_as_it_was(self, name: str) -> None:
        net, x = build_model(name, CLASSES, SHAPE).eval(), blobs()[0]
        before = net(x)
        student = Subclassed(net, S).eval()
        torch.testing.assert_close(student(x), before)
        nn.init.normal_(last_linear(student)[1].weight)
        outputs = tapped(student, x)
        assert outputs.shape == (len(x), CLASSES * S)
        probabilities = outputs.softmax(-1).view(-1, CLASSES, S).sum(-1)
        torch.testing.assert_close(student(x).softmax(-1), probabilities)

    def test_a_linear_student_without_bias_of_a_mapping(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Linear(4, CLASSES, bias=False)

            def forward(self, left: Tensor, right: Tensor) -> Any:
                return type("Out", (), {"logits": self.net(left + right)})()

        x = draw(5, 4).float()
        student = Subclassed(Named(), S)
        assert student(left=x, right=x).shape == (5, CLASSES)
        assert Subclassed(nn.Linear(4, CLASSES), S)(x).shape == (5, CLASSES)

    def test_another_layer_gives_the_logits(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head, self.other = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(x)
                return out

        with pytest.raises(ValueError, match=r"expected that 'other'.* gives its logits.*adapt\(net, head=\.\.\.\)"):
            Subclassed(Two(), S)(torch.zeros(2, 4))
        assert Subclassed(adapt(Two(), head="head"), S)(torch.zeros(2, 4)).shape == (2, CLASSES)


class TestMethod:
    def test_one_subclass_trains_as_kd(self) -> None:
        given = trained_teachers()[0]
        torch.manual_seed(0)
        nets = [build_model("mlp-8", CLASSES, SHAPE)]
        nets.append(copy.deepcopy(nets[0]))
        trainer().fit(LELP(nets[0], given, subclasses=1, **BASE), Blobs(seed=0))
        trainer().fit(KD(nets[1], given, weight=1.0, term=KL(1.0), **BASE), Blobs(seed=0))
        torch.testing.assert_close(nets[0](blobs()[0]), nets[1](blobs()[0]), rtol=1e-3, atol=1e-4)

    def test_labels_are_not_used(self) -> None:
        found = []
        for options in {}, {"labeled": 0.2}, {"noise": "symmetric", "noise_rate": 0.9}:
            torch.manual_seed(0)
            net = build_model("mlp-8", CLASSES, SHAPE)
            run = trainer(max_epochs=1)
            run.fit(LELP(net, trained_teachers()[0], subclasses=2, **BASE), Blobs(seed=0, **options))
            found.append(run.callback_metrics["train/loss"])
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[0], found[2])

    def test_the_student_teaches_is_exported_and_predicts(self, tmp_path: Path) -> None:
        model, run, path, x = (
            LELP("cnn-2", trained_teachers()[0], subclasses=2, **BASE),
            trainer(),
            tmp_path / "c.ckpt",
            blobs()[0],
        )
        run.fit(model, Blobs())
        run.save_checkpoint(path)
        read = read_student(path)
        assert isinstance(read.model, Subclassed)
        torch.testing.assert_close(read.model(x), model.eval()(x))
        torch.testing.assert_close(LELP.load_from_checkpoint(path).eval()(x), model(x))
        for file, kind in (("s.onnx", "onnx"), ("s.pt2", "torch_export")):
            assert export_student(read.model, tmp_path / file, kind, input_shape=SHAPE) < 1e-5
        file = tmp_path / "s.safetensors"
        export_student(read.model, file, "safetensors", input_shape=SHAPE, name="cnn-2")
        with safetensors.safe_open(file, "pt") as opened:
            told = {key: json.loads(text) for key, text in opened.metadata().items()}
        again = completed(build_model(told["student"], CLASSES, told["input_shape"]), told["composite"]).eval()
        again.load_state_dict(safetensors.torch.load_file(file))
        torch.testing.assert_close(again(x), model(x))
        with pytest.raises(ValueError, match="a student to train on, found one that SimKD or LELP has extended"):
            student_name(path)
        taught = trainer(max_epochs=4)
        taught.fit(KD("mlp-16", str(path), **BASE), Blobs())
        assert taught.callback_metrics["val/accuracy"] > 0.9
        assert load_student(path)(x).shape == (len(x), CLASSES)
        deep = {"teacher_tap": "body.layer3"}
        for method, taps in ((SRRL, {}), (SimKD, {}), (CATKD, deep), (SDD, deep)):
            with pytest.raises(ValueError, match="found a student of LELP, whose layer gives 2 outputs for each class"):
                trainer(max_epochs=1).fit(method("cnn-2", str(path), **taps, **BASE), Blobs())
        for method in (ComparativeKD, CRD, LabelRevision):
            trainer(max_epochs=1).fit(method("mlp-8", str(path), **BASE), Blobs())

    def test_projections_are_found_once_and_kept(self, tmp_path: Path) -> None:
        def directions(model: LELP) -> Tensor:
            assert model.terms is not None
            [term] = model.terms.each
            assert isinstance(term, Subclasses)
            return term.directions

        given = trained_teachers()[0]
        model, run = LELP("mlp-8", given, subclasses=2, **BASE), trainer(max_epochs=1)
        run.fit(model, Blobs(seed=0))
        run.save_checkpoint(tmp_path / "c.ckpt")
        again = LELP("mlp-8", given, subclasses=2, **BASE)
        trainer(max_epochs=2).fit(again, Blobs(seed=0), ckpt_path=tmp_path / "c.ckpt")
        assert torch.equal(directions(again), directions(model))

    def test_a_module_of_ones_own_keeps_its_head(self) -> None:
        class Own(Distilled):
            def configure_distillation(self) -> LELP:
                return LELP("mlp-8", trained_teachers()[0], **BASE)

        with pytest.raises(ValueError, match="leaves batches and networks as they are, found LELP"):
            _ = Own().distiller

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda t: LELP("mlp-8", t, **BASE), "expected one teacher, whose classes are divided, found 2"),
            (
                lambda t: LELP("mlp-8", t[0], subclasses=0, **BASE),
                "expected at least 1 subclass of each class",
            ),
            (
                lambda t: LELP(nn.Linear(16, 5), t[0], **BASE),
                "the student's last linear layer, has 3 .*found 5",
            ),
            (lambda t: LELP("mlp-8", t[0], term=KL(), **BASE), "expected no term: LELP has its own"),
            (
                lambda t: LELP("mlp-8", t[0], subclasses=7, **BASE),
                "at most as many subclasses as .* 8 - 2 = 6",
            ),
            (
                lambda t: LELP("mlp-8", Subclassed(t[0], 2), **BASE),
                "the teacher's last linear layer, has 3 outputs, .*found 6",
            ),
        ],
    )
    def test_refused(self, make: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trainer().fit(make(trained_teachers()), Blobs())
