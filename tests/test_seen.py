"""A run is seen: what loggers are given is read back from what they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import wandb
import yaml
from commands import QUIET, call, configs, read_csv, version
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from methods import CLASSES, SHAPE, Blobs, blobs, build, trainer
from PIL import Image
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from lit_kd import ALMKD
from lit_kd.data import DigitsDataModule, Source, TensorRows
from lit_kd.report.show import ShowRun

NOISE: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.4, "seed": 0}
RULE = "{class_path: lit_kd.weightings.Paper, init_args: {warmup_epochs: 0, every: 1}}"
ALMKD_FIT = (
    *("fit", *configs("almkd"), *QUIET[:3], "--model.student=mlp-8", "--model.teacher=mlp-8", "--model.rule", RULE),
    *("--trainer.limit_train_batches=4", "--trainer.max_epochs=2"),
    *("--data.noise=symmetric", "--data.noise_rate=0.3"),
)
NAMES = ["samples/right_label_weight", "samples/wrong_label_weight", "samples/noise_auc"]


class Vectors(Blobs):
    """The same rows, not as images."""

    input_shape = (16,)  # type: ignore[assignment]

    def load(self) -> Source:
        x, y = blobs()
        rows = TensorRows(x.flatten(1))
        return Source(rows, rows, y.numpy(), test_size=24, identity=b"vectors")


@pytest.fixture
def _offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B, writing nowhere else and asking nobody."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for quick in ("DISABLE_STATS", "DISABLE_META", "DISABLE_MACHINE_INFO"):
        monkeypatch.setenv(f"WANDB_X_{quick}", "true")
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path_factory.mktemp("wandb")))
    yield
    wandb.teardown()


def read_log(path: Path) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes.

    A record's pieces have a header each: checksum (4 bytes), length (2), and kind (1): whole, first, middle, last.
    """
    content, block, at, record = path.read_bytes(), 32768, 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(run: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """What a run of W&B wrote: about itself, its config and its history."""
    [path] = run.glob("*.wandb")
    about: dict[str, Any] = {}
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for data in read_log(path):
        record = Record()
        record.ParseFromString(data)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
        if record.HasField("run"):
            about = {"group": record.run.run_group, "name": record.run.display_name, "project": record.run.project}
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                inner = row
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[last] = json.loads(item.value_json)
            history.append(row)
    return about, config, history


def artifacts(run: Path) -> dict[str, str]:
    """The files that a run of W&B will upload as artifacts: their content by name."""
    [path] = run.glob("*.wandb")
    found: dict[str, str] = {}
    for data in read_log(path):
        record = Record()
        record.ParseFromString(data)
        found |= {file.path: Path(file.local_path).read_text() for file in record.artifact.manifest.contents}
    return found


@pytest.mark.usefixtures("_offline")
class TestWandb:
    def test_a_fit_twice_in_one_directory(self) -> None:
        for seed in (0, 1):
            logger = ("--trainer.logger=WandbLogger", "--trainer.logger.project=seen", "--trainer.logger.offline=true")
            call(*ALMKD_FIT, *logger, f"--seed_everything={seed}")
            wandb.finish()
        runs = sorted(Path("wandb").glob("offline-run-*"))
        assert len(runs) == 2
        for seed, run in enumerate(runs):
            about, config, history = read_wandb(run)
            assert about["project"] == "seen"
            assert config["seed_everything"] == seed
            assert config["model"]["class_path"] == "lit_kd.ALMKD"
            assert config["model"]["init_args"]["student"] == "mlp-8"
            assert config["model"]["init_args"]["rule"]["init_args"]["warmup_epochs"] == 0
            assert config["data"]["init_args"]["noise_rate"] == 0.3
            # each run's config beside its checkpoints: the second has not replaced the first
            saved = Path("seen") / run.name.split("-")[-1]
            assert yaml.safe_load((saved / "config.yaml").read_text()) == {k: config[k] for k in KEYS if k in config}
            call("samples", saved)
            assert artifacts(run) == {name: (saved / name).read_text() for name in ("config.yaml", "samples.csv")}

            logged = {key for row in history for key in row}
            terms = {f"train/{term}" for term in ("label", "teacher", "loss")}
            measured = {f"val/{name}" for name in ("accuracy", "ece", "nll", "teacher_agreement")}
            assert logged >= terms | measured | set(NAMES)
            assert len(logged) < 40  # and no scalar a sample
            data = DigitsDataModule(seed=seed, noise="symmetric", noise_rate=0.3)
            data.setup()
            histograms = [row["samples/label_weights"] for row in history if "samples/label_weights" in row]
            assert [sum(h["values"]) for h in histograms] == [data.train_size] * 2
            for name in ("weights", "most_distrusted"):
                [drawn] = (row[f"samples/{name}"] for row in history if f"samples/{name}" in row)
                sent = np.asarray(Image.open(run / "files" / drawn["filenames"][0]).convert("RGB"))
                assert (sent == np.asarray(Image.open(saved / "pictures" / f"{name}.png").convert("RGB"))).all()

    def test_a_comparison_is_a_group(self) -> None:
        data = {"class_path": "DigitsDataModule", "init_args": {"noise": "symmetric", "noise_rate": 0.3}}
        short = {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu"}
        taught = {"class_path": "ALMKD", "init_args": {"teacher": "mlp-8"}}
        recipe = {
            "seeds": [3],
            "defaults": {"trainer": short, "data": data, "model": {"init_args": {"student": "mlp-8"}}},
            "methods": {"Labels": {"model": {"class_path": "Supervised"}}, "ALM-KD": {"model": taught}},
        }
        Path("small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        call("compare", "small.yaml", "--jobs", 1, "--name", "group-a", "--wandb", "seen")
        assert wandb.run is None
        rows = read_csv(Path("runs/group-a/results.csv"))
        for row, folder in zip(rows, ("labels", "alm-kd"), strict=True):
            [run] = Path("runs/group-a", folder, "seed-3/wandb").glob("offline-run-*")
            about, config, history = read_wandb(run)
            assert about == {"group": "group-a", "name": f"{row['method']}, seed 3", "project": "seen"}
            assert (config["method"], config["seed"]) == (row["method"], 3)
            assert config["data"] == data
            tested = [line["test/accuracy"] for line in history if "test/accuracy" in line]
            assert tested[-1] == pytest.approx(float(row["test_accuracy"]), abs=1e-6)
            assert any("samples/label_weights" in line for line in history) == (folder == "alm-kd")


class KeptByMLflow(MLFlowLogger):
    """MLflow's logger without MLflow: what its client is given is kept here."""

    files: ClassVar[dict[str, bytes]] = {}
    name, version, run_id, save_dir = "experiment", "run", "run", "."  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    @property
    def experiment(self) -> Any:
        return self

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        assert run_id == "run"
        self.files[f"{artifact_path or '.'}/{Path(local_path).name}"] = Path(local_path).read_bytes()

    def log_metrics(self, *args: Any, **options: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **options: Any) -> None: ...

    def after_save_checkpoint(self, *args: Any, **options: Any) -> None: ...

    def finalize(self, *args: Any, **options: Any) -> None: ...


def test_mlflow_keeps_config_pictures_and_table() -> None:
    call(*ALMKD_FIT, "--trainer.logger=test_seen.KeptByMLflow")
    run = Path("experiment/run")
    call("samples", run)
    named = {"./config.yaml": "config.yaml", "./samples.csv": "samples.csv"}
    named |= {name: name for name in ("pictures/weights.png", "pictures/most_distrusted.png")}
    assert KeptByMLflow.files == {key: (run / name).read_bytes() for key, name in named.items()}


KEYS = ("seed_everything", "trainer", "model", "data", "checkpoint", "last", "show", "ckpt_path", "weights_only")


def test_curves_and_png_files_with_the_csv_logger() -> None:
    call(*ALMKD_FIT, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--show.samples=3")
    data = DigitsDataModule(seed=0, noise="symmetric", noise_rate=0.3)
    data.setup()
    noisy = (data.labels != data.clean_labels)[: data.train_size]
    saved = torch.load(version(0) / "checkpoints" / "last.ckpt", weights_only=True)
    weights = saved["sample_table"]["columns"]["weights"][: data.train_size, 0]
    rows = [row for row in read_csv(version(0) / "metrics.csv") if row["samples/noise_auc"]]
    assert len(rows) == 2
    expected = [weights[~noisy].mean(), weights[noisy].mean(), roc_auc_score(noisy, -weights)]
    assert [float(rows[-1][name]) for name in NAMES] == pytest.approx([float(e) for e in expected], abs=1e-5)
    pictures = version(0) / "pictures"
    assert sorted(path.name for path in pictures.iterdir()) == ["most_distrusted.png", "weights.png"]
    assert yaml.safe_load((version(0) / "config.yaml").read_text())["show"] == {"every_n_epochs": 10, "samples": 3}
    assert Image.open(pictures / "most_distrusted.png").height < 250  # one row of samples
    for path in pictures.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 10  # something is drawn


def fit(callback: ShowRun | None, data: Any = None, model: Any = None, **options: Any) -> ALMKD:
    torch.manual_seed(0)
    model = build("almkd-paper") if model is None else model
    resume = {"ckpt_path": options.pop("ckpt_path", None)}
    options = {"default_root_dir": "run", **options}
    fitted = trainer(callbacks=[callback] if callback else [], **options)
    fitted.fit(model, Blobs(**NOISE) if data is None else data, **resume)
    fitted.save_checkpoint("last.ckpt")
    return model  # type: ignore[no-any-return]


class TestInPython:
    def test_tensorboard_has_images_and_histograms(self) -> None:
        loggers = [CSVLogger("logs"), TensorBoardLogger("tb")]
        fit(ShowRun(every_n_epochs=1), max_epochs=3, logger=loggers, log_every_n_steps=1)
        [folder] = Path("tb/lightning_logs").iterdir()
        read = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
        read.Reload()
        assert sorted(read.Tags()["images"]) == ["samples/most_distrusted", "samples/weights"]
        assert len(read.Images("samples/weights")) == 3
        histograms = read.Histograms("samples/label_weights")
        assert [h.histogram_value.num for h in histograms] == [48] * 3
        assert set(NAMES) <= set(read.Tags()["scalars"])
        assert len(list(Path("logs").rglob("pictures/*.png"))) == 2  # the first logger's directory is the run's

    def test_it_leaves_no_trace_in_the_training(self) -> None:
        seen = fit(ShowRun(every_n_epochs=1), max_epochs=3)
        plain = fit(None, max_epochs=3)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, seen.state_dict()[name]), name
        assert plain.table is not None
        assert seen.table is not None
        assert torch.equal(plain.table["weights"], seen.table["weights"])

    def test_each_run_has_a_folder_and_a_resumed_one_the_whole_course(self) -> None:
        first = ShowRun()
        fit(first, max_epochs=2)
        again = ShowRun()
        fit(again, max_epochs=3, ckpt_path="last.ckpt")
        assert [row["epoch"] for row in again.course] == [0, 1, 2]
        assert again.course[:2] == first.course
        assert sorted(p.name for p in Path("run").iterdir()) == ["pictures", "pictures-1"]
        fit(again, max_epochs=1)
        assert [row["epoch"] for row in again.course] == [0]

    def test_vectors_have_no_pictures_and_clean_labels_one_curve(self) -> None:
        shown = ShowRun(every_n_epochs=None)
        fit(shown, Vectors(seed=0), build("almkd-paper", input_shape=[16], teachers=[torch.nn.Linear(16, CLASSES)]))
        assert [p.name for p in Path("run/pictures").iterdir()] == ["weights.png"]
        assert [set(row) for row in shown.course] == [{"epoch", "all"}] * 2

    @pytest.mark.parametrize("method", ["kd", "weighted"])
    def test_other_methods_are_left_alone(self, method: str) -> None:
        fit(ShowRun(), Blobs(seed=0, labeled=24), build(method), max_epochs=1)
        assert not Path("run").exists()

    def test_without_distrust_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        titles = []
        monkeypatch.setattr("lit_kd.report.show.contact_sheet", lambda *args: titles.append(args[3]) or b"")
        fit(ShowRun(every_n_epochs=1), max_epochs=2)  # the first epoch warms up
        assert titles == ["epoch 0: no label is distrusted", "epoch 1: the 24 most distrusted labels"]

    def test_switched_off(self) -> None:
        shown = ShowRun(every_n_epochs=0)
        fit(shown, logger=CSVLogger("logs"), log_every_n_steps=1)
        assert shown.course == []
        assert "noise_auc" not in next(Path("logs").rglob("metrics.csv")).read_text()
        fit(ShowRun(every_n_epochs=1), fast_dev_run=True)
        assert not list(Path.cwd().rglob("*.png"))


def test_large_pictures_are_made_small_and_others_are_none() -> None:
    from lit_kd.report.samples import as_pictures

    draw = torch.Generator().manual_seed(0)
    shown = as_pictures(3 * torch.randn(2, 3, 192, 96, generator=draw) - 5)
    assert shown is not None
    assert (shown.shape, shown.min(), shown.max()) == ((2, 96, 48, 3), 0, 255)
    long = as_pictures(torch.randn(2, 1, 12, 5000, generator=draw))
    assert long is not None
    assert (long.shape, long.max()) == ((2, 1, 96, 3), 255)
    grey = as_pictures(torch.linspace(-1, 1, 16).view(1, *SHAPE))
    assert grey is not None
    assert grey[0, :, :, 0].ravel().tolist() == [17 * i for i in range(16)]
    assert as_pictures(torch.randn(2, 5, 8, 8)) is None
    assert as_pictures(torch.randn(2, 8)) is None
    assert as_pictures({"x": torch.randn(2, 1, 8, 8)}) is None
