"""The maths of one stack, apart from models and files."""

import pytest
import torch

from distaya_ext.compress.report import _losses
from distaya_ext.compress.solve import Figures, output_energy
from distaya_ext.finite import all_finite


def test_output_energy_is_exact_where_it_is_computed():
    """Small matrices in all rows, large ones in evenly spaced rows, NaN (unknown) elsewhere."""
    sizes, columns = [3, 512, 1300], 40
    make = torch.Generator().manual_seed(0)
    W = torch.randn(sum(sizes), columns, generator=make).bfloat16()
    X = torch.randn(200, columns, generator=make)
    H = X.T @ X / 200
    energy = output_energy(W, H, sizes)
    exact = (X.double() @ W.double().T).square().mean(0) / 2
    known = ~energy.isnan()
    assert known[:515].all() and known[515:].nonzero().flatten().tolist() == list(range(0, 1300, 3))
    torch.testing.assert_close(energy[known], exact[known], rtol=1e-5, atol=0)


def test_relative_loss_uses_the_rows_whose_energy_is_known():
    loss = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    energy = torch.tensor([10.0, torch.nan, 30.0], dtype=torch.float64)
    figures = Figures(loss=loss, energy=energy)
    assert _losses(figures, slice(None)) == (9.0, 0.1)
    assert _losses(figures, slice(2, 3)) == (3.0, 0.1)
    assert _losses(Figures(), slice(None)) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_all_finite(dtype, bad):
    x = torch.full((70, 33), torch.finfo(dtype).max, dtype=dtype)
    x[::2] *= -1
    assert all_finite(x) and all_finite(x[:0])
    for place in ((0, 0), (69, 32), (31, 17)):
        spoilt = x.clone()
        spoilt[place] = bad
        assert not all_finite(spoilt)
