"""Packed buffers and quantised tensors that lie, under hypothesis and the kept corpus.

Nothing here needs a file or a model, so that the sanitizer builds of the kernels can run it all.
"""

import fuzz_packed
import pytest
import torch
from fuzz_checks import examine, prepared_once, replay
from fuzzing import Dice, found_within

from distaya_ext.formats import ModuleScheme

EXAMPLES = 800
TARGETS = {target.name: target for target in fuzz_packed.TARGETS}


@pytest.fixture(scope="module")
def prepared():
    return prepared_once(TARGETS, lambda name: None)


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_come_out(prepared, name):
    examine(prepared(name), EXAMPLES, 64)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_still_holds(prepared, name):
    replay(prepared(name))


def test_every_kind_is_reached_and_most_buffers_are_read(prepared):
    """The undamaged first choice succeeds, so that the kernels behind the checks are reached."""
    kinds = {packed.format.kind for packed in prepared("packed").state}
    assert kinds == set(fuzz_packed.P.KINDS)
    for i, packed in enumerate(prepared("packed").state):
        fuzz_packed._buffer(prepared("packed").state, Dice(bytes([i])))
        data = fuzz_packed.aligned(packed.data.numpy().tobytes())
        assert data.data_ptr() % 64 == 0 and torch.equal(data, packed.data)


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_planted_defects_are_found(prepared, monkeypatch):
    """Without the check of dtypes and shapes tensors that lie reach the decoders."""
    monkeypatch.setattr(ModuleScheme, "check", lambda *args: None)
    assert found_within(prepared("grid"), 3000)
