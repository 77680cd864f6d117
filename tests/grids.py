"""Random quantised matrices, and what is expected of a refusal."""

import pytest
import torch

from distaya_ext.errors import InputError
from distaya_ext.formats import Grid


def grid_of(seed, rows, cols, width, group, symmetric, dtype=torch.bfloat16, pruned=0.0, low=0):
    """A random grid; zeros of at least `low`, a share of the weights pruned."""
    make = torch.Generator().manual_seed(seed)
    shape = (rows, -(-cols // group) if group else 1)
    codes = torch.randint(0, 1 << width, (rows, cols), generator=make, dtype=torch.uint8)
    scales = torch.rand(shape, generator=make).to(dtype)
    zeros = None
    if not symmetric:
        zeros = torch.randint(low, 1 << width, shape, generator=make, dtype=torch.uint8)
    grid = Grid(codes, scales, zeros, width, group)
    gone = torch.rand((rows, cols), generator=make) < pruned
    codes[gone] = (codes - grid.centred()).to(torch.uint8)[gone]  # their zero
    return grid


def same(a, b):
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    assert a.scales.dtype == b.scales.dtype and (a.bits, a.group) == (b.bits, b.group)
    assert (a.zeros is None) == (b.zeros is None)
    assert a.zeros is None or torch.equal(a.zeros, b.zeros)


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    assert all(word in sentence for word in words), sentence


def standard(**weights):
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**args, **weights}}},
    }  # fmt: skip
