"""The same command goes on behind the last layer that was kept, unless something has changed."""

import json
import os
import shutil
import sys

import chains
import forked
import pytest
import tiny
from safetensors.torch import load_file, save_file

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import compress, events, keep
from distaya_ext.compress.budget import Needs, least_bytes
from distaya_ext.errors import InputError, UsageError, notes
from distaya_ext.ops import machine
from distaya_ext.resume import Work

AIMED = {"nm": "2:4", "bits": 4, "group": 32}


@pytest.fixture(autouse=True)
def every_layer(monkeypatch):
    """Layers of these models take less time than the disk: keep all of them nevertheless."""
    monkeypatch.setattr(keep, "SHARE", 1e9)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("model") / "source", tiny.FAMILIES["cohere2"])


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Hashes of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(source, out, tiny.recipe(**AIMED), tiny.windows())
    return forked.hashes(out)


def stopped(source, out, layer=2, recipe=None, texts=None):
    """A run that is interrupted when a layer is done (and not kept); its work folder."""

    def stop(event):
        if isinstance(event, events.LayerDone) and event.layer == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        compress(
            source, out, recipe or tiny.recipe(**AIMED), texts or tiny.windows(), on_event=stop
        )
    work = out.parent / f".{out.name}.compress"
    words = f"kept in {work.name}: {layer} of 4 layers; the same command goes on from there"
    assert notes(caught.value) == [words]
    return work


def again(source, out, recipe=None, **more):
    """(layers kept from before, layers done, notices) of the same command."""
    seen = []
    compress(
        source, out, recipe or tiny.recipe(**AIMED), tiny.windows(), on_event=seen.append, **more
    )
    resumed = [e.done for e in seen if isinstance(e, events.Resumed)]
    done = [e.layer for e in seen if isinstance(e, events.LayerDone)]
    return resumed, done, [e.message for e in seen if isinstance(e, events.Notice)]


def test_layers_that_are_kept_are_not_computed_again(source, whole, tmp_path):
    out = tmp_path / "out"
    work = stopped(source, out)
    assert sorted(path.name for path in work.iterdir()) == [
        "dense-00000-00000.bin", "dense-00001-00000.bin",
        "hidden-00000-00000.bin", "hidden-00001-00000.bin", "journal.jsonl",
        "layer-00000.safetensors", "layer-00001.safetensors", "lock",
        "state-00000.json", "state-00001.json",
    ]  # fmt: skip
    resumed, done, _ = again(source, out)
    assert (resumed, done) == ([2], [2, 3])
    assert forked.hashes(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_where_the_model_and_the_texts_lie_and_the_memory_decide_nothing(source, whole, tmp_path):
    stopped(source, tmp_path / "out")
    shutil.copytree(source, tmp_path / "moved")
    limit = least_bytes(open_checkpoint(source), Needs(twin=True))
    recipe = tiny.recipe(**AIMED, max_ram=f"{limit}B")
    resumed, done, told = again(tmp_path / "moved", tmp_path / "out", recipe)
    assert (resumed, done) == ([2], [2, 3])
    assert any("wait on disk" in message for message in told)
    name = "model.safetensors"
    assert forked.hashes(tmp_path / "out")[name] == whole[name]


def test_a_changed_recipe_shows_every_difference(source, whole, tmp_path):
    work = stopped(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"}
    changed = tiny.recipe(**{**AIMED, "group": 64}, calibration={"seed": 5})
    with pytest.raises(UsageError) as caught:
        compress(source, tmp_path / "out", changed, tiny.windows())
    assert "\n" not in str(caught.value)
    for words in (
        f"{work} holds a run that was stopped, and since then",
        "recipe.group was 32 and is 64",
        "recipe.calibration.seed was 0 and is 5",
        "--restart begins anew",
    ):
        assert words in str(caught.value)
    assert notes(caught.value) == []
    after = {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"}
    assert after == before, "what was kept is touched by a refusal"
    assert again(source, tmp_path / "out")[0] == [2]
    assert forked.hashes(tmp_path / "out") == whole


def test_changed_texts_model_version_and_kernels(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(source, out)

    def refused(words, model=source, texts=None):
        with pytest.raises(UsageError, match=words):
            compress(model, out, tiny.recipe(**AIMED), texts or tiny.windows())

    texts = tiny.windows()
    texts.ids[3, 5] += 1
    refused(
        r"since then texts was 'windows \w{16}' and is 'windows \w{16}'; --restart", texts=texts
    )
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "more": tensors["model.norm.weight"].clone()}, other / "x.safetensors")
    refused(r"model\.x\.safetensors was not there and is '\d+ bytes, \w+'", model=other)
    (other / "x.safetensors").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "logit_scale": 0.5}))
    refused(r"model\.config\.json was '\d+ bytes, \w+' and is '\d+ bytes, \w+'", model=other)
    with monkeypatch.context() as patch:
        module = sys.modules["distaya_ext.compress.identity"]  # the package offers compress()
        patch.setattr(module, "__version__", "99.0")
        refused(r"version was '\S+' and is '99\.0'")
    if machine.best_isa() != "portable":
        with machine.use_isa("portable"):
            refused(r"kernels\.isa was '\w+' and is 'portable'")
    assert again(source, out)[0] == [2]


def test_restart_begins_anew_and_not_before_the_run_could_start(source, tmp_path):
    work = stopped(source, tmp_path / "out")
    changed = tiny.recipe(**{**AIMED, "group": 64})
    bad = tiny.windows()
    bad.ids[0, 0] = 10_000
    with pytest.raises(InputError, match="10000"):
        compress(source, tmp_path / "out", changed, bad, restart=True)
    assert (work / "layer-00001.safetensors").exists()
    assert again(source, tmp_path / "out", changed, restart=True)[:2] == ([], [0, 1, 2, 3])
    compress(source, tmp_path / "straight", changed, tiny.windows())
    assert forked.hashes(tmp_path / "out") == forked.hashes(tmp_path / "straight")


@pytest.mark.parametrize(
    ("file", "first", "damage"),
    [
        ("hidden-00001-00000.bin", 1, "one bit"),  # those of the layer before are still there
        ("dense-00001-00000.bin", 1, "gone"),
        ("state-00001.json", 1, "cut"),
        ("layer-00001.safetensors", 1, "one bit"),
        ("layer-00001.safetensors", 1, "link"),
        ("layer-00000.safetensors", 0, "cut"),  # and those of the layer before that are not
    ],
)
def test_a_damaged_file_is_not_trusted(source, whole, tmp_path, file, first, damage):
    work = stopped(source, tmp_path / "out")
    path, data = work / file, bytearray((work / file).read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "one bit":
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    if damage == "link":
        path.symlink_to(source / "config.json")
        with pytest.raises(InputError, match="a run of ours makes no links"):
            again(source, tmp_path / "out")
        path.unlink()
    resumed, done, told = again(source, tmp_path / "out")
    assert (resumed, done) == ([first] if first else [], list(range(first, 4)))
    words = "some of what was kept in .out.compress is not what it was; done again from layer"
    assert f"{words} {first + 1} of 4" in told
    assert forked.hashes(tmp_path / "out") == whole


def test_damaged_journals(source, whole, tmp_path):
    for number, (old, new, first, aloud) in enumerate(
        [
            (b"}\n", b"", 1, False),  # its last line, torn
            (b'"layer": 1', b'"layer": 3', 1, True),
            (b'"layer": 0', b'"layer": 1', 0, True),
        ]
    ):
        out = tmp_path / f"out{number}"
        journal = stopped(source, out) / "journal.jsonl"
        before, _, behind = journal.read_bytes().rpartition(old)
        journal.write_bytes(before + new + behind)
        resumed, done, told = again(source, out)
        assert (resumed, done) == ([first] if first else [], list(range(first, 4)))
        assert any("of journal.jsonl is damaged)" in message for message in told) == aloud
        assert forked.hashes(out) == whole


def test_shards_that_are_full_are_kept_and_a_damaged_one_is_made_again(
    source, tmp_path, monkeypatch
):
    real = keep.Shards.__init__
    small = lambda self, work, size: real(self, work, 150_000)  # noqa: E731
    monkeypatch.setattr(keep.Shards, "__init__", small)
    recipe = tiny.recipe(quality="plain")
    compress(source, tmp_path / "straight", recipe, tiny.windows())
    expected = forked.hashes(tmp_path / "straight")
    assert sum(name.endswith(".safetensors") for name in expected) > 3
    for name in ("part-00000", "part-00001"):
        work = stopped(source, tmp_path / name, layer=3, recipe=recipe)
        full = [path.name for path in work.glob("part-*")]
        assert len(full) >= 2
        # A layer of which every tensor is in a full shard is not there a second time.
        assert not (work / "layer-00000.safetensors").exists()
        data = (work / f"{name}.safetensors").read_bytes()
        (work / f"{name}.safetensors").write_bytes(data[:-1] + b"?")
        resumed, done, told = again(source, tmp_path / name, recipe)
        assert any("is not what it was; done again" in message for message in told)
        if name == "part-00000":  # its layers were nowhere else
            assert resumed == [] and done == [0, 1, 2, 3]
        assert forked.hashes(tmp_path / name) == expected
    stopped(source, tmp_path / "out", layer=3, recipe=recipe)
    assert again(source, tmp_path / "out", recipe)[:2] == ([3], [3])
    assert forked.hashes(tmp_path / "out") == expected


def test_keeping_takes_its_share_of_the_time_only(source, whole, tmp_path, monkeypatch):
    """Without any share the first layer of a run is kept, and the last, whose streams are not."""
    monkeypatch.setattr(keep, "SHARE", 0.0)
    saved, save = [], keep.Keeper.save
    monkeypatch.setattr(keep.Keeper, "save", lambda self, k: (saved.append(k), save(self, k)))
    compress(source, tmp_path / "out", tiny.recipe(**AIMED), tiny.windows())
    assert saved == [0, 3] and forked.hashes(tmp_path / "out") == whole
    with pytest.raises(KeyboardInterrupt) as caught:
        compress(
            source, tmp_path / "b", tiny.recipe(**AIMED), tiny.windows(),
            on_event=lambda e: interrupt(e, 2),
        )  # fmt: skip
    assert "1 of 4 layers" in notes(caught.value)[0]
    assert again(source, tmp_path / "b")[:2] == ([1], [1, 2, 3]), "layer 2 is done again"
    assert forked.hashes(tmp_path / "b") == whole


def interrupt(event, layer):
    if isinstance(event, events.LayerDone) and event.layer == layer:
        raise KeyboardInterrupt


def test_streams_that_wait_on_disk_are_not_written_twice(source, whole, tmp_path, monkeypatch):
    limit = least_bytes(open_checkpoint(source), Needs(twin=True))
    recipe, links = tiny.recipe(**AIMED, max_ram=f"{limit}B"), []
    save = keep.Keeper.save

    def watched(self, layer):
        save(self, layer)
        links.extend(path.stat().st_nlink for path in self.work.root.glob("hidden-*"))

    monkeypatch.setattr(keep.Keeper, "save", watched)
    compress(source, tmp_path / "out", recipe, tiny.windows())
    assert 2 in links
    stopped(source, tmp_path / "again", recipe=recipe)
    assert again(source, tmp_path / "again", recipe)[0] == [2]
    name = "model.safetensors"
    assert forked.hashes(tmp_path / "again")[name] == whole[name]


def test_what_is_kept_takes_no_more_disk_than_is_said(source, tmp_path, monkeypatch):
    most, texts = [], tiny.windows(40)
    put = Work.keep

    def watched(self, name, write):
        found = put(self, name, write)
        most.append(self.nbytes)
        return found

    monkeypatch.setattr(Work, "keep", watched)
    report = compress(source, tmp_path / "out", tiny.recipe(**AIMED), texts)
    checkpoint = open_checkpoint(source)
    needs, output = Needs(twin=True), report.file_bytes
    said = keep.most_bytes(checkpoint, texts.ids.numel(), needs, 1 << 30, output)
    small = sum(len(json.dumps(keep.dump_report(report))) for _ in range(3))  # journal, state
    print(f"most {max(most)}, said {output + said} and the report three times {small}")
    assert 0.6 * (output + said) < max(most) <= output + said + 2 * small


def test_killed_behind_the_last_rename(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Work, "remove", lambda self: None)
        first = compress(source, out, tiny.recipe(**AIMED), tiny.windows())
    assert (tmp_path / ".out.compress").exists()
    seen = []
    report = compress(source, out, tiny.recipe(**AIMED), tiny.windows(), on_event=seen.append)
    assert not seen and report.summary() == first.summary()
    assert forked.hashes(out) == whole and os.listdir(tmp_path) == ["out"]


def test_another_command_behind_the_last_rename_is_told_of_the_output(
    source, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Work, "remove", lambda self: None)
        compress(source, tmp_path / "out", tiny.recipe(**AIMED), tiny.windows())
    other = tiny.recipe("magnitude")
    with pytest.raises(InputError, match="out is not empty"):
        compress(source, tmp_path / "out", other)
    assert forked.hashes(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]
    compress(source, tmp_path / "out", other, overwrite=True)
    assert forked.hashes(tmp_path / "out") != whole


def test_an_older_result_that_was_put_aside_comes_back(source, tmp_path):
    """Killed between the two renames of --overwrite, and then asked for something else."""
    out = tmp_path / "out"
    compress(source, out, tiny.recipe("magnitude"))
    older = forked.hashes(out)
    work = stopped(source, tmp_path / "new")
    work.rename(tmp_path / ".out.compress")
    out.rename(tmp_path / ".out.compress" / "replaced")
    with pytest.raises(UsageError, match="holds a run that was stopped"):
        compress(source, out, tiny.recipe("wanda"), tiny.windows(), overwrite=True)
    assert forked.hashes(out) == older


def test_a_chain_goes_on_inside_its_compression(tmp_path):
    model, texts = chains.shallow(tmp_path / "source"), chains.texts(tmp_path / "calib")
    evaluate = {"path": str(chains.texts(tmp_path / "held", "evaluation")), "window": 32}
    recipe = chains.recipe(model, texts, drop_layers=[], evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt) as caught:
        compress(model, tmp_path / "out", recipe, on_event=lambda e: interrupt(e, 1))
    words = "kept in .out.chain: compress so far; the same command goes on from there"
    assert notes(caught.value) == [words]
    seen = []
    compress(model, tmp_path / "out", recipe, on_event=seen.append)
    assert [e.done for e in seen if isinstance(e, events.Resumed)] == [1]
    compress(model, tmp_path / "straight", recipe)
    assert chains.hashes(tmp_path / "out") == chains.hashes(tmp_path / "straight")
    assert not list(tmp_path.glob(".*"))
