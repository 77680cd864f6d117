"""The journal, the lock and the order in which things reach the disk."""

import errno
import json
import os
import re

import pytest

from distaya_ext import durable
from distaya_ext.chain.journal import WorkFolder
from distaya_ext.errors import InputError, UsageError
from distaya_ext.resume import Held, Journal, Lock, Work, difference
from distaya_ext.resume.identity import MOST_TOLD


def journal(path, count=3):
    made = Journal(path)
    for number in range(count):
        made.append({"kind": "layer", "layer": number, "names": ["ü", 'a"b\n']})
    return made


def layers(made):
    return [record["layer"] for record in made.records]


def test_what_was_appended_is_read(tmp_path):
    made = journal(tmp_path / "j")
    again = Journal(tmp_path / "j")
    assert again.records == made.records and layers(again) == [0, 1, 2] and again.damaged is None
    assert again.records[0]["names"] == ["ü", 'a"b\n']


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, cut):
    journal(tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-cut])
    torn = Journal(tmp_path / "j")
    assert layers(torn) == [0, 1] and torn.damaged is None
    torn.append({"layer": 7})
    assert layers(Journal(tmp_path / "j")) == [0, 1, 7]
    assert all(json.loads(line) for line in (tmp_path / "j").read_text().splitlines())


def test_from_a_damaged_line_on_nothing_is_trusted(tmp_path):
    journal(tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data.replace(b'"layer": 1', b'"layer": 5'))
    found = Journal(tmp_path / "j")
    assert layers(found) == [0] and found.damaged == "line 2 of j is damaged"
    (tmp_path / "j").write_bytes(data.replace(b'"layer": 1', b'"layer"; 1'))
    assert Journal(tmp_path / "j").damaged == "line 2 of j is damaged"


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    made, write = journal(tmp_path / "j"), os.write
    before = (tmp_path / "j").read_bytes()

    def full(handle, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:15])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left.*j'") as caught:
        made.append({"layer": 3})
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "j").read_bytes() == before and layers(made) == [0, 1, 2]
    monkeypatch.undo()
    made.append({"layer": 3})
    assert layers(Journal(tmp_path / "j")) == [0, 1, 2, 3]


def test_a_link_is_no_journal_and_no_lock(tmp_path):
    (tmp_path / "mine").write_text("")
    (tmp_path / "j").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        Journal(tmp_path / "j").append({"layer": 0})
    with pytest.raises(OSError):
        Lock(tmp_path, "j").take()
    assert (tmp_path / "mine").read_text() == ""


def test_the_lock_tells_its_holder(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.take()
    words = rf"another run \(process {os.getpid()}\) is at work in {re.escape(str(tmp_path))}; wait"
    with pytest.raises(UsageError, match=words):
        second.take()
    first.release()
    second.take()
    second.release()


def test_order_on_the_disk(tmp_path, monkeypatch):
    """A file is synced, then named, the folder is synced, then the record appended and synced."""
    seen, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "write")}

    def name_of(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    def fsync(handle):
        seen.append(f"sync {name_of(handle)}")
        real["fsync"](handle)

    def replace(source, target):
        seen.append(f"name {os.path.basename(target)}")
        real["replace"](source, target)

    def write(handle, data):
        seen.append(f"append {name_of(handle)}")
        return real["write"](handle, data)

    with Work(tmp_path / "out") as work:
        work.begin({"a": 1})
        for name, own in (("fsync", fsync), ("replace", replace), ("write", write)):
            monkeypatch.setattr(os, name, own)
        files = {"x": work.keep("x", lambda path: path.write_text("some"))}
        work.commit({"kind": "layer", "files": files})
        monkeypatch.undo()
    folder, file = ".out.compress", "journal.jsonl"
    assert seen == ["sync x.partial", "name x", f"sync {folder}", f"append {file}", f"sync {file}"]
    assert files["x"] == durable.describe(tmp_path / folder / "x") and files["x"]["size"] == 4


def test_what_fails_leaves_nothing_and_what_is_kept_stays(tmp_path):
    with pytest.raises(RuntimeError), Work(tmp_path / "deep" / "out") as work:
        work.begin({"a": 1})
        work.keep("x", lambda path: path.write_text("some"))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), Work(tmp_path / "deep" / "out") as work:
        work.begin({"a": 1})
        work.commit({"kind": "layer", "files": {}})
        raise RuntimeError
    words = "since then a was 1 and is 2; b was not there and is None; --restart"
    with pytest.raises(UsageError, match=words), Work(tmp_path / "deep" / "out") as work:
        work.begin({"a": 2, "b": None})
    with Work(tmp_path / "deep" / "out") as work:
        assert work.begin({"a": 1}) is None and len(work.records) == 1


def test_the_word_of_a_library_for_a_full_disk(tmp_path):
    told = RuntimeError("Error while serializing: I/O error: No space (os error 28)")

    def write(path):
        path.write_text("half")
        raise told

    with pytest.raises(OSError, match="No space left on device") as caught:
        durable.put(tmp_path / "x", write)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["thesis.tex", "layer-00000.safetensors"])
def test_a_folder_that_is_not_ours_is_in_the_way(tmp_path, name):
    (tmp_path / ".out.compress").mkdir()
    (tmp_path / ".out.compress" / name).write_text("mine")
    with pytest.raises(InputError, match=r"\.out\.compress is in the way: it is no folder of a"):
        Work(tmp_path / "out").__enter__()
    assert (tmp_path / ".out.compress" / name).read_text() == "mine"
    (tmp_path / ".out.compress" / "journal.jsonl").write_text("also mine\n")
    with pytest.raises(InputError, match=r"line 1 of journal\.jsonl is damaged in .*; remove"):
        Work(tmp_path / "out").__enter__()
    assert (tmp_path / ".out.compress" / name).read_text() == "mine"


def test_a_file_and_links_are_in_the_way(tmp_path):
    (tmp_path / ".a.compress").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / ".b.compress").symlink_to(tmp_path / "theirs")
    for out in ("a", "b"):
        with pytest.raises(InputError, match="is in the way: it is no folder"):
            Work(tmp_path / out).__enter__()
    (tmp_path / ".c.compress").mkdir()
    (tmp_path / ".c.compress" / "scratch").symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"scratch is in the way: a run of ours makes no links"):
        Work(tmp_path / "c").__enter__()
    assert list((tmp_path / "theirs").iterdir()) == []


def test_every_difference_is_told():
    old = {"recipe": {"nm": "2:4", "seed": 1}, "version": "1"}
    new = {"recipe": {"nm": "1:4", "seed": 2}, "version": "2"}
    assert difference(old, new) == (
        "recipe.nm was '2:4' and is '1:4'; recipe.seed was 1 and is 2; version was '1' and is '2'"
    )
    many = {f"k{number}": number for number in range(MOST_TOLD + 5)}
    assert difference({**many, "z": 0}, {"z": 0}).endswith("is not there (and 5 more)")


@pytest.mark.parametrize("door", [Work, WorkFolder, lambda out: Held(out.parent / ".out.compress")])
@pytest.mark.parametrize("kind", ["another user's", "a link", "a file"])
def test_a_work_folder_that_is_not_ours_is_refused_at_every_door(tmp_path, monkeypatch, door, kind):
    for name in (".out.compress", ".out.chain"):
        place = tmp_path / name
        if kind == "a file":
            place.write_text("mine")
            continue
        real = tmp_path / f"elsewhere{name}"
        real.mkdir()
        (real / "note").write_text("mine")
        place.symlink_to(real) if kind == "a link" else real.rename(place)
    if kind == "another user's":
        tmp_path.chmod(0o777)
        who = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: who + 1)
    with pytest.raises(
        InputError, match="another user" if "user" in kind else "no folder of a run"
    ):
        held = door(tmp_path / "out")
        (held.enter if isinstance(held, Held) else held.__enter__)()
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept and set(kept) == {"mine"}
