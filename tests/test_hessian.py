"""hessian: H += sum w x x^T against double precision, within the bound of hessian.h."""

import numpy as np
import pytest
import torch
from second_moment import RUN, bound, cuda_bound

from distaya_ext.ops import hessian as room
from distaya_ext.ops.hessian import column_sq_, hessian_, symmetrize_

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# tokens, columns: single ones, odd pairs of tokens, every tile edge (12, 24, 48 wide), many squares
SHAPES = [(1, 1), (2, 7), (257, 1), (3, 130), (255, 48), (513, 97), (300, 500)]


def rand(*shape: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def some_weights(kind: str, tokens: int) -> torch.Tensor | None:
    """few: 0, 0.3, 1, 2.7 mixed (languages, padding); many: nearly all different, some 0."""
    if kind == "none":
        return None
    if kind == "few":
        return torch.tensor([0.3, 0.0, 2.7, 1.0])[torch.arange(tokens) * 7 % 4]
    w = torch.rand(tokens, generator=torch.Generator().manual_seed(9))
    w[3::5] = 0
    return w


def check(H: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None) -> None:
    """hessian_ on H: upper triangle within the bound, the rest untouched to the bit."""
    before = H.clone()
    hessian_(H, X, weights)
    error = (H.double() - room.reference(before, X, weights)).triu().abs()
    excess = (error - bound(before, X, weights).triu()).max()
    assert excess <= 0, f"off by {error.max():.3g}, {excess:.3g} over the bound"
    assert torch.equal(H.tril(-1), before.tril(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_double_precision(isa, shape, dtype):
    tokens, columns = shape
    check(rand(columns, columns, seed=1), rand(tokens, columns).to(dtype), None)


@pytest.mark.parametrize("kind", ["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 130, 700])
def test_weights(isa, dtype, kind, tokens):
    check(rand(101, 101, seed=1), rand(tokens, 101).to(dtype), some_weights(kind, tokens))


@pytest.mark.parametrize("kind", ["few", "many"])
def test_tokens_of_weight_zero_may_hold_anything(isa, kind):
    X, weights = rand(333, 60).bfloat16(), some_weights(kind, 333)
    clean, dirty = torch.zeros(60, 60), torch.zeros(60, 60)
    hessian_(clean, X, weights)
    X[weights == 0] = float("nan")
    hessian_(dirty, X, weights)
    assert torch.equal(clean, dirty)
    s = torch.zeros(60)
    column_sq_(s, X, weights)
    assert s.isfinite().all()
    hessian_(dirty, X, torch.zeros(333))
    assert torch.equal(clean, dirty)


def test_weights_of_one_change_nothing(isa):
    X = rand(300, 70).bfloat16()
    plain, ones = torch.zeros(70, 70), torch.zeros(70, 70)
    hessian_(plain, X)
    hessian_(ones, X, torch.ones(300))
    assert torch.equal(plain, ones)


@pytest.mark.parametrize("calls", [1, 64])
@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_262144_tokens_lose_no_accuracy(isa, dtype, mean, calls):
    """Also with a mean, where sums grow without cancelling: 1e-5 of sqrt(H_ii H_jj)."""
    X = rand(262144, 20, mean=mean).to(dtype)
    H = torch.zeros(20, 20)
    for part in X.chunk(calls):
        hessian_(H, part)
    expected = room.reference(torch.zeros(20, 20), X)
    scale = torch.outer(expected.diagonal(), expected.diagonal()).sqrt()
    error = ((H - expected).abs() / scale).max()
    assert error <= 1e-5, f"relative error {error:.3g}"


def test_one_long_fp32_sum_would_lose_accuracy():
    """The reason for promotion: the same sum in one fp32 accumulator misses the line above."""
    X = rand(262144, mean=1.5)
    naive = float(np.cumsum(X.square().numpy(), dtype=np.float32)[-1])
    exact = X.double().square().sum()
    H = torch.zeros(1, 1)
    hessian_(H, X[:, None])
    assert abs(naive - exact) / exact > 20 * abs(H.item() - exact) / exact


@pytest.mark.parametrize("kind", ["none", "many"])
def test_more_tokens_than_the_scratch_holds(kind):
    """36000 x 512 words exceed the packing buffer, so H is visited in several chunks."""
    X, weights = rand(36000, 512, mean=0.5), some_weights(kind, 36000)
    H = torch.zeros(512, 512)
    hessian_(H, X, weights)
    w = torch.ones(1) if weights is None else weights
    left, right = X[:, 250:254].double(), X.double() * w.double()[:, None]
    expected, size = left.t() @ right, left.abs().t() @ right.abs()
    factor = (RUN + 36000 / RUN + 4) * 2.0**-24
    error = (H[250:254] - expected).abs() - factor * size
    assert error[:, 254:].max() <= 0


def test_same_bits_for_any_thread_count(isa):
    for kind in ("none", "few", "many"):
        X, weights = rand(700, 450).bfloat16(), some_weights(kind, 700)
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            H, s = torch.zeros(450, 450), torch.zeros(450)
            hessian_(H, X, weights)
            symmetrize_(H)
            column_sq_(s, X, weights)
            torch.set_num_threads(before)
            results.append(torch.cat([H.flatten(), s]))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_any_alignment_of_rows(isa):
    X = rand(33 * 51 + 1).bfloat16()[1:].view(33, 51)
    assert X.data_ptr() % 4 == 2 and X.is_contiguous()
    check(torch.zeros(51, 51), X, None)


def test_subnormal_inputs_stay_within_the_stated_bound(isa):
    X = (rand(64, 30) * 2.0**-127).bfloat16()
    X[:, 1::2] = rand(64, 15, seed=4).bfloat16()
    H = torch.zeros(30, 30)
    hessian_(H, X)
    size = X.double().abs()
    extra = 2.0**-126 * (1 + size[:, :, None] + size[:, None, :]).sum(0)
    error = (H - room.reference(torch.zeros(30, 30), X)).abs()
    assert (error <= extra + bound(torch.zeros(30, 30), X, None)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_row_and_column_only(isa, dtype, bad):
    X = rand(65, 53).to(dtype)
    X[64, 5] = bad  # the last token, alone in its pair
    H = torch.zeros(53, 53)
    hessian_(H, X)
    tainted = torch.zeros(53, 53, dtype=torch.bool)
    tainted[5, 5:] = tainted[:6, 5] = True
    assert torch.equal(~H.isfinite(), tainted)
    assert H[5, 5].isnan() if bad != bad else H[5, 5] == bad


@pytest.mark.parametrize("kind", ["none", "few", "many"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (700, 531)], ids=str)
def test_column_squares(isa, shape, dtype, kind):
    tokens, columns = shape
    X, weights = rand(tokens, columns, mean=0.3).to(dtype), some_weights(kind, tokens)
    before = rand(columns, seed=2).abs()
    s = before.clone()
    column_sq_(s, X, weights)
    expected = room.reference(before.diag(), X, weights).diagonal()
    assert ((s - expected).abs() <= bound(before.diag(), X, weights).diagonal()).all()


@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 300])
def test_symmetrize(isa, columns):
    H = rand(columns, columns)
    expected = H.triu() + H.triu(1).t()
    symmetrize_(H)
    assert torch.equal(H, expected)


def test_nothing_to_add(isa):
    H, s = rand(4, 4), rand(4)
    before = H.clone(), s.clone()
    for weights in (None, torch.zeros(0)):
        hessian_(H, torch.zeros(0, 4), weights)
        column_sq_(s, torch.zeros(0, 4), weights)
    for weights in (None, torch.ones(7)):
        hessian_(torch.zeros(0, 0), torch.zeros(7, 0), weights)
        column_sq_(torch.zeros(0), torch.zeros(7, 0), weights)
    assert torch.equal(H, before[0]) and torch.equal(s, before[1])


X53, H33 = torch.zeros(5, 3), torch.zeros(3, 3)
REFUSED = {
    "H is 3x3 but X has 4 columns, so H must be 4x4": (H33, torch.zeros(5, 4), None),
    "H is 3x4 but X has 3 columns": (torch.zeros(3, 4), X53, None),
    "H must have 2 dimensions but is float32 .3. on cpu": (torch.zeros(3), X53, None),
    "X must have 2 dimensions": (H33, torch.zeros(1, 5, 3), None),
    "H must be float32 but is float64": (H33.double(), X53, None),
    "X is float64 but must be one of float32, float16, bfloat16": (H33, X53.double(), None),
    "weights has 4 entries but X has 5 tokens": (H33, X53, torch.ones(4)),
    "weights must have 1 dimensions": (H33, X53, torch.ones(5, 1)),
    "weights must be float32 but is float16": (H33, X53, torch.ones(5).half()),
    "X .* is not contiguous": (H33, torch.zeros(3, 5).t(), None),
    "H .* is not contiguous": (torch.zeros(3, 6)[:, ::2], X53, None),
    "weights .* is not contiguous": (H33, X53, torch.ones(10)[::2]),
    r"weights\[2\] is -0.5 but must be finite": (H33, X53, torch.tensor([1, 1, -0.5, 1, 1])),
    r"weights\[1\] is nan": (H33, X53, torch.tensor([1, float("nan"), 1, 1, 1])),
    r"weights\[4\] is inf": (H33, X53, torch.tensor([1, 1, 1, 1, float("inf")])),
    "requires grad": (H33, X53.clone().requires_grad_(), None),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        hessian_(*REFUSED[sentence])
    assert not H33.any()


def test_bad_columns_and_squares_are_refused():
    with pytest.raises(ValueError, match="s has 4 entries but X has 3 columns"):
        column_sq_(torch.zeros(4), X53)
    with pytest.raises(ValueError, match=r"weights\[0\] is -1"):
        column_sq_(torch.zeros(3), X53, -torch.ones(5))
    with pytest.raises(ValueError, match="s must be float32"):
        column_sq_(torch.zeros(3).half(), X53)
    with pytest.raises(ValueError, match="H must be square but is 3x4"):
        symmetrize_(torch.zeros(3, 4))


def test_opcheck_and_compile():
    ops = torch.ops.distaya
    X = rand(6, 5).bfloat16()
    for weights in (None, torch.rand(6)):
        torch.library.opcheck(ops.hessian_syrk_.default, (torch.zeros(5, 5), X, weights))
        torch.library.opcheck(ops.hessian_column_sq_.default, (torch.zeros(5), X, weights))
    torch.library.opcheck(ops.hessian_symmetrize_.default, (rand(5, 5),))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def full(H, X, weights):
        H = H.clone()
        hessian_(H, X, weights)
        symmetrize_(H)
        s = torch.zeros(X.shape[1])
        column_sq_(s, X, weights)
        return H, s

    weights = torch.rand(6)
    H, s = full(torch.zeros(5, 5), X, weights)
    expected = room.reference(torch.zeros(5, 5), X, weights)
    torch.testing.assert_close(H, (expected + expected.triu(1).t()).float())
    torch.testing.assert_close(s, expected.diagonal().float())


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["none", "few", "many"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 200)], ids=str)
def test_cuda_agrees_with_double_precision(shape, dtype, kind):
    tokens, columns = shape
    X, weights = rand(tokens, columns).to(dtype), some_weights(kind, tokens)
    before, squares = rand(columns, columns, seed=1), rand(columns, seed=2).abs()
    expected = room.reference(before, X, weights)
    if weights is not None:
        X[weights == 0] = float("nan")
    on_gpu = [t if t is None else t.cuda() for t in (X, weights)]
    runs = []
    for _ in range(2):
        H, s = before.cuda(), squares.cuda()
        hessian_(H, *on_gpu)
        column_sq_(s, *on_gpu)
        runs.append((H, s))
    H, s = runs[0][0].cpu(), runs[0][1].cpu()
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    X = X.nan_to_num(0)
    assert ((H - expected).triu().abs() <= cuda_bound(before, X, weights).triu()).all()
    assert torch.equal(H.tril(-1), before.tril(-1))
    diagonal = room.reference(squares.diag(), X, weights).diagonal()
    assert ((s - diagonal).abs() <= bound(squares.diag(), X, weights).diagonal()).all()
    symmetrize_(runs[0][0])
    symmetrize_(H)
    assert torch.equal(runs[0][0].cpu(), H)


def test_more_than_2_31_elements():
    """X of 2^31 + 320 elements (4.3 GB of address space; untouched zero pages cost no memory)."""
    columns = 64
    X = torch.zeros(2**31 // columns + 5, columns, dtype=torch.bfloat16)
    X[-1] = 3.0
    s = torch.zeros(columns)
    column_sq_(s, X)
    assert torch.equal(s, torch.full((columns,), 9.0))
    weights = torch.zeros(X.shape[0])
    weights[-2:] = 2.0
    H = torch.zeros(columns, columns)
    hessian_(H, X, weights)  # weight 0: only the last two tokens are read
    assert torch.equal(H.triu(), torch.full((columns, columns), 18.0).triu())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 65])
def test_cuda_more_than_2_31_elements(columns, dtype):
    """The last tokens lie beyond what 32 bits reach; those before them are not read."""
    X = torch.zeros(2**31 // columns + 70, columns, dtype=dtype, device="cuda")
    X[-2:] = 3.0
    weights = torch.zeros(X.shape[0], device="cuda")
    weights[-2:] = 2.0
    s, H = torch.zeros(columns, device="cuda"), torch.zeros(columns, columns, device="cuda")
    column_sq_(s, X, weights)
    hessian_(H, X, weights)
    assert torch.equal(s, torch.full_like(s, 36.0))
    assert torch.equal(H, torch.full_like(H, 36.0).triu())
