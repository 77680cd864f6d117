"""Hessian: the accumulator around hessian_, over batches, weights and strided activations."""

import pytest
import torch

from distaya_ext.ops import hessian as room
from distaya_ext.ops.hessian import Hessian


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_accumulator_over_batches_windows_and_weights():
    X, Y = rand(2, 30, 17).bfloat16(), rand(40, 17, seed=3).bfloat16()
    weights = torch.tensor([0.3, 0.0, 2.7, 1.0]).repeat(15).view(2, 30)
    acc = Hessian(17)
    acc.add(X, weights)
    acc.add(Y)
    assert acc.tokens == 40 + int((weights > 0).sum())
    assert acc.weight == pytest.approx(40 + weights.double().sum().item(), rel=1e-12)
    total = room.reference(torch.zeros(17, 17), X.view(60, 17), weights.view(60))
    expected = room.reference(total, Y) / acc.weight
    torch.testing.assert_close(acc.column_norms(), expected.diagonal().sqrt().float())
    H = acc.finish()
    torch.testing.assert_close(H, (expected + expected.triu(1).t()).float())
    torch.testing.assert_close(acc.column_norms(), expected.diagonal().sqrt().float())
    assert acc.finish() is H and torch.equal(H, H.t())
    with pytest.raises(ValueError, match="finished and takes no more tokens"):
        acc.add(Y)


def test_accumulator_copies_strided_activations():
    wide = rand(8, 20, 24).bfloat16()
    acc, plain = Hessian(12), Hessian(12)
    acc.add(wide[..., ::2], torch.ones(20, 8).t())
    plain.add(wide[..., ::2].contiguous())
    assert torch.equal(acc.finish(), plain.finish())


def test_accumulator_refuses():
    acc = Hessian(6)
    for ask in (acc.finish, acc.column_norms):
        with pytest.raises(ValueError, match=r"no token of positive weight .* of 6 columns"):
            ask()
    with pytest.raises(ValueError, match=r"X of shape \[2, 5\] must have 6 columns"):
        acc.add(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"weights of shape \[3\] do not match X of"):
        acc.add(torch.zeros(2, 6), torch.ones(3))
    with pytest.raises(ValueError, match=r"weights\[0\] is -1"):
        acc.add(torch.zeros(2, 6), -torch.ones(2))
    assert acc.tokens == 0 and not acc.H.any()


@pytest.mark.cuda
def test_cuda_accumulator_finds_bad_weights_without_waiting():
    acc = Hessian(8, "cuda")
    acc.add(rand(4, 8).cuda(), torch.tensor([1.0, -1.0, float("nan"), 2.0]).cuda())
    with pytest.raises(ValueError, match="2 token weights were negative, NaN or infinite"):
        acc.finish()
