"""What verify sees in the numbers of a folder alone, where no manifest says which are right."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from verified import DOWN, WEIGHTS, Q, build, change, copy, told

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.finished import complete
from distaya_ext.verify import verify
from distaya_ext.verify.weights import spare_bits, too_many_kept


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return build(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def folder(folders, tmp_path):
    """A function that copies one of them."""
    return lambda kind, **how: copy(folders / kind, tmp_path / "copy", **how)


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


def test_too_many_kept_counts_both_ways():
    W = torch.tensor([[1.0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0]])
    assert too_many_kept(W, 3, 4) is None
    bad = too_many_kept(W, 2, 4)
    assert (bad.too_many, bad.row, bad.group) == (1, 0, 1)
    bad = too_many_kept(W, 1, 2, "outputs")
    assert (bad.too_many, bad.row, bad.group) == (2, 4, 0)
    assert too_many_kept(torch.ones(3, 5), 1, 4).too_many == 3  # the group of one keeps one
