"""A call that must be refused in one sentence."""

import pytest


def refused(kind, call, *words):
    """call() raises `kind` in one sentence that holds all words."""
    with pytest.raises(kind) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence
