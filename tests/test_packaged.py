"""What an installed package brings along, and what ``lit-kd`` tells before it imports anything heavy."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from commands import CONFIGS, QUIET, configs, files, version

from lit_kd.cli.main import find_config, with_paths

ROOT = Path(__file__).parents[1]


def python(script: str, path: Path = ROOT, *args: object) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(given, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": str(path)})


def test_the_wheel_brings_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatchling.build import build_wheel

    monkeypatch.chdir(ROOT)
    wheel = tmp_path / build_wheel(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall("installed")
    package = tmp_path / "installed" / "lit_kd"
    own = [path for kind in ("methods", "data", "recipes") for path in (CONFIGS / kind).glob("*.yaml")]
    own += CONFIGS.glob("*.schema.json")
    expected = {path.relative_to(CONFIGS): path.read_bytes() for path in own}
    found = {
        path.relative_to(package / "configs"): content for path, (_, content) in files(package / "configs").items()
    }
    assert found == expected
    for suffix in ("py", "html", "css", "js"):
        code = {path.relative_to(ROOT / "lit_kd") for path in (ROOT / "lit_kd").rglob(f"*.{suffix}")}
        assert {path.relative_to(package) for path in package.rglob(f"*.{suffix}")} == code != set()

    [metadata] = (tmp_path / "installed").glob("*.dist-info/METADATA")
    told = message_from_string(metadata.read_text())
    assert told["Author"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["authors"][0]["name"]
    assert told["Author"] in (ROOT / "LICENSE").read_text()
    assert (told["License-Expression"], told["License-File"]) == ("MIT", "LICENSE")
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    used = set(re.findall(r"pip install '\.\[(\w+)\]", pages))
    assert set(told.get_all("Provides-Extra", [])) == used | {"docs", "bench", "dev"}  # the others are make's

    script = "from lit_kd.cli.main import find_config as f; print(f('methods/kd.yaml'), f('digits_pair', 'recipes'))"
    done = python(script, tmp_path / "installed")
    configs = package / "configs"
    assert done.stdout.split() == [str(configs / "methods/kd.yaml"), str(configs / "recipes/digits_pair.yaml")]


class TestFindConfig:
    @pytest.mark.parametrize("name", ["methods/kd.yaml", "configs/methods/kd.yaml", "methods/kd"])
    def test_shipped(self, name: str) -> None:
        assert find_config(name) == CONFIGS / "methods" / "kd.yaml"

    def test_recipes_by_name(self) -> None:
        assert find_config("digits_pair", "recipes") == CONFIGS / "recipes" / "digits_pair.yaml"
        with pytest.raises(FileNotFoundError, match=r"one of lit_kd's: .*recipes/digits_pair,"):
            find_config("digits_par", "recipes")

    def test_own_files_come_first(self) -> None:
        Path("methods").mkdir()
        Path("methods/kd.yaml").write_text("{}")
        assert find_config("methods/kd.yaml") == Path("methods/kd.yaml")

    @pytest.mark.parametrize(
        "name",
        ["../configs/methods/kd.yaml", "/methods/kd.yaml", "methods/none.yaml", "methods", "~nobody/kd.yaml"],
    )
    def test_nothing_else(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match=f"no config at {name}: expected a YAML file"):
            find_config(name)

    def test_in_a_line(self) -> None:
        kd = str(CONFIGS / "methods" / "kd.yaml")
        assert with_paths(["fit", "--config", "kd", "-c", "methods/kd", "--config=kd.yaml", "--model", "kd"]) == [
            *("fit", "--config", kd, "-c", kd, f"--config={kd}", "--model", "kd"),
        ]
        assert with_paths(["fit", "--config", "model: {class_path: KD}"]) == [
            "fit",
            "--config",
            "model: {class_path: KD}",
        ]


def test_each_command_imports_what_it_needs() -> None:
    """And the models no Lightning; without wandb all works: in one process, as imports take seconds."""
    script = """
import sys
from lit_kd.cli.main import main
for line in ["--help"], ["-h"], ["--version"], []:
    main(line)
assert not {"torch", "lightning", "numpy", "matplotlib", "sklearn"} & set(sys.modules)
import lit_kd.models
assert not {"torchvision", "timm", "lightning"} & set(sys.modules)
lit_kd.models.build_model("resnet8", 10)
assert not {"torchvision", "timm", "lightning"} & set(sys.modules)
import lit_kd.models.export, lit_kd.models.predict
assert "lightning" not in sys.modules
import lit_kd.cli.lightning
assert not {"sklearn.cluster", "sklearn.neighbors", "wandb", "timm", "onnx"} & set(sys.modules)
sys.modules["wandb"] = None
lit_kd.KD
sys.argv[0] = "lit-kd"
main()
"""
    short = (*QUIET, "--model.student=mlp-16", "--trainer.limit_train_batches=4", "--trainer.max_epochs=1")
    done = python(script, ROOT, "fit", *configs("supervised"), *short)
    assert done.returncode == 0, done.stderr
    assert "GPU available" in done.stderr
    assert not re.search("Tip|TPU|LeafSpec", done.stderr)
    assert done.stdout.count("usage: lit-kd COMMAND") == 3
    assert (version(0) / "checkpoints" / "best.ckpt").is_file()
