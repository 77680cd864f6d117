"""manifest.json: what a folder holds, and that it stays true whatever happens to the folder."""

import hashlib
import json
import os

import pytest
import tiny
from speaking import save_model, save_texts

from distaya_ext import durable, manifest
from distaya_ext.compress import compress
from distaya_ext.errors import InputError
from distaya_ext.finished import complete
from distaya_ext.verify import verify


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    root = tmp_path_factory.mktemp("healthy")
    save_model(root / "model", seed=1)
    save_texts(root / "texts", repeat=8)
    (root / "model" / "README.md").write_text("of the source\n")
    return root


def run(healthy, out, **more):
    recipe = tiny.recipe(calibration={"tokens": 480, "window": 16})
    return compress(healthy / "model", out, recipe, healthy / "texts", **more)


@pytest.fixture
def out(healthy, tmp_path):
    run(healthy, tmp_path / "out")
    return tmp_path / "out"


def read(out):
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def test_every_file_is_in_it_with_size_and_hash(out):
    held = read(out)
    files = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert set(held["files"]) == files and {"model.safetensors", "tokenizer.json"} <= files
    for name, told in held["files"].items():
        data = (out / name).read_bytes()
        digest = hashlib.blake2b(data, digest_size=32).hexdigest()
        assert told == {"size": len(data), "blake2b": digest}, name
    assert held["format"] == 1 and held["created_by"] == "compress"
    assert held["versions"]["distaya_ext"] and held["kernels"]["isa"]


def test_two_runs_differ_only_in_what_tells_times(healthy, tmp_path):
    first, second = tmp_path / "here" / "a", tmp_path / "b"
    run(healthy, first)
    run(healthy, second)
    a, b = read(first), read(second)
    differ = {name for name in a["files"] if a["files"][name] != b["files"][name]}
    assert differ <= {"results.json", "layers.csv", "report.html", "README.md"}
    assert {**a, "files": None} == {**b, "files": None}
    assert str(tmp_path) not in (first / "manifest.json").read_text()


def test_the_input_is_told_by_its_fingerprint(healthy, tmp_path):
    run(healthy, tmp_path / "a")
    other = tiny.recipe(calibration={"tokens": 240, "window": 16})
    compress(healthy / "model", tmp_path / "b", other, healthy / "texts")
    a, b = read(tmp_path / "a")["input"], read(tmp_path / "b")["input"]
    assert a["model"] == b["model"] and "model.safetensors" in a["model"]
    assert a["texts"] != b["texts"] and a["fingerprint"] != b["fingerprint"]


def test_a_result_that_is_added_is_described_and_nothing_else_forgotten(out):
    before = read(out)
    (out / "evaluation.json").write_text("{}\n")
    assert [f.where for f in verify(out).found] == ["evaluation.json"]
    complete(out)
    after = read(out)
    assert "evaluation.json" in after["files"] and verify(out).ok
    for key in ("created_by", "input", "versions"):
        assert after[key] == before[key]
    pages = {"README.md", "report.html"}  # they tell of all results
    for name in before["files"].keys() - pages:
        assert after["files"][name] == before["files"][name]


def test_a_rewrite_that_is_killed_leaves_the_old_one(out, monkeypatch):
    old = (out / "manifest.json").read_bytes()
    (out / "evaluation.json").write_text("{}\n")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.write(out)
    monkeypatch.undo()
    (out / "manifest.json.partial").write_bytes(old[:100])  # SIGKILL cleans nothing up
    assert (out / "manifest.json").read_bytes() == old
    assert [(f.check, f.where) for f in verify(out).found] == [("extra", "evaluation.json")]
    complete(out)
    assert verify(out).ok and not (out / "manifest.json.partial").exists()


def test_links_of_another_folder_are_not_written_through(out, tmp_path):
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in out.iterdir():
        os.link(path, twin / path.name)
    (twin / "evaluation.json").write_text("{}\n")
    complete(twin)
    assert "evaluation.json" not in read(out)["files"] and verify(out).ok and verify(twin).ok


def test_a_readme_that_was_edited_is_kept_and_described(healthy, out):
    (out / "README.md").write_text("mine\n")
    run(healthy, out, overwrite=True)
    assert (out / "README.md").read_text() == "mine\n"
    assert verify(out).ok


def test_files_in_folders_are_named_with_their_folder(out):
    (out / "adapter").mkdir()
    (out / "adapter" / "README.md").write_text("x")
    complete(out)
    assert "adapter/README.md" in read(out)["files"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=2), "has the format 2; this release reads 1"),
        (lambda m: m.update(format="1"), "has the format 1; this release"),
        (lambda m: m.pop("files"), "lists no files"),
        (lambda m: m.update(files=[]), "lists no files"),
        (lambda m: m["files"].update({"../x": {}}), "'../x', which is no file of its folder"),
        (lambda m: m["files"].update({"/x": {}}), "'/x', which is no file of its folder"),
        (lambda m: m["files"].update({"a//b": {}}), "which is no file of its folder"),
        (lambda m: m["files"].update({"x": {"size": 1}}), "does not give size and blake2b of x"),
        (lambda m: m["files"]["config.json"].update(blake2b="0"), "does not give size and blake2b"),
        (lambda m: m["files"]["config.json"].update(size=True), "does not give size and blake2b"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(out, change, words):
    held = read(out)
    change(held)
    (out / "manifest.json").write_text(json.dumps(held))
    with pytest.raises(InputError) as told:
        manifest.read(out)
    assert words in str(told.value)
    (found,) = verify(out, quick=True).found
    assert (found.check, found.where) == ("manifest", "manifest.json")


def test_a_damaged_manifest_is_written_anew(out):
    (out / "manifest.json").write_text('{"format": 1, "format": 1}')
    assert "given twice" in verify(out, quick=True).found[0].what
    complete(out)
    assert verify(out).ok and read(out)["created_by"] is None
