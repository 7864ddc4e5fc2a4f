"""How time and memory grow with the number of samples, on synthetic data: ``python tests/benchmarks/scale.py``.

Each line is measured in a process of its own: seconds of one core, the memory it took beyond its inputs, and by how
much both grew from the line before, with a tenth of the samples. Some 3 minutes on an idle machine, less than 4 GB;
``--largest 1000000`` for less.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lit_kd.data.table import SampleTable
from lit_kd.trust.game import dep_round, rad_distribution, rad_marginals
from lit_kd.trust.reliability import Neighbours, distillation_weights
from lit_kd.weightings.base import MetaStep
from lit_kd.weightings.robust import Robust

CLASSES, BATCH, META = 10, 256, 10_000
Work = Callable[[], Any]


def robust_table(n: int) -> tuple[Robust, SampleTable]:
    """A table of the robust rule in which each row was seen once, a third of the labels wrong."""
    draw = torch.Generator().manual_seed(0)
    rule, table = Robust(), SampleTable(n, "synthetic")
    trusted = torch.arange(n) >= n - META
    clean = torch.randint(CLASSES, (n,), generator=draw)
    wrong = (torch.rand(n, generator=draw) < 0.33) & ~trusted
    rule.start(table, 1, trusted, (clean + wrong) % CLASSES, 10)
    table.add(
        "memory", (torch.randn(n, CLASSES, generator=draw) + 3 * F.one_hot(clean, CLASSES)).softmax(-1), rows=True
    )
    table["epochs"], table["teacher_class"] = torch.ones(n), clean.unsqueeze(1)
    table.shared["errors"] = torch.tensor([[[90.0, 90.0], [90.0, 10.0]]])
    return rule, table


def create(n: int) -> Work:
    return lambda: robust_table(n)[1]


def observe(n: int) -> Work:
    """What a batch of 256 shows, 100 times."""
    rule, table = robust_table(n)
    draw = torch.Generator().manual_seed(1)
    index = torch.randint(n, (100, BATCH), generator=draw)
    logits = torch.randn(BATCH, CLASSES, generator=draw)

    def work() -> None:
        for rows in index:
            step = MetaStep(rows, rule.labels[rows], logits, [logits], lambda weights, lr: weights, 0.1, BATCH)
            rule.observe(table, step)

    return work


def sync(n: int) -> Work:
    _, table = robust_table(n)
    table.write(torch.arange(BATCH), weights=torch.ones(BATCH, 2))
    return table.sync


def renew(n: int) -> Work:
    rule, table = robust_table(n)
    return lambda: rule.renew(table, 5)


def save(n: int) -> Work:
    _, table = robust_table(n)
    return lambda: torch.save(table.state_dict(), io.BytesIO())


def weights(n: int) -> Work:
    """10^4 validation points."""
    draw = torch.Generator().manual_seed(0)
    near, cost = Neighbours(torch.rand(META, 2, generator=draw)), 1 + torch.rand(META, generator=draw)
    margins = torch.rand(n, 2, generator=draw)
    return lambda: distillation_weights(margins, near, cost)


def game(n: int) -> Work:
    gain = np.random.default_rng(0).random(n)
    return lambda: rad_distribution(gain, 0.1 * n)


def marginals(n: int) -> Work:
    """A budget so large that rows are certain to be asked about."""
    gain = np.random.default_rng(0).random(n) ** 4
    return lambda: rad_marginals(gain, 0.01 * n, n // 2)


def rounding(n: int) -> Work:
    draw = np.random.default_rng(0)
    q = draw.random(n)
    q *= (n // 4) / q.sum()
    return lambda: dep_round(q, draw)


CASES: list[tuple[str, Callable[[int], Work], list[int]]] = [
    ("robust table: create", create, [10**5, 10**6, 10**7]),
    ("robust table: observe 100 batches", observe, [10**5, 10**6, 10**7]),
    ("robust table: share among ranks", sync, [10**5, 10**6, 10**7]),
    ("robust table: renew, with the PU fit", renew, [10**5, 10**6, 10**7]),
    ("robust table: save", save, [10**5, 10**6, 10**7]),
    ("neighbours' weights", weights, [10**4, 10**5, 10**6]),
    ("RAD: distribution", game, [10**5, 10**6, 10**7]),
    ("RAD: marginals", marginals, [10**5, 10**6, 10**7]),
    ("RAD: DepRound", rounding, [10**5, 10**6, 10**7]),
]


def resident() -> float:
    """This process's memory now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure(case: int, n: int, answer: Any) -> None:
    """Seconds that it had a core, and the most MB beyond what was there before, looked at every millisecond."""
    torch.set_num_threads(1)
    CASES[case][1](2 * META)()  # what is slow the first time
    work = CASES[case][1](n)
    before, largest, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.thread_time()
    kept = work()
    seconds = time.thread_time() - start
    largest = max(largest, resident())
    done.set()
    watcher.join()
    del kept
    answer.send((seconds, max(0.0, largest - before)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=10**7, help="number of samples")
    largest = parser.parse_args().largest
    fork = multiprocessing.get_context("fork")
    print("| what | samples | seconds | MB | growth of time | of memory |\n| --- | --- | --- | --- | --- | --- |")
    for number, (name, _, sizes) in enumerate(CASES):
        last: tuple[float, float] | None = None
        for n in (size for size in sizes if size <= largest):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=measure, args=(number, n, theirs))
            process.start()
            theirs.close()
            try:
                seconds, memory = ours.recv()
            except EOFError:
                process.join()
                sys.exit(f"{name}, {n}: ended with {process.exitcode}")
            process.join()
            pairs = zip((seconds, memory), last or (), strict=False)
            growth = [f"{a / b:.1f}" if b else "" for a, b in pairs] or ["", ""]
            exponent = round(np.log10(n))
            print(f"| {name} | 10^{exponent} | {seconds:.3f} | {memory:.0f} | {growth[0]} | {growth[1]} |", flush=True)
            last = (seconds, memory)


if __name__ == "__main__":
    main()
