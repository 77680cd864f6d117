"""cross: G += sum w y x^T against double precision, and to the bit against hessian."""

import pytest
import torch
from second_moment import cross_bound, cuda_cross_bound
from test_hessian import DTYPES, SHAPES, rand, some_weights

from distaya_ext.ops import hessian as room
from distaya_ext.ops.hessian import CrossMoment, Hessian, cross_, hessian_, symmetrize_

KINDS = ["none", "few", "many"]
# tokens, rows, columns: one row or column, every tile edge on one side only, several squares a side
RECTANGLES = [(1, 3, 1), (40, 1, 1), (9, 1, 130), (258, 97, 1), (257, 24, 49), (130, 500, 12)]
RECTANGLES += [(70, 13, 531), (300, 211, 110)]


def check(G: torch.Tensor, Y: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> None:
    """cross_ on G, within the bound."""
    before = G.clone()
    cross_(G, Y, X, weights)
    error = (G.double() - room.cross_reference(before, Y, X, weights)).abs()
    excess = (error - cross_bound(before, Y, X, weights)).max()
    assert excess <= 0, f"off by {error.max():.3g}, {excess:.3g} over the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_double_precision(isa, shape, dtype):
    tokens, columns = shape
    Y, X = rand(tokens, columns, seed=2).to(dtype), rand(tokens, columns).to(dtype)
    check(rand(columns, columns, seed=1), Y, X, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RECTANGLES, ids=str)
def test_rectangles(isa, shape, dtype, kind):
    tokens, rows, columns = shape
    Y, X = rand(tokens, rows, seed=2).to(dtype), rand(tokens, columns).to(dtype)
    check(rand(rows, columns, seed=1), Y, X, some_weights(kind, tokens))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 130, 700])
@pytest.mark.parametrize("rows", [101, 50])
def test_weights(isa, rows, dtype, kind, tokens):
    Y, X = rand(tokens, rows, seed=2).to(dtype), rand(tokens, 101).to(dtype)
    check(rand(rows, 101, seed=1), Y, X, some_weights(kind, tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("same", [True, False], ids=["itself", "a copy"])
def test_of_equal_inputs_is_the_hessian_to_the_bit(isa, dtype, kind, same):
    """The upper triangle is hessian_'s, the lower its mirror image, over several calls."""
    H, G = torch.zeros(531, 531), torch.zeros(531, 531)
    for seed in range(2):
        X = rand(390, 531, seed=seed).to(dtype)
        weights = some_weights(kind, 390)
        hessian_(H, X, weights)
        cross_(G, X if same else X.clone(), X, weights)
    symmetrize_(H)
    assert torch.equal(G, H)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 131, 430])
def test_of_two_parts_of_an_input_is_a_part_of_its_hessian_to_the_bit(isa, rows, dtype, kind):
    Z, weights = rand(290, 531).to(dtype), some_weights(kind, 290)
    H, G = torch.zeros(531, 531), torch.zeros(rows, 531 - rows)
    hessian_(H, Z, weights)
    cross_(G, Z[:, :rows].contiguous(), Z[:, rows:].contiguous(), weights)
    assert torch.equal(G, H[:rows, rows:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [150, 61])
def test_swapping_the_inputs_transposes(isa, rows, dtype, kind):
    Y, X = rand(390, rows, seed=2).to(dtype), rand(390, 150).to(dtype)
    weights = some_weights(kind, 390)
    one, other = torch.zeros(rows, 150), torch.zeros(150, rows)
    cross_(one, Y, X, weights)
    cross_(other, X, Y, weights)
    assert torch.equal(one, other.t())


@pytest.mark.parametrize("rows", [3, 9])
def test_of_two_lengths_in_the_same_memory(isa, rows):
    memory = rand(9 * 20)
    Y, X = memory[: 20 * rows].view(20, rows), memory[: 20 * 6].view(20, 6)
    check(torch.zeros(rows, 6), Y, X, None)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_tokens_of_weight_zero_may_hold_anything(isa, kind):
    Y, X = rand(333, 60, seed=2).bfloat16(), rand(333, 60).bfloat16()
    weights = some_weights(kind, 333)
    clean, dirty = torch.zeros(60, 60), torch.zeros(60, 60)
    cross_(clean, Y, X, weights)
    Y[weights == 0], X[weights == 0] = float("inf"), float("nan")
    cross_(dirty, Y, X, weights)
    assert torch.equal(clean, dirty)
    cross_(dirty, Y, X, torch.zeros(333))
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", ["none", "many"])
def test_more_tokens_than_the_scratch_holds(kind):
    """Twice 36000 x 512 words exceed the packing buffer, so G is visited in several chunks."""
    Y, X = rand(36000, 512, seed=2, mean=0.5), rand(36000, 512, mean=0.5)
    weights = some_weights(kind, 36000)
    G = torch.zeros(512, 512)
    cross_(G, Y, X, weights)
    w = torch.ones(36000) if weights is None else weights
    left, right = Y[:, 250:254].double(), X.double() * w.double()[:, None]
    expected, size = left.t() @ right, left.abs().t() @ right.abs()
    assert ((G[250:254] - expected).abs() <= (256 + 36000 / 256 + 6) * 2.0**-24 * size).all()


def test_same_bits_for_any_thread_count(isa):
    Y, X = rand(700, 310, seed=2).bfloat16(), rand(700, 450).bfloat16()
    for kind in KINDS:
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            G = torch.zeros(310, 450)
            cross_(G, Y, X, some_weights(kind, 700))
            torch.set_num_threads(before)
            results.append(G)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_its_row_or_column_only(isa, dtype):
    Y, X = rand(65, 40, seed=2).to(dtype), rand(65, 53).to(dtype)
    Y[64, 5], X[64, 50] = float("nan"), float("inf")
    G = torch.zeros(40, 53)
    cross_(G, Y, X)
    tainted = torch.zeros(40, 53, dtype=torch.bool)
    tainted[5], tainted[:, 50] = True, True
    assert torch.equal(~G.isfinite(), tainted)


def test_nothing_to_add(isa):
    G = rand(4, 4)
    before = G.clone()
    for weights in (None, torch.zeros(0)):
        cross_(G, torch.zeros(0, 4), torch.zeros(0, 4), weights)
    for rows, columns in ((0, 0), (0, 3), (3, 0)):
        cross_(torch.zeros(rows, columns), torch.zeros(7, rows), torch.zeros(7, columns))
    assert torch.equal(G, before)


X53, G33 = torch.zeros(5, 3), torch.zeros(3, 3)
REFUSED = {
    "G is 3x3 but Y has 3 columns and X has 4, so G must be 3x4": (
        G33,
        X53,
        torch.zeros(5, 4),
        None,
    ),
    "G is 3x3 but Y has 4 columns and X has 3, so G must be 4x3": (
        G33,
        torch.zeros(5, 4),
        X53,
        None,
    ),
    "Y has 6 tokens but X has 5": (G33, torch.zeros(6, 3), X53, None),
    "Y .* and X .* must have the same dtype": (G33, X53.half(), X53, None),
    "X is float64 but must be one of": (G33, X53.double(), X53.double(), None),
    "G must be float32 but is float64": (G33.double(), X53, X53, None),
    "Y must have 2 dimensions": (G33, torch.zeros(1, 5, 3), X53, None),
    "weights has 4 entries but X has 5 tokens": (G33, X53, X53, torch.ones(4)),
    "X .* is not contiguous": (G33, X53, torch.zeros(3, 5).t(), None),
    "Y .* is not contiguous": (G33, torch.zeros(3, 5).t(), X53, None),
    "G .* is not contiguous": (torch.zeros(3, 6)[:, ::2], X53, X53, None),
    r"weights\[2\] is -0.5 but": (G33, X53, X53, torch.tensor([1, 1, -0.5, 1, 1])),
    "requires grad": (G33, X53.clone().requires_grad_(), X53, None),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        cross_(*REFUSED[sentence])
    assert not G33.any()


def test_opcheck_and_compile():
    Y, X = rand(6, 4, seed=2).bfloat16(), rand(6, 5).bfloat16()
    for weights in (None, torch.rand(6)):
        torch.library.opcheck(
            torch.ops.distaya.hessian_cross_.default, (torch.zeros(4, 5), Y, X, weights)
        )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def full(G, Y, X):
        G = G.clone()
        cross_(G, Y, X)
        return G

    expected = torch.zeros(4, 5)
    cross_(expected, Y, X)
    assert torch.equal(full(torch.zeros(4, 5), Y, X), expected)


# ---- CrossMoment ----


@pytest.mark.parametrize("rows", [17, 6, 29])
def test_accumulator_over_batches_and_weights(rows):
    Y, X = rand(2, 30, rows, seed=2).bfloat16(), rand(2, 30, 17).bfloat16()
    more_y, more_x = rand(40, rows, seed=4).bfloat16(), rand(40, 17, seed=3).bfloat16()
    weights = torch.tensor([0.3, 0.0, 2.7, 1.0]).repeat(15).view(2, 30)
    acc = CrossMoment(rows, 17)
    acc.add(Y, X, weights)
    acc.add(more_y, more_x)
    assert acc.tokens == 40 + int((weights > 0).sum())
    assert acc.weight == pytest.approx(40 + weights.double().sum().item(), rel=1e-12)
    flat = (Y.view(60, rows), X.view(60, 17), weights.view(60))
    total = room.cross_reference(torch.zeros(rows, 17), *flat)
    expected = room.cross_reference(total, more_y, more_x) / acc.weight
    G = acc.finish()
    torch.testing.assert_close(G, expected.float())
    assert acc.finish() is G
    with pytest.raises(ValueError, match="cross moment was finished and takes no more tokens"):
        acc.add(more_y, more_x)


def test_the_difference_of_equal_streams_is_zero():
    """What a corrected target adds for a layer whose input compression has not changed yet."""
    acc, hessian = CrossMoment(70, 70), Hessian(70)
    for seed in range(3):
        X, weights = rand(50, 70, seed=seed).bfloat16(), some_weights("many", 50)
        acc.add(X.clone(), X, weights)
        hessian.add(X, weights)
    assert not (acc.finish() - hessian.finish()).any()


def test_accumulator_copies_strided_inputs():
    wide = rand(8, 20, 24).bfloat16()
    acc, plain = CrossMoment(8, 12), CrossMoment(8, 12)
    acc.add(wide[..., 1::3], wide[..., ::2], torch.ones(20, 8).t())
    plain.add(wide[..., 1::3].contiguous(), wide[..., ::2].contiguous())
    assert torch.equal(acc.finish(), plain.finish())


def test_accumulator_refuses():
    acc = CrossMoment(4, 6)
    Y, X = torch.zeros(2, 4), torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"no token of positive weight .* cross moment of 6 col"):
        acc.finish()
    with pytest.raises(
        ValueError, match=r"X of shape \[2, 4\] must have 6 columns, as many as .* columns"
    ):
        acc.add(X, Y)
    with pytest.raises(
        ValueError, match=r"Y of shape \[2, 6\] must have 4 columns, as many as .* rows"
    ):
        acc.add(X, X)
    with pytest.raises(ValueError, match=r"Y of shape \[3, 4\] and X of shape \[2, 6\] must agree"):
        acc.add(torch.zeros(3, 4), X)
    with pytest.raises(ValueError, match=r"weights of shape \[3\] do not match X of"):
        acc.add(Y, X, torch.ones(3))
    with pytest.raises(ValueError, match=r"weights\[0\] is -1"):
        acc.add(Y, X, -torch.ones(2))
    assert acc.tokens == 0 and not acc.G.any()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(t, c, c) for t, c in [*SHAPES, (5000, 200)]] + RECTANGLES, ids=str
)
def test_cuda_agrees_with_double_precision(shape, dtype, kind):
    tokens, rows, columns = shape
    Y, X = rand(tokens, rows, seed=2).to(dtype), rand(tokens, columns).to(dtype)
    weights, before = some_weights(kind, tokens), rand(rows, columns, seed=1)
    expected = room.cross_reference(before, Y, X, weights)
    limit = cuda_cross_bound(before, Y, X, weights)
    on_gpu = [t if t is None else t.cuda() for t in (Y, X, weights)]
    G, again = before.cuda(), before.cuda()
    cross_(G, *on_gpu)
    cross_(again, *on_gpu)
    assert torch.equal(G, again)
    assert ((G.cpu() - expected).abs() <= limit).all()
    H, G = (torch.zeros(columns, columns, device="cuda") for _ in range(2))
    hessian_(H, *on_gpu[1:])
    symmetrize_(H)
    cross_(G, on_gpu[1].clone(), *on_gpu[1:])
    assert torch.equal(G, H)
