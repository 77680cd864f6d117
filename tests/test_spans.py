"""The loss between two tokenizers: against its formulas, and at work on nano-aya."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_tests import byte_level
from transformers import AutoModelForCausalLM, Qwen2Config

import distaya_ext
from distaya_ext import read_texts
from distaya_ext.errors import UsageError
from distaya_ext.evaluate import cut_windows
from distaya_ext.evaluate.score import score
from distaya_ext.evaluate.statistics import interval
from distaya_ext.tokenizer import load_tokenizer
from distaya_ext.train.finetune import CrossEntropy
from distaya_ext.train.fit import fit
from distaya_ext.train.pairs import paired_data
from distaya_ext.train.spans import (
    SpanObjective,
    binary_divergence,
    carried,
    distribution_divergence,
    log1mexp,
)
from distaya_ext.train.spec import LossSpec, TrainSpec

ASSETS = Path(distaya_ext.__file__).parent / "assets"
TEXTS = read_texts(ASSETS / "texts" / "calibration")
LANGUAGES = ("en", "fr", "de", "es")


# ---- formulas ----


@given(x=st.floats(-60.0, -1e-9))
@settings(max_examples=200, deadline=None)
def test_log1mexp(x):
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(exact, rel=1e-12)


def test_log1mexp_has_a_gradient_at_both_ends():
    x = torch.tensor([-1e-6, -0.69, -0.7, -30.0, -200.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log1mexp(x).sum(), x)
    expected = -x.exp() / -torch.expm1(x)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("tau", [1.0, 3.0, 100.0])
def test_binary_divergence_is_its_formula(tau):
    """Value and gradient against p log(p/q) + (1-p) log((1-p)/(1-q)) of p^(1/tau), written out."""
    generator = torch.Generator().manual_seed(1)
    log_p = -torch.rand(40, generator=generator, dtype=torch.float64) * 12 - 0.01
    log_q = (-torch.rand(40, generator=generator, dtype=torch.float64) * 12 - 0.01).requires_grad_()
    found = binary_divergence(log_p, log_q, tau)
    p, q = log_p.exp() ** (1 / tau), log_q.exp() ** (1 / tau)
    literal = tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    torch.testing.assert_close(found, literal, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss.sum(), log_q)[0] for loss in (found, literal))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q: binary_divergence(log_p, q, tau), (log_q,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_divergence_is_finite_at_the_ends(dtype):
    ends = torch.tensor([0.0, -1e-12, -1.0, -80.0, -5000.0], dtype=dtype)
    p, q = (part.reshape(-1) for part in torch.meshgrid(ends, ends, indexing="ij"))
    q = q.clone().requires_grad_()
    for tau in (1.0, 10.0):
        found = binary_divergence(p, q, tau)
        (gradient,) = torch.autograd.grad(found.sum(), q)
        assert found.isfinite().all() and gradient.isfinite().all()
        assert (found > -1e-6).all()
        assert found[p == q].abs().max() < 1e-6


def test_for_large_tau_it_weighs_cross_entropy():
    log_p, log_q = torch.tensor([-2.0, -6.0]).double(), torch.tensor([-4.0, -3.0]).double()
    log_q.requires_grad_()
    (gradient,) = torch.autograd.grad(binary_divergence(log_p, log_q, 1e6).sum(), log_q)
    expected = -(1 - log_p / log_q.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0.0)


def test_carried_probabilities_are_sums_over_what_begins_alike():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.tensor([-1, 2, 0, 2, -1, 3, 0])
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    kept = 1 - p[:, 0] - p[:, 4]
    zero = torch.zeros_like(kept)
    literal = torch.stack([p[:, 2] + p[:, 6], zero, p[:, 1] + p[:, 3], p[:, 5]], dim=1)
    P = carried(logits, first, 4)
    torch.testing.assert_close(P, literal / kept[:, None])
    log_q = torch.log_softmax(torch.randn(5, 4, dtype=torch.float64), dim=1)
    some = [0, 2, 3]
    expected = (P[:, some] * (P[:, some].log() - log_q[:, some])).sum(dim=1)
    torch.testing.assert_close(distribution_divergence(P, log_q), expected)


# ---- a batch ----


def _student(size: int, seed: int, width: int = 64, layers: int = 2):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher():
    folder = ASSETS / "nano-aya"
    tokenizer = load_tokenizer(folder, 8192)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


@pytest.fixture(scope="module")
def prepared(teacher):
    texts = {lang: TEXTS[lang] for lang in LANGUAGES}
    tokenizer = byte_level([line for lines in texts.values() for line in lines], 2048)
    spec = TrainSpec(
        train="full",
        also=["norms", "embeddings"],
        window=64,
        batch_tokens=512,
        steps=60,
        evaluate_every=30,
        save_every=1000,
        learning_rate=3e-3,
        precision="float32",
        held_out=0.1,
        loss=LossSpec(ce=0.3, kl=0.0, spans=1.0),
    )
    return tokenizer, spec, *paired_data(texts, teacher[1], tokenizer, spec)


@pytest.mark.parametrize("room", [256 << 20, 0])
def test_a_batch_is_its_formula(teacher, prepared, monkeypatch, room):
    """Each term span by span, with whole logits in float64; what the teacher expects is kept, or
    made again.
    """
    monkeypatch.setattr("distaya_ext.train.spans._KEPT_BYTES", room)
    tokenizer, spec, training, _, pairs = prepared
    model = _student(len(tokenizer), 0)
    objective = SpanObjective(teacher[0], pairs, spec.loss, binary=0.5, tau=4.0)
    batch = training.batch([3, 0, 7])
    found = objective(model, batch)
    ce, after, binary, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for row, n in zip([3, 0, 7], batch.mask.sum(dim=1).tolist(), strict=True):
            ids, said = training.ids[row][:n], pairs.teacher[row]
            q = torch.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
            p = torch.log_softmax(teacher[0](said[None]).logits[0].double(), dim=-1)
            ce -= sum(float(q[t - 1, ids[t]]) for t in range(1, n))
            count += n - 1
            for a, b, c, d in pairs.spans[row].tolist():
                both = torch.stack(
                    [
                        sum(p[t - 1, said[t]] for t in range(a, b)),
                        sum(q[t - 1, ids[t]] for t in range(c, d)),
                    ]
                )
                binary += float(binary_divergence(both[0], both[1], 4.0))
                P = carried(p[None, a - 1], pairs.first, len(tokenizer))[0]
                at = P > 0
                after += float((P[at] * (P[at].log() - q[c - 1][at])).sum())
    expected = {"ce": ce / count, "next": after / count, "binary": binary / count}
    expected["loss"] = (0.3 * expected["ce"] + expected["next"] + 0.5 * expected["binary"]) / 1.3
    assert int(found["count"]) == count
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=2e-5), name


def test_a_step_does_not_depend_on_how_it_is_split(teacher, prepared):
    tokenizer, spec, training, _, pairs = prepared
    model = _student(len(tokenizer), 0)
    objective = SpanObjective(teacher[0], pairs, spec.loss)
    with torch.no_grad():
        whole = objective(model, training.batch([0, 1, 2, 3]))
        parts = [objective(model, training.batch(rows)) for rows in ([0, 1, 2], [3])]
    joined = sum(float(part["loss"] * part["count"]) for part in parts)
    assert joined / float(whole["count"]) == pytest.approx(float(whole["loss"]), rel=1e-5)


def test_what_is_kept_does_not_depend_on_the_batch(teacher, prepared):
    """A resumed run meets rows in other company and must see the same bits."""
    tokenizer, spec, training, _, pairs = prepared
    model = _student(len(tokenizer), 0)
    first, second = (SpanObjective(teacher[0], pairs, spec.loss) for _ in range(2))
    with torch.no_grad():
        first(model, training.batch([5, 1, 2]))
        one, other = (o(model, training.batch([2, 9]))["loss"] for o in (first, second))
    assert one.item() == other.item()


def test_the_teacher_learns_nothing(teacher, prepared):
    tokenizer, spec, training, _, pairs = prepared
    model = _student(len(tokenizer), 0)
    objective = SpanObjective(teacher[0], pairs, spec.loss)
    objective(model, training.batch([0]))["loss"].backward()
    assert all(p.grad is None for p in teacher[0].parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_spans_without_weight_are_refused(teacher, prepared):
    with pytest.raises(ValueError, match="weight of spans is 0"):
        SpanObjective(teacher[0], prepared[-1], LossSpec(kl=1.0))


def test_rows_longer_than_the_teacher_reads_are_refused(teacher, prepared, monkeypatch):
    monkeypatch.setattr(teacher[0].config, "max_position_embeddings", 8)
    with pytest.raises(UsageError, match="positions are 8; give a smaller window"):
        SpanObjective(teacher[0], prepared[-1], prepared[1].loss)


# ---- what it is for ----


def test_the_aligned_route_beats_cross_entropy_at_equal_steps(teacher, prepared, tmp_path):
    """A Qwen2 student with its own tokenizer, two seeds, the best of each run by its held-out loss;
    other texts decide, with an interval over windows.
    """
    tokenizer, spec, training, held_out, pairs = prepared
    texts = read_texts(ASSETS / "texts" / "evaluation")
    samples = cut_windows(
        {lang: texts[lang] for lang in LANGUAGES}, tokenizer, window=64, tokens=6000
    )
    rows = [row for sample in samples for row in sample.rows]
    gains = []
    for seed in (0, 1):
        seeded = spec.model_copy(update={"seed": seed})
        nll = {}
        arms = {
            "text": CrossEntropy(),
            "teacher": SpanObjective(teacher[0], pairs, spec.loss),
        }
        for name, objective in arms.items():
            model = _student(len(tokenizer), seed)
            fit(model, training, held_out, objective, seeded, tmp_path / f"{name}{seed}")
            nll[name] = score([model.eval()], rows)[0].nll
        gains.append(nll["text"] - nll["teacher"])
    tokens = np.array([len(row) - 1 for row in rows], dtype=np.float64)
    low, high = interval(np.mean(gains, axis=0), tokens)
    assert all(gain.sum() > 0 for gain in gains)
    assert low > 0.1, (low, high)  # nats per token


def test_the_bench_counts_bits_of_bytes_and_pairs_windows():
    from bench.students import Row, gains, table

    nats = {"text alone": [[8.0, 4.0], [6.0, 6.0]], "aligned": [[6.0, 4.0], [6.0, 2.0]]}
    rows = [
        Row(arm, seed, sum(found[seed]) / 10 / math.log(2), 5, 1.0, found[seed])
        for seed in (0, 1)
        for arm, found in nats.items()
    ]
    saved = gains(rows, np.array([5.0, 5.0]))
    bits = 1 / math.log(2)
    assert saved["0"][0] == pytest.approx(0.2 * bits)
    assert saved["1"][0] == pytest.approx(0.4 * bits)
    assert saved["all"] == pytest.approx([0.3 * bits, 0.2 * bits, 0.4 * bits])
    about = {"parameters": 10**6, "vocabulary": 9, "training_tokens": 7, "steps": 5}
    lines = table(
        rows, about | {"batch_tokens": 3, "languages": ["en"], "gains": saved}
    ).splitlines()
    assert lines[-1] == "| mean | 1.731 | 1.298 | 0.433 (0.289 to 0.577) |"
