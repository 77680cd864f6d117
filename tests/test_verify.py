"""distaya verify: whatever is wrong with a folder is named; a whole one passes, of any format."""

import csv
import json
import shutil
from pathlib import Path

import damage
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from speaking import save_model, save_texts
from typer.testing import CliRunner

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import compress
from distaya_ext.errors import InputError
from distaya_ext.export import export
from distaya_ext.finished import complete
from distaya_ext.train.adapter_write import put_adapter
from distaya_ext.train.learned import LowRank
from distaya_ext.verify import verify
from distaya_ext.verify.weights import spare_bits, too_many_kept

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
RECIPES = {
    "dense": {"nm": "2:4"},
    "half": {"sparsity": 0.5},
    "masked": {"sparsity": 0.6, "bits": 4, "group": 32, "embed_bits": 8, "format": "distaya"},
    "2:4 int4": {"nm": "2:4", "bits": 4, "group": 32, "format": "distaya"},
    "int3": {"method": "gptq", "bits": 3, "group": 32, "symmetric": False},
    "pack-quantized": {"method": "gptq", "bits": 4, "group": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every kind."""
    root = tmp_path_factory.mktemp("folders")
    save_model(root / "model", seed=1)
    save_texts(root / "texts", repeat=8)
    for name, fields in RECIPES.items():
        recipe = tiny.recipe(**fields, calibration={"tokens": 480, "window": 16})
        compress(root / "model", root / name, recipe, root / "texts")
    export(root / "pack-quantized", root / "gptq", "gptq")
    export(root / "2:4 int4", root / "exported", "dense")
    shutil.copytree(root / "pack-quantized", root / "adapted")
    low_rank = {Q: LowRank(torch.ones(2, 32), torch.ones(32, 2), 4.0)}
    put_adapter(root / "adapted" / "adapter", low_rank)
    complete(root / "adapted")
    return root


KINDS = [*RECIPES, "gptq", "exported", "adapted"]


@pytest.fixture
def folder(folders, tmp_path):
    """A function that gives a copy of one of them, with its manifest or without."""

    def copy(kind: str, manifest: bool = False) -> Path:
        shutil.copytree(folders / kind, tmp_path / "copy")
        if not manifest:
            (tmp_path / "copy" / "manifest.json").unlink(missing_ok=True)
        return tmp_path / "copy"

    return copy


def told(path, **options):
    return [(found.check, found.where) for found in verify(path, **options).found]


def change(path, name, edit):
    """edit(tensor) in place."""
    tensors = load_file(path / WEIGHTS)
    edit(tensors[name])
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


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


# ---- without a manifest: what can be seen in the numbers ----


def at(row, column, value):
    def edit(tensor):
        tensor[row, column] = value

    return edit


def xor(row, column, bits):
    def edit(tensor):
        tensor[row, column] ^= bits

    return edit


def prune_more(tensor):
    row = tensor[0]
    row[int(row.nonzero()[0])] = 0


def keep_more(tensor):
    tensor[3][tensor[3] == 0] = 0.5


def negative(tensor):
    tensor[0] = -tensor[0]


def first_kept_to_zero(tensor):
    """The code of the zero, 8, in both halves of a byte."""
    tensor[0] = 0x88


NUMBERS = {
    "NaN": ("dense", f"{DOWN}.weight", at(1, 1, float("nan")), "finite", f"{DOWN}.weight"),
    "Inf": ("exported", f"{Q}.weight", at(1, 1, float("inf")), "finite", f"{Q}.weight"),
    "three of four": ("dense", f"{DOWN}.weight", keep_more, "pattern", DOWN),
    "pruned more": ("dense", f"{DOWN}.weight", prune_more, "sparsity", DOWN),
    "pruned less": ("half", f"{DOWN}.weight", at(slice(None), 1, 0.5), "sparsity", DOWN),
    "norm": ("gptq", "model.norm.weight", lambda t: t.fill_(torch.nan), "finite",
             "model.norm.weight"),
    "scale NaN": ("int3", f"{Q}.weight_scale", at(1, 0, float("nan")), "codes", Q),
    "scale below 0": ("pack-quantized", f"{Q}.weight_scale", negative, "codes", Q),
    "gptq scale": ("gptq", f"{Q}.scales", negative, "codes", Q),
    "gptq zero": ("gptq", f"{Q}.qzeros", xor(0, 0, 1), "codes", Q),
    "gptq order": ("gptq", f"{Q}.g_idx", lambda t: t.add_(1), "codes", Q),
    "shape": ("int3", f"{Q}.weight_shape", lambda t: t.add_(1), "codes", Q),
    "mask": ("masked", f"{Q}.weight_mask", xor(5, 2, 1), "codes", Q),
    "code of a zero": ("masked", f"{Q}.weight_values", first_kept_to_zero, "codes", Q),
    "embedding's scale": ("masked", "model.embed_tokens.weight_scale", negative, "codes",
                          "model.embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "tensor", "edit", "check", "where"), NUMBERS.values(), ids=NUMBERS
)
def test_numbers_that_cannot_be_are_found_without_a_manifest(
    folder, kind, tensor, edit, check, where
):
    path = folder(kind)
    change(path, tensor, edit)
    found = told(path)
    assert found[0] == (check, where) and {where} == {each for _, each in found}


def test_a_code_where_the_pattern_has_none_is_found(folder):
    """2:4 int4, with as many kept as before: one of a full group's zeros is kept, and another
    group keeps one less.
    """
    path = folder("2:4 int4")
    checkpoint = open_checkpoint(path, packed=True)
    scheme, grid = checkpoint.stored[DOWN].scheme, checkpoint.grid(DOWN)
    groups = grid.kept()[0].view(-1, 4)
    full = [int(i) for i in (groups.sum(1) == 2).nonzero().flatten()[:2]]
    for group, fewer in zip(full, (True, False), strict=True):
        kept = groups[group].nonzero().flatten() + 4 * group
        zero = (~groups[group]).nonzero().flatten() + 4 * group
        source, target = (zero, kept) if fewer else (kept, zero)
        grid.codes[0, target[0]] = grid.codes[0, source[0]]
    tensors = load_file(path / WEIGHTS)
    tensors |= {f"{DOWN}.{suffix}": t for suffix, t in scheme.encode(grid).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    assert set(told(path)) == {("pattern", DOWN)}, verify(path).found
    assert f"first group {full[1]} of row 0" in verify(path).found[-1].what


def test_spare_bits_are_found(folder, folders):
    """10 rows of 3 bits end in the middle of a word."""
    held = open_checkpoint(folders / "int3", packed=True).stored[Q]
    from dataclasses import replace

    for encoding, suffix, shape, dim in (
        ("pack-quantized", "weight_packed", (4, 1), 1),
        ("pack-quantized", "weight_zero_point", (1, 4), 0),
        ("gptq", "qweight", (1, 4), 0),
        ("gptq", "qzeros", (4, 1), 1),
    ):
        scheme = replace(held.scheme, encoding=encoding)
        small = replace(held, scheme=scheme, rows=10, cols=10)
        word = torch.zeros(shape, dtype=torch.int32)
        word.select(dim, 0)[0] = (1 << 30) - 1  # all that ten values may use
        assert spare_bits(small, {suffix: word}) == []
        word.select(dim, 0)[0] = 1 << 30
        assert spare_bits(small, {suffix: word}) == [suffix]


def test_tied_ends_that_differ_are_found(folder):
    path = folder("dense")
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    assert told(path) == []
    change(path, "lm_head.weight", at(0, 0, 9.0))
    assert told(path) == [("tied", "lm_head.weight")]


def test_adapter_that_is_not_finite_is_found(folder):
    path = folder("adapted")
    weights = path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    assert told(path) == [("adapter", "adapter")]


def test_an_adapter_alone_is_looked_at(folders, tmp_path):
    shutil.copytree(folders / "adapted" / "adapter", tmp_path / "alone")
    complete(tmp_path / "alone", "training")
    found = verify(tmp_path / "alone")
    assert found.ok and found.looked == {"files": 2, "adapter": 1}
    (tmp_path / "alone" / "adapter_model.safetensors").write_bytes(b"")
    assert [c for c, _ in told(tmp_path / "alone")] == ["changed", "adapter"]


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


def test_too_many_kept_counts_both_ways():
    W = torch.tensor([[1.0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0]])
    assert too_many_kept(W, 3, 4) is None
    bad = too_many_kept(W, 2, 4)
    assert (bad.too_many, bad.row, bad.group) == (1, 0, 1)
    bad = too_many_kept(W, 1, 2, "outputs")
    assert (bad.too_many, bad.row, bad.group) == (2, 4, 0)
    assert too_many_kept(torch.ones(3, 5), 1, 4).too_many == 3  # the group of one keeps one


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
