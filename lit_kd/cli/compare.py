"""The command ``lit-kd compare``."""

import argparse
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path

from jsonargparse.typing import PositiveInt
from rich.markup import escape
from rich.progress import Progress

from lit_kd.cli.main import find_config
from lit_kd.cli.recipe import merge, read_overrides, read_recipe
from lit_kd.report.runs import RESULT, Job, Result, score_of


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd compare`` with the command line after it."""
    parser = argparse.ArgumentParser(
        "lit-kd compare",
        description="Train a recipe's teachers, then every method at every seed. Run again to go on where it stopped.",
    )
    parser.add_argument("recipe", type=Path, help="YAML file, or the name of one that comes with lit_kd: digits_pair")
    parser.add_argument("--name", help="results go to ROOT/NAME (default: the recipe's name)")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument("--max_epochs", type=PositiveInt, help="shorter trainings, to try a recipe out")
    option = "an option of every training, such as data.init_args.root=DIR; may be repeated. Give the results a --name"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=option)
    parser.add_argument("--jobs", type=PositiveInt, help="trainings side by side (default: one a core, one with a GPU)")
    parser.add_argument("--wandb", metavar="PROJECT", help="show each training in this W&B project, grouped by NAME")
    options = parser.parse_args(args)
    recipe = read_recipe(find_config(options.recipe, "recipes"))
    folder = options.root / (options.name or recipe.name)
    overrides = read_overrides(options.set)
    if options.max_epochs:
        overrides = merge(overrides, {"trainer": {"max_epochs": int(options.max_epochs)}})
    jobs = list(recipe.jobs(folder, options.seeds or recipe.seeds, overrides, options.wandb))

    import torch  # heavy, and not needed to find a mistake in the recipe

    from lit_kd.cli.training import check, finished
    from lit_kd.report.comparison import write_report

    side_by_side = options.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    done: dict[tuple[str, int], Result] = {}
    todo: dict[tuple[str, int], Job] = {}
    for job in jobs:
        result = finished(job)
        # students of a teacher that is no more are trained again
        if result is None or any((teacher, job.seed) in todo for teacher in job.teachers):
            todo[job.method, job.seed] = job
        else:
            done[job.method, job.seed] = result
    for job in {job.method: job for job in todo.values()}.values():
        check(job)
    for job in todo.values():  # if this is stopped, nobody must take the result of another teacher's student for done
        (job.folder / RESULT).unlink(missing_ok=True)
    with Progress() as progress:
        bar = progress.add_task(folder.name, total=len(jobs), completed=len(done))
        for wave in sorted({job.wave for job in todo.values()}):
            now = [job for job in todo.values() if job.wave == wave]
            for job, result in _train_all(now, side_by_side):
                done[job.method, job.seed] = result
                progress.advance(bar)
                told = f"{job.method}, seed {job.seed}: {score_of(result)[1]:.4f} ({result['seconds']:.0f} s)"
                progress.console.print(escape(told))
    write_report(folder, [(job, done[job.method, job.seed]) for job in jobs])


def _train_all(jobs: list[Job], side_by_side: int) -> Iterator[tuple[Job, Result]]:
    """Train jobs, several at a time, each in a process of its own with its share of the cores."""
    from lit_kd.cli.training import train

    if side_by_side == 1:
        for job in jobs:
            yield job, train(job)
        return
    # a job that runs alone keeps to its share too: with more threads sums round otherwise
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(side_by_side, len(jobs)), spawn, _start_worker, (threads,))
    try:
        running = {pool.submit(train, job): job for job in jobs}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        # trainings that have begun are finished, so that none writes while the command is run again
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Never outlive a parent that was killed: a second try would find two writers in one folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
