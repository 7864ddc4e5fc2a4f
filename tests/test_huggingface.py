"""A text classifier of Hugging Face, as its users have it: three lines for KD, four for ALM-KD."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningModule
from methods import trainer
from torch import nn

PROJECT = """
import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(**sizes):
    config = BertConfig(vocab_size=40, max_position_embeddings=12, num_labels=4, **(SIZES | sizes))
    return BertForSequenceClassification(config)


class Reviews(LightningDataModule):
    "Sentences of 12 tokens; most of a class's tokens come from its own ten of 40 words."

    def setup(self, stage):
        draw = torch.Generator().manual_seed(0)
        truth = torch.arange(400) % 4
        own = torch.randint(10, (400, 12), generator=draw) + 10 * truth[:, None]
        anything = torch.randint(40, (400, 12), generator=draw)
        tokens = torch.where(torch.rand(400, 12, generator=draw) < 0.5, own, anything)
        mask = (torch.arange(12) < torch.randint(8, 13, (400, 1), generator=draw)).long()
        wrong = torch.rand(400, generator=draw) < 0.4
        labels = torch.where(wrong & (torch.arange(400) < 240), torch.randint(4, (400,), generator=draw), truth)
        rows = [
            {"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(tokens, mask, labels, strict=True)
        ]
        self.train, self.val, self.test = rows[:240], rows[240:320], rows[320:]

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=40)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=40)


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def test_step(self, batch, batch_idx):
        right = self.net(**batch).logits.argmax(1) == batch["labels"]
        self.log("test/accuracy", right.float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(trainer, teacher):
    model = Classifier(bert())
    data = Reviews()
    trainer.fit(model, data)
    return model, trainer.test(model, data, verbose=False)
"""
ADAMW = "optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3)"
IMPORT, MODEL, DATA = "import torch", "    model = Classifier(bert())", "    data = Reviews()"
TO_KD = {
    IMPORT: f"{IMPORT}\nfrom lit_kd import KD",
    MODEL: f"    model = KD(bert(), teacher, num_classes=4, {ADAMW})",
}
TO_ALMKD = {
    IMPORT: f"{IMPORT}\nfrom lit_kd import ALMKD\nfrom lit_kd.data import DistillationDataModule",
    MODEL: f"    model = ALMKD(bert(), teacher, num_classes=4, {ADAMW})",
    DATA: "    data = DistillationDataModule(Reviews())",
}
TO_LORA = {
    IMPORT: f"{IMPORT}\nfrom peft import LoraConfig, get_peft_model\nfrom lit_kd import KD",
    MODEL: f"""    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4)
    model = KD(get_peft_model(bert(), lora), teacher, num_classes=4, {ADAMW.replace("2e-3", "1e-2")})""",
}


def run(changes: dict[str, str], teacher: nn.Module | None = None, epochs: int = 12) -> tuple[LightningModule, float]:
    """The project with some of its lines changed."""
    lines, space = PROJECT.splitlines(), {"TEACHER": teacher}
    assert all(lines.count(line) == 1 for line in changes)
    exec("\n".join(changes.get(line, line) for line in lines), space)
    torch.manual_seed(0)
    model, [tested] = space["main"](trainer(max_epochs=epochs), teacher)
    return model, tested["test/accuracy"]


def changed(changes: dict[str, str]) -> int:
    new = "\n".join(changes.values()).splitlines()
    return len([line for line in new if line not in PROJECT.splitlines()])


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """What the project trained before."""
    model, _ = run({})
    net: nn.Module = model.net
    return net


@pytest.mark.parametrize(("changes", "most"), [(TO_KD, 3), (TO_ALMKD, 4)], ids=["kd", "almkd"])
def test_a_few_changed_lines(changes: dict[str, str], most: int, teacher: nn.Module) -> None:
    assert changed(changes) <= most
    model, accuracy = run(changes, teacher)
    assert accuracy > 0.6
    if model.table is not None:
        assert model.table["weights"].shape == (240 + 40, 2)  # type: ignore[index]


def test_a_student_that_is_adapted_by_lora(teacher: nn.Module) -> None:
    model, accuracy = run(TO_LORA, teacher, epochs=12)
    learning = {name for name, p in model.student.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    assert learning
    assert all("lora" in name or "classifier" in name for name in learning)
    assert accuracy > 0.25


TO_MIXIN = {
    IMPORT: f"{IMPORT}\nfrom lit_kd import ALMKD, Distilled\nfrom lit_kd.data import DistillationDataModule",
    "class Classifier(LightningModule):": """class Classifier(Distilled, LightningModule):
    def configure_distillation(self):
        return ALMKD(self.net, TEACHER, num_classes=4)
""",
    "        return self.net(**batch).loss": """        logits = self.net(**batch).logits
        return self.distillation(logits, batch).mean()""",
    DATA: "    data = DistillationDataModule(Reviews())",
}


def test_a_module_of_their_own(teacher: nn.Module) -> None:
    """Its steps see the mappings that the data give."""
    model, accuracy = run(TO_MIXIN, teacher)
    assert accuracy > 0.6
    assert model.distiller.table["weights"].shape == (240 + 40, 2)  # type: ignore[union-attr]
