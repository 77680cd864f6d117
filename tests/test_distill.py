"""A teacher and a student, from two folders to a third."""

import math
from types import SimpleNamespace

import pytest
import torch
from teaching import DROPPED, LAYERS, load, make, record, save, spec, told

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.train.cache import Cache, Layout, fingerprint
from distaya_ext.train.distill import distill
from distaya_ext.train.distillation import Distillation
from distaya_ext.train.hidden import projector
from distaya_ext.train.objective import Batch
from distaya_ext.train.spec import LossSpec
from distaya_ext.train.teacher import Cached, Online


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


# ---- the objective ----


def batch(rows=3, length=10, padded=True):
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(4))
    mask, labels = torch.ones_like(ids, dtype=torch.bool), ids.clone()
    if padded:
        mask[1, 6:] = False
        labels[1, 6:] = -100
        labels[2, :4] = -100  # a prompt
    return Batch(ids, labels, mask, torch.arange(rows))


def literal(teacher, student, about, pairs, T):
    """The four terms from whole logits and transformers' own hidden states."""
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=about.ids, output_hidden_states=True) for model in (student, teacher)
        )
    ce, kl, cos, mse = [], [], [], []
    for row, at in (about.labels[:, 1:] != -100).nonzero().tolist():
        z_t, z_s = (out.logits[row, at].double() for out in (theirs, ours))
        ce.append(-torch.log_softmax(z_s, -1)[about.ids[row, at + 1]])
        p, q = torch.softmax(z_t / T, -1), torch.softmax(z_s / T, -1)
        kl.append(T * T * (p * (p / q).log()).sum())
    for s, t in pairs:
        for row, at in about.mask.nonzero().tolist():
            x, y = (o.hidden_states[i][row, at].double() for o, i in ((ours, s), (theirs, t)))
            cos.append(1 - x @ y / x.norm() / y.norm())
            mse.append(((x - y) ** 2).mean())
    terms = {"ce": ce, "kl": kl, "cosine": cos, "mse": mse}
    return {name: float(torch.stack(each).mean()) for name, each in terms.items()}


def test_the_objective_is_its_formula(made):
    teacher, student, about = load(made.teacher), load(made.dropped), batch()
    pairs = [(1, 2), (1, 3)]
    loss = LossSpec(ce=0.5, kl=1.0, temperature=2.0, cosine=0.25, mse=0.25)
    terms = Distillation(Online(teacher), loss, pairs)(student, about)
    wanted = literal(teacher, student, about, pairs, 2.0)
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-5), name
    total = 0.5 * wanted["ce"] + wanted["kl"] + 0.25 * (wanted["cosine"] + wanted["mse"])
    assert terms["loss"].item() == pytest.approx(total / 2, rel=2e-5)
    assert int(terms["count"]) == 9 + 5 + 6


def test_chunks_of_tokens_change_neither_loss_nor_gradient(made, monkeypatch):
    from distaya_ext.train import head

    found = []
    for size in (head._LOGIT_BYTES, 4 * 300 * 4):  # all tokens at once, four at a time
        monkeypatch.setattr(head, "_LOGIT_BYTES", size)
        student = load(made.dropped)
        objective = Distillation(Online(load(made.teacher)), LossSpec(ce=1.0, kl=1.0))
        loss = objective(student, batch())["loss"]
        loss.backward()
        found.append((loss.detach(), student.model.layers[0].mlp.up_proj.weight.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
    assert found[0][1].abs().max() > 0


def test_the_teacher_is_left_without_gradients(made):
    teacher = load(made.teacher)
    objective = Distillation(Online(teacher), LossSpec(cosine=1.0), [(2, 4)])
    objective(load(made.dropped), batch())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_teacher_that_teaches_itself_has_nothing_to_say(made):
    loss = LossSpec(kl=1.0, cosine=1.0, mse=1.0)
    objective = Distillation(Online(load(made.teacher)), loss, [(4, 4)])
    assert float(objective(load(made.teacher), batch())["loss"].detach()) < 1e-6


def test_a_projector_is_trained_beside(made, tmp_path):
    narrow = load(save(tmp_path / "narrow", hidden_size=16, num_attention_heads=2))
    objective = Distillation(
        Online(load(made.teacher)), LossSpec(kl=0.0, mse=1.0), [(4, 4)], projector(16, 32)
    )
    objective(narrow, batch())["loss"].backward()
    assert objective.modules.linear.weight.grad.abs().max() > 0
    assert narrow.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_cache_of_all_tokens_gives_the_loss_and_gradient_of_the_teacher(made, tmp_path):
    teacher, about, checkpoint = load(made.teacher), batch(), open_checkpoint(made.teacher)
    found = {}
    for k in (300, 20):
        layout = Layout(3, 9, k, 300, fingerprint(checkpoint, "float32", about.ids, k))
        cache = Cache(tmp_path / str(k), layout)
        cache.prepare(None)
        cache.write(teacher, about.ids)
        found[k] = Cached(cache)
    found["online"] = Online(teacher)
    losses, gradients = {}, {}
    for name, guide in found.items():
        student = load(made.dropped)
        loss = Distillation(guide, LossSpec())(student, about)["loss"]
        loss.backward()
        losses[name] = float(loss.detach())
        gradients[name] = student.model.layers[0].mlp.up_proj.weight.grad
    # log p of 16 bits: off by 2^-11 |log p| at most, and |log p| < 16 here.
    assert losses[300] == pytest.approx(losses["online"], abs=2**-7)
    off = (gradients[300] - gradients["online"]).norm() / gradients["online"].norm()
    assert off < 2e-2
    assert 0 < losses[20] < losses["online"]


# ---- the whole way ----

HEAL = {"kl": 1.0, "cosine": 0.5, "ce": 0.1}


@pytest.fixture(scope="module")
def healed(made, tmp_path_factory):
    """The student without two layers after an uninterrupted run."""
    out = tmp_path_factory.mktemp("healed") / "out"
    found = distill(made.teacher, made.dropped, out, made.texts, spec(HEAL, save_every=5))
    return SimpleNamespace(out=out, found=found)


def test_a_student_without_layers_gets_nearer_to_its_teacher(made, healed):
    about = record(healed.out)
    assert set(about["before"]) == set(about["after"]) == {"en", "es", "ja", "all"}
    assert about["after"]["all"]["kl"] < 0.9 * about["before"]["all"]["kl"]
    assert about["states"] == [[1, 1], [2, 4]] and about["dropped_layers"] == DROPPED
    assert healed.found.record["after"] == about["after"] and healed.found.course.steps == 20
    after = open_checkpoint(healed.out)
    assert after.config.num_hidden_layers == LAYERS - len(DROPPED)
    assert not (healed.out.parent / ".out.training").exists()


def test_a_packed_student_learns_and_keeps_its_codes(made, tmp_path):
    out = tmp_path / "out"
    distill(made.teacher, made.packed, out, made.texts, spec(HEAL))
    about = record(out)
    assert about["after"]["all"]["kl"] < 0.9 * about["before"]["all"]["kl"]
    assert about["states"] == [[i, i] for i in range(1, LAYERS + 1)]
    before, after = (open_checkpoint(each, packed=True) for each in (made.packed, out))
    assert before.stored.keys() == after.stored.keys() and before.stored
    for name in before.stored:
        assert torch.equal(before.grid(name).codes, after.grid(name).codes), name
    objective = Distillation(Online(load(made.teacher)), LossSpec())
    with torch.no_grad():
        found = [
            objective(distaya_ext.load(each, dtype="float32", exact=True), batch(padded=False))
            for each in (made.packed, out)
        ]
    assert math.isfinite(found[1]["kl"]) and found[1]["kl"] != found[0]["kl"]


def test_what_is_written_is_what_was_measured(made, healed):
    """The folder's KL on the held-out rows, in float32, is that of training.json."""
    from distaya_ext.tokenizer import load_tokenizer
    from distaya_ext.train.data import from_texts
    from distaya_ext.train.held_out import by_language

    _, held = from_texts(made.texts, load_tokenizer(made.teacher, 300), spec(HEAL))
    again = by_language(load(healed.out), Online(load(made.teacher)), held, torch.device("cpu"))
    wanted = record(healed.out)["after"]
    for lang, found in again.items():
        assert found["labels"] == wanted[lang]["labels"]
        assert found["nll"] == pytest.approx(wanted[lang]["nll"], rel=1e-4)
        assert found["kl"] == pytest.approx(wanted[lang]["kl"], rel=1e-3, abs=1e-5)


def test_a_cached_teacher_serves_the_whole_run_within_its_budget(made, tmp_path):
    work, sizes = tmp_path / "work", []

    def watch(_):
        files = list((work / "teacher").glob("*"))
        sizes.append(sum(path.stat().st_size for path in files))

    given = spec({"kl": 1.0, "cache": 30, "cache_bytes": 2_000_000})
    distill(
        made.teacher, made.dropped, tmp_path / "out", made.texts, given, work=work, on_event=watch
    )
    about = record(tmp_path / "out")
    assert about["after"]["all"]["kl"] < 0.9 * about["before"]["all"]["kl"]
    assert 0 < max(sizes) <= 2_000_000 and not work.exists()


def test_a_killed_run_goes_on_and_ends_the_same(made, healed, tmp_path):
    from distaya_ext.train.events import Resumed, TrainStep

    class Killed(Exception):
        pass

    def kill(event):
        if isinstance(event, TrainStep) and event.step == 13:
            raise Killed

    given = spec(HEAL, save_every=5)
    with pytest.raises(Killed):
        distill(made.teacher, made.dropped, tmp_path / "cut", made.texts, given, on_event=kill)
    assert not (tmp_path / "cut").exists()
    events = []
    again = distill(
        made.teacher, made.dropped, tmp_path / "cut", made.texts, given, on_event=events.append
    )
    assert [event.step for event in events if isinstance(event, Resumed)] == [10]
    assert again.record["after"] == healed.found.record["after"]
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (healed.out / name).read_bytes()


def test_a_narrower_student_of_the_same_tokenizer_is_projected(made, tmp_path):
    narrow = save(tmp_path / "narrow", seed=1, hidden_size=16, num_hidden_layers=2)
    events, out = [], tmp_path / "out"
    given = spec({"kl": 1.0, "mse": 0.1}, train="full", learning_rate=3e-3)
    distill(made.teacher, narrow, out, made.texts, given, on_event=events.append)
    assert any("16 numbers are projected to 32" in message for message in told(events))
    assert record(out)["states"] == [[1, 2], [2, 4]]
    assert record(out)["after"]["all"]["kl"] < record(out)["before"]["all"]["kl"]
    assert "linear.weight" not in load(out).state_dict()


def test_a_vocabulary_that_is_padded_differently_is_cut_and_said(made, tmp_path):
    padded = save(tmp_path / "padded", seed=1, hidden_size=16, vocab_size=320)
    events, out = [], tmp_path / "out"
    distill(made.teacher, padded, out, made.texts, spec(steps=2), on_event=events.append)
    assert any("300 logits and the student 320" in message for message in told(events))
    assert record(out)["after"]["all"]["labels"] > 0
