"""How terms combine with methods, features of networks of different kinds, and several labels a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs, read_csv, train_teacher, version
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer
from torch import Tensor, nn

from lit_kd import (
    ALMKD,
    CRD,
    DKD,
    KD,
    LELP,
    SDD,
    SRRL,
    VID,
    Batch,
    ComparativeKD,
    Distiller,
    FitNet,
    LabelRevision,
    MixKD,
    MultiLevelKD,
    MutualLearning,
    Outputs,
    ReviewKD,
    SimKD,
    SLaM,
    Supervised,
    WeightedDistillation,
)
from lit_kd.data import DigitAttributesDataModule
from lit_kd.models import build_model, last_linear
from lit_kd.models.checkpoint import read_student
from lit_kd.models.export import export_student
from lit_kd.terms import (
    KL,
    BernoulliCrossEntropy,
    Contrastive,
    CrossEntropy,
    DecoupledKL,
    GeneralizedCrossEntropy,
    HardLabel,
    Hint,
    LogitTerm,
    Term,
    TermSet,
)
from lit_kd.types import PENULTIMATE
from lit_kd.weightings import Paper

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
TAPS: dict[str, Any] = {"student_taps": [PENULTIMATE], "teacher_taps": [PENULTIMATE]}


class Coupled(Term):
    couples_batch = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return student.logits.square().mean()


NET = build_model("mlp-8", CLASSES, list(SHAPE))


class Loss(KL):
    """A name that the sum has."""


class Last(nn.Module):
    """Of what an LSTM gives, the output of the last step."""

    def forward(self, out: tuple[Tensor, Any]) -> Tensor:
        return out[0][:, -1]


class Wide(LogitTerm):
    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        return (student - teacher).square()


class Running(CrossEntropy):
    keeps_rows = True

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Renew what is kept of rows."""


class Miscounted(Distiller):
    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> list[float]:
        return [1.0]


class TestCombinations:
    @pytest.mark.parametrize(
        "method",
        [
            lambda t: KD("mlp-8", t, term=DecoupledKL(beta=2.0), **BASE),
            lambda t: KD("mlp-8", t, term=Coupled(), **BASE),
            lambda t: WeightedDistillation("mlp-8", t, term=DecoupledKL(beta=1.0, temperature=1.0), **BASE),
            lambda t: ALMKD("mlp-8", t, label_term=GeneralizedCrossEntropy(), extra=[Coupled(0.1), Hint()], **BASE),
            lambda t: FitNet("mlp-8", t, weight=1.0, extra=[KL(), DecoupledKL(beta=1.0)], **BASE),
            lambda t: MixKD("mlp-8", t, term=DecoupledKL(beta=1.0), label_term=GeneralizedCrossEntropy(), **BASE),
            lambda t: MutualLearning("mlp-8", ["mlp-12", "cnn-2"], term=DecoupledKL(beta=1.0), **BASE),
        ],
    )
    def test_it_learns(self, method: Any) -> None:
        model, fitted = method(trained_teachers()[0]), trainer(max_epochs=1)
        fitted.fit(model, Blobs(labeled=0.8))
        assert fitted.callback_metrics["train/loss"].isfinite()
        assert {f"train/{term.name}" for term in model._templates[2]} <= set(fitted.callback_metrics)

    def test_crd_beside_kd(self) -> None:
        """Cross-entropy + KL + 0.8 CRD, and the same with the method CRD."""
        losses = []
        for model in (
            KD("mlp-8", trained_teachers()[0], weight=0.5, temperature=1.0, extra=[Contrastive(weight=0.8)], **BASE),
            CRD("mlp-8", trained_teachers()[0], extra=[KL(1.0)], **BASE),
        ):
            fitted = trainer(max_epochs=1)
            fitted.fit(model, Blobs())
            losses.append({name: value.item() for name, value in fitted.callback_metrics.items()})
        one, other = losses
        assert one["train/loss"] == pytest.approx(
            one["train/label"] + one["train/teacher"] + one["train/contrastive"], rel=1e-5
        )
        assert other["train/loss"] == pytest.approx(other["train/label"] + other["train/teacher"] + other["train/kl"])

    @pytest.mark.parametrize(
        ("term", "match"),
        [
            (Coupled(), "couples the rows of a batch.*pass it as extra"),
            (Hint(), "compares features.*set meta_gradient"),
        ],
    )
    def test_what_almkd_cannot_weigh(self, term: Term, match: str) -> None:
        with pytest.raises(ValueError, match=f"ALMKD cannot weigh {type(term).__name__} by sample: it {match}"):
            trainer().fit(ALMKD("mlp-8", trained_teachers()[0], rule="paper", term=term, **BASE), Blobs())

    def test_weights_by_sample_refuse_a_coupled_term(self) -> None:
        model = WeightedDistillation("mlp-8", trained_teachers()[0], term=Coupled(), **BASE)
        with pytest.raises(ValueError, match="WeightedDistillation cannot weigh Coupled by sample: it couples"):
            trainer().fit(model, Blobs(labeled=0.5))

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: TermSet(BernoulliCrossEntropy(), HardLabel(), [], 1, "multilabel"), "multilabel, found Hard"),
            (lambda: MutualLearning("mlp-8", ["mlp-8"], term=Hint(), **BASE), "as all networks share them, found Hint"),
            (lambda: MutualLearning("mlp-8", [], **BASE), "at least one peer"),
            (lambda: KD("mlp-8", task="multilabel", revise=0.8, **BASE), "and one class a sample, found 0.8"),
            (lambda: KD("mlp-8", ["a", "b"], term=Hint(), drop=0.5, **BASE), "neither drop nor average with features"),
            (lambda: KD("mlp-8", ["a", "b"], extra=[Hint()], average="logits", **BASE), "neither drop nor average"),
            (lambda: Supervised("mlp-8", term=KL(), **BASE), "no term: Supervised has its own"),
            (lambda: SimKD("mlp-8", "a", label_term=CrossEntropy(), **BASE), "no label_term: SimKD has its own"),
            (lambda: SLaM("mlp-8", "a", task="multilabel", **BASE), "as task of SLaM one of .'classification'"),
            (lambda: MutualLearning(NET, [NET], **BASE), "start from different weights, found two that are the same"),
            (lambda: DKD("mlp-8", "a", beta=-0.5, **BASE), "found 1.0, -0.5 and 20"),
            (lambda: DKD("mlp-8", "a", warmup_epochs=-1, **BASE), "found 1.0, 8.0 and -1"),
            (lambda: FitNet("mlp-8", "a", weight=-1.0, **BASE), "expected a weight of at least 0, found -1.0"),
            (lambda: CRD("mlp-8", "a", weight=-1.0, **BASE), "expected a weight of at least 0, found -1.0"),
            (lambda: TermSet(CrossEntropy(), KL(), [Hint()], 1, teachers=2), "expected one teacher for Hint"),
            (lambda: TermSet(CrossEntropy(), KL(), [Loss()], 1), "a name of its own in the logs, found 'loss'"),
        ],
    )
    def test_what_does_not_fit(self, make: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make()

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (
                lambda t: MixKD("mlp-8", t[0], label_term=Running(), **BASE),
                "Running keeps what it saw of each row",
            ),
            (lambda t: LabelRevision("mlp-8", t[:2], extra=[Hint()], **BASE), "expected one teacher for Hint"),
            (lambda t: KD("mlp-8", t[0], term=Wide(), **BASE), r"one number a sample.*Wide gave \(\d+, 3\)"),
            (
                lambda t: Miscounted("mlp-8", t[0], **BASE),
                "expected 2 weights, of the label and of each source",
            ),
        ],
    )
    def test_what_does_not_fit_in_training(self, make: Any, match: str) -> None:
        model = make(trained_teachers())
        with pytest.raises(ValueError, match=match):
            trainer().fit(model, Blobs())

    def test_a_term_has_its_temperature_for_the_mean_of_teachers(self) -> None:
        """The gradient of the mean teacher's KL is that of the mean of the KLs, at the term's own temperature."""
        student, teachers = nn.Linear(16, 3), trained_teachers()[:2]
        x, y = torch.randn(8, *SHAPE), torch.arange(8) % 3
        model = KD(nn.Sequential(nn.Flatten(), student), teachers, weight=1.0, term=KL(1.0), **BASE)
        model.terms = model.make_terms()
        said, batch = Outputs(student(x.flatten(1)), {}), Batch(x, y)
        heard = [Outputs(teacher(x).detach(), {}) for teacher in teachers]
        losses, _ = model.terms(said, model.sources(said, heard, batch), batch)
        found = torch.autograd.grad(losses[1].mean(), said.logits, retain_graph=True)[0]
        each = torch.stack([KL(1.0)(said, one, batch).mean() for one in heard]).mean()
        torch.testing.assert_close(found, torch.autograd.grad(each, said.logits)[0])

    def test_validation_before_training(self) -> None:
        model = FitNet("mlp-8", trained_teachers()[0], weight=1.0, **BASE)
        trainer().validate(model, Blobs(), verbose=False)
        trainer().fit(model, Blobs())

    def test_peers_are_in_training_mode(self) -> None:
        model = MutualLearning("mlp-8", [build_model("mlp-8", CLASSES, list(SHAPE)).eval()], **BASE)
        trainer().fit(model, Blobs())
        assert model.peers.training

    def test_a_peers_checkpoint_is_needed_once(self, tmp_path: Path) -> None:
        fitted, path = trainer(max_epochs=1), tmp_path / "peer.ckpt"
        fitted.fit(Supervised("mlp-12", **BASE), Blobs())
        fitted.save_checkpoint(path)
        model, fitted = MutualLearning("mlp-8", ["cnn-2", path], **BASE), trainer(max_epochs=1)
        fitted.fit(model, Blobs())
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        path.unlink()
        again = MutualLearning.load_from_checkpoint(tmp_path / "c.ckpt", weights_only=True)
        torch.testing.assert_close(again.state_dict(), model.state_dict())

    def test_on_the_command_line(self, tmp_path: Path) -> None:
        teacher = train_teacher(tmp_path / "teacher")
        given = ("--model.term=DecoupledKL", "--model.term.beta=2.0", "--model.label_term=GeneralizedCrossEntropy")
        short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", f"--model.teacher={teacher}")
        call("fit", *configs("almkd"), *QUIET, *given, *short)
        losses = [row["train/loss"] for row in read_csv(version(0) / "metrics.csv") if row["train/loss"]]
        assert [float(loss) > 0 for loss in losses] == [True]


class TestFeatures:
    """FitNet and SimKD between networks of different kinds."""

    def test_convolutional_networks_of_other_widths_and_sizes(self) -> None:
        teacher = build_model("cnn-4", CLASSES, SHAPE)
        for taps in (("layer1", "layer2"), ("layer2", "layer1"), ("layer2", "layer2"), (PENULTIMATE, PENULTIMATE)):
            model = FitNet("cnn-2", teacher, student_tap=taps[0], teacher_tap=taps[1], weight=1.0, **BASE)
            fitted = trainer(max_epochs=1)
            fitted.fit(model, Blobs())
            assert fitted.callback_metrics["train/teacher"].isfinite()

    def test_vision_transformers(self) -> None:
        from torchvision.models import VisionTransformer

        def vit(width: int) -> nn.Module:
            return VisionTransformer(4, 2, 2, 2, width, 2 * width, num_classes=CLASSES)

        teacher, data = vit(16), Images()
        layer = "encoder.layers.encoder_layer_0"
        for student, tap in ((vit(8), layer), (build_model("cnn-2", CLASSES, (3, 4, 4)), PENULTIMATE)):
            model = FitNet(student, teacher, student_tap=tap, teacher_tap=tap, weight=1.0, num_classes=CLASSES)
            trainer(max_epochs=1).fit(model, data)
            assert isinstance(model.terms.each[0].adapter, nn.Linear)  # type: ignore[union-attr, index]

    @pytest.mark.parametrize(
        "make",
        [
            lambda teacher, **base: CRD("cnn-2", teacher, negatives=16, **base),
            lambda teacher, **base: VID("cnn-2", teacher, **TAPS, **base),
            lambda teacher, **base: ReviewKD("cnn-2", teacher, **TAPS, **base),
            lambda teacher, **base: SRRL("cnn-2", teacher, weight=0.01, **base),
            lambda teacher, **base: SimKD("cnn-2", teacher, **base),
            lambda teacher, **base: SDD("cnn-2", teacher, teacher_tap=PENULTIMATE, scales=[1], **base),
            lambda teacher, **base: ComparativeKD("cnn-2", teacher, **base),
            lambda teacher, **base: LELP("cnn-2", teacher, subclasses=2, **base),
            lambda teacher, **base: MultiLevelKD("cnn-2", teacher, **base),
            lambda teacher, **base: ALMKD("cnn-2", teacher, **base),
        ],
    )
    def test_a_vision_transformer_teaches_a_convolutional_network(self, make: Any) -> None:
        from torchvision.models import VisionTransformer

        torch.manual_seed(1)
        teacher = VisionTransformer(4, 2, 2, 2, 16, 32, num_classes=CLASSES)
        torch.nn.init.normal_(teacher.heads.head.weight, std=2.0)  # else it names one class alone
        fitted = trainer(max_epochs=1)
        fitted.fit(make(teacher, num_classes=CLASSES, input_shape=[3, 4, 4]), Images())
        assert fitted.callback_metrics["train/loss"].isfinite()

    def test_adapters_are_trained_and_resumed_but_not_exported(self, tmp_path: Path) -> None:
        model, fitted = (
            FitNet("cnn-2", trained_teachers()[0], student_tap="layer1", teacher_tap="layer2", **BASE),
            trainer(),
        )
        fitted.fit(model, Blobs())
        parts = {name for name, _ in model.named_parameters() if name.startswith("terms.")}
        assert parts
        optimized = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
        assert all(id(p) in optimized for name, p in model.named_parameters() if name in parts)
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        assert parts <= set(torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"])
        exported = read_student(tmp_path / "c.ckpt").model.state_dict()
        assert set(exported) == set(model.student.state_dict())

    @pytest.mark.parametrize("method", [FitNet, SimKD, CRD])
    def test_near_taps_are_named(self, method: Any) -> None:
        with pytest.raises(ValueError, match=r"no layer 'layer_2' in ConvNet; the nearest are \['layer2"):
            trainer().fit(method("cnn-2", trained_teachers()[0], student_tap="layer_2", **BASE), Blobs())

    def test_a_layer_that_gives_a_tuple(self) -> None:
        student = nn.Sequential(nn.Flatten(2), nn.LSTM(16, 4), Last(), nn.Linear(4, CLASSES))
        with pytest.raises(
            ValueError, match=r"^expected taps .* give a tensor, found that '1' of Sequential gives a tuple"
        ):
            trainer().fit(FitNet(student, trained_teachers()[0], student_tap="1", **BASE), Blobs())
        trainer().fit(FitNet(student, trained_teachers()[0], student_tap="2", **BASE), Blobs())

    def test_simkd_is_exported_whole(self, tmp_path: Path) -> None:
        """Body, projector and the teacher's head; what lies behind the tap neither learns nor waits for a gradient."""
        teacher = trained_teachers()[0]
        model = SimKD("cnn-2", teacher, student_tap="layer1", teacher_tap="layer3", **BASE)
        fitted = trainer()
        with pytest.raises(ValueError, match="projector is built"):
            model.eval()(blobs()[0])
        for use in (fitted.validate, fitted.test, fitted.predict):
            with pytest.raises(ValueError, match=r"^expected a student with projector and head, found none: train it"):
                use(model, Blobs())
        fitted.fit(model, Blobs())
        frozen = {name.split(".")[0] for name, p in model.student.body.named_parameters() if not p.requires_grad}
        assert frozen == {"layer2", "layer3", "fc"}
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        read, x = read_student(tmp_path / "c.ckpt").model, blobs()[0]
        torch.testing.assert_close(read(x), model.eval()(x))
        assert export_student(read, tmp_path / "c.pt2", "torch_export", input_shape=SHAPE) < 1e-5
        again = SimKD.load_from_checkpoint(tmp_path / "c.ckpt", weights_only=True)
        assert torch.equal(again.student.head.weight, last_linear(teacher)[1].weight)
        [tested] = trainer().test(again, Blobs(), verbose=False)
        assert tested.items() < fitted.test(model, Blobs(), verbose=False)[0].items()
        with pytest.raises(ValueError, match="one teacher, whose head is borrowed, found 2"):
            SimKD("cnn-2", [teacher, teacher], **BASE)
        wrong = SimKD("cnn-2", teacher, student_tap="layer1", teacher_tap="layer1", **BASE)
        with pytest.raises(ValueError, match="last linear layer to read the mean of its layer 'layer1'"):
            trainer().fit(wrong, Blobs())


class Images(Blobs):
    input_shape = (3, 4, 4)

    def load(self) -> Any:
        source = super().load()
        for rows in (source.train, source.plain):
            rows.x = rows.x.expand(-1, 3, -1, -1)  # type: ignore[attr-defined]
        return source


def test_several_labels_a_sample() -> None:
    """KD of two teachers, ALM-KD and hints on digits with five labels each."""
    data = DigitAttributesDataModule(noise="symmetric", noise_rate=0.1)
    supervised: dict[str, Any] = {"task": "multilabel", "num_classes": 5, "input_shape": [1, 8, 8]}
    supervised["optimizer"] = lambda p: torch.optim.Adam(p, 0.01)
    teacher, fitted = Supervised("mlp-32", **supervised), trainer(max_epochs=4)
    fitted.fit(teacher, data)
    for make in (
        lambda: KD("mlp-16", [teacher.student, build_model("mlp-8", 5, (1, 8, 8))], weight=0.3, **supervised),
        lambda: ALMKD("mlp-16", teacher.student, rule=Paper(warmup_epochs=1), **supervised),
        lambda: FitNet("mlp-16", teacher.student, weight=1.0, **supervised),
        lambda: MutualLearning("mlp-16", ["mlp-8"], **supervised),
    ):
        model, fitted = make(), trainer(max_epochs=4)  # type: ignore[no-untyped-call]
        fitted.fit(model, data)
        [tested] = fitted.test(model, data, verbose=False)
        names = {"accuracy", "map", "nll", *(f"f1_{label}" for label in range(5))}
        names |= {"teacher_agreement"} if model.needs_teacher else {"peer_1_accuracy"}
        assert set(tested) == {f"test/{name}" for name in names}
        assert tested["test/accuracy"] > 0.75
        [one, *_] = fitted.predict(model, data)  # type: ignore[misc]
        assert one["labels"].shape == one["probability"].shape  # type: ignore[index, call-overload]
        logits = torch.cat([model.student.eval()(batch.x) for batch in data.test_dataloader()])
        truth = torch.cat([batch.y for batch in data.test_dataloader()])
        assert tested["test/accuracy"] == pytest.approx(((logits > 0) == truth).float().mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="the rule Robust needs one class a sample"):
        trainer().fit(ALMKD("mlp-16", teacher.student, **supervised), data)
