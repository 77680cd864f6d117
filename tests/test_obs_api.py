"""The OBS room's high-level function, its refusals, its registration and its GPU twin."""

import pytest
import torch
from test_obs import MODES, damped, factor, problem

from distaya_ext.errors import InputError
from distaya_ext.ops import obs as room
from distaya_ext.ops.cholesky import cholesky
from distaya_ext.ops.obs import Quant, obs, quantize, sweep_


def test_obs_is_factor_and_sweep():
    W, H = problem(20, 130)
    before, H = W.clone(), H.float()
    got = obs(W, H, nm=(2, 4), quant=Quant(4, 32))
    assert torch.equal(W, before) and got.perm is None
    W1 = W.clone()
    swept = sweep_(W1, cholesky(H, 0.01).R, nm=(2, 4), quant=Quant(4, 32))
    assert torch.equal(got.W, W1)
    assert all(torch.equal(a, b) for a, b in zip(got[1:6], swept, strict=True))
    again = obs(W, factor=cholesky(H, 0.01), nm=(2, 4), quant=Quant(4, 32))
    assert torch.equal(again.W, W1)
    assert obs(W, H, quant=Quant(4)).mask.all()
    assert torch.equal(obs(W, H, sparsity=0.0).W, W)


@pytest.mark.parametrize(
    "quant", [None, Quant(4, 0), Quant(4, 32), Quant(4, 32, static=True)], ids=str
)
def test_activation_order(quant):
    """The textbook on explicitly permuted inputs, and the result back in the original order."""
    W, H = problem(12, 130, seed=5)
    sparsity = None if quant else 0.5
    got = obs(W, H.float(), sparsity=sparsity, quant=quant, order="activation")
    perm = torch.argsort(H.diagonal(), descending=True)
    assert torch.equal(got.perm, perm)
    H = damped(H)
    want = None
    if quant is None or not quant.static:
        want = room.reference(W[:, perm], H[perm][:, perm], sparsity=sparsity or 0, quant=quant)
        assert want.clear.any()
        assert torch.equal(got.mask[:, perm][want.clear], want.mask[want.clear])
        if quant:
            assert torch.equal(got.codes[:, perm][want.clear], want.codes[want.clear])
            scales = got.scales[want.clear]
            torch.testing.assert_close(scales, want.scales[want.clear].float(), rtol=1e-4, atol=0)
    else:  # static: grids of the dense weights in the original order, whatever the sweep's order
        scales, zeros = room.grids(W, quant)
        assert torch.equal(got.scales, scales) and torch.equal(got.zeros, zeros)
        spread = (x.repeat_interleave(32, 1)[:, :130] for x in (scales, zeros))
        scale, zero = spread
        assert torch.equal(got.W, scale * (got.codes.float() - zero))
    E = (W - got.W).double()
    torch.testing.assert_close(got.loss, ((E @ H) * E).sum(1) / 2, rtol=1e-4, atol=0)


def test_reference_zeroes_dead_columns():
    """As published: a column whose input never fired gets zero weights and a unit diagonal."""
    W, H = problem(30, 140)
    H[:, 7] = H[7] = 0
    got = obs(W, H.float(), sparsity=0.5, reference=True)
    assert not got.W[:, 7].any() and not got.mask[:, 7].any()
    dead = H.clone()
    dead[7, 7] = 1
    masked = W.clone()
    masked[:, 7] = 0
    want = room.reference(masked, damped(dead), sparsity=0.5, reference=True)
    assert want.clear.all() and torch.equal(got.mask, want.mask)
    assert obs(W, H.float(), sparsity=0.0).W[:, 7].all()  # not as published: nothing is lost


REFUSALS = {
    "two masks": ({"sparsity": 0.5, "nm": (2, 4)}, "sparsity and nm"),
    "nothing": ({}, "nothing to do"),
    "sparsity 1": ({"sparsity": 1.0}, "below 1, not 1"),
    "sparsity -0.1": ({"sparsity": -0.1}, "not -0.1"),
    "sparsity nan": ({"sparsity": float("nan")}, "not nan"),
    "5:4": ({"nm": (5, 4)}, "not 5:4"),
    "1:33": ({"nm": (1, 33)}, "not 1:33"),
    "0:4": ({"nm": (0, 4)}, "not 0:4"),
    "mask shape": ({"mask": torch.ones(8, 19, dtype=torch.bool)}, r"mask .*\[8, 19\]"),
    "mask dtype": ({"mask": torch.ones(8, 20)}, "mask must be bool"),
    "no common block": ({"nm": (1, 3), "quant": Quant(4, 128)}, "3 inputs .* 128 columns"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_options(name):
    options, sentence = REFUSALS[name]
    W, H = problem(8, 20)
    with pytest.raises(ValueError, match=sentence):
        obs(W, H.float(), **options)


def test_refused_tensors():
    W, H = problem(8, 20)
    H, R = H.float(), torch.eye(20)
    wrong = [
        (lambda: obs(W, H[:19, :19], nm=(2, 4)), r"\[19, 19\] does not fit W of 20"),
        (lambda: obs(W, nm=(2, 4)), "either H or factor"),
        (lambda: obs(W[0], H, nm=(2, 4)), r"shape \[20\]"),
        (lambda: obs(W, H, nm=(2, 4), order="activation"), "2:4 groups apart"),
        (lambda: obs(W, H, sparsity=0.5, order="random"), "'random'"),
        (lambda: obs(W.double(), H, nm=(2, 4)), "W is float64"),
        (lambda: obs(W / 0, H, nm=(2, 4)), r"W\[0, 0\] of \[8, 20\] is -?inf, not finite"),
        (lambda: sweep_(W.t(), torch.eye(8), nm=(2, 4)), "not contiguous"),
        (lambda: sweep_(W, R.double(), nm=(2, 4)), "R must be float32"),
        (lambda: sweep_(W, torch.eye(21), nm=(2, 4)), r"R .*\[21, 21\].* does not fit W"),
        (lambda: sweep_(W.clone().requires_grad_(), R, nm=(2, 4)), "requires grad"),
        (lambda: sweep_(W * float("nan"), R, sparsity=0.5), "NaN"),
        (lambda: Quant(9), "bits must be 2 to 8, not 9"),
        (lambda: Quant(4, 48), "not 48"),
        (lambda: Quant(4, scale="max"), "'max'"),
        (lambda: Quant(4, scale_dtype=torch.float64), "not torch.float64"),
        (lambda: quantize(W.int(), Quant(4)), "W is int32"),
    ]
    for call, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(InputError, match="either H or factor"):
        obs(W, H, factor=cholesky(H), nm=(2, 4))


def raw_arguments(device="cpu"):
    W, H = problem(5, 40)
    R = factor(damped(H))
    W, R = W.to(device), R.to(device)
    mask, codes = torch.empty_like(W, dtype=torch.bool), torch.empty_like(W, dtype=torch.uint8)
    scales = torch.empty(5, 2, device=device)
    loss = torch.zeros(5, dtype=torch.float64, device=device)
    return (W, R, mask, codes, scales, scales.clone(), None, loss, "nm", 0.0, False, 2, 4, 4, 32,
            False, False, "float32", True)  # fmt: skip


def test_opcheck():
    torch.library.opcheck(room.obs_, raw_arguments())
    W = torch.randn(4, 40)
    grids = torch.empty(4, 2), torch.empty(4, 2)
    codes = torch.empty_like(W, dtype=torch.uint8)
    torch.library.opcheck(room.quantize_, (W, codes, *grids, 4, 32, False, False, "float32"))


def test_compiles_in_one_graph():
    W, H = problem(9, 150)
    R = factor(damped(H))

    def run(W, R):
        W = W.clone()
        return W, *sweep_(W, R, nm=(2, 4), quant=Quant(4, 64))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(W, R)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(W, R), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (130, 300), (700, 512)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_twin(shape, mode):
    """Same decisions as the CPU in all rows but few: the two round T differently."""
    W, H = problem(*shape)
    R, Wc = factor(damped(H)), W.cuda()
    cpu, gpu = sweep_(W, R, **MODES[mode]), sweep_(Wc, R.cuda(), **MODES[mode])
    for a, b in zip(cpu[:2], gpu[:2], strict=True):
        if a is not None:
            assert (a == b.cpu()).double().mean() > 0.998
    torch.testing.assert_close(gpu.loss.sum().cpu(), cpu.loss.sum(), rtol=1e-3, atol=1e-9)
    E = problem(*shape)[0].double() - Wc.cpu().double()
    exact = ((E @ damped(H)) * E).sum(1) / 2
    torch.testing.assert_close(gpu.loss.cpu(), exact, rtol=1e-4, atol=1e-9)
    if gpu.mask is not None:
        assert not Wc[~gpu.mask].any()
        if "sparsity" in MODES[mode] and "reference" not in MODES[mode]:
            assert (~gpu.mask).sum().item() == int(W.numel() * MODES[mode]["sparsity"])


@pytest.mark.cuda
@pytest.mark.parametrize("quant", [Quant(4, 0), Quant(3, 32, True), Quant(4, 64, scale="mse")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_rounds_alike(quant, dtype):
    W = problem(70, 200)[0].to(dtype)
    for a, b in zip(quantize(W, quant), quantize(W.cuda(), quant), strict=True):
        assert (a == b.cpu()).double().mean() > 0.995


def test_lifted_pivots_are_told_and_H_is_kept():
    """A rank-1 H without damping cannot be factorised as it is; whose H it was decides its fate."""
    W, _ = problem(6, 40)
    x = torch.linspace(1, 2, 40)
    H = torch.outer(x, x)
    kept = H.clone()
    assert obs(W, H, nm=(2, 4), damp=0.0).floored > 0
    assert torch.equal(H, kept)
    healthy = obs(W, H, nm=(2, 4), damp=0.01)
    assert healthy.floored == 0 and torch.equal(H, kept)
    again = obs(W, H, nm=(2, 4), damp=0.01, overwrite_H=True)
    assert torch.equal(again.W, healthy.W) and not torch.equal(H, kept)
