"""The OBS room's high-level function, its refusals, its registration and its GPU twin."""

import pytest
import torch
from test_obs import MODES, damped, factor, problem

from distaya_ext.errors import InputError
from distaya_ext.ops import obs as room
from distaya_ext.ops.obs import Quant, obs, quantize, sweep_


class Factor:
    """What ``cholesky`` returns, as far as ``obs`` looks at it."""

    def __init__(self, H):
        self.R = factor(damped(H))


def test_obs_from_a_factor_leaves_its_input():
    W, H = problem(20, 130)
    before = W.clone()
    got = obs(W, factor=Factor(H), nm=(2, 4), quant=Quant(4, 32))
    assert torch.equal(W, before) and got.W.dtype == W.dtype and got.perm is None
    only = obs(W, factor=Factor(H), quant=Quant(4))
    assert only.mask.all()
