"""MixKD of tokens: a linear network's closed form, KD where nothing is mixed, and a training of two BERTs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from methods import trainer
from torch import Tensor, nn
from torch.distributions import Beta
from torch.utils.data import DataLoader

from lit_kd import KD, MixKD
from lit_kd.types import Batch

C, V, T = 3, 11, 5


class Linear(nn.Module):
    """Logits that are linear in the embeddings of the tokens, without and with a mask."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(V, width), nn.Linear(width, C)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        embedded = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        kept = torch.ones(embedded.shape[:2]) if attention_mask is None else attention_mask
        logits: Tensor = self.head((embedded * kept.unsqueeze(-1)).mean(1))
        return logits


def tokens(mask: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(4)
    x = {"input_ids": torch.randint(V, (8, T), generator=draw)}
    if mask:
        x["attention_mask"] = (torch.arange(T) < torch.randint(2, T + 1, (8, 1), generator=draw)).long()
    return Batch(x, torch.randint(C, (8,), generator=draw))


def ready(model: Any, batch: Batch) -> Any:
    seed_everything(1, verbose=False)
    trainer(max_epochs=0).fit(model, DataLoader([0]))  # which sets it up
    model.trainer.training = True
    model.log = lambda *args, **kwargs: None
    return model


@pytest.mark.parametrize("alone", [True, False])
def test_a_linear_network_gives_mixed_logits(alone: bool) -> None:
    """Student and teachers embed in 4, 6 and 7 numbers, and mix by the same shares and partners."""
    given = tokens(mask=False)
    assert isinstance(given.x, dict)
    given = given._replace(x=given.x["input_ids"]) if alone else given
    model = ready(MixKD(Linear(4, 0), [Linear(6, 1), Linear(7, 2)], alpha=0.7, num_classes=C), given)
    made = model.prepare_batch(given)
    student, teachers = model.outputs(made)
    share, j = made.share.unsqueeze(1), made.partner
    assert (share > 0).all()
    assert not j.equal(torch.arange(8))
    for found, net in zip([student, *teachers], [model.student, *model.teachers.models], strict=True):
        z = net(given.x) if alone else net(**given.x)
        torch.testing.assert_close(found.logits, torch.cat([z, share * z + (1 - share) * z[j]]))
    hard = F.one_hot(given.y, C).float()
    torch.testing.assert_close(made.y, torch.cat([hard, share * hard + (1 - share) * hard[j]]))


def test_both_rows_are_attended_to() -> None:
    given = tokens()
    assert isinstance(given.x, dict)
    model = ready(MixKD(Linear(4, 0), Linear(6, 1), num_classes=C), given)
    made = model.prepare_batch(given)
    mask = given.x["attention_mask"]
    assert made.mixture(model.student)["attention_mask"].equal(mask | mask[made.partner])


def bert(width: int, seed: int) -> Any:
    hub = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": T}
    config = hub.BertConfig(vocab_size=V, hidden_size=width, num_labels=C, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return hub.BertForSequenceClassification(config).eval()  # without dropout


def test_shares_of_1_are_kd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows have padding, and where networks have other widths."""
    monkeypatch.setattr(Beta, "sample", lambda self, shape: torch.ones(shape))
    given, losses, grads = tokens(), [], []
    for kind in (KD, MixKD):
        model = ready(kind(bert(8, 0), bert(12, 1), num_classes=C), given)
        model.student.eval()
        loss = model.training_step(given, 0)
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.student.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


def test_two_berts_train() -> None:
    given = tokens()
    assert isinstance(given.x, dict)
    rows = [{**{name: x[i] for name, x in given.x.items()}, "labels": given.y[i]} for i in range(8)]
    loss, adam = [], partial(torch.optim.Adam, lr=0.01)
    for epochs in (1, 30):
        seed_everything(0, verbose=False)
        model = MixKD(bert(8, 0), bert(12, 1), num_classes=C, weight=0.5, optimizer=adam)
        before = model.student.get_input_embeddings().weight.detach().clone()
        fitted = trainer(max_epochs=epochs)
        fitted.fit(model, *[DataLoader(rows, batch_size=4)] * 2)
        loss.append(float(fitted.callback_metrics["train/loss"]))
        assert not model.student.get_input_embeddings().weight.equal(before)
    assert loss[1] < 0.9 * loss[0]


def test_networks_without_embeddings_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(V, 4), nn.Flatten(), nn.Linear(4 * T, C))
    given = tokens()
    assert isinstance(given.x, dict)
    model = ready(MixKD(net, Linear(4, 0), num_classes=C), given)
    with pytest.raises(ValueError, match=r"get_input_embeddings\(\) makes of tokens, found Sequential"):
        model.training_step(given._replace(x=given.x["input_ids"]), 0)
