"""The same input gives the same bits: run to run, for any number of threads, and where a room says
so on every instruction set. A whole compression writes the same bytes again.
"""

import csv
import hashlib
from pathlib import Path

import pytest
import torch
from every_op import CASES, Draw, same
from speaking import save_model, save_texts

from distaya_ext import Recipe, compress
from distaya_ext.ops import dass, machine, mask, pack, sqgemm

THREADS = (1, 2, 3, 4)
LARGE = 4  # times the columns of the smallest case: several blocks, slices and panels


@pytest.fixture
def pool():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_threads_and_reruns_change_no_bit(isa, pool, name):
    call = CASES[name](2, LARGE)
    pool(1)
    expected = call()
    for n in THREADS:
        pool(n)
        assert same(call(), expected), f"{n} threads"


def all_kinds(seed: int) -> list[pack.PackedWeight]:
    draw = Draw(seed)
    drawn = [draw.packed(kind, 67, 269, group) for kind in pack.KINDS for group in (32, 128, 0)]
    return [pack.pack(codes, scales, zeros, **form) for codes, scales, zeros, form in drawn]


def packed_bytes() -> list[torch.Tensor]:
    """Packed matrices, and what is read out of them."""
    out = []
    for packed in all_kinds(3):
        out += [packed.data, pack.dequantize(packed), pack.gather(packed, torch.tensor([66, 0]))]
    return out


def packed_products() -> list[torch.Tensor]:
    x = Draw(4).normal(9, 269, dtype=torch.bfloat16)
    weights = all_kinds(5)
    out = [sqgemm.linear(t, weight) for weight in weights for t in (x, x[:1])]
    return out


def kept() -> list[torch.Tensor]:
    """Masks: comparisons and counts alone."""
    S = Draw(6).normal(48, 64)
    S[S.abs() < 0.2] = 0.0  # ties
    out = [mask.keep_k(S, 700 if along == "matrix" else 7, along) for along in ("matrix", "row")]
    return out + [mask.keep_nm(S, 2, 4, along) for along in ("inputs", "outputs")]


def plain_scores() -> list[torch.Tensor]:
    """Scores of DaSS at the powers that it promises this for."""
    draw = Draw(7)
    W, norms = draw.normal(40, 67), draw.normal(40).abs()
    return [dass.gate_up(W, norms, power) for power in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("run", [packed_bytes, packed_products, kept, plain_scores])
def test_instruction_sets_change_no_bit_where_promised(isa, run):
    with machine.use_isa("portable"):
        expected = run()
    assert same(run(), expected)


TOLD = {"results.json", "report.html", "README.md", "manifest.json"}  # times and peak memory
CLOCKS = {"seconds"}  # columns of layers.csv


def contents(path: Path) -> bytes:
    """A file's bytes; of a table, without how long things took."""
    if path.suffix != ".csv":
        return path.read_bytes()
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
    assert rows
    return repr(rows).encode()


def digests(folder: Path) -> dict[str, str]:
    """BLAKE2b of every file that tells no time."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(contents(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TOLD
    }


def test_a_whole_compression_writes_the_same_files_again(tmp_path, pool):
    """Twice with one thread, then with 2 and 3: pruned, quantised, packed and written."""
    save_model(tmp_path / "model", seed=1)
    save_texts(tmp_path / "texts", repeat=8)
    recipe = Recipe(
        model=str(tmp_path / "model"),
        method="sparsegpt",
        nm="2:4",
        bits=4,
        group=32,
        calibration={"path": str(tmp_path / "texts"), "tokens": 480, "window": 16},
    )
    found = []
    for turn, n in enumerate((1, 1, 2, 3)):
        pool(n)
        out = tmp_path / str(turn)
        compress(recipe.model, out, recipe)
        found.append(digests(out))
    assert found[0] and any(name.endswith(".safetensors") for name in found[0])
    for other in found[1:]:
        assert other == found[0]
