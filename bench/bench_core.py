"""What it costs to call a kernel at all: four tensors across the border, next to torch's call."""

import torch

from distaya_ext.ops import machine


def test_border_four_tensors(benchmark):
    """Borrow four tensors, check them, return: must stay under 0.5 us (min column)."""
    tensors = [torch.zeros(64, 64) for _ in range(4)]
    benchmark(machine.touch, *tensors)


def test_ruler_torch_add_out(benchmark):
    """The cheapest torch call with three tensors, on 1 element."""
    a, b, out = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    benchmark(torch.add, a, b, out=out)
