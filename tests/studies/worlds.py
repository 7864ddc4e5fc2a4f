"""The small worlds: recommendation, sequences without alignment, a policy under noise.

python tests/studies/worlds.py

keeps what each world found under each seed in ``results/worlds.json``, goes on where it stopped, and makes the tables
of it, ``results/worlds.md``. Each seed draws its own world. A few minutes a world on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from torch import nn

from lit_kd import KD, AdversarialKD, Distiller, OracleCTC, UnKD
from lit_kd.data import DataModule, PopularItemsDataModule, SymbolSequencesDataModule
from lit_kd.data.cartpole import BalancingPolicy, CartPoleDataModule, returns
from lit_kd.methods.oracle_ctc import SymbolErrorRate
from lit_kd.models.files import write_whole
from lit_kd.models.worlds import FrameNet, MatrixFactorisation

Results = Iterator[tuple[str, str, float]]
"""Method, figure and value."""
ADAM = partial(torch.optim.Adam, lr=0.01)
EPOCHS = 20


def fitted(model: Distiller, data: DataModule, epochs: int = EPOCHS) -> tuple[nn.Module, dict[str, float]]:
    """The student after the last epoch, and its test metrics."""
    trainer = Trainer(
        max_epochs=epochs, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    return model.student.eval(), trainer.test(model, data, verbose=False)[0]


def unkd(seed: int) -> Results:
    data = PopularItemsDataModule(seed=seed)
    users, items = data.users, data.num_classes

    def trained(features: int, teacher: nn.Module | None = None, groups: int = 4) -> Distiller:
        student = MatrixFactorisation(users, items, features)
        return UnKD(student, teacher, num_classes=items, groups=groups, optimizer=ADAM)

    teacher, found = fitted(trained(32), data)
    results = {"the teacher": found, "student, BPR alone": fitted(trained(4), data)[1]}
    results["ranking distillation (`groups: 1`)"] = fitted(trained(4, teacher, groups=1), data)[1]
    results["`UnKD`, 4 groups"] = fitted(trained(4, teacher), data)[1]
    for method, metrics in results.items():
        for kind, name in (("recall at 10", "recall"), ("NDCG at 10", "ndcg")):
            for part in ("", *(f"_group_{number}" for number in range(4))):
                yield method, f"{kind}: {part.strip('_').replace('_', ' ') or 'all'}", metrics[f"test/{name}{part}"]


NOISY = {"sequences": 4000, "spread": 0.6, "batch_size": 128}
SEQUENCES: dict[str, tuple[dict[str, Any], int]] = {
    "symbol errors": ({}, EPOCHS),
    "symbol errors, more data and noise": (NOISY, EPOCHS),
    "symbol errors, more data and noise, 7 epochs": (NOISY, 7),
}
"""Options of the data, and epochs, by kind of figure."""


def ctc(seed: int) -> Results:
    for kind, (options, epochs) in SEQUENCES.items():
        data = SymbolSequencesDataModule(**options, seed=seed)
        for method, network in listeners(data, epochs).items():
            for part, rows in (("test rows", data.parts.test), ("training rows", data.parts.train_rows(False))):
                batch, errors = rows.__getitems__(list(range(400))), SymbolErrorRate()
                with torch.no_grad():
                    errors.update(network(batch.x, batch.y), batch.y)
                yield method, f"{kind}: {part}", float(errors.compute())


def listeners(data: SymbolSequencesDataModule, epochs: int) -> dict[str, nn.Module]:
    steps = {"num_classes": data.num_classes, "optimizer": ADAM}

    def net(hidden: int, oracle: bool = False) -> FrameNet:
        return FrameNet(data.input_shape[1], data.num_classes, hidden, oracle)

    blind = fitted(OracleCTC(net(32), **steps), data, epochs)[0]
    oracle = fitted(OracleCTC(net(32, oracle=True), reads_target=True, **steps), data, epochs)[0]
    found = {"blind teacher, width 32": blind, "oracle teacher, width 32, which reads the target": oracle}
    for name, teacher in (("CTC alone", None), ("of the blind teacher", blind), ("of the oracle", oracle)):
        found[f"student, width 8, {name}"] = fitted(OracleCTC(net(8), teacher, **steps), data, epochs)[0]
    return found


def policy(seed: int) -> Results:
    data = CartPoleDataModule(seed=seed)
    options = {
        "num_classes": 2, "input_shape": [4], "weight": 0.5, "temperature": 1.0, "optimizer": ADAM,
    }  # fmt: skip
    policies: dict[str, nn.Module] = {"the policy by hand": BalancingPolicy()}
    policies["`KD`"] = fitted(KD("mlp-32", BalancingPolicy(), **options), data)[0]
    for epsilon in (0.05, 0.1, 0.3):
        model = AdversarialKD("mlp-32", BalancingPolicy(), epsilon=epsilon, steps=3, **options)
        policies[f"`AdversarialKD`, epsilon {epsilon}"] = fitted(model, data)[0]
    for method, acts in policies.items():
        for noise in (0, 1, 2, 3, 4):
            yield method, f"return: noise {noise}", statistics.mean(returns(acts, noise, seed=seed))


WORLDS = {"unkd": unkd, "ctc": ctc, "policy": policy}
SEEDS = {"unkd": [0, 1, 2], "ctc": [0, 1, 2], "policy": [3, 4, 5]}
"""That are reported; options of the policy were chosen with seed 0."""


def tables(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Means and standard deviations over seeds, a table for each world and kind of figure, as markdown."""
    lines = []
    for world in WORLDS:
        seeds = sorted(int(key.split()[1]) for key in found if key.split()[0] == world)
        runs = [found[f"{world} {seed}"] for seed in seeds]
        figures = [figure.split(": ") for figure in next(iter(runs[0].values()))] if runs else []
        for kind in dict.fromkeys(kind for kind, _ in figures):
            columns = [column for of, column in figures if of == kind]
            lines += [f"{world}, seeds {', '.join(map(str, seeds))}\n", f"| {kind} | {' | '.join(columns)} |"]
            lines += ["| --- " * (len(columns) + 1) + "|"]
            for method in runs[0]:
                values = [[run[method][f"{kind}: {column}"] for run in runs] for column in columns]
                spread = [f" ± {statistics.stdev(v):.2g}" if v[1:] else "" for v in values]
                cells = [f"{statistics.mean(v):.3g}{one}" for v, one in zip(values, spread, strict=True)]
                lines.append(f"| {method} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Try what is not done, then make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", default=list(WORLDS), help=f"among {', '.join(WORLDS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"(default: {SEEDS})")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "worlds.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for world in args.worlds:
        for seed in args.seeds or SEEDS[world]:
            if f"{world} {seed}" in found:
                continue
            seed_everything(seed, verbose=False)
            values: dict[str, dict[str, float]] = defaultdict(dict)
            for method, figure, value in WORLDS[world](seed):
                values[method][figure] = round(value, 4)
            found[f"{world} {seed}"] = values
            write_whole(args.output, json.dumps(found, indent=1) + "\n")
            print(world, seed, dict(values), flush=True)
    write_whole(args.output.with_suffix(".md"), tables(found))


if __name__ == "__main__":
    main()
