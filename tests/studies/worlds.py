"""The small worlds: recommendation, sequences without alignment, a policy under noise.

``python tests/studies/worlds.py unkd ctc policy --seeds 0 1 2`` prints means and standard deviations over seeds, each
of which draws its own world. A few minutes a world on one core.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from lightning import Trainer, seed_everything
from torch import nn

from lit_kd import KD, AdversarialKD, Distiller, OracleCTC, UnKD
from lit_kd.data import DataModule, PopularItemsDataModule, SymbolSequencesDataModule
from lit_kd.data.cartpole import BalancingPolicy, CartPoleDataModule, returns
from lit_kd.models.worlds import FrameNet, MatrixFactorisation

Results = Iterator[tuple[str, str, float]]
"""Method, figure and value."""
ADAM = partial(torch.optim.Adam, lr=0.01)
EPOCHS = 20


def fitted(model: Distiller, data: DataModule) -> tuple[nn.Module, dict[str, float]]:
    """The student after the last epoch, and its test metrics."""
    trainer = Trainer(
        max_epochs=EPOCHS, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
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
    results = {"teacher": found, "student alone": fitted(trained(4), data)[1]}
    results["one group"] = fitted(trained(4, teacher, groups=1), data)[1]
    results["UnKD, 4 groups"] = fitted(trained(4, teacher), data)[1]
    for method, metrics in results.items():
        for name, value in metrics.items():
            if "recall" in name or "ndcg" in name:
                yield method, name.removeprefix("test/"), value


def ctc(seed: int) -> Results:
    data = SymbolSequencesDataModule(seed=seed)
    steps = {"num_classes": data.num_classes, "optimizer": ADAM}

    def net(hidden: int, oracle: bool = False) -> FrameNet:
        return FrameNet(data.input_shape[1], data.num_classes, hidden, oracle)

    blind, of_blind = fitted(OracleCTC(net(32), **steps), data)
    oracle, of_oracle = fitted(OracleCTC(net(32, oracle=True), reads_target=True, **steps), data)
    results = {"blind teacher": of_blind, "oracle teacher": of_oracle}
    for name, teacher in (("alone", None), ("of the blind teacher", blind), ("of the oracle", oracle)):
        results[f"student {name}"] = fitted(OracleCTC(net(8), teacher, **steps), data)[1]
    for method, metrics in results.items():
        yield method, "error rate", metrics["test/error_rate"]


def policy(seed: int) -> Results:
    data = CartPoleDataModule(seed=seed)
    options = {
        "num_classes": 2, "input_shape": [4], "weight": 0.5, "temperature": 1.0, "optimizer": ADAM,
    }  # fmt: skip
    policies: dict[str, nn.Module] = {"the policy by hand": BalancingPolicy()}
    policies["KD"] = fitted(KD("mlp-32", BalancingPolicy(), **options), data)[0]
    for epsilon in (0.05, 0.1, 0.3):
        model = AdversarialKD("mlp-32", BalancingPolicy(), epsilon=epsilon, steps=3, **options)
        policies[f"AdversarialKD, epsilon {epsilon}"] = fitted(model, data)[0]
    for method, acts in policies.items():
        for noise in (0, 1, 2, 3, 4):
            yield method, f"noise {noise}", statistics.mean(returns(acts, noise, seed=seed))


WORLDS = {"unkd": unkd, "ctc": ctc, "policy": policy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="+", choices=WORLDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    for world in args.worlds:
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            for method, figure, value in WORLDS[world](seed):
                found[method][figure].append(value)
        columns = list(next(iter(found.values())))
        print(f"| {world} | {' | '.join(columns)} |")
        print("| --- " * (len(columns) + 1) + "|")
        for method, values in found.items():
            cells = [f"{statistics.mean(v):.3g} ± {statistics.stdev(v) if v[1:] else 0:.2g}" for v in values.values()]
            print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
