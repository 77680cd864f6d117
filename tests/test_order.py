"""Orders of the sweep: what moves where, that the sweep is the textbook's on permuted columns, and
that the error falls on the spectra it is for."""

import pytest
import syncs
import torch
from test_obs import damped, problem
from test_refit_admm import power_law

from distaya_ext.compress.refine import refined
from distaya_ext.compress.settings import Settings
from distaya_ext.errors import InputError
from distaya_ext.ops import obs as room
from distaya_ext.ops.cholesky import cholesky_late
from distaya_ext.ops.obs import Quant, obs
from distaya_ext.ops.order import permutation

WAYS = {
    "group": {"nm": (2, 4)},
    "group 4:8": {"nm": (4, 8)},
    "block": {"sparsity": 0.5},
}
QUANTS = [None, Quant(4, 0), Quant(4, 32), Quant(4, 32, static=True)]


def expected(W: torch.Tensor, H: torch.Tensor, way: str) -> torch.Tensor:
    """The order by loops in float64: groups or blocks, and what stays where it is."""
    W, cost = W.double(), H.diagonal().double()
    cols = W.shape[1]
    nm, share = WAYS[way].get("nm"), WAYS[way].get("sparsity")
    width = nm[1] if nm else 128
    keyed = []
    for first in range(0, cols, width):
        columns = torch.arange(first, min(first + width, cols))
        losses = W[:, columns] ** 2 * cost[columns]
        gone = torch.zeros_like(losses, dtype=torch.bool)
        if nm:
            gone.scatter_(1, losses.argsort(1)[:, : nm[1] - nm[0]], True)
        else:
            gone.view(-1)[losses.flatten().argsort()[: int(losses.numel() * share)]] = True
        lost = (losses * gone).sum(0)
        if not nm:
            columns = columns[lost.argsort(descending=True, stable=True)]
        keyed.append((float(lost.sum()) if len(columns) == width else -1.0, columns))
    keyed.sort(key=lambda x: -x[0])
    return torch.cat([columns for _, columns in keyed])


@pytest.mark.parametrize("cols", [4, 127, 128, 130, 384, 500])
@pytest.mark.parametrize("way", WAYS)
def test_what_moves_where(way, cols, isa):
    W, H = problem(9, cols, seed=4)
    got = permutation(way.split()[0], W, H.float(), WAYS[way].get("nm"), WAYS[way].get("sparsity"))
    assert torch.equal(got, expected(W, H.float(), way))


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_textbook_on_permuted_columns(way, quant):
    """As obs in natural order of W[:, perm], and back; static grids stay those of the dense W."""
    W, H = problem(12, 260, seed=5)
    H = H.float()
    got = obs(W, H, order=way.split()[0], quant=quant, **WAYS[way])
    perm = expected(W, H, way)
    assert torch.equal(got.perm, perm) and not torch.equal(perm, torch.arange(260))
    there = obs(W[:, perm], H[perm][:, perm], quant=quant, **WAYS[way])
    again = obs(W, H, order=perm, quant=quant, **WAYS[way])
    assert all(x is y or torch.equal(x, y) for x, y in zip(got[:-1], again[:-1], strict=True))
    if quant is None or not (quant.group and quant.static):
        assert torch.equal(got.W[:, perm], there.W) and torch.equal(got.mask[:, perm], there.mask)
        assert got.scales is None or torch.equal(got.scales, there.scales)
    else:
        scales, zeros = room.grids(W, quant)
        assert torch.equal(got.scales, scales) and torch.equal(got.zeros, zeros)
        spread = (x.repeat_interleave(32, 1)[:, :260] for x in (scales, zeros))
        scale, zero = spread
        assert torch.equal(got.W, scale * (got.codes.float() - zero))
    if "nm" in WAYS[way]:
        n, m = WAYS[way]["nm"]
        whole = 260 // m * m
        assert bool((got.mask[:, :whole].view(12, -1, m).sum(2) == n).all())
    else:
        assert int((~got.mask).sum()) == int(12 * 260 * 0.5)
    E = (W - got.W).double()
    exact = ((E @ damped(H.double())) * E).sum(1) / 2
    torch.testing.assert_close(got.loss, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(dtype):
    W, H = problem(9, 140)
    W = W.to(dtype)
    for way, order in (("group", "group"), ("block", "block")):
        wide = obs(W.float(), H.float(), order=order, **WAYS[way])
        got = obs(W, H.float(), order=order, **WAYS[way])
        assert torch.equal(got.perm, wide.perm) and torch.equal(got.W, wide.W.to(dtype))


@pytest.mark.parametrize("power", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("way", ["group", "block"])
def test_less_error_on_power_laws(way, power):
    """Inputs of unequal size in a random basis: what the order is for (arXiv 2603.05878)."""
    make = torch.Generator().manual_seed(1)
    W = torch.randn(96, 512, generator=make) * torch.exp(0.5 * torch.randn(96, 512, generator=make))
    size = torch.exp(0.4 * torch.randn(512, generator=make))
    H = power_law(512, power) * size * size[:, None]
    natural, ordered = (obs(W, H, order=o, **WAYS[way]).loss.sum() for o in ("natural", way))
    assert ordered < 0.998 * natural


def test_a_given_mask_may_follow_the_order_of_an_earlier_sweep():
    W, H = problem(10, 260)
    first = obs(W, H.float(), nm=(2, 4), order="group")
    again = obs(W, H.float(), mask=first.mask, order=first.perm)
    assert torch.equal(again.W, first.W) and torch.equal(again.mask, first.mask)


@pytest.mark.parametrize("quality", ["default", "high"])
@pytest.mark.parametrize("way", ["group", "block"])
def test_both_sweeps_of_a_refined_matrix_follow_it(way, quality):
    """Pruned, refitted and rounded with grids of the dense columns, as packed formats want them."""
    W, H = problem(10, 260)
    H = H.float()
    pattern = {"sparsity": None, "nm": None} | WAYS[way]
    how = {"bits": 4, "group": 32, "symmetric": False, "scale": "minmax", "static": True}
    settings = Settings("sparsegpt", **pattern, **how, order=way, damp=0.01, quality=quality)
    got = refined(W, W, H, cholesky_late(H, 0.01), settings)
    assert torch.equal(got.perm, permutation(way, W, H, settings.nm, settings.sparsity))
    scale, zero = (x.repeat_interleave(32, 1)[:, :260] for x in (got.scales, got.zeros))
    assert torch.equal(got.W, scale * (got.codes.float() - zero)) and not got.W[~got.mask].any()
    plain = obs(W, H, quant=Quant(4, 32, static=True), **WAYS[way])
    assert got.loss.sum() < plain.loss.sum()


def test_the_same_for_any_number_of_threads(threads):
    W, H = problem(70, 300)
    torch.set_num_threads(3 - threads)
    other = [permutation(o, W, H.float(), (2, 4), 0.5) for o in ("group", "block")]
    torch.set_num_threads(threads)
    here = [permutation(o, W, H.float(), (2, 4), 0.5) for o in ("group", "block")]
    assert all(torch.equal(a, b) for a, b in zip(here, other, strict=True))


def test_nothing_waits_for_the_device():
    W, H = problem(9, 260)
    H = H.float()
    with syncs.Recorder() as recorder:
        for order in ("group", torch.arange(260)):
            obs(W, H, nm=(2, 4), order=order, later=lambda factor: None)
        obs(W, H, sparsity=0.5, order="block", later=lambda factor: None)
    assert recorder.found == []


def test_edges():
    W, H = problem(3, 5)
    assert torch.equal(permutation("group", W[:, :3].contiguous(), H[:3, :3].float(), (2, 4), None),
                       torch.arange(3))  # fmt: skip
    assert torch.equal(permutation("group", W, H.float(), (4, 4), None), torch.arange(5))
    assert permutation("group", W[:0], H.float(), (2, 4), None) is None
    dead = obs(W, torch.zeros(5, 5), nm=(2, 4), order="group")
    assert torch.equal(dead.perm, torch.arange(5))  # nothing to lose: ties keep their order


def test_refused():
    W, H = problem(8, 20)
    H = H.float()
    wrong = [
        ({"sparsity": 0.5, "order": "group"}, "moves whole N:M groups, so it needs nm"),
        ({"nm": (2, 4), "order": "block"}, "needs a sparsity > 0"),
        ({"quant": Quant(4), "order": "block"}, "needs a sparsity > 0"),
        ({"nm": (2, 4), "order": "random"}, "natural, activation, group, block, not 'random'"),
        ({"nm": (2, 4), "order": torch.arange(19)}, r"int64 \[20\] on cpu, not int64 \[19\]"),
        ({"nm": (2, 4), "order": torch.arange(20.0)}, r"not float32 \[20\] on cpu"),
        ({"nm": (2, 4), "order": torch.zeros(20).long()}, "every column of 0 to 19 once"),
    ]
    for options, sentence in wrong:
        with pytest.raises(InputError, match=sentence):
            obs(W, H, **options)
    for order in ("group", torch.arange(20)):
        with pytest.raises(InputError, match="needs H: the factor depends on the order"):
            obs(W, factor=object(), nm=(2, 4), order=order)
