"""Packed buffers and quantised tensors that lie, under hypothesis and the kept corpus.

Nothing here needs a file or a model, so that the sanitizer builds of the kernels can run it all.
"""

import fuzz_packed
import pytest
import torch
from fuzzing import Dice, found_within, kept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distaya_ext.formats import ModuleScheme

EXAMPLES = 800
TARGETS = {target.name: target for target in fuzz_packed.TARGETS}


@pytest.fixture(scope="module")
def prepared():
    made = {}

    def prepare(name):
        if name not in made:
            made[name] = TARGETS[name].prepare(None)
        return made[name]

    return prepare


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_come_out(prepared, name):
    target = prepared(name)
    check = settings(
        max_examples=EXAMPLES // target.slow,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    check(given(st.binary(max_size=64))(target.run))()


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_still_holds(prepared, name):
    inputs = kept(name)
    assert inputs
    for data in inputs:
        prepared(name).run(data)


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
