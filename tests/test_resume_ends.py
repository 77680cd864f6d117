"""How a run may end before its time, and goes on: a full disk, a signal, another run."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
import tiny
from typer.testing import CliRunner

from distaya_ext.cli.app import app
from distaya_ext.compress import compress, keep
from distaya_ext.errors import UsageError

RECIPE = {"method": "sparsegpt", "nm": "2:4", "bits": 4, "group": 32}
ROOM = 6 << 20  # bytes of the small disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ends")
    tiny.make(made / "source", tiny.FAMILIES["llama"])
    return made


@pytest.fixture(scope="module")
def forks(folder):
    made = forked.Forks(folder / "answers")
    yield made
    made.close()


@pytest.fixture(scope="module")
def order(folder):
    return {
        "source": folder / "source", "recipe": RECIPE, "windows": 12, "length": tiny.WINDOW,
        "share": 1e9,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(forks, order, folder):
    assert forks.run(out=folder / "whole", **order)["code"] == 0
    return forked.hashes(folder / "whole")


@pytest.fixture(scope="module")
def disk(folder):
    """A file system of a few MiB, in memory."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
        said = done.stderr
    except OSError as error:
        said = str(error)
    if said or not os.path.ismount(place):
        pytest.skip(f"FULL DISKS ARE NOT TESTED HERE: no tmpfs can be mounted ({said.strip()})")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk, free):
    """Leave so many bytes free, however much is there."""
    (disk / "filler").unlink(missing_ok=True)
    room = shutil.disk_usage(disk).free - free
    with open(disk / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, room))


def test_a_full_disk(forks, order, disk, folder):
    """Wherever it is met, from the first byte to the last, the run ends with 5 and one sentence,
    and goes on when there is room.
    """
    order = {**order, "recipe": {"method": "sparsegpt", "quality": "plain"}}
    assert forks.run(out=folder / "dense", **order)["code"] == 0
    whole, seen = forked.hashes(folder / "dense"), set()
    for kib in (0, 8, 120, 220, 300, 420, 470, 520, 700, 840):
        out = disk / f"out{kib}"
        fill(disk, kib << 10)
        told = forks.run(out=out, unchecked=True, **order)
        assert told["code"] == 5, (kib, told)
        assert os.strerror(errno.ENOSPC) in told["sentence"] and "\n" not in told["sentence"]
        assert not out.exists()
        print(f"{kib} KiB free: {told['sentence']} {told['kept']}")
        seen.add(told["kept"][0] if told["kept"] else "nothing")
        if told["kept"]:
            assert "; the same command goes on from there" in told["kept"][0]
            assert not list((disk / f".out{kib}.compress").glob("*.partial")), "half-written"
        else:
            assert forked.beside(out) == [], "nothing is kept and something is left"
        (disk / "filler").unlink()
        again = forks.run(out=out, **order)
        assert again["code"] == 0, again
        assert bool(again["resumed"]) == bool(told["kept"])
        assert forked.hashes(out) == whole and forked.beside(out) == [out.name]
        shutil.rmtree(out)
    for kept in ("nothing", "1 of 3 layers", "2 of 3 layers", "3 of 3 layers"):
        assert any(kept in each for each in seen), f"a disk that is full at {kept} is not tried"


def test_a_disk_that_is_known_to_be_too_small(forks, order, disk):
    """Where it can be told before any work it is: nothing is left."""
    fill(disk, 200 << 10)
    told = forks.run(out=disk / "early", **order)
    assert told["code"] == 5 and "only 0.00 GiB are free there" in told["sentence"]
    assert forked.beside(disk / "early") == []
    (disk / "filler").unlink()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_told_to_stop(forks, order, whole, folder, number, code):
    out = folder / f"stopped{code}"
    told = forks.run(out=out, signal=number, layer=1, **order)
    assert told["code"] == code, told
    words = f"kept in .{out.name}.compress: 1 of 3 layers; the same command goes on from there"
    assert told["kept"] == [words]
    assert not (out.parent / f".{out.name}.compress" / "scratch").exists()
    again = forks.run(out=out, **order)
    assert again["code"] == 0 and again["resumed"] == [1]
    assert forked.hashes(out) == whole and forked.beside(out) == [out.name]


def test_two_processes(forks, order, whole, folder):
    """The second is refused in one sentence with the number of the first, which ends as ever."""
    out, flag = folder / "two", folder / "first-is-there"
    forks.begin(out=out, wait=flag, **order)
    until = time.monotonic() + 60
    while not flag.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    first = (folder / ".two.compress" / "lock").read_text().strip()
    assert Path(f"/proc/{first}/stat").read_text().split()[3] == str(forks.pid)
    for restart in (False, True):
        with pytest.raises(UsageError) as caught:
            recipe = tiny.recipe(**RECIPE)
            compress(folder / "source", out, recipe, tiny.windows(), restart=restart)
        words = f"another run (process {first}) is at work in {folder}/.two.compress; wait for it"
        assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    flag.unlink()
    assert forks.end()["code"] == 0
    assert forked.hashes(out) == whole and forked.beside(out) == ["two"]


# ---- the sentences of the command line ----


def distaya(folder, *more):
    flags = [
        "--out",
        folder / "out",
        "--method",
        "magnitude",
        "--sparsity",
        "0.5",
        "--quiet",
        *more,
    ]
    return CliRunner().invoke(app, [str(a) for a in ["compress", folder / "source", *flags]])


def stop_behind(monkeypatch, layer, error):
    """Have the run end with an error when so many layers are kept."""
    save = keep.Keeper.save

    def watched(self, index):
        save(self, index)
        if index == layer:
            raise error

    monkeypatch.setattr(keep.Keeper, "save", watched)


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (KeyboardInterrupt(), 130, "Interrupted; "),
        (SystemExit(143), 143, "Stopped; "),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), 5,
            "Error: No space left on device (x); ",
        ),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 5, "Error: Disk quota exceeded; "),
        (MemoryError(), 5, "Error: out of memory; "),
    ],
    ids=["interrupt", "terminate", "disk", "quota", "memory"],
)  # fmt: skip
def test_sentences_of_the_command_line(folder, tmp_path, monkeypatch, error, code, start):
    shutil.copytree(folder / "source", tmp_path / "source")
    monkeypatch.setattr(keep, "SHARE", 1e9)
    with monkeypatch.context() as patch:
        stop_behind(patch, 1, error)
        ended = distaya(tmp_path)
    words = "kept in .out.compress: 2 of 3 layers; the same command goes on from there"
    assert ended.exit_code == code and ended.stdout == ""
    assert ended.stderr.strip().rstrip(".") == start + words
    refused = distaya(tmp_path, "--sparsity", "0.6")
    assert refused.exit_code == 2
    assert "recipe.sparsity was 0.5 and is 0.6; --restart begins anew" in refused.stderr
    assert distaya(tmp_path).exit_code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["totals"]["modules"] == 21 and results["totals"]["sparsity"] == 0.5
