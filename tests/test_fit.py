"""fit(): what a step learns, which parameters are kept, and how a training ends badly."""

import math
from dataclasses import dataclass

import pytest
import torch
from fitting import SPEC, Scripted, data, same, spec, state, tiny_model
from tiny import FAMILIES, windows
from torch import nn

from distaya_ext.train import events, plot
from distaya_ext.train.data import IGNORED, TrainingData
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import fit
from distaya_ext.train.head import chunked_logits, final_hidden, head_logits
from distaya_ext.train.loop import Loop, precision


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the trainings here; draw() is the real one."""
    monkeypatch.setattr(plot, "plot_losses", lambda *_: [])


draw = plot.plot_losses


def ragged() -> TrainingData:
    """Rows of different length, of whose tokens some are not learnt."""
    whole, _ = data(8)
    mask = torch.arange(24) < torch.tensor([24, 5, 17, 9, 24, 12, 3, 20])[:, None]
    labels = torch.where(mask & (torch.arange(24) % 3 > 0), whole.ids, IGNORED)
    return TrainingData(whole.ids * mask, labels, mask, whole.languages)


# ---- a step ----


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_in_chunks_are_the_models_own(family):
    model, ids = tiny_model(family).eval(), windows(2).ids
    whole = model(input_ids=ids).logits
    hidden = final_hidden(model, ids)
    assert torch.equal(head_logits(model, hidden), whole)
    with torch.no_grad():
        weight = torch.linspace(-1, 1, whole.shape[-1])
    seen = []

    def fn(logits, here):
        seen.append((here.start, here.stop))
        return (logits * weight).square().sum()

    flat = hidden.reshape(-1, hidden.shape[-1])
    total = chunked_logits(model, flat, fn, chunk=20)
    assert seen == [(0, 20), (20, 40), (40, 48)]
    expected = (whole * weight).square().sum()
    torch.testing.assert_close(total, expected)
    total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (model(input_ids=ids).logits * weight).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_cross_entropy_is_the_literal_formula():
    model, rows = tiny_model("gemma2").eval(), ragged()
    found = CrossEntropy()(model, rows.batch(range(8)))
    logits = model(input_ids=rows.ids, attention_mask=rows.mask.long()).logits.double()
    nll = [
        -torch.log_softmax(logits[r, t - 1], dim=0)[rows.labels[r, t]]
        for r in range(8)
        for t in range(1, 24)
        if rows.labels[r, t] != IGNORED
    ]
    assert int(found["count"]) == len(nll) == rows.labelled
    torch.testing.assert_close(found["loss"].double(), sum(nll) / len(nll), rtol=1e-6, atol=0)


def test_a_step_is_the_mean_over_its_labels_however_it_is_split(tmp_path):
    """Rows have from 2 to 16 labels, so a mean of the micro-batches' means would be another."""
    ends = []
    for micro in (24, 72, 192):
        model = tiny_model()
        asked = spec(steps=3, batch_tokens=192, micro_tokens=micro, held_out=0.0)
        fit(model, ragged(), None, CrossEntropy(), asked, tmp_path / str(micro))
        ends.append(state(model))
    model = tiny_model()
    start = state(model)
    batch, optimizer = ragged().batch(range(8)), torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for rate in (1e-2, 0.75e-2, 0.25e-2):  # half a cosine, as transformers has it
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for end in ends:
        there = state(model)
        off = sum(float((end[n] - p).square().sum()) for n, p in there.items())
        way = sum(float((start[n] - p).square().sum()) for n, p in there.items())
        assert off < 1e-6 * way  # AdamW makes much of the rounding of small gradients


def test_every_epoch_has_every_row_once(tmp_path):
    training, _ = data(7)
    loop = Loop(tiny_model(), training, None, CrossEntropy(), spec(micro_tokens=72), tmp_path)
    assert (loop.rows, loop.micro_rows, loop.micros) == (4, 3, 2)
    taken = [row for step in range(7) for micro in (0, 1) for row in loop.rows_of(step, micro)]
    epochs = [taken[start : start + 7] for start in range(0, 28, 7)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = [row for micro in (0, 1) for row in loop.rows_of(3, micro)]
    assert again == taken[12:16]  # whatever was asked for before


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5] + [1] * 8),
        ("linear", [0, 0.5] + [1 - i / 8 for i in range(8)]),
        ("cosine", [0, 0.5] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
    ],
)
def test_learning_rates(tmp_path, schedule, expected):
    training, _ = data(5)
    asked = spec(steps=10, warmup=0.2, schedule=schedule, held_out=0.0)
    course = fit(tiny_model(), training, None, CrossEntropy(), asked, tmp_path)
    found = [line["learning_rate"] for line in plot.read_metrics(course.metrics)]
    assert found == pytest.approx([1e-2 * each for each in expected])


def test_weight_decay_is_for_matrices(tmp_path):
    training, _ = data(5)
    loop = Loop(tiny_model(), training, None, CrossEntropy(), spec(weight_decay=0.1), tmp_path)
    decays = {
        id(p): group["weight_decay"]
        for group in loop.optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in loop.parameters.items():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1)


def test_gradient_checkpointing_changes_memory_alone(tmp_path):
    training, held_out = data()
    ends = []
    for on in (False, True):
        model, calls = tiny_model(), []
        layer = model.model.layers[0]
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        asked = spec(gradient_checkpointing=on)
        fit(model, training, held_out, CrossEntropy(), asked, tmp_path / str(on))
        assert not layer.gradient_checkpointing and model.training
        ends.append((state(model), len(calls)))
    assert same(ends[0][0], ends[1][0])
    assert ends[1][1] == ends[0][1] + SPEC.steps  # each layer once more per micro-batch


def test_bfloat16_multiplies_and_float32_learns(tmp_path):
    training, held_out = data()
    model, seen = tiny_model(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    course = fit(model, training, held_out, CrossEntropy(), spec(precision="bfloat16"), tmp_path)
    assert set(seen) == {torch.bfloat16} and course.precision == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert precision("float32", torch.device("cpu")) == "float32"


# ---- what is kept ----


@dataclass
class Worsens(Scripted):
    """Better on held-out rows until step 2, then worse."""

    def __call__(self, model, batch):
        found = super().__call__(model, batch)
        if not torch.is_grad_enabled():
            found["loss"] = torch.tensor(float(abs(self.calls - 2)))
        return found


def test_held_out_rows_choose_the_best_parameters(tmp_path):
    training, held_out = data()
    ends = {}
    for steps in (2, 6):
        model = tiny_model()
        asked = spec(steps=steps, schedule="constant", warmup=0.0)
        told = []
        course = fit(
            model, training, held_out, Worsens(), asked, tmp_path / str(steps), on_event=told.append
        )
        assert (course.best_step, course.best_loss) == (2, 0.0)
        ends[steps] = state(model)
    assert same(ends[2], ends[6])
    assert course.held_out == [(0, 2.0), (2, 0.0), (4, 2.0), (6, 4.0)]
    looks = [event for event in told if isinstance(event, events.Evaluated)]
    assert [look.best for look in looks] == [True, True, False, False]
    assert [e.step for e in told if isinstance(e, events.TrainStep)] == [1, 2, 3, 4, 5, 6]
    model = tiny_model()
    fit(model, training, None, Worsens(), asked, tmp_path / "all")
    assert not same(state(model), ends[6])  # the last ones


def test_a_training_that_never_helps_leaves_the_model_as_it_was(tmp_path):
    training, held_out = data()
    model = tiny_model()
    before = state(model)
    course = fit(model, training, held_out, Scripted(aim=3.0), spec(), tmp_path)
    assert course.best_step == 4  # it does help
    model.load_state_dict(before, strict=False)

    class Harm(Scripted):
        def __call__(self, model, batch):
            found = super().__call__(model, batch)
            return found if torch.is_grad_enabled() else {**found, "loss": -found["loss"]}

    course = fit(model, training, held_out, Harm(aim=3.0), spec(), tmp_path / "harm")
    assert course.best_step == 0 and same(state(model), before)


def test_what_the_loss_trains_beside_is_kept_with_the_model(tmp_path):
    training, held_out = data()

    class Beside(Scripted):
        def __call__(self, model, batch):
            found = super().__call__(model, batch)
            return {**found, "loss": found["loss"] + (self.modules.weight - 1).square().sum()}

    objective = Beside(modules=nn.Linear(2, 2, bias=False))
    before = objective.modules.weight.detach().clone()
    model = tiny_model()
    course = fit(model, training, held_out, objective, spec(), tmp_path)
    assert not torch.equal(before, objective.modules.weight)
    assert course.parameters == sum(p.numel() for p in model.parameters()) + 4
    lines = plot.read_metrics(course.metrics)
    assert all(line["size"] > 0 for line in lines if "loss" in line)
    assert lines[0]["held_out"]["size"] > 0


def test_what_learns_is_chosen_by_requires_grad_and_nothing_else_moves(tmp_path):
    training, held_out = data()
    model = tiny_model()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    before, drawn = state(model), torch.random.get_rng_state()
    fit(model, training, held_out, CrossEntropy(), spec(), tmp_path)
    assert torch.equal(drawn, torch.random.get_rng_state())
    changed = [n for n, tensor in state(model).items() if not torch.equal(tensor, before[n])]
    assert changed == ["model.norm.weight"]
    (kept,) = (tmp_path / "best").iterdir()
    assert kept.stat().st_size < 1000


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 1, "held_out": {"loss": 2.5}}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n".replace("'", '"') for line in lines))
    first = [path.read_bytes() for path in draw(metrics, tmp_path)]
    assert first == [path.read_bytes() for path in draw(metrics, tmp_path)]
    assert first[0][:4] == b"\x89PNG" and b"<svg" in first[1]
