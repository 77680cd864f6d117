"""Losses against their literal formulas in float64, with gradients, masks and temperatures."""

import math

import pytest
import torch

from distaya_ext.train import losses

ROWS, LENGTH, VOCAB, WIDTH = 3, 5, 11, 7


def logits(seed, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(ROWS, LENGTH, vocab, dtype=torch.float64, generator=generator)


def states(seed, width=WIDTH):
    return logits(seed, width)


def counted():
    generator = torch.Generator().manual_seed(9)
    return torch.rand(ROWS, LENGTH, generator=generator) > 0.4


def literal(p, q):
    """sum p log(p / q) of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(row, temperature=1.0):
    powers = [math.exp(float(z) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def jensen(p, q):
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (literal(p, m) + literal(q, m)) / 2


FORMULAS = {"forward": literal, "reverse": lambda p, q: literal(q, p), "jsd": jensen}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_kl_is_its_formula(kind, temperature):
    teacher, student, mask = logits(1), logits(2), counted()
    wanted = [
        FORMULAS[kind](softmax(teacher[i, j], temperature), softmax(student[i, j], temperature))
        for i, j in mask.nonzero().tolist()
    ]
    got = losses.kl(teacher, student, mask, temperature, kind)
    assert got.item() == pytest.approx(temperature**2 * sum(wanted) / len(wanted), rel=1e-12)


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="none of forward"):
        losses.kl(logits(1), logits(2), counted(), kind="sideways")


def test_cross_entropy_is_its_formula():
    student, mask = logits(2), counted()
    targets = torch.randint(0, VOCAB, (ROWS, LENGTH))
    wanted = [
        -math.log(softmax(student[i, j])[int(targets[i, j])]) for i, j in mask.nonzero().tolist()
    ]
    got = losses.cross_entropy(student, targets.where(mask, -100), mask)
    assert got.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)


def test_hidden_losses_are_their_formulas():
    s, t, mask = states(3), states(4), counted()
    places = mask.nonzero().tolist()

    def away(x, y):
        dot = sum(a * b for a, b in zip(x, y, strict=True))
        return 1 - dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))

    wanted = sum(away(s[i, j].tolist(), t[i, j].tolist()) for i, j in places) / len(places)
    assert losses.cosine(s, t, mask).item() == pytest.approx(wanted, rel=1e-12)
    squares = sum(((s[i, j] - t[i, j]) ** 2).sum().item() for i, j in places)
    assert losses.mse(s, t, mask).item() == pytest.approx(squares / (len(places) * WIDTH))


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_kl_is_the_kl_over_the_tokens_and_one_bucket(k, temperature):
    teacher, student, mask = logits(1), logits(2), counted()
    wanted = []
    for i, j in mask.nonzero().tolist():
        p, q = softmax(teacher[i, j]), softmax(student[i, j])
        order = sorted(range(VOCAB), key=lambda token: -p[token])
        merged = []
        for full in (p, q):
            outcomes = [full[token] for token in order[:k]]
            outcomes += [sum(full[token] for token in order[k:])] if k < VOCAB else []
            tempered = [value ** (1 / temperature) for value in outcomes]
            merged.append([value / sum(tempered) for value in tempered])
        wanted.append(literal(*merged))
    values, ids, rest = losses.top(teacher, k)
    got = losses.mean(losses.sparse_divergence(values, ids, rest, student, temperature), mask)
    assert got.item() == pytest.approx(temperature**2 * sum(wanted) / len(wanted), rel=1e-11)


def test_more_tokens_come_nearer_to_the_full_kl_from_below():
    teacher, student = logits(1), logits(2)
    full = losses.divergence(teacher, student)
    before = torch.zeros_like(full)
    for k in range(1, VOCAB + 1):
        now = losses.sparse_divergence(*losses.top(teacher, k), student)
        assert (now >= before - 1e-12).all() and (now <= full + 1e-12).all()
        before = now
    assert torch.allclose(before, full, rtol=1e-12)
    tempered = losses.sparse_divergence(*losses.top(teacher, VOCAB), student, 2.5)
    assert torch.allclose(tempered, losses.divergence(teacher, student, 2.5), rtol=1e-12)


def test_identical_inputs_cost_nothing():
    z, h, mask = logits(1), states(3), counted()
    assert losses.kl(z, z.clone(), mask, 2.0).item() == 0.0
    assert losses.kl(z, z.clone(), mask, kind="jsd").abs().item() < 1e-15
    assert losses.cosine(h, h.clone(), mask).abs().item() < 1e-15
    assert losses.mse(h, h.clone(), mask).item() == 0.0
    sparse = losses.sparse_divergence(*losses.top(z, 4), z)
    assert sparse.abs().max().item() < 1e-14


def few(tensor):
    return tensor[:2, :2].clone().requires_grad_()


GRADIENTS = {
    "forward": lambda s, t, m: losses.kl(t, s, m, 1.7),
    "reverse": lambda s, t, m: losses.kl(t, s, m, 1.7, "reverse"),
    "jsd": lambda s, t, m: losses.kl(t, s, m, 1.7, "jsd"),
    "ce": lambda s, t, m: losses.cross_entropy(s, t.argmax(-1), m),
    "cosine": losses.cosine,
    "mse": losses.mse,
    "sparse": lambda s, t, m: losses.mean(losses.sparse_divergence(*losses.top(t, 4), s, 1.7), m),
    "whole": lambda s, t, m: losses.mean(
        losses.sparse_divergence(*losses.top(t, VOCAB), s, 1.7), m
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    mask = torch.tensor([[True, False], [True, True]])
    teacher = logits(1)[:2, :2]
    loss = GRADIENTS[name]
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), (few(logits(2)),))


def test_the_gradient_of_the_kl_is_the_difference_of_probabilities():
    teacher, student, mask = logits(1), logits(2).requires_grad_(), counted()
    losses.kl(teacher, student, mask, 2.0).backward()
    p, q = (torch.softmax(z.detach() / 2.0, dim=-1) for z in (teacher, student))
    wanted = 2.0 * (q - p) * mask[..., None] / mask.sum()
    assert torch.allclose(student.grad, wanted, atol=1e-14)


def test_what_does_not_count_has_no_say_even_when_it_is_not_finite():
    teacher, mask = logits(1), counted()
    clean = logits(2)
    spoilt = clean.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    loss = losses.kl(teacher, spoilt, mask)
    assert loss.item() == losses.kl(teacher, clean, mask).item()
    loss.backward()
    assert torch.isfinite(spoilt.grad[mask]).all()


def test_no_counted_position_is_zero_and_differentiable():
    student = logits(2).requires_grad_()
    nothing = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    loss = losses.kl(logits(1), student, nothing)
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_and_logits_neither_overflow_nor_vanish(dtype):
    generator = torch.Generator().manual_seed(5)
    teacher = (torch.randn(4, 256_000, generator=generator) * 4).to(dtype)
    student = (torch.randn(4, 256_000, generator=generator) * 4).to(dtype)
    teacher[0, 7] = student[1, 9] = 3e4
    got = losses.divergence(teacher, student)
    wanted = losses.divergence(teacher.double(), student.double())
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert torch.allclose(got.double(), wanted, rtol=1e-4)  # 256k roundings of log p, 12 eps each
    sparse = losses.sparse_divergence(*losses.top(teacher, 64), student)
    assert torch.isfinite(sparse).all() and (sparse <= got * (1 + 1e-4)).all()


def test_a_teacher_that_is_certain_leaves_no_rest():
    teacher = torch.full((1, VOCAB), -1e4)
    teacher[0, 3] = 1e4
    values, ids, rest = losses.top(teacher, 2)
    assert rest.exp() == 0 and ids[0, 0] == 3
    rest = torch.full_like(rest, float("-inf"))  # as 16 bits hold it
    student = torch.zeros(1, VOCAB, requires_grad=True)
    loss = losses.sparse_divergence(values, ids, rest, student).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(VOCAB)) and torch.isfinite(student.grad).all()


def test_total_is_a_weighted_mean_of_the_terms_with_weight():
    terms = {"ce": torch.tensor(2.0), "kl": torch.tensor(5.0)}
    weights = {"ce": 1.0, "kl": 3.0, "mse": 0.0}
    assert losses.total(terms, weights).item() == pytest.approx((2 + 15) / 4)
    with pytest.raises(KeyError):
        losses.total(terms, {"mse": 1.0})


def test_labels_are_shifted_once():
    labels = torch.tensor([[5, -100, 7, 8]])
    targets, counts = losses.shifted(labels)
    assert targets.tolist() == [[-100, 7, 8]] and counts.tolist() == [[False, True, True]]
