"""The command ``lit-kd compare``."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_kd.cli.configs import find_config, missing_config
from lit_kd.cli.main import raised_here
from lit_kd.cli.options import check_options, in_config
from lit_kd.cli.recipe import Job, check_seeds, merge, read_overrides, read_recipe

if TYPE_CHECKING:
    from lit_kd.cli.training import Result


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd compare``.

    Args:
        args: Command line after ``compare``.
    """
    parser = argparse.ArgumentParser(
        "lit-kd compare",
        description="Train a recipe's teachers, then every method at every seed. Run again to go on where it stopped.",
    )
    parser.add_argument("recipe", type=Path, help="YAML file, or the name of one that comes with lit_kd: digits_pair")
    parser.add_argument("--name", help="results go to ROOT/NAME (default: the recipe's name)")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument("--max_epochs", type=int, help="shorter trainings, to try a recipe out")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of every training, such as data.init_args.root=DIR; may be repeated. Give the results a --name",
    )
    parser.add_argument("--jobs", type=int, help="trainings side by side (default: one a core, one with a GPU)")
    parser.add_argument("--wandb", metavar="PROJECT", help="show each training in this W&B project, grouped by NAME")
    options = parser.parse_args(args)
    for name in ("jobs", "max_epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"expected --{name} of at least 1, found {value}")
    if options.wandb is not None:
        require_wandb()
    found = find_config(options.recipe, "recipes")
    if found is None:
        raise missing_config(options.recipe, "recipe", "recipes")
    recipe = read_recipe(found)
    seeds = recipe.seeds if options.seeds is None else check_seeds(options.seeds, "--seeds")
    folder = options.root / (options.name or recipe.name)
    overrides = read_overrides(options.set)
    if options.max_epochs:
        overrides = merge(overrides, {"trainer": {"max_epochs": options.max_epochs}})
    jobs = [replace(job, project=options.wandb) for job in recipe.jobs(folder, seeds, overrides)]
    for job in jobs:
        if job.seed == seeds[0]:
            check_options("fit", in_config(job.config, f"{options.recipe}, {job.method}: "), whole=True)

    from lit_kd.cli.training import RESULT, finished
    from lit_kd.report.comparison import write_report  # heavy, and not needed to find a mistake in the recipe

    done: list[tuple[Job, Result]] = []
    todo: dict[tuple[str, int], Job] = {}
    for job in jobs:
        result = finished(job)
        # students of a teacher that is no more are trained again
        if result is None or any((teacher, job.seed) in todo for teacher in job.teachers):
            todo[job.method, job.seed] = job
        else:
            done.append((job, result))
    for job in todo.values():  # if this is stopped, nobody must take the result of another teacher's student for done
        (job.folder / RESULT).unlink(missing_ok=True)
    with _progress() as progress:
        bar = progress.add_task(folder.name, total=len(jobs), completed=len(done))
        for wave in sorted({job.wave for job in todo.values()}):
            now = [job for job in todo.values() if job.wave == wave]
            for job, result in _train_all(now, options.jobs or _default_jobs()):
                done.append((job, result))
                progress.advance(bar)
                accuracy, seconds = result["test_accuracy"], result["seconds"]
                progress.console.print(escape(f"{job.method}, seed {job.seed}: {accuracy:.4f} ({seconds:.0f} s)"))
    order = {(job.method, job.seed): i for i, job in enumerate(jobs)}
    done.sort(key=lambda pair: order[pair[0].method, pair[0].seed])
    write_report(folder, done)


def _train_all(jobs: list[Job], side_by_side: int) -> Iterator[tuple[Job, Result]]:
    """Train jobs, several at a time, each in a process of its own with its share of the cores."""
    if side_by_side == 1:  # one job of several keeps to its share too: on more threads sums round otherwise
        for job in jobs:
            yield job, _train(job)
        return
    threads = max(1, (os.cpu_count() or 1) // side_by_side)
    pool = ProcessPoolExecutor(
        min(side_by_side, len(jobs)), multiprocessing.get_context("spawn"), _start_worker, (threads,)
    )
    try:
        running = {pool.submit(_train, job): job for job in jobs}
        for future in as_completed(running):
            yield running[future], future.result()
    except TrainingError as error:
        raise TrainingError(str(error)) from None  # from here: the worker's traceback has been told by the message
    finally:
        # trainings that have begun are finished, so that none writes while the command is run again
        pool.shutdown(cancel_futures=True)


def require_wandb() -> None:
    """Refuse to start where W&B is wanted and is not installed.

    Raises:
        ImportError: If it is not.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ImportError("expected wandb for --wandb, found none: pip install 'lit_kd[wandb]', or leave --wandb out")


class TrainingError(Exception):
    """A training refused what the recipe says; tells which."""


def _train(job: Job) -> Result:
    from lit_kd.cli.training import train

    try:
        return train(job)
    except Exception as error:
        where = f"{job.method}, seed {job.seed}"
        ours = raised_here(error)
        if ours is None:
            error.add_note(f"in the training of {where}")
            raise
        raise TrainingError(f"{where}: {ours}") from error


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


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
