"""What runs on a GPU and how fast: every option that concerns it, every method, the benchmarks; run by ``make gpu``.

Writes ``gpu.md`` and ``gpu.json``, and ends with 1 if anything failed. What does not fit into ``--minutes`` is
listed as not run. Each training is repeated on the CPU: the epoch's mean loss there is the yardstick. It differs by
rounding, and by chance where a method draws on the device.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from commands import CONFIGS, QUIET, call, configs, read_csv, read_yaml, train_teacher

import lit_kd
from lit_kd.models.files import write_whole

OPTIONS = {
    "KD": (),
    "bf16-mixed": ("--trainer.precision=bf16-mixed",),
    "16-mixed": ("--trainer.precision=16-mixed",),
    "teacher in bf16": ("--model.teacher_precision=bf16",),
    "compiled": ("--model.compile=true",),
    "DDP, one device": ("--trainer.strategy=ddp", "--trainer.devices=1"),
    "teacher cache in memory": ("--model.teacher_cache=memory",),
    "teacher cache in a directory": ("--model.teacher_cache=cache",),
    "rows on the device": ("--data.on_device=true",),
    "not channels last": ("--model.channels_last=false",),
}
EXACT = {
    "ALMKD, exact meta-gradient": (
        "--model.meta_gradient=exact",
        "--model.rule=Paper",
        "--model.rule.warmup_epochs=0",
        "--model.rule.every=1",
    )
}
QUICK = tuple(EXACT)


def trainings(teacher: Path) -> dict[str, list[object]]:
    """The command line of each training, but for where it runs."""
    taught = f"--model.teacher={teacher}"
    lines: dict[str, list[object]] = {}
    lines |= {name: [*configs("kd"), taught, *options] for name, options in OPTIONS.items()}
    lines |= {name: [*configs("almkd"), taught, *options] for name, options in EXACT.items()}
    for path in sorted((CONFIGS / "methods").glob("*.yaml")):
        model = read_yaml(path)["model"]
        again = model["init_args"].get("rounds", model["class_path"] == "GLC")
        several = path.stem == "kd_multilabel"  # whose teacher has other labels: a random one will do
        line = configs(path.stem, "digit_attributes" if several else "digits")
        if getattr(lit_kd, model["class_path"]).needs_teacher:
            line.append("--model.teacher=mlp-8" if several else taught)
        if again:
            line += ["--data.labeled=100", f"--trainer.max_epochs={again + 1}"]
        lines[f"configs/methods/{path.name}"] = line
    return lines


def train(line: Sequence[object], device: str) -> tuple[float, float]:
    """Seconds of a short training, and the mean loss of its last epoch."""
    place = "gpu" if device == "cuda" else "cpu"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1")
        call("fit", *line[:4], *QUIET, *short, *line[4:], f"--trainer.accelerator={place}")  # configs first
        losses = [row["train/loss"] for row in read_csv(Path("lightning_logs/version_0/metrics.csv"))]
    return time.perf_counter() - begin, float([loss for loss in losses if loss][-1])


def check(line: Sequence[object], device: str) -> dict[str, Any]:
    """One row of the table."""
    try:
        seconds, loss = train(line, device)
        _, expected = train([word for word in line if "precision" not in str(word)], "cpu")
    except (Exception, SystemExit) as error:  # whatever it is: the other rows are wanted, too
        told = str(error).partition("\n")[0]
        return {"status": f"failed: {type(error).__name__}: {told}"}
    return {"status": "ran", "seconds": round(seconds, 1), "loss": loss, "loss_cpu": expected}


def benchmarks(device: str, seconds: float) -> str:
    """The table of ``make bench``, with fewer rounds."""
    line = [sys.executable, Path(__file__).parent / "benchmarks", "--device", device, "--rounds", "5", "--compile"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"failed: not done within {seconds:.0f} s"
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-2000:]}"


def cifar(root: Path, device: str) -> dict[str, Any]:
    """A training on CIFAR-10 as its config has it, of 200 epochs, in which random flips and crops are drawn."""
    line = [*configs("supervised", "cifar10"), f"--data.root={root}", "--model.student=resnet20"]
    place, begin = "gpu" if device == "cuda" else "cpu", time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        call("fit", *line, *QUIET, f"--trainer.accelerator={place}")
        rows = read_csv(Path("lightning_logs/version_0/metrics.csv"))
    accuracy = max(float(row["val/accuracy"]) for row in rows if row["val/accuracy"])
    return {"status": "ran", "seconds": round(time.perf_counter() - begin, 1), "val_accuracy": accuracy}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| what | {' | '.join(keys)} |", "| --- " * (len(keys) + 1) + "|"]
    lines += [f"| {what} | {' | '.join(str(row.get(key, '')) for key in keys)} |" for what, row in rows.items()]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one training and no benchmark, to try this script")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after this; default: 8")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="also train on CIFAR-10, in full, however long")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="default: runs/gpu")
    options = parser.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a GPU that torch can use, found none: try this script with --device cpu --quick")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * options.minutes
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = trainings(train_teacher(Path(folder), "cnn-8"))
        bench = "" if options.quick else benchmarks(options.device, 30 * options.minutes)
        for name, line in lines.items():
            if not options.quick or name in QUICK:
                rows[name] = check(line, options.device) if time.monotonic() < end else {"status": "not run: no time"}
                print(f"{name}: {rows[name]['status']}", flush=True)
    if options.cifar10:
        rows["CIFAR-10, 200 epochs"] = cifar(options.cifar10.resolve(), options.device)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    told = f"# {where}, torch {torch.__version__}\n\n{table(rows)}\n" + (f"\n```\n{bench}\n```\n" if bench else "")
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"device": where, "torch": torch.__version__, "rows": rows, "benchmarks": bench}
    for path, text in ((options.output / "gpu.md", told), (options.output / "gpu.json", json.dumps(content, indent=1))):
        write_whole(path, text)
    print(told)
    return int(bench.startswith("failed") or any(row["status"].startswith("failed") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
