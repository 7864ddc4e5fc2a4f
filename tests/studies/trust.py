"""Untrusted supervision of many kinds, and what each method makes of it: the table of docs/experiments.md.

    python tests/studies/trust.py --data digits mnist=mnist_5k.csv.gz letter=letter-recognition.data

trains perceptrons with 32 hidden units for 30 epochs in every scenario, and tells test accuracies at the last epoch.
All methods train on the trusted rows, too. Experiments of a seed run side by side, from the same initial weights and
with rows in the same order for each method; tests/test_studies.py shows that they are trainings by lit_kd. Results are
kept seed by seed and method by method: run again to go on.
"""

from __future__ import annotations

import argparse
import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenarios import SCENARIOS, build, load
from sklearn.metrics import roc_auc_score
from students import METHODS, OURS, RIVALS, Maker, Method, Runs, changed

Cells = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""By data set and scenario, then by method: what was found, a list by seed for each name."""


def measure(runs: Runs, method: Method) -> dict[str, dict[str, Any]]:
    """By scenario: test accuracies, the AUC of the doubt, the true and the estimated share of wrong labels."""
    method.begin(runs)
    nets, found = runs.train(method), {}
    right = nets.forward(runs.data.test_x.expand(len(runs.experiments), -1, -1))[1].argmax(-1) == runs.data.test_y
    for i, e in enumerate(runs.experiments):
        wrong, doubt = (e.y != e.true)[: e.rows], method.doubt(i)
        result: dict[str, Any] = {"accuracy": round(float(right[i].float().mean()), 4)}
        result["classes"] = [
            round(float(right[i, runs.data.test_y == c].float().mean()), 3) for c in range(runs.classes)
        ]
        if doubt is not None:
            auc = float(roc_auc_score(wrong, doubt[: e.rows])) if wrong.any() else None
            result |= {"auc": auc and round(auc, 4), "true": round(float(wrong.float().mean()), 4)}
            result["estimated"] = round(float(doubt[: e.rows].mean()), 4)
        found[str(e.scenario)] = result
    return found


def run(name: str, path: Path | None, seeds: list[int], methods: dict[str, Maker], args: Any) -> None:
    """Measure what is missing of a data set."""
    file = args.out / f"trust_{name}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    data = load(name, path)
    for seed in seeds:
        done = {m: known.setdefault(m, {}).setdefault(str(seed), {}) for m in methods}
        wanted = [s for s in SCENARIOS if str(s) in args.scenarios]
        missing = [m for m in methods if any(str(s) not in done[m] for s in wanted)]
        runs = Runs(data, [build(data, s, seed) for s in wanted]) if missing else None
        for m in missing:
            assert runs is not None
            done[m] |= measure(runs, methods[m]())
            file.with_suffix(".part").write_text(json.dumps(known))
            file.with_suffix(".part").replace(file)
            print(name, seed, m, flush=True)


def read(names: list[str], methods: list[str], scenarios: list[str], seeds: list[int], out: Path) -> Cells:
    """What is known for each method, of the seeds that are done with all of them."""
    cells: Cells = {}
    for name in names:
        file = out / f"trust_{name}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        for scenario in scenarios:
            by_method = [[known.get(m, {}).get(str(s), {}).get(scenario) for s in seeds] for m in methods]
            full = [of_seed for of_seed in zip(*by_method, strict=True) if all(of_seed)]
            if full:
                cells[name, scenario] = {
                    m: {key: [r[i][key] for r in full] for key in full[0][i]} for i, m in enumerate(methods)
                }
    if not cells:
        raise SystemExit(f"expected in {out} a seed that is done with all methods, found none: run without --report")
    return cells


def means(cells: Cells, method: str) -> np.ndarray[Any, Any]:
    """Accuracies in %, one a cell."""
    return 100 * np.array([np.mean(cell[method]["accuracy"]) for cell in cells.values()])


def summary(cells: Cells) -> list[list[str]]:
    """A line for each method."""
    methods = list(next(iter(cells.values())))
    plain, noisy = means(cells, "CE"), np.array(["clean" not in scenario for _, scenario in cells])
    best = np.max([means(cells, m) for m in methods if m in RIVALS], axis=0)
    head = "method|noisy cells|all cells|worst to CE|not 0.3 below CE|not 0.3 below the best rival|worst class to CE"
    lines = [head.split("|"), ["---"] * 7]
    for m in methods:
        own = means(cells, m)
        drop = min(classes_to_plain(cell, m) for cell in cells.values())
        line = [own[noisy].mean() if noisy.any() else np.nan, own.mean(), (own - plain).min()]
        shares = [100 * (own >= other - 0.3 - 1e-9).mean() for other in (plain, best)]
        lines.append([m, *(f"{v:.1f}" for v in line), *(f"{v:.0f}%" for v in shares), f"{drop:.1f}"])
    return lines


def classes_to_plain(cell: dict[str, dict[str, Any]], method: str) -> float:
    """How far, in points, the class that suffers most is below its accuracy with cross-entropy."""
    own, plain = (np.mean(cell[m]["classes"], axis=0) for m in (method, "CE"))
    return float(100 * (own - plain).min())


def report(cells: Cells, out: Path) -> None:
    """The tables as markdown, and as csv."""
    text, methods = "", list(next(iter(cells.values())))
    flat = [["data", "scenario", "method", "seeds", "accuracy", "sd", "worst class to CE", "auc", "true", "estimated"]]
    for name in dict.fromkeys(name for name, _ in cells):
        of_data = {key: cell for key, cell in cells.items() if key[0] == name}
        lines = [["scenario", *methods, "AUC", "noise: true / estimated"], ["---"] * (len(methods) + 3)]
        for (_, scenario), cell in of_data.items():
            line, doubt = [scenario], ["", ""]
            for m, found in cell.items():
                accuracies = 100 * np.array(found["accuracy"])
                mean, sd = f"{accuracies.mean():.1f}", f"{accuracies.std(ddof=1):.1f}" if len(accuracies) > 1 else ""
                line.append(f"{mean} ± {sd}" if sd else mean)
                of_doubt = [
                    f"{np.mean(found[key]):.2f}" if key in found and None not in found[key] else ""
                    for key in ("auc", "true", "estimated")
                ]
                flat.append(
                    [name, scenario, m, str(len(accuracies)), mean, sd, f"{classes_to_plain(cell, m):.1f}", *of_doubt]
                )
                if m == OURS:
                    doubt = [of_doubt[0], f"{of_doubt[1]} / {of_doubt[2]}"]
            lines.append([*line, *doubt])
        seeds = len(next(iter(of_data.values()))[methods[0]]["accuracy"])
        text += f"## {name}\n\nTest accuracy in % at the last epoch, mean ± standard deviation over {seeds} seeds.\n\n"
        text += f"{markdown(lines)}\n{markdown(summary(of_data))}\n"
    text += f"## All data sets\n\n{markdown(summary(cells))}"
    (out / "trust.md").write_text(text)
    with (out / "trust.csv").open("w", newline="") as file:
        csv.writer(file).writerows(flat)


def markdown(lines: list[list[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """See the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "digits; NAME=PATH: mnist (csv or csv.gz of pixels, then label), or a csv with a header, label first or last"
    parser.add_argument("--data", nargs="+", default=["digits"], metavar="NAME=PATH", help=text)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--methods", nargs="+", default=[*RIVALS, OURS], choices=METHODS, metavar="METHOD", help=f"{[*METHODS]}"
    )
    text = "also the rule with one constant changed: decay, early, or one of lit_kd.trust.belief"
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=text)
    parser.add_argument(
        "--scenarios", nargs="+", default=[str(s) for s in SCENARIOS], help="of the table; all by default"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--report", action="store_true", help="only write the table of what is done")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "the trusted rows have other shares")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    methods = {m: METHODS[m] for m in dict.fromkeys(["CE", *args.methods])}
    methods |= {f"{OURS} {setting}": changed(setting) for setting in args.set}
    paths = {name: Path(path) if path else None for name, _, path in (given.partition("=") for given in args.data)}
    for name, path in paths.items():
        if not args.report:
            run(name, path, args.seeds, methods, args)
        cells = read([*paths], [*methods], args.scenarios, args.seeds, args.out)
        report(cells, args.out)
    print(markdown(summary(cells)))


if __name__ == "__main__":
    main()
