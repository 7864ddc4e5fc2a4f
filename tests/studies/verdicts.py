"""Predicted against realised gains of a teacher: how far the verdict of ``lit-kd trust`` can be believed.

    python tests/studies/verdicts.py --fit digits pendigits=pendigits.csv --report mnist=mnist_5k.csv.gz \
        letter=letter-recognition.data

What is told before any training is fitted to what students gained on the data sets and seeds of ``--fit``, and the
table shows how it fares on those of ``--report``. Students are trained as in trust.py: perceptrons with 32 hidden
units, 30 epochs, all with the trusted rows. Results are kept seed by seed: run again to go on.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scenarios import SCENARIOS, Data, Experiment, build, load
from sklearn.linear_model import QuantileRegressor
from students import METHODS, Method, Runs

from lit_kd.data.seeds import derive_seed
from lit_kd.trust.teachers import Interval, repeated_share
from lit_kd.trust.verdict import LAWS, LITTLE, Law, Rehearsal, Way, clues, decide, predicted, rehearse

KINDS = ("sym40", "pair30", "inst30", "clean")
OTHERS = (
    *("sym75, same labels", "sym75, strong", "sym20, weak", "sym60, wrong on a quarter"),
    *("sym40, 50 meta rows", "clean, 50 meta rows", "sym40, long tail", "clean, second domain"),
)
CHOSEN = [s for s in SCENARIOS if (s.noise in KINDS and not s.shift) or str(s) in OTHERS]
STUDENTS = {"labels": "CE", "distil": "KD 0.9", "learned weights": "robust"}


class Cell(NamedTuple):
    """A scenario and a seed."""

    data: str
    seed: str
    scenario: str
    told: Rehearsal
    also: dict[str, Any]  # what else was found
    gains: dict[Way, float]  # realised


def trusted_alone(e: Experiment) -> Experiment:
    """An experiment with the trusted rows only, as often as makes as many updates."""
    times = -(-len(e.y) // (len(e.y) - e.rows))
    x, y, true, said = (part[e.rows :].repeat(times, *[1] * (part.dim() - 1)) for part in (e.x, e.y, e.true, e.teacher))
    return Experiment(e.scenario, e.seed, x, y, true, len(y), said, e.val, e.teacher_val)


def accuracies(runs: Runs, method: Method) -> list[float]:
    """Test accuracies at the last epoch, one an experiment."""
    method.begin(runs)
    logits = runs.train(method).forward(runs.data.test_x.expand(len(runs.experiments), -1, -1))[1]
    return (logits.argmax(-1) == runs.data.test_y).float().mean(1).tolist()


def realised(data: Data, experiments: list[Experiment]) -> list[dict[str, float]]:
    """By experiment: the accuracy of each student."""
    runs = Runs(data, experiments)
    found = {name: accuracies(runs, METHODS[m]()) for name, m in STUDENTS.items()}
    found["trusted rows"] = accuracies(Runs(data, [trusted_alone(e) for e in experiments]), Method())
    return [{name: round(values[i], 4) for name, values in found.items()} for i in range(len(experiments))]


def told(data: Data, e: Experiment) -> dict[str, Any]:
    """What is known before any training, and the true share of wrong labels."""
    x, y = torch.cat([e.x, e.val[0]]), torch.cat([e.y, e.val[1]])
    said = torch.cat([e.teacher, e.teacher_val]).softmax(-1)
    found = rehearse(x, y, torch.arange(len(y)) >= e.rows, said, derive_seed(e.seed, "probe"))
    right = (said.argmax(1) == y)[e.rows :].float().mean()
    wrong = (e.y != e.true)[: e.rows]
    repeats = said.argmax(1)[: e.rows] == e.y[: e.rows]
    return found._asdict() | {
        "teacher": float(right),
        "agreed": float(repeats.float().mean()),
        "truly wrong": float(wrong.float().mean()),
        "truly repeated": float(repeats[wrong].float().mean()) if wrong.any() else None,
    }


def run(name: str, path: Path | None, seeds: list[int], out: Path) -> None:
    """Measure what is missing of a data set, by seed and scenario."""
    file = out / f"verdicts_{name}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    data = load(name, path)
    for seed in seeds:
        of_seed = known.setdefault(str(seed), {})
        if "told" in of_seed and "realised" in of_seed:
            continue
        experiments = [build(data, s, seed) for s in CHOSEN]
        for part in ("told", "realised"):
            if part in of_seed:
                continue
            found = realised(data, experiments) if part == "realised" else [told(data, e) for e in experiments]
            of_seed[part] = {str(e.scenario): one for e, one in zip(experiments, found, strict=True)}
            file.with_suffix(".part").write_text(json.dumps(known))
            file.with_suffix(".part").replace(file)
            print(name, seed, part, flush=True)


def read(names: list[str], seeds: list[int], out: Path) -> list[Cell]:
    """The cells that are done."""
    cells = []
    for name in names:
        file = out / f"verdicts_{name}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        for seed in map(str, seeds):
            of_seed = known.get(seed, {})
            if {"told", "realised"} <= of_seed.keys():
                for scenario, found in of_seed["told"].items():
                    accuracy = of_seed["realised"][scenario]
                    gains = {way: accuracy[way] - accuracy["labels"] for way in LAWS}
                    rehearsed = Rehearsal(*(found[field] for field in Rehearsal._fields))
                    rehearsed = rehearsed._replace(wrong=Interval(*rehearsed.wrong))
                    cells.append(Cell(name, seed, scenario, rehearsed, found, gains))
    if not cells:
        raise SystemExit(f"expected in {out} a seed that is done, found none: run without --only")
    return cells


def law(way: Way, cells: list[Cell]) -> Law:
    """Three quantile regressions."""
    x = np.array([clues(way, cell.told)[0] for cell in cells])
    y = np.array([cell.gains[way] for cell in cells])
    fits = [QuantileRegressor(quantile=q, alpha=0).fit(x, y) for q in (0.5, 0.05, 0.95)]
    return Law(*(tuple(round(float(v), 3) for v in (fit.intercept_, *fit.coef_)) for fit in fits))


def right(advice: str, gains: dict[Way, float]) -> bool:
    """Whether an advice was good: what is advised gained, or nothing gained a point."""
    if advice == "labels":
        return max(gains["distil"], gains["learned weights"]) < LITTLE
    return gains[advice] > 0  # type: ignore[index]


def table(cells: list[Cell]) -> str:
    """Predicted against realised, as markdown."""
    lines = [
        "| way | data | cells | correlation | slope | mean error | RMSE | in the 90% interval |",
        "| --- " * 8 + "|",
    ]
    groups = [[name] for name in dict.fromkeys(cell.data for cell in cells)]
    groups += [[name for [name] in groups]] if len(groups) > 1 else []
    for way in LAWS:
        for group in groups:
            some = [cell for cell in cells if cell.data in group]
            told = [predicted(way, cell.told)[0] for cell in some]
            guess, gain = np.array([t.estimate for t in told]), np.array([cell.gains[way] for cell in some])
            inside = np.mean([t.low <= g <= t.high for t, g in zip(told, gain, strict=True)])
            values = np.corrcoef(guess, gain)[0, 1], np.polyfit(guess, gain, 1)[0]
            errors = 100 * (guess - gain).mean(), 100 * np.sqrt(((guess - gain) ** 2).mean())
            lines.append(
                f"| {way} | {', '.join(group)} | {len(some)} | {values[0]:.2f} | {values[1]:.2f} | {errors[0]:+.1f} "
                f"| {errors[1]:.1f} | {100 * inside:.0f}% |"
            )
    lines += ["", "| advice | cells | right | distil | learned weights | trusted rows | worst of what is advised |"]
    lines.append("| --- " * 7 + "|")
    by_advice: dict[str, list[Cell]] = {}
    for cell in cells:
        by_advice.setdefault(decide(cell.told).advice, []).append(cell)
    for advice, some in sorted(by_advice.items()):
        gains = [f"{100 * np.mean([cell.gains[way] for cell in some]):+.1f}" for way in LAWS]
        good, worst = "", ""
        if advice in ("labels", *LAWS):
            good = f"{100 * np.mean([right(advice, cell.gains) for cell in some]):.0f}%"
            worst = f"{100 * min(cell.gains.get(advice, 0.0) for cell in some):+.1f}"  # type: ignore[call-overload]
        lines.append(f"| {advice} | {len(some)} | {good} | {' | '.join(gains)} | {worst} |")
    wrong = [(cell.told.wrong, cell.also["truly wrong"]) for cell in cells]
    errors = [abs(w.estimate - true) for w, true in wrong if w.estimate == w.estimate]
    inside = np.mean([w.low - 1e-9 <= true <= w.high + 1e-9 for w, true in wrong])
    lines += [
        "",
        f"Share of wrong labels: mean error {100 * np.mean(errors):.1f} points, in the interval {inside:.0%}.",
    ]
    noisy = [cell for cell in cells if cell.also["truly repeated"] is not None]
    bounds = [repeated_share(c.also["agreed"], c.also["teacher"], c.told.wrong.estimate) for c in noisy]
    inside = np.mean([b.low <= c.also["truly repeated"] <= b.high for b, c in zip(bounds, noisy, strict=True)])
    errors = [abs(b.estimate - c.also["truly repeated"]) for b, c in zip(bounds, noisy, strict=True) if b.estimate >= 0]
    lines.append(f"Wrong labels repeated: mean error {100 * np.mean(errors):.1f} points, in the interval {inside:.0%}.")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """See the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", nargs="+", default=["digits"], metavar="NAME=PATH", help="as --data of trust.py")
    parser.add_argument("--report", nargs="+", default=[], metavar="NAME=PATH", help="others")
    parser.add_argument("--fit_seeds", nargs="+", type=int, default=[400, 401, 402])
    parser.add_argument("--report_seeds", nargs="+", type=int, default=[410, 411])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", action="store_true", help="train nothing: only fit, and write the table")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "the trusted rows have other shares")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    text = ""
    for part, seeds in (("fit", args.fit_seeds), ("report", args.report_seeds)):
        paths = {name: Path(path) if path else None for name, _, path in (g.partition("=") for g in vars(args)[part])}
        for name, path in paths.items() if not args.only else ():
            run(name, path, seeds, args.out)
        if paths:
            cells = read([*paths], seeds, args.out)
            text += f"## {part}: {', '.join(paths)}\n\n{table(cells)}\n"
            if part == "fit":
                print("LAWS:", *(f'    "{way}": {law(way, cells)},' for way in LAWS), sep="\n")
    (args.out / "verdicts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
