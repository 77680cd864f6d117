"""Fuzz targets of what reads whole folders of ours again: verify, manifests, runs that go on."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import fuzz_readers
from fuzzing import Dice, Target, as_json, flipped, guarded, json_file, spliced
from speaking import save_model

from distaya_ext import manifest
from distaya_ext.chain.journal import WorkFolder, place
from distaya_ext.cli.history import history as show
from distaya_ext.recipe import Recipe
from distaya_ext.resume import Work
from distaya_ext.verify import verify


def _result(folder: Path) -> tuple[Path, dict[str, bytes]]:
    from distaya_ext.compress import compress

    model, out = save_model(folder / "model"), folder / "out"
    compress(model, out, Recipe(model="m", method="rtn", bits=4, group=32))
    return out, {path.name: path.read_bytes() for path in out.iterdir()}


def _verify(state: tuple, dice: Dice) -> None:
    out, files = state
    shutil.rmtree(out)
    out.mkdir()
    for name, data in files.items():
        (out / name).write_bytes(data)
    for _ in range(1 + dice.below(3)):
        path = out / dice.choose(sorted(files))
        way = dice.below(8)
        if path.is_dir():
            continue
        if path.is_symlink() or way >= 4:
            path.unlink(missing_ok=True)
        if way == 4:
            path.symlink_to(dice.choose(["nothing", path.name, "config.json", "/"]))
        elif way == 5:
            path.mkdir()
        elif way in (6, 7):
            continue
        elif path.suffix == ".json" and path.exists():
            path.write_bytes(json_file(json.loads(files[path.name]), dice))
        elif path.exists():
            path.write_bytes((flipped if way % 2 else spliced)(path.read_bytes(), dice))
    with guarded(out):
        verify(out, quick=bool(dice.byte() % 2))
    with guarded(out):
        manifest.read(out)


def _kept(folder: Path) -> tuple[Path, bytes]:
    out = folder / "out"
    with Work(out) as work:
        work.begin({"version": "1", "texts": None})
        work.overwrite = True
        file = work.keep("layer-00000.safetensors", lambda path: path.write_bytes(b"x"))
        told = {"layer": 0, "names": ["a"], "held": ["a"], "tensors": {}, "files": {"l": file}}
        work.commit({"kind": "layer", **told})
        journal = (work.root / "journal.jsonl").read_bytes()
        work.clear()
    return out, journal


def _resume(state: tuple, dice: Dice) -> None:
    out, journal = state
    root = out.parent / ".out.compress"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    data = dice.rest() if dice.byte() % 8 == 7 else spliced(journal, dice, (b"\n", b"{}\n", b"\0"))
    (root / "journal.jsonl").write_bytes(data)
    (root / dice.choose(["lock", "layer-00000.safetensors", "x", "scratch"])).write_bytes(b"x")
    with guarded(), Work(out) as work:
        work.begin(
            {"version": dice.choose(["1", "2"]), "texts": None}, restart=bool(dice.byte() % 2)
        )
        assert all(isinstance(record["kind"], str) for record in work.journal.records)


def _chain(folder: Path) -> Path:
    place(folder / "out").mkdir()
    return folder


def _journal(folder: Path, dice: Dice) -> None:
    shutil.rmtree(place(folder / "out"), ignore_errors=True)
    place(folder / "out").mkdir()
    done = {"inputs": {"a": 1}, "fingerprint": "f", "seconds": 1.0}
    whole = {"steps": {"compress": done, "heal": {**done, "seconds": None}}}
    (place(folder / "out") / "steps.json").write_bytes(json_file(whole, dice))
    (place(folder / "out") / "compress").mkdir()
    with guarded(), WorkFolder(folder / "out") as work:
        for step in work.steps:
            work.finished(step)


_RUN = {
    "time": "2030-01-01T00:00:00+00:00", "command": "eval", "version": "1", "model": "m@1",
    "base": "b@2", "recipe": None, "texts": "t", "bytes": 1000, "bits_per_weight": 4.5,
    "seconds": 2.0, "tokens_per_second": 9.0,
    "languages": {"en": {"dnll": 0.1, "ppl_ratio": 1.1, "kl": 0.2, "dnll_interval": [0.0, 0.2]}},
}  # fmt: skip


def _history(folder: Path, dice: Dice) -> None:
    lines = [json_file(_RUN, dice).replace(b"\n", b" ") for _ in range(1 + dice.below(3))]
    (folder / "h.jsonl").write_bytes(b"\n".join([as_json(_RUN), *lines, b""]))
    before = os.environ.get("DISTAYA_HISTORY", "")
    os.environ["DISTAYA_HISTORY"] = str(folder / "h.jsonl")
    try:
        with guarded(folder), contextlib.redirect_stdout(io.StringIO()):
            show(json=bool(dice.byte() % 2))
    finally:
        os.environ["DISTAYA_HISTORY"] = before


TARGETS = [
    *fuzz_readers.TARGETS,
    Target("verify", _result, _verify, slow=8),
    Target("resume", _kept, _resume, slow=2),
    Target("history", lambda folder: folder, _history, slow=4),
    Target("journal", _chain, _journal, slow=2),
]
