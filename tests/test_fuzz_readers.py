"""What reads other people's files, under hypothesis and the kept corpus; see fuzzing.py.

tools/fuzz.py runs the same targets by coverage, for as long as one likes.
"""

import resource
import time

import fuzz_folders
import pytest
from fuzz_checks import examine, prepared_once, replay
from fuzzing import Broken, Dice, edited, found_within, guarded, spliced
from hypothesis import given, settings
from hypothesis import strategies as st

import distaya_ext.documents as documents
import distaya_ext.errors as errors
import distaya_ext.recipe_file as recipe_file
from distaya_ext.errors import InputError

EXAMPLES = 320
TARGETS = {target.name: target for target in fuzz_folders.TARGETS}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_once(TARGETS, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_come_out(prepared, name):
    examine(prepared(name), EXAMPLES, 100)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_still_holds(prepared, name):
    replay(prepared(name))


def careless(path):
    """documents.read_lines without its checks."""
    return enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1)


def test_planted_defects_are_found(prepared, monkeypatch):
    """A check taken out is noticed: the guard and the targets are no decoration."""
    with monkeypatch.context() as broken:
        broken.setattr(recipe_file, "_check_shape", lambda text, path: None)
        assert found_within(prepared("recipe"), 3000)
    with monkeypatch.context() as broken:
        broken.setattr(documents, "read_lines", careless)
        assert found_within(prepared("texts"), 3000)
    with monkeypatch.context() as broken:
        broken.setattr(errors, "printable", lambda text: text)
        assert found_within(prepared("index"), 3000)


def test_the_guard_holds_to_everything_it_promises(tmp_path, monkeypatch):
    def refuses(act, word):
        with pytest.raises(Broken, match=word), guarded(tmp_path):
            act()

    def refuse():
        raise InputError("")

    refuses(lambda: (tmp_path / "x").write_text("x"), "wrote")
    refuses(refuse, "no sentence")
    with pytest.raises(KeyError), guarded(tmp_path):
        raise KeyError("x")
    monkeypatch.setattr(time, "monotonic", iter([0.0, 21.0]).__next__)
    refuses(lambda: None, "21 seconds")
    monkeypatch.undo()
    peaks = iter([0, 500 << 10])
    usage = type("Usage", (), {"ru_maxrss": property(lambda self: next(peaks))})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage())
    refuses(lambda: None, "500 MiB")


@given(st.binary(max_size=60))
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
def test_the_same_bytes_make_the_same_damage(data):
    document = {"a": [1, {"b": "c"}], "d": None}
    assert repr(edited(document, Dice(data))) == repr(edited(document, Dice(data)))
    assert document == {"a": [1, {"b": "c"}], "d": None}
    assert spliced(b"some text", Dice(data)) == spliced(b"some text", Dice(data))
