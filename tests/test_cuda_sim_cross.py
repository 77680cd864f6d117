"""cross_ on CUDA, simulated: bounds of hessian.h, and the bits of the simulated hessian_."""

import pytest
import torch
from cuda_sim import build
from cuda_sim.simulator import Simulator
from second_moment import cuda_cross_bound
from test_cuda_sim_hessian import DTYPES, HALVES, KINDS, SHAPES, rand, some_weights

from distaya_ext.ops import hessian as room
from distaya_ext.ops.hessian import CrossMoment, Hessian, cross_, hessian_, symmetrize_

# tokens, rows, columns: one row or column, one panel of rows or a pair and a rest, on and off 16
# bytes on either side
RECTANGLES = [(7, 1, 40), (40, 40, 1), (33, 130, 17), (40, 264, 64), (17, 200, 136), (35, 72, 520)]


def check(
    simulator, G: torch.Tensor, Y: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None
) -> None:
    """cross_ on G within the bound; tokens of weight 0 hold NaN."""
    expected, limit = room.cross_reference(G, Y, X, weights), cuda_cross_bound(G, Y, X, weights)
    if weights is not None:
        Y, X = Y.clone(), X.clone()
        Y[weights == 0], X[weights == 0] = float("nan"), float("nan")
    with simulator.use():
        cross_(G, Y, X, weights)
    error = (G.double() - expected).abs()
    assert (error <= limit).all(), f"off by {error.max():.3g}, limit {limit.max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_double_precision(simulator, shape, dtype):
    tokens, columns = shape
    Y, X = rand(tokens, columns, seed=2).to(dtype), rand(tokens, columns).to(dtype)
    check(simulator, rand(columns, columns, seed=1), Y, X, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RECTANGLES, ids=str)
def test_rectangles(simulator, shape, dtype):
    tokens, rows, columns = shape
    Y, X = rand(tokens, rows, seed=2).to(dtype), rand(tokens, columns).to(dtype)
    for kind in ("none", "mixed"):
        check(simulator, rand(rows, columns, seed=1), Y, X, some_weights(kind, tokens))


@pytest.mark.parametrize("kind", ["none", "sequences"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 150])
def test_of_two_parts_of_an_input_is_a_part_of_its_hessian_to_the_bit(simulator, rows, dtype, kind):
    Z, weights = rand(55, 200).to(dtype), some_weights(kind, 55)
    H, G = torch.zeros(200, 200), torch.zeros(rows, 200 - rows)
    with simulator.use():
        hessian_(H, Z, weights)
        cross_(G, Z[:, :rows].contiguous(), Z[:, rows:].contiguous(), weights)
    assert torch.equal(G, H[:rows, rows:])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40, 51])
def test_weights(simulator, dtype, kind, columns):
    Y, X = rand(230, columns, seed=2).to(dtype), rand(230, columns).to(dtype)
    check(simulator, rand(columns, columns, seed=1), Y, X, some_weights(kind, len(X)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [264, 259])
@pytest.mark.parametrize("columns", [264, 259, 24])
def test_tokens_left_out_where_rows_lie_right_of_columns(simulator, dtype, rows, columns):
    """Y's third panel, of 8 or 3 columns, against X's first: NaN in padding must not get in."""
    Y, X = rand(60, rows, seed=2).to(dtype), rand(60, columns).to(dtype)
    check(simulator, torch.zeros(rows, columns), Y, X, some_weights("sequences", 60))


@pytest.mark.parametrize(
    ("columns", "tokens", "kind"), [(136, 40, "none"), (137, 55, "sequences"), (72, 33, "mixed")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_inputs_is_the_hessian_to_the_bit(simulator, dtype, columns, tokens, kind):
    """So the difference of a dense stream and an equal compressed one is exactly zero."""
    acc, hessian = CrossMoment(columns, columns), Hessian(columns)
    for seed in range(2):
        X, weights = rand(tokens, columns, seed=seed).to(dtype), some_weights(kind, tokens)
        with simulator.use():
            hessian.add(X, weights)
            acc.add(X.clone(), X, weights)
    with simulator.use():
        H = hessian.finish()
    assert torch.equal(acc.finish(), H)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offsets", [(1, 0), (0, 4), (8, 8)], ids=str)
def test_any_alignment_of_rows(simulator, dtype, offsets):
    """C a multiple of 8, Y or X off 16 bytes; G off 8, also where all of a warp's 64 x 64 exist."""
    for rows in (136, 72):
        Y, X = (
            rand(40 * c + o, seed=o).to(dtype)[o:].view(40, c)
            for c, o in zip((rows, 136), offsets, strict=True)
        )
        G = torch.zeros(rows * 136 + 1)[1:].view(rows, 136)
        check(simulator, G, Y, X, some_weights("padded", len(X)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("panels", [(17, 17), (18, 18), (1, 33), (3, 18), (19, 2)], ids=str)
def test_every_tile_once(simulator, dtype, panels):
    """More panels than a group of columns, odd and even. One token of small integers: exact."""
    rows, columns = (n * 128 - 3 for n in panels)
    Y = (torch.arange(rows) % 5 - 2.0).to(dtype)[None]
    X = (torch.arange(columns) % 7 - 3.0).to(dtype)[None]
    G = torch.zeros(rows, columns)
    with simulator.use():
        cross_(G, Y, X, torch.tensor([2.0]))
    assert torch.equal(G, 2 * torch.outer(Y[0].float(), X[0].float()))


def test_more_tokens_than_a_launch_takes(simulator):
    """2^30 of them are made 40: the rest begins with its own tokens and weights."""
    path = "csrc/hessian/hessian_cuda.cu"
    text = (build.ROOT / path).read_text()
    assert text.count("kMost = 1 << 30;") == 1
    split = Simulator(build.build({path: text.replace("kMost = 1 << 30;", "kMost = 40;")}))
    X = rand(97, 24).half()
    for rows in (24, 9):
        Y = rand(97, rows, seed=2).half()
        for kind in ("none", "mixed"):
            check(split, rand(rows, 24, seed=1), Y, X, some_weights(kind, len(X)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_its_row_or_column_only(simulator, dtype):
    Y, X = rand(65, 53, seed=2).to(dtype), rand(65, 53).to(dtype)
    Y[64, 5], X[64, 50] = float("nan"), float("inf")
    tainted = torch.zeros(53, 53, dtype=torch.bool)
    tainted[5], tainted[:, 50] = True, True
    for kind in ("none", "mixed"):
        G = torch.zeros(53, 53)
        with simulator.use():
            cross_(G, Y, X, some_weights(kind, 65))
        assert torch.equal(~G.isfinite(), tainted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_no_check_refuses(simulator, dtype):
    """A NaN weight gives NaN everywhere, a negative one counts as it is, in G as in H."""
    X, weights = rand(64, 24).to(dtype), torch.ones(64)
    for bad in (-0.5, float("nan")):
        weights[20] = bad
        G, H = torch.zeros(24, 24), torch.zeros(24, 24)
        with simulator.use():
            cross_(G, X.clone(), X, weights)
            hessian_(H, X, weights)
            symmetrize_(H)
        if bad == bad:
            assert torch.equal(G, H)
        else:
            assert G.isnan().all()


@pytest.mark.parametrize("kind", ["none", "sequences"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 40), (51, 51), (200, 200), (140, 24), (9, 200)], ids=str)
def test_the_same_bits_under_every_schedule(simulator, dtype, kind, shape):
    rows, columns = shape
    tokens = 40 if rows + columns > 150 else 150
    Y, X = rand(tokens, rows, seed=2).to(dtype), rand(tokens, columns).to(dtype)

    def run():
        G = rand(rows, columns, seed=1)
        cross_(G, Y, X, some_weights(kind, tokens))
        return G

    simulator.same_always(run)
