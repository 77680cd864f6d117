"""distaya verify: whatever is wrong with a folder is named; a whole one passes, of any format."""

import csv
import json
import shutil

import damage
import pytest
from safetensors import safe_open
from typer.testing import CliRunner
from verified import KINDS, WEIGHTS, build, copy, told

from distaya_ext.cli.app import app
from distaya_ext.errors import InputError
from distaya_ext.verify import verify


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return build(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def folder(folders, tmp_path):
    """A function that copies one of them."""
    return lambda kind, **how: copy(folders / kind, tmp_path / "copy", **how)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- what is whole ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_passes(folders, kind):
    found = verify(folders / kind)
    assert found.ok and found.manifest, found.found
    assert found.looked["files"] >= 6 and found.looked["headers"] and found.looked["tokenizer"] == 1
    if kind in ("dense", "2:4 int4"):
        assert found.looked["patterns"] == 14
    assert bool(found.looked["quantised matrices"]) == (kind not in ("dense", "half", "exported"))


@pytest.mark.parametrize("kind", ["model", "masked", "gptq"])
def test_a_folder_without_a_manifest_passes_and_says_so(folder, kind):
    found = verify(folder(kind))
    assert found.ok and not found.manifest
    assert "there is no manifest.json: nothing says which bytes are right" in found.notes


def test_shards_pass(folder):
    path = folder("model")
    damage.shard(path)
    assert verify(path).ok


def test_a_folder_that_is_not_there():
    with pytest.raises(InputError, match="neither an existing folder nor a hub id"):
        verify("no/such/folder")


# ---- one bit, with a manifest ----


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_in_any_file_and_tensor_is_found(folder, kind):
    path = folder(kind, manifest=True)
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"):
        name = file.relative_to(path).as_posix()
        whole = file.read_bytes()
        for at in places(file):
            flip(file, at)
            assert ("changed", name) in told(path), (name, at)
            file.write_bytes(whole)
    assert verify(path).ok


def places(file):
    """The middle of a file; of weights the header, and a byte of one tensor of each suffix."""
    if file.suffix != ".safetensors":
        return [file.stat().st_size // 2]
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    header.pop("__metadata__", None)
    suffixes = {name.rpartition(".")[2]: spans["data_offsets"] for name, spans in header.items()}
    return [20, *(8 + length + (first + last) // 2 for first, last in suffixes.values())]


def test_quick_sees_sizes_and_headers_but_no_bits(folder):
    path = folder("dense", manifest=True)
    flip(path / WEIGHTS, -1)
    assert told(path, quick=True) == [] and ("changed", WEIGHTS) in told(path)
    with open(path / "LICENSE", "w") as file:
        file.write("free")
    assert told(path, quick=True) == [("extra", "LICENSE")]


def test_missing_and_extra_files_are_named(folder):
    path = folder("masked", manifest=True)
    (path / "languages.csv").unlink()
    (path / "notes.txt").write_text("x")
    (path / "results.json").rename(path / "results.json.partial")
    assert sorted(told(path)) == [
        ("extra", "notes.txt"),
        ("extra", "results.json.partial"),
        ("missing", "languages.csv"),
        ("missing", "results.json"),
    ]


def test_a_link_in_the_place_of_a_file_is_found(folder, tmp_path):
    path = folder("dense", manifest=True)
    (path / "recipe.yaml").rename(tmp_path / "elsewhere")
    (path / "recipe.yaml").symlink_to(tmp_path / "elsewhere")
    assert ("changed", "recipe.yaml") in told(path)


# ---- without a manifest: the structure ----

STRUCTURE = {
    "lost shards": (damage.lose_shards, "structure", "2 of 3 shards are missing"),
    "cut short": (damage.truncate, "structure", "promises"),
    "another depth": (damage.edit_json("config.json", num_hidden_layers=3), "structure", "3 deco"),
    "another width": (damage.edit_json("config.json", hidden_size=64), "structure", "shape"),
    "no tensor": (damage.edit_tensors(lambda t: t.pop("model.norm.weight")), "structure", "norm"),
    "no config": (damage.remove("config.json"), "structure", "no config.json"),
    "no JSON": (damage.write("special_tokens.json", b"{"), "unreadable", "no JSON"),
    "a shard nobody names": (
        lambda path: shutil.copy(path / WEIGHTS, path / "model-00009-of-00009.safetensors"),
        "extra",
        "a shard that nothing names",
    ),
    "another tokenizer": (
        damage.change_tokenizer(lambda t: t["model"]["vocab"].update({"zzz": 4000})),
        "tokenizer",
        "4000",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("hurt", "check", "words"), STRUCTURE.values(), ids=STRUCTURE)
def test_structure_is_checked_without_a_manifest(folder, hurt, check, words):
    path = folder("model")
    hurt(path)
    (found,) = verify(path, quick=True).found
    assert found.check == check and words in found.what


def test_the_index_and_its_total(folder):
    path = folder("model")
    damage.shard(path)
    index = json.loads((path / damage.INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (path / damage.INDEX).write_text(json.dumps(index))
    assert told(path, quick=True) == [("index", damage.INDEX)]


def test_a_plan_that_cannot_be_read(folder):
    path = folder("dense")
    (path / "layers.csv").write_text("module,shape\nx,y\n")
    assert told(path, quick=True) == [("plan", "layers.csv")]


def test_layers_of_another_model_are_no_plan(folder):
    path = folder("dense")
    with open(path / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path / "layers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([row | {"module": "model.layers.7.x"} for row in rows[:1]])
    assert told(path, quick=True) == [("plan", "layers.csv")]


# ---- the command ----


def distaya(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_command_says_that_all_is_well(folders):
    result = distaya(folders / "masked")
    assert result.exit_code == 0 and result.stdout.startswith("masked is whole: ")
    report = json.loads(distaya(folders / "masked", "--json").stdout)
    assert report["ok"] is True and report["found"] == [] and report["manifest"] is True


def test_the_command_lists_twenty_faults_and_counts_the_rest(folder):
    path = folder("dense", manifest=True)
    for number in range(25):
        (path / f"extra-{number:02d}").write_text("x")
    result = distaya(path, "--quick")
    assert result.exit_code == 3 and "and 5 more (--json lists all)" in result.stdout
    assert "extra-19" in result.stdout and "extra-20" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "copy has 25 faults (25 extra), first: extra-00: it is in no manifest" in line
    report = json.loads(distaya(path, "--quick", "--json").stdout)
    assert len(report["found"]) == 25 and report["ok"] is False


def test_nothing_is_written(folder):
    path = folder("gptq", manifest=True)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}
    verify(path)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")} == before


def test_header_and_data_of_safetensors_are_all_looked_at(folders):
    """The places that test flips are tensors that exist."""
    for kind in KINDS:
        with safe_open(folders / kind / WEIGHTS, framework="pt") as file:
            suffixes = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
        assert len(places(folders / kind / WEIGHTS)) == 1 + len(suffixes)
