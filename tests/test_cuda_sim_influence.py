"""The influence room on CUDA, simulated: the bounds of test_influence.py with core/gemm.cuh's
terms, the same bits under every schedule."""

import pytest
import test_influence as checks
import torch
from cuda_sim import build
from cuda_sim.simulator import Simulator
from test_influence import DTYPES, HEADS, head

from distaya_ext.ops.influence import divergence, similarity


def terms(hidden: int) -> float:
    return hidden / 16 + 48


@pytest.fixture(scope="module")
def small():
    """Blocks of 256 vocabulary entries and 8 rows, so that a small head takes several."""
    path = "csrc/influence/influence.h"
    text = (build.ROOT / path).read_text()
    for plain, few in (
        ("kColumnsCuda = 2048", "kColumnsCuda = 256"),
        ("kRowsCuda = 4096", "kRowsCuda = 8"),
    ):
        assert text.count(plain) == 1
        text = text.replace(plain, few)
    return Simulator(build.build({path: text}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity(simulator, dtype):
    with simulator.use():
        for apart in (0.0, 1e-6, 1.0):
            for tokens, hidden in ((1, 1), (3, 37), (2, 700)):
                checks.check_similarity(tokens, hidden, dtype, apart)
    X, Y = checks.randn(3, 300).to(dtype), checks.randn(3, 300, seed=1).to(dtype)
    found = simulator.same_always(lambda: similarity(X, Y))
    torch.testing.assert_close(found, similarity(X, Y), rtol=2.5 * checks.U, atol=0)


def test_zero_and_odd_rows(simulator):
    with simulator.use():
        checks.check_special_rows()
        assert similarity(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0, 3)


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_within_its_bound(simulator, small, dtype, options):
    """With rows that 16-bit products take as they are (multiples of 8) and others."""
    with simulator.use():
        for hidden in (33, 40):
            operands, rest = head(2, 2, hidden, 70, dtype=dtype, **HEADS[options])
            checks.check_divergence(operands, rest, terms(hidden))
    with small.use():  # several blocks of the vocabulary, runs of tokens, a last block of one
        for hidden in (20, 24):
            operands, rest = head(2, 5, hidden, 513, dtype=dtype, **HEADS[options])
            checks.check_divergence(operands, rest, terms(hidden))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_products_of_16_bits(simulator, dtype):
    """Several tiles of rows and columns, ragged, and more slices of k than are under way."""
    for shape in ((2, 50, 200, 131), (1, 64, 8, 257), (1, 1, 72, 3)):
        operands, rest = head(*shape, dtype=dtype)
        with simulator.use():
            found = checks.check_divergence(operands, rest, terms(shape[2]))
    again = simulator.same_always(lambda: divergence(*operands, **rest))
    assert torch.equal(found, again)
    P, Q, W, targets = head(1, 3, 16, 40, dtype=dtype)[0]
    shifted = torch.empty(W.numel() + 1, dtype=dtype)[1:].view_as(W).copy_(W)  # not on 16 bytes
    with simulator.use():
        other, plain = divergence(P, Q, shifted, targets), divergence(P, Q, W, targets)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)


def test_whole_blocks(simulator):
    """2048 entries and some more, eight of each thread."""
    with simulator.use():
        operands, rest = head(1, 2, 8, 2300, apart=1.0)
        checks.check_divergence(operands, rest, terms(8))


def test_groups_of_variants(small):
    with small.use():
        operands, rest = head(17, 2, 12, 300)
        checks.check_divergence(operands, rest, terms(12))


def test_odd_values(simulator, small):
    for each in (simulator, small):
        with each.use():
            checks.check_never_negative()
            checks.check_odd_values()


def test_first_choices(small):
    with small.use():
        checks.check_first_choices()


def test_targets_outside_of_the_vocabulary(simulator):
    """Nobody looks at them on the device: their loss is NaN, and nothing else is."""
    (P, Q, W, targets), _ = head(1, 3, 8, 40)
    plain = divergence(P, Q, W, targets)
    targets[0], targets[2] = -100, 40
    with simulator.use():
        found = divergence(P, Q, W, targets)
    wrong = torch.zeros(1, 3, 4, dtype=torch.bool)
    wrong[:, [0, 2], 1:3] = True
    assert torch.equal(found.isnan(), wrong)
    torch.testing.assert_close(found[~wrong], plain[~wrong], rtol=1e-4, atol=1e-6)


def test_nothing_to_compare(simulator):
    (P, Q, W, targets), _ = head(2, 4, 8, 30)
    with simulator.use():
        assert divergence(P[:0], Q[:, :0], W, targets[:0]).shape == (2, 0, 4)
        assert divergence(P, Q[:0], W, targets).shape == (0, 4, 4)


@pytest.mark.parametrize("options", HEADS)
def test_all_schedules_give_the_same_bits(small, options):
    for dtype, hidden in zip(DTYPES, (10, 8, 8), strict=True):
        operands, rest = head(2, 3, hidden, 300, dtype=dtype, **HEADS[options])
        found = small.same_always(lambda o=operands, r=rest: divergence(*o, **r))
        ours = divergence(*operands, **rest)
        of_kl, of_nll, _ = checks.allowed(*operands[:3], terms(hidden), **rest)
        assert bool(((found - ours)[..., 0].abs() <= 2 * of_kl).all())
        off = (found - ours)[..., 1:3].abs() - 2 * checks.U * ours[..., 1:3]
        assert bool((off <= 2 * of_nll[..., None]).all())
