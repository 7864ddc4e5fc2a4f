"""Sequences: labels against a loop, the sampler against the distribution, losses against closed forms, trainings."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from methods import CLASSES, SHAPE, Blobs, trainer
from torch import Tensor, nn

from lit_kd import ALMKD, GKD, KD, Distiller, OnlineKD, SequenceKD, SpeculativeKD, StepByStep, Supervised
from lit_kd.data import SumsDataModule
from lit_kd.models import build_model, load_student
from lit_kd.models.generate import draw_tokens, next_tokens, respond, response_of, sampler
from lit_kd.models.networks import mlp
from lit_kd.teachers.lora import with_lora
from lit_kd.terms import KL, OnlineTeacher
from lit_kd.types import IGNORED, PENULTIMATE, Batch, Inputs, Outputs

C = SumsDataModule.num_classes
END = SumsDataModule.end


def sums(**options: Any) -> SumsDataModule:
    return SumsDataModule(**{"rows": 120, "batch_size": 16, "meta": 16, "val": 16, "test": 16, "seed": 0} | options)


def net(width: int = 8, seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(f"gru-{width}", C)


def made(kind: Any, **options: Any) -> Any:
    seed_everything(0, verbose=False)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
    return kind(**{"student": net(), "num_classes": C, "optimizer": adam} | options)


def fit(model: Distiller, data: SumsDataModule | None = None, **options: Any) -> Any:
    fitted = trainer(**{"max_epochs": 1} | options)
    fitted.fit(model, data or sums())
    return fitted


def weights(model: Distiller) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.student.parameters()])


def batch() -> Batch:
    data = sums()
    data.setup()
    return data.parts.train_rows(False).__getitems__(list(range(12)))


class TestLabels:
    def test_by_a_loop(self) -> None:
        draw = np.random.default_rng(0)
        ids = draw.integers(4, size=(200, 9))
        response = np.arange(9) >= draw.integers(1, 10, size=(200, 1))
        expected = np.full((200, 9), IGNORED)
        for row, mask, label in zip(ids, response, expected, strict=True):
            for t in range(1, 9):
                if mask[t]:
                    label[t - 1] = row[t]
                    if row[t] == 0:
                        break
        found = next_tokens(torch.from_numpy(ids), torch.from_numpy(response), end=0)
        np.testing.assert_array_equal(found.numpy(), expected)
        reached = expected != IGNORED
        starts = [row.argmax() + 1 if row.any() else 9 for row in reached]
        np.testing.assert_array_equal(response_of(found).numpy(), np.arange(9) >= np.array(starts)[:, None])

    def test_the_first_response_token_is_learned_from_the_last_of_the_prompt(self) -> None:
        """The released script of speculative distillation cuts at the prompt's length without the shift by one."""
        data = sums()
        ids, y = data.batch_of(["1+2="], ["3"], 8)
        z = torch.zeros(1, 8, C, requires_grad=True)
        KL(1.0)(Outputs(z, {}), Outputs(torch.randn(1, 8, C), {}), Batch(ids, y)).sum().backward()
        assert z.grad is not None
        assert z.grad[0].any(-1).nonzero().flatten().tolist() == [3, 4]  # at "=", which tells "3", and at "3", the end

    def test_rows_of_the_data(self) -> None:
        data = sums(wrong=0.3, rows=400)
        data.setup()
        n, texts = data.train_size, {}
        for row in data.parts.train_rows(True):
            texts[int(row.index)] = data.decode(row.x)
            assert next_tokens(row.x.unsqueeze(0), response_of(row.y.unsqueeze(0)), END)[0].equal(row.y)
        right = [eval(text.split("=")[0]) == int(text.split("=")[1][:-1]) for text in texts.values()]
        assert right[n:] == [True] * data.meta_size
        assert right[:n].count(False) == round(0.3 * n)
        assert [not r for r in right] == data.noisy.tolist()
        for part in (data.parts.val, data.parts.test):
            assert all(eval(data.decode(row.x)[:-1].replace("=", "==")) for row in part)
        assert len(set(data.parts.ids)) == 400
        ids, y = data.rationales(torch.tensor([0, n]))
        assert [data.decode(row).split("?")[0] for row in ids] == [data.parts.ids[i] for i in (0, n)]
        assert data.decode(ids[0])[:-1].split("=")[-1][0] == texts[0].split("=")[1][0] or not right[0]
        assert (y != IGNORED).any(1).all()


class TestSampler:
    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.8), (2.0, 0.3)])
    def test_frequencies(self, temperature: float, top_p: float) -> None:
        logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
        p = (logits / temperature).softmax(0).double().numpy()
        order = sorted(range(5), key=lambda i: -p[i])
        few: list[int] = []
        while sum(p[few]) < top_p - 1e-9 and len(few) < 5:
            few.append(order[len(few)])
        expected = np.zeros(5)
        expected[few] = p[few] / p[few].sum()
        uniform = (torch.arange(100_000) + 0.5) / 100_000
        found = draw_tokens(logits.expand(100_000, 5), uniform, temperature, top_p)
        np.testing.assert_allclose(np.bincount(found, minlength=5) / 100_000, expected, atol=1e-4)
        edge = draw_tokens(logits.expand(2, 5), torch.tensor([0.0, 1 - 2**-24]), temperature, top_p)
        assert edge.tolist() == [few[0], few[-1]]

    def test_responses(self) -> None:
        x, y, _ = batch()
        y[3] = IGNORED
        model, uniform = net(), torch.rand(*y.shape, 2)
        ids, labels = respond(x, y, END, sampler(model), uniform)
        for i in range(len(y)):  # token by token, a row at a time
            row = x[i].tolist()
            start = next((t + 1 for t in range(len(row)) if y[i, t] != IGNORED), len(row))
            for t in range(start, len(row)):
                ended = END in row[start:t]
                p = model(torch.tensor([row[:t]]))[0, -1].softmax(-1)
                down = p.argsort(descending=True)
                place = (p[down].cumsum(0) <= uniform[i, t, 0]).sum()
                row[t] = END if ended else int(down[place])
            assert ids[i].tolist() == row  # type: ignore[index]
        assert (labels[3] == IGNORED).all()
        assert not labels.requires_grad

    def test_padding_before_prompts_and_masks(self) -> None:
        x, y, _ = batch()
        given = {"input_ids": F.pad(x, (2, 0)), "attention_mask": F.pad(torch.ones_like(x), (2, 0))}
        given["attention_mask"][:, 8:] = 0
        seen = []

        def logits(x: Inputs) -> Tensor:
            assert isinstance(x, dict)
            seen.append({name: part.clone() for name, part in x.items()})
            return F.one_hot(x["input_ids"] * 0 + 3, C) * 90.0

        made, labels = respond(given, F.pad(y, (2, 0), value=IGNORED), END, sampler(logits), torch.rand(12, 12, 2))
        assert isinstance(made, dict)
        assert (made["input_ids"][F.pad(response_of(y), (2, 0))] == 3).all()
        assert (made["attention_mask"][:, 2:] == 1).all()
        assert (made["attention_mask"][:, :2] == 0).all()
        assert (seen[-1]["attention_mask"][:, 2:] == 1).all()
        assert (labels[:, -2] == 3).all()

    @pytest.mark.parametrize("x", [{"pixels": torch.zeros(2, 3)}, torch.zeros(2, 3)])
    def test_refused(self, x: Any) -> None:
        with pytest.raises(ValueError, match=r"expected tokens as inputs, integers \(B, T\)"):
            respond(x, torch.zeros(2, 3).long(), 0, sampler(net()), torch.rand(2, 3, 2))


def jensen_shannon(z: Tensor, t: Tensor, beta: float) -> Tensor:
    """GKD's eq. 1 by entropies: ``H(m) - beta H(p) - (1 - beta) H(q)``, for each token."""
    p, q = t.softmax(-1), z.softmax(-1)
    entropy = lambda x: -(x * x.log()).sum(-1)  # noqa: E731
    return entropy(beta * p + (1 - beta) * q) - beta * entropy(p) - (1 - beta) * entropy(q)


class TestLosses:
    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_jensen_shannon(self, beta: float) -> None:
        _, y, _ = batch()
        z, t = (torch.randn(*y.shape, C, dtype=torch.float64) for _ in range(2))
        y[2] = IGNORED
        found = KL(1.0, divergence="jensen_shannon", beta=beta)(Outputs(z, {}), Outputs(t, {}), Batch(z, y))
        each, kept = jensen_shannon(z, t, beta), y != IGNORED
        expected = torch.stack([e[k].mean() if k.any() else e.new_zeros(()) for e, k in zip(each, kept, strict=True)])
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        assert found[2] == 0

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_jensen_shannon_is_trls(self, beta: float) -> None:
        trl = pytest.importorskip("trl.experimental.gkd", reason="only where trl is")
        _, y, _ = batch()
        z, t = (torch.randn(*y.shape, C, dtype=torch.float64) for _ in range(2))
        found = KL(1.0, divergence="jensen_shannon", beta=beta)(Outputs(z, {}), Outputs(t, {}), Batch(z, y))
        count = (y != IGNORED).sum(1)
        theirs = trl.GKDTrainer.generalized_jsd_loss(z, t, y, beta=beta)
        torch.testing.assert_close((found * count).sum() / count.sum(), theirs, atol=1e-6, rtol=0)

    def test_arguments_of_the_mixture_are_not_swapped(self) -> None:
        """The speculative script has KL(m || p) in the place of KL(p || m): 0.1388 where the divergence is 0.1235."""
        p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.45, 0.55])
        found = KL(1.0, divergence="jensen_shannon").loss(q.log()[None], p.log()[None], torch.zeros(1))
        m = (p + q) / 2
        swapped = 0.5 * (m * (m / p).log()).sum() + 0.5 * (m * (m / q).log()).sum()
        torch.testing.assert_close(found[0], jensen_shannon(q.log(), p.log(), 0.5))
        assert (found[0] - swapped).abs() > 0.01

    def test_online_gradients(self) -> None:
        """Against autograd on each part alone: the adapter never moves the student, nor the student the adapter."""
        _, y, _ = batch()
        z, t = (torch.randn(*y.shape, C, dtype=torch.float64, requires_grad=True) for _ in range(2))
        y[2, :] = IGNORED
        rows = y[y != IGNORED]
        term = OnlineTeacher()
        term.build(Outputs(z, {}), Outputs(t, {PENULTIMATE: torch.zeros(*y.shape, 4)}))
        term.double()
        loss = term(Outputs(z, {}), Outputs(t, {PENULTIMATE: torch.randn(*y.shape, 4).double()}), Batch(z, y))
        count = (y != IGNORED).sum(1).clamp(min=1)
        own, theirs = torch.autograd.grad((loss * count).sum(), (z, t))
        p, q = t.detach().softmax(-1), z.detach().softmax(-1)
        kept = (y != IGNORED).unsqueeze(-1)
        torch.testing.assert_close(own, (q - p) * kept)  # of KL(p || q)
        hard = torch.zeros_like(p)
        hard[y != IGNORED] = F.one_hot(rows, C).double()
        torch.testing.assert_close(theirs, (2 * p - q - hard) * kept)  # of KL(q || p) and of cross-entropy
        assert loss[2] == 0


METHODS: dict[str, Callable[..., Any]] = {
    "sequence": lambda **o: made(SequenceKD, teacher=net(12, 2), **o),
    "teacher's": lambda **o: made(SequenceKD, teacher=net(12, 2), responses="teacher", **o),
    "gkd": lambda **o: made(GKD, teacher=net(12, 2), **o),
    "speculative": lambda **o: made(SpeculativeKD, teacher=net(12, 2), top_k=3, **o),
    "online": lambda **o: made(OnlineKD, teacher=net(12, 2), **o),
    "lora": lambda **o: made(OnlineKD, teacher=net(12, 2), lora=2, **o),
    "steps": lambda **o: made(StepByStep, **o),
}


@pytest.mark.parametrize("method", METHODS)
def test_trainings(method: str) -> None:
    model = METHODS[method]()
    before = [copy.deepcopy(spec.state_dict()) for spec in model._teacher_specs]
    first, last = fit(model).callback_metrics, fit(METHODS[method](), max_epochs=4).callback_metrics
    assert last["train/loss"] < first["train/loss"]
    assert last["val/nll"].isfinite()
    for spec, old in zip(model._teacher_specs, before, strict=True):
        assert all(spec.state_dict()[name].equal(value) for name, value in old.items())


@pytest.mark.parametrize("method", ["gkd", "speculative", "lora"])
def test_a_resumed_run_draws_the_same(method: str, tmp_path: Any) -> None:
    whole, half, rest = (METHODS[method]() for _ in range(3))
    fit(whole, max_epochs=2)
    fit(half, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    fitted = trainer(max_epochs=2)
    fitted.fit(rest, sums(), ckpt_path=tmp_path / "a.ckpt")
    assert weights(whole).equal(weights(rest))
    assert all(a.equal(b) for a, b in zip(whole.terms.parameters(), rest.terms.parameters(), strict=True))
    assert not weights(whole).equal(weights(half))


def test_no_own_sample_is_supervised_token_kd() -> None:
    models = [
        made(SequenceKD, teacher=net(12, 2), weight=1.0, divergence="jensen_shannon"),
        made(GKD, teacher=net(12, 2), student_share=0.0),
        made(KD, teacher=net(12, 2), weight=1.0, task="tokens", term=KL(1.0, divergence="jensen_shannon")),
    ]
    for model in models:
        fit(model)
    assert weights(models[0]).equal(weights(models[1]))
    assert weights(models[0]).equal(weights(models[2]))


@pytest.mark.parametrize("kind", [GKD, SpeculativeKD])
def test_a_teacher_that_is_the_student_teaches_nothing(kind: Any) -> None:
    model = made(kind, student=net(), teacher=net())
    before = weights(model)
    fit(model, limit_train_batches=1)
    assert model.trainer.callback_metrics["train/loss"].abs() < 1e-6
    assert (weights(model) - before).abs().max() < 1.1e-2  # Adam makes of rounding a step of its rate, at most


def ready(model: Any, **options: Any) -> Any:
    fit(model, limit_train_batches=1, **options)
    return model


def test_speculation() -> None:
    given = batch()
    model = ready(METHODS["speculative"]())
    for k in (0, 3, C):
        model.top_k = k
        draws = torch.rand(*given.y.shape, 2, generator=torch.Generator().manual_seed(5))
        ids, y = respond(given.x, given.y, END, model.next_token(True), draws)
        if k == C:
            own = sampler(model.student, 0.5, 0.5)
            assert ids.equal(respond(given.x, given.y, END, own, draws)[0])  # type: ignore[union-attr, arg-type]
        if k == 0:
            theirs = sampler(model.teacher_logits, 0.2, 0.5)
            expected = respond(given.x, given.y, END, theirs, draws[..., [1, 0]])[0]
            assert ids.equal(expected)  # type: ignore[union-attr, arg-type]
        said = model.teacher_logits(ids)
        seen = 0
        for i, t in (y != IGNORED).nonzero().tolist():
            best = said[i, t].topk(k).indices.tolist()
            kept = bool(model._kept[t + 1][i])
            seen += kept
            assert not kept or int(y[i, t]) in best
        assert seen == {0: 0, C: int((y != IGNORED).sum())}.get(k, seen)


def test_sampling_has_no_gradient_and_no_dropout_and_training_has() -> None:
    """The released speculative script runs the student's training pass inside its block without gradients."""

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop, self.seen = net(), nn.Dropout(0.5), list[tuple[bool, bool]]()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append((self.training, torch.is_grad_enabled()))
            logits: Tensor = self.net(x) + self.drop(torch.zeros(1))
            return logits

    for kind, options in ((GKD, {"student_share": 1.0}), (SpeculativeKD, {})):
        student = Watched()
        ready(made(kind, student=student, teacher=net(12, 2), **options), limit_val_batches=0)
        assert student.seen[-1] == (True, True)
        assert set(student.seen[:-1]) == {(False, False)}
        assert student.net.fc.weight.grad is None or student.training  # type: ignore[union-attr]


def test_adapters_start_as_the_teacher_and_learn() -> None:
    model = METHODS["online"]()
    adapters = []

    def at_start(*_: Any) -> None:
        adapters.append(copy.deepcopy(model.terms.each[0].adapter))

    model.on_train_start = at_start
    fit(model)
    x = torch.randn(5, 12)
    assert (adapters[0](x) == 0).all()
    assert (model.terms.each[0].adapter(x) != 0).any()


class TestLora:
    @pytest.fixture
    def teacher(self) -> Any:
        hub = pytest.importorskip("transformers")
        small = {"vocab_size": C, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.5}
        return hub.GPT2LMHeadModel(hub.GPT2Config(**small, bos_token_id=END, eos_token_id=END))

    def test_the_teacher_stays_and_its_adapters_learn(self, teacher: Any, tmp_path: Any) -> None:
        old = copy.deepcopy(teacher.state_dict())
        model, started = made(OnlineKD, student="gru-8", teacher=teacher, lora=2), []
        x = batch().x

        def at_start(*_: Any) -> None:
            with torch.no_grad():
                started.append((model.ask(batch())[0].logits, model.teachers(batch())[0].logits))
            started.append([p.detach().clone() for p in model.terms.each[0].adapter])

        model.on_train_start = at_start
        fit(model).save_checkpoint(tmp_path / "a.ckpt")
        torch.testing.assert_close(*started[0], atol=0, rtol=0)
        adapter = model.terms.each[0].adapter
        assert len(adapter) == 8  # two of each of the four layers
        assert not any(p.equal(before) for p, before in zip(adapter, started[1], strict=True))
        assert teacher.state_dict().keys() == old.keys()
        assert all(value.equal(old[name]) for name, value in teacher.state_dict().items())
        with torch.no_grad():
            assert not model._adapted[0](x).logits.equal(teacher(x).logits)

        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
        for k, parameter in enumerate(adapter):
            assert saved[f"terms.each.0.adapter.{k}"].equal(parameter)
        assert {name.split(".")[0] for name in saved} == {"student", "terms"}
        assert load_student(tmp_path / "a.ckpt").state_dict().keys() == net().state_dict().keys()

    def test_its_answers_are_those_of_low_rank_sums(self) -> None:
        """``W + B A`` in the place of each W, put together by hand."""
        teacher, base = mlp(16, [8], CLASSES), {"num_classes": CLASSES, "input_shape": list(SHAPE)}
        model = made(OnlineKD, student="mlp-4", teacher=teacher, lora=2, task="classification", **base)
        trainer(max_epochs=1).fit(model, Blobs())
        by_hand, adapter = copy.deepcopy(teacher), list(model.terms.each[0].adapter)
        layers = [part for part in by_hand.modules() if isinstance(part, nn.Linear)]
        with torch.no_grad():
            for layer, a, b in zip(layers, adapter[::2], adapter[1::2], strict=True):
                assert b.any()
                layer.weight += b @ a
            x = torch.randn(7, *SHAPE)
            torch.testing.assert_close(model._adapted[0](x), by_hand(x))

    def test_layers_that_are_read_past_get_none_whatever_their_names(self) -> None:
        """torch's attention reads the weights of its out_proj; another layer has that name, too."""

        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention, self.out_proj = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        adapted, adapter = with_lora(Named(), 2)
        assert len(adapter) == 2
        assert {name.split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad and "lora" in name} == {
            "out_proj"
        }

    def test_the_copy_follows_dtype_and_buffers(self) -> None:
        """As it follows to a device: buffers are the copy's own."""
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
        base = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
        model = made(OnlineKD, student="mlp-4", teacher=teacher, lora=2, task="classification", **base)
        trainer(max_epochs=1, precision="64-true").fit(model, Blobs())
        [copied] = model._adapted
        assert {t.dtype for t in copied.state_dict().values()} == {torch.float64, torch.int64}
        own = {id(p) for p in model.teachers.models[0].parameters()}
        assert len(own & {id(p) for p in copied.parameters()}) == 6

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"lora": 0}, "expected as lora a rank from 1, found 0"),
            ({"lora": 2, "teacher_cache": "memory"}, "expected neither teacher_cache nor teacher_precision with lora"),
            ({"lora": 2, "teacher_precision": "bf16"}, "nor teacher_precision with lora"),
            (
                {"lora": 2, "teacher": nn.Embedding(C, C)},
                "linear layers inside it and no adapters.* found Embedding",
            ),
        ],
    )
    def test_refused(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            fit(made(OnlineKD, **{"teacher": net(12, 2)} | options))

    def test_adapters_twice(self, teacher: Any) -> None:
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(teacher, peft.LoraConfig(r=2))
        with pytest.raises(ValueError, match="found PeftModel: merge_and_unload"):
            fit(made(OnlineKD, teacher=adapted, lora=2))

    def test_without_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"LoRA needs peft, which is not installed: pip install 'lit_kd\[hf\]'"):
            made(OnlineKD, teacher=net(), lora=2)


def test_steps_are_a_weighted_sum() -> None:
    whole = ready(made(StepByStep, label_share=0.3))
    given = batch()
    made_batch = whole.prepare_batch(given)
    student = Outputs(whole.student(made_batch.x), {})
    losses, _ = whole.terms(student, [], made_batch)
    total = (whole.weigh(student, [], made_batch)[:, 0] * losses[0]).mean()
    parts = []
    ways = whole.data.rationales(given.index)
    for x, y in ((given.x, given.y), ways):
        z = whole.student(x)
        rows = [F.cross_entropy(z[i], y[i], ignore_index=IGNORED) for i in range(len(y))]
        parts.append(torch.stack(rows).mean())
    torch.testing.assert_close(total, 0.3 * parts[0] + 0.7 * parts[1])


def test_all_labels_are_plain_training() -> None:
    alone, both = made(Supervised, task="tokens"), made(StepByStep, label_share=1.0)
    for model in (alone, both):
        fit(model)
    torch.testing.assert_close(weights(alone), weights(both), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rule", "gradient"), [("paper", "exact"), ("amal", "central")])
def test_weights_of_sequences(rule: str, gradient: str) -> None:
    model = made(ALMKD, task="tokens", teacher=net(12, 2), rule=rule, meta_gradient=gradient)
    fit(model, sums(wrong=0.5), max_epochs=3)
    found = model.table["weights"][: model.data.train_size]
    assert found.shape[1] == 2
    assert found.isfinite().all()


def test_answers_are_cached_where_responses_are_the_datas() -> None:
    plain, cached = (METHODS["sequence"](teacher_cache=cache) for cache in (None, "memory"))
    for model in (plain, cached):
        fit(model, max_epochs=2)
    torch.testing.assert_close(weights(plain), weights(cached))


class TestHuggingFace:
    @pytest.fixture
    def language_model(self) -> Any:
        hub = pytest.importorskip("transformers")
        small = {"vocab_size": C, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
        return hub.GPT2Config(**small, bos_token_id=END, eos_token_id=END)

    def test_language_models_teach_and_learn(self, language_model: Any, tmp_path: Any) -> None:
        language_model.save_pretrained(tmp_path)
        name = f"hf-causal/{tmp_path}"
        model = made(GKD, student=name, teacher=name, student_share=1.0)
        fit(model, limit_train_batches=2, limit_val_batches=1)
        assert type(model.student).__name__ == "GPT2LMHeadModel"
        with pytest.raises(ValueError, match=f"expected a vocabulary of num_classes=9 tokens, found {C}"):
            build_model(name, 9)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: made(SequenceKD, teacher=net(), temperature=0.0), "temperature above 0"),
        (lambda: made(SequenceKD, teacher=net(), responses="student"), "expected as responses one of"),
        (lambda: made(GKD, teacher=net(), student_share=1.5), r"expected student_share in \[0, 1\]"),
        (lambda: made(GKD, teacher=net(), top_p=0.0), r"top_p in \(0, 1\] to sample with, found 1.0 and 0.0"),
        (lambda: made(SpeculativeKD, teacher=net(), top_k=-1), "expected top_k of at least 0, found -1"),
        (lambda: made(StepByStep, label_share=-1.0), r"expected label_share in \[0, 1\]"),
        (lambda: made(OnlineKD, teacher=net(), width=0), "expected a width from 1"),
        (lambda: fit(made(GKD, teacher=[net(8, 3), net(8, 4)])), "expected one teacher where responses are sampled"),
        (lambda: fit(made(GKD, teacher=net(8, 3), end=99)), "expected as end the token that ends a response, found 99"),
        (lambda: fit(made(GKD, teacher=net(8, 3), teacher_cache="memory")), "expected no teacher_cache"),
        (lambda: sums(wrong=2.0), r"expected wrong in \[0, 1\]"),
        (lambda: sums(digits=1, rows=101), "at most 100"),
    ],
)
def test_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
