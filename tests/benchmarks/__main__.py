"""Times and memory of lit_kd beside other ways to write the same training, in one table; run by ``make bench``."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import subprocess
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from contenders import (
    LR,
    WEIGHT,
    Setting,
    bare,
    double_backward,
    installed,
    losses,
    ours,
    plain,
    torchdistill,
    with_higher,
    with_meta,
    with_torchopt,
)
from turns import Turns, interleave

from lit_kd import ALMKD
from lit_kd.data.table import SampleTable
from lit_kd.models.taps import Replay
from lit_kd.trust import exact
from lit_kd.trust.meta import meta_gradient
from lit_kd.weightings import Paper, Robust, Rule


def spread(values: object, unit: str = "") -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return f"{middle:6.2f}{unit}  [{low:.2f}, {high:.2f}]"


class Table:
    """Lines of the table."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []

    def add(self, what: str, who: str, figure: str, wanted: str = "", memory: str = "") -> None:
        self.lines.append((what, who, figure, wanted, memory))

    def __str__(self) -> str:
        head = ("what", "who", "median [quartiles]", "wanted", "peak MiB")
        rows = [head, *self.lines]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        text = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([text[0], "-|-".join("-" * width for width in widths), *text[1:]])


def cosine(setting: Setting) -> float:
    """Of the exact meta-gradient in float32 and that by double backward in float64."""
    student, teacher = setting.networks()
    batches = setting.batches()
    (x, y), (meta_x, meta_y) = next(batches), next(batches)
    with torch.no_grad():
        taught = teacher(x)
    weights = torch.tensor([1 - WEIGHT, WEIGHT], device=setting.device).repeat(len(y), 1)
    replay = Replay(student)

    def terms(theta: exact.Named) -> torch.Tensor:
        return torch.stack(losses(replay(x, theta).logits, taught, y, "none"), 1)

    total = (weights * torch.stack(losses(student(x), taught, y, "none"), 1)).sum() / len(y)
    step = exact.gradient(total, dict(student.named_parameters()))
    ahead = {name: (value - LR * step[name]).requires_grad_() for name, value in replay.parameters.items()}
    student.eval()
    v = exact.gradient(F.cross_entropy(Replay(student)(meta_x, ahead).logits, meta_y), ahead)
    student.train()
    found = meta_gradient(exact.exact_derivative(terms, replay.parameters, v), LR, len(y))
    student, _ = setting.networks()
    student(x)  # running statistics as ours has them
    doubles = (student.double(), x.double(), y, taught.double(), weights.double().requires_grad_())
    for layer in student.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.0  # the second pass of this batch is not seen
    expected = double_backward(*doubles, meta_x.double(), meta_y)
    return float(F.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0))


def renewal(rows: int) -> float:
    """Seconds that the rule robust takes at the end of an epoch of so many rows, on the CPU."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(100, (rows,), generator=draw)
    table, rule = SampleTable(rows, ""), Robust()
    trusted = torch.arange(rows) >= 0.9 * rows
    rule.start(table, 1, trusted, labels, 30)
    clean = torch.where(torch.rand(rows, generator=draw) < 0.7, labels, labels.roll(1))
    table.add("memory", (torch.randn(rows, 100, generator=draw) + 3 * F.one_hot(clean, 100)).softmax(-1), rows=True)
    table["epochs"], table["teacher_class"] = torch.ones(rows), labels.unsqueeze(1)
    table.shared["errors"] = torch.tensor([[[90.0, 90.0], [90.0, 10.0]]])
    begin = time.process_time()
    rule.renew(table, 20)
    return time.process_time() - begin


def compare_steps(table: Table, setting: Setting, rounds: int, compiled: bool) -> None:
    """Steps of a training on images."""

    def enter(name: str, loop: object) -> Turns:
        print(f"  {name}", flush=True)
        return Turns(name, loop, setting.device)  # type: ignore[arg-type]

    print("getting ready:", flush=True)
    loop = enter("bare loop, student first", bare(setting))
    kd = enter("lit_kd", ours(setting))
    steps = [enter("plain Lightning", plain(setting))]
    if installed("torchdistill"):
        steps.append(enter("torchdistill", torchdistill(setting)))
    steps += [enter("lit_kd, channels_last=False", ours(setting, channels_last=False)), kd]
    wanted = {"lit_kd": "<= 0.85", "lit_kd, cached teacher": "<= 0.57"}
    cached = enter("lit_kd, cached teacher", ours(setting, teacher_cache="memory"))
    steps.append(cached)
    if compiled:
        steps.append(enter("lit_kd, compiled", ours(setting, compile=True)))
    if setting.device != "cpu":
        steps.append(enter("lit_kd, bf16 teacher", ours(setting, teacher_precision="bf16")))
    rules: list[tuple[str, Rule]] = [
        ("rule paper", Paper(warmup_epochs=0, every=1)),
        ("rule robust", Robust()),
    ]
    refreshes = [(enter(name, ours(setting, ALMKD, rule=rule)), kd, "<= 0.6") for name, rule in rules]
    refreshes += [
        (enter(f"{name}, cached teacher", ours(setting, ALMKD, rule=rule, teacher_cache="memory")), cached, "<= 0.22")
        for name, rule in rules
    ]
    once = Paper(warmup_epochs=0, every=1, repeats=1)
    through_all = enter("lit_kd, exact", ours(setting, ALMKD, rule=once, meta_gradient="exact"))
    metas = [enter("double backward", with_meta(setting, double_backward))]
    metas += [
        enter(name, with_meta(setting, meta))
        for name, meta in (("higher", with_higher), ("torchopt", with_torchopt))
        if installed(name)
    ]
    everyone = [loop, *steps, *(one for one, _, _ in refreshes), through_all, *metas]
    interleave(everyone, rounds, warm_up=2)
    for contender in everyone:
        contender.measure_memory()
    seconds = {one.name: np.array(one.seconds) for one in everyone}
    base, own = seconds[loop.name], seconds[kd.name]
    table.add(f"KD step, {np.median(base):.2f} s", loop.name, "  1.00", "", f"{loop.peak:.0f}")
    for one in steps:
        table.add(
            "KD step / bare loop",
            one.name,
            spread(seconds[one.name] / base),
            wanted.get(one.name, ""),
            f"{one.peak:.0f}",
        )
    for one, without, most in refreshes:
        extra = seconds[one.name] - seconds[without.name]
        table.add("ALM-KD refresh, in bare KD epochs", one.name, spread(extra / base), most, f"{one.peak:.0f}")
        table.add("                in lit_kd's own", one.name, spread(extra / seconds[without.name]))
    if setting.device == "cpu":
        epoch = 50_000 / setting.batch_size * float(np.median(own))
        table.add("  renewal of 50,000 rows, in lit_kd's", "rule robust", f"{renewal(50_000) / epoch:6.4f}")
    for one in metas:
        extra = f"{one.peak:.0f} (+{one.peak - loop.peak:.0f})"
        table.add(
            "exact meta-gradient, extra bare KD steps", one.name, spread((seconds[one.name] - base) / base), "", extra
        )
    extra = f"{through_all.peak:.0f} (+{through_all.peak - kd.peak:.0f})"
    table.add(
        "exact meta-gradient, extra bare KD steps",
        through_all.name,
        spread((seconds[through_all.name] - own) / base),
        "<= 1.3, +90",
        extra,
    )
    table.add("                     in lit_kd's own", through_all.name, spread((seconds[through_all.name] - own) / own))
    table.add("  1 - cosine to float64 double backward", through_all.name, f"{1 - cosine(setting):.1e}", "<= 1e-5")


def compare_overhead(table: Table, setting: Setting, rounds: int) -> None:
    """What a step costs beyond the arithmetic."""
    loop = Turns("bare loop", bare(setting), setting.device)
    others = [
        Turns("plain Lightning", plain(setting), setting.device),
        Turns("plain Lightning, logs of steps and bar", plain(setting, logs="steps"), setting.device),
        Turns("plain Lightning, epoch's means and bar", plain(setting, logs="means"), setting.device),
        Turns("lit_kd", ours(setting), setting.device),
        Turns("lit_kd, epoch's means and bar", ours(setting, logs=True), setting.device),
    ]
    interleave([loop, *others], rounds, warm_up=10)
    base = np.array(loop.seconds)
    for one in others:
        table.add("overhead a step, tiny network", one.name, spread(1e3 * (np.array(one.seconds) - base), " ms"))


def compare_start(table: Table, rounds: int) -> None:
    """How long it takes to be told something that needs no training."""
    ours = [sys.executable, "-m", "lit_kd"]
    lines = {
        "import lightning, nothing else": [sys.executable, "-c", "import lightning"],
        "lit-kd --version": [*ours, "--version"],
        "lit-kd, an option misspelt": [
            *ours,
            "fit",
            "--config=methods/kd.yaml",
            "--config=data/digits.yaml",
            "--model.lr=1",
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, line in lines.items():
            begin = time.perf_counter()
            subprocess.run(line, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - begin)
    for name, found in seconds.items():
        table.add("start-up", name, spread(found, " s"), "<= 1 s" if "version" in name else "")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contender")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also lit_kd compiled, which takes minutes to get ready")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = Table()
    compare_start(table, min(args.rounds, 5))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars
        compare_overhead(table, Setting("mlp-8", "mlp-8", (8,), 8, args.device), 40 * args.rounds)
    images = Setting("resnet20", "resnet56", (3, 32, 32), 64, args.device)
    compare_steps(table, images, args.rounds, args.compile)
    clock = "processor time of one thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"\nresnet56 -> resnet20, 32x32, 10 classes, batches of 64; paired ratios, {args.rounds} rounds; {clock}\n")
    print(table)


if __name__ == "__main__":
    main()
