"""The documentation names what there is, and its commands and formulas hold. `make docs` checks links and pages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer, weighted_terms
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import lit_kd.methods
from lit_kd import ALMKD, KD, Batch, Distiller, Outputs, Supervised
from lit_kd.cli.lightning import make_cli
from lit_kd.cli.main import with_paths

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
TEXT = re.sub(r"```text\n.*?```", "", "\n".join(PAGES.values()), flags=re.DOTALL)  # which are commands of others


def commands() -> list[str]:
    """What the pages' ``lit-kd fit`` lines say after ``fit``, of those whose configs are shipped."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    found = [line.split(" fit ", 1)[1] for line in blocks.splitlines() if re.search(r"(lit-kd|-m lit_kd) fit ", line)]
    return [line for line in found if re.search(r"--config (methods|data)/", line) and " my_methods." not in line]


@pytest.mark.parametrize("method", [name for name in lit_kd.methods.__all__ if name != "Distilled"])
def test_every_method_has_a_page(method: str) -> None:
    [page] = [name for name, text in PAGES.items() if f"\n::: lit_kd.{method}\n" in text]
    assert page in (ROOT / "mkdocs.yml").read_text()
    for part in ("When", "Config", "Needs", "Costs", "Limits"):
        assert f"- **{part}:**" in PAGES[page]


def test_every_config_is_mentioned_and_all_that_is_mentioned_is_there() -> None:
    named = set(re.findall(r"(?:configs|notebooks|lit_kd|tests)/[\w/.]*\w", TEXT))
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


STUDIES = {"sequences": "sequences", "worlds": "small_worlds", "elements": "element_trust"}


@pytest.mark.parametrize("study", STUDIES)
def test_tables_are_those_that_the_studies_wrote(study: str) -> None:
    written = (ROOT / "tests" / "studies" / "results" / f"{study}.md").read_text().splitlines()
    assert {line for line in written if line.startswith("|")} <= set(PAGES[f"methods/{STUDIES[study]}.md"].splitlines())


THEIRS = ["MyDataModule", "Net", "net", "synthetic_x", "synthetic_y", "teacher", "val", "x", "y"]  # the reader's own


def code(page: str) -> str:
    """The Python on a page."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


@pytest.mark.parametrize("name", [*(name for name, text in PAGES.items() if code(text)), "../README.md"])
def test_python_names_what_there_is(name: str) -> None:
    given = code((ROOT / "docs" / name).read_text())
    options = ["--isolated", "--select=F821", f"--config=builtins = {THEIRS}", "--output-format=concise", "-"]
    run = [sys.executable, "-m", "ruff", "check", *options]
    found = subprocess.run(run, input=given, text=True, capture_output=True, check=False)
    assert not found.returncode, found.stdout + found.stderr
    exec("\n".join(re.findall(r"^from lit_kd.* import .*$", given, re.MULTILINE)), {})


def test_the_code_of_rows_that_label_each_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning logs
    given = re.sub(r"max_epochs=\d+", "max_epochs=1, accelerator='cpu'", code(PAGES["methods/loss_divider.md"]))
    there: dict[str, Any] = {}
    exec(given, there)
    assert there["history"].shape == (3, there["data"].train_size)


def test_the_classifier_of_hugging_face_and_the_answers_of_an_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words, wrong = {"bad": "leaks", "good": "works"}, {"r31", "r41", "r51", "r61", "r71"}
    reviews = {f"r{i}": "good" if i % 2 else "bad" for i in range(80)}
    given = {name: "bad" if name in wrong else kind for name, kind in reviews.items()}
    checked = [*["yes"] * 20, *["no"] * 60]
    rows = [
        f"{name},it {words[kind]},{given[name]},{sure}"
        for (name, kind), sure in zip(reviews.items(), checked, strict=True)
    ]
    Path("reviews").mkdir()
    Path("reviews/train.csv").write_text("\n".join(["id,text,label,checked", *rows]))
    answers = [f"{name},{kind},-0.05" for name, kind in reviews.items()]
    Path("gpt.csv").write_text("\n".join(["id,class_1,logprob_1", *answers]))
    known = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "it", *words.values()))}
    tokenizer = Tokenizer(WordLevel(known, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=5, max_position_embeddings=8, **sizes)).save_pretrained("bert")

    page = PAGES["your_project.md"].split("## A classifier of Hugging Face")[1]
    here = (
        code(page.split("\n## ")[0])
        .replace("max_epochs=5", "max_epochs=8, accelerator='cpu'")
        .replace("lr=5e-5", "lr=1e-2")
    )
    there: dict[str, Any] = {}
    exec(here, there)
    assert there["trainer"].callback_metrics["test/accuracy"] > 0.9
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    weights = {line[0]: float(line[1]) for line in printed if line and line[0] in reviews}
    assert len(weights) > 50
    there_are = wrong & set(weights)
    assert set(sorted(weights, key=lambda name: weights[name])[: len(there_are)]) == there_are
    assert len(there_are) > 2


def test_every_command_can_be_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lit-kd"])
    tiny = ["--model=Supervised", "--model.student=mlp-8", "--data=DigitsDataModule", "--trainer.logger=false"]
    parser = make_cli([*tiny, "--trainer.accelerator=cpu"], run=False).parser
    assert len(commands()) > 40
    for command in commands():  # run=False has made a parser without subcommands, once, which knows no --ckpt_path
        config = parser.parse_args(with_paths(shlex.split(command.replace("--ckpt_path last", ""))))
        assert config.model.class_path.removeprefix("lit_kd.") in lit_kd.methods.__all__


def test_examples_are_rendered_as_such() -> None:
    # "Example:" is a note to mkdocstrings, "Examples:" a section of code
    assert not [path for path in (ROOT / "lit_kd").rglob("*.py") if re.search(r"^ +Example:$", path.read_text(), re.M)]


def test_the_methods_and_terms_of_writing_a_method_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGES["writing_a_method.md"], re.DOTALL)
    (tmp_path / "my_methods.py").write_text("\n".join(block for block in blocks if "class " in block))
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_methods as my

    options: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
    teachers = trained_teachers()
    models: list[Distiller] = [
        my.ConfidentKD(student="mlp-8", teacher=teachers, **options),
        my.SureKD(student="mlp-8", teacher=teachers, power=2.0, **options),
        ALMKD("mlp-8", teachers, term=my.LogitError(), **options),
        KD("mlp-8", teachers, term=my.Direction(), **options),
        Supervised("mlp-8", label_term=my.OwnELR(), **options),
        KD("mlp-8", teachers, extra=[my.SimilarityPreserving(weight=10.0)], **options),
    ]
    for model in models:
        fitted = trainer(max_epochs=1)
        fitted.fit(model, Blobs())
        assert fitted.callback_metrics["train/loss"].isfinite()
    assert "train/similarity_preserving" in fitted.callback_metrics


@pytest.mark.parametrize(("label", "teacher"), [(0.1, 0.9), (1.0, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_conversion_of_foreign_weights(label: float, teacher: float, momentum: float) -> None:
    """The table of `migrating.md`: other weights that do not sum to 1 give the same training."""
    draw = torch.Generator().manual_seed(0)
    x, y, t = torch.randn(16, 5, generator=draw), torch.arange(16) % 3, torch.randn(16, 3, generator=draw)
    lr, decay, temperature = 0.1, 0.01, 4.0
    scale = label + teacher
    method = KD(nn.Linear(5, 3), nn.Linear(5, 3), num_classes=3, weight=teacher / scale, temperature=temperature)

    def theirs(z: Tensor) -> Tensor:
        soft, target = (z / temperature).log_softmax(1), (t / temperature).softmax(1)
        kl = (target * (target.log() - soft)).sum(1).mean()
        return label * F.cross_entropy(z, y) + teacher * temperature**2 * kl

    def ours(z: Tensor) -> Tensor:
        terms = weighted_terms(method, Outputs(z, {}), [Outputs(t, {})], Batch(x, y))
        return sum((term.mean() for term in terms.values()), torch.zeros(()))

    def train(loss: Callable[[Tensor], Tensor], lr: float, decay: float) -> Tensor:
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            loss(net(x)).backward()
            optimizer.step()
        return net.weight.detach()

    torch.testing.assert_close(train(ours, scale * lr, decay / scale), train(theirs, lr, decay))
