"""How codes lie in files: against the real compressed-tensors package, the text of docs/format.md,
and a second reader written from it.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from grids import grid_of, same, standard
from hypothesis import given, settings
from hypothesis import strategies as st

from distaya_ext.formats import Grid, ModuleScheme, bits, compressed, gptq, own, read_scheme

DOC = Path(__file__).resolve().parents[1] / "docs" / "format.md"
ROOM = settings(max_examples=60, deadline=None)


# ---- bits ----


@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 140), st.integers(0, 99))
@ROOM
def test_bits_are_those_of_compressed_tensors(width, rows, cols, seed):
    make = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << width, (rows, cols), generator=make, dtype=torch.uint8)
    signed = (values.int() - (1 << (width - 1))).to(torch.int8)
    packed = bits.pack(values, width)
    assert packed.shape == (rows, bits.words(cols, width))
    assert torch.equal(packed, pack_to_int32(signed, width))
    assert torch.equal(bits.unpack(packed, width, cols), values)
    assert torch.equal(unpack_from_int32(packed, width, values.shape), signed)
    along_rows = bits.pack(values.T.contiguous(), width).T
    assert torch.equal(along_rows, pack_to_int32(signed, width, packed_dim=0))


def test_bits_of_more_than_one_block(monkeypatch):
    monkeypatch.setattr(bits, "_BLOCK", 50)
    values = torch.randint(0, 8, (11, 33), dtype=torch.uint8)
    packed = bits.pack(values, 3)
    assert torch.equal(packed, pack_to_int32((values.int() - 4).to(torch.int8), 3))
    assert torch.equal(bits.unpack(packed, 3, 33), values)


# ---- encodings ----


@given(
    st.sampled_from([("pack-quantized", 0), ("bitmask", 0), ("gptq", 0), ("gptq", 1)]),
    st.sampled_from([3, 4, 8]), st.sampled_from([0, 32, 64, 128]), st.booleans(),
    st.integers(1, 40), st.integers(1, 200), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 99),
)  # fmt: skip
@ROOM
def test_round_trip(way, width, group, symmetric, rows, cols, pruned, dtype, seed):
    encoding, offset = way
    if encoding == "bitmask":
        width = 4
    if encoding == "gptq":
        width = 4 if width == 3 else width
    grid = grid_of(seed, rows, cols, width, group, symmetric, dtype, pruned, low=offset)
    scheme = ModuleScheme(width, group, symmetric, encoding, offset=offset)
    tensors = scheme.encode(grid)
    needs = scheme.tensors(rows, cols, dtype)
    assert {k: v.dtype for k, v in tensors.items()} == {k: v[0] for k, v in needs.items()}
    assert all(shape is None or tensors[k].shape == shape for k, (_, shape) in needs.items())
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == scheme.nbytes(rows, cols, dtype, int(grid.kept().sum()))
    same(scheme.decode(tensors, rows, cols, "m"), grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width, group", [(4, 32), (4, 0), (8, 32), (8, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_real_package_compresses_to_our_tensors_and_back(width, group, symmetric, dtype):
    """Its weights out of our tensors and its tensors out of our weights, bit for bit."""
    grid = grid_of(1, 48, 96, width, group, symmetric, dtype)
    grid.scales.clamp_(min=2**-8)
    scheme = ModuleScheme(width, group, symmetric)
    tensors = scheme.encode(grid)
    theirs = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=width,
            symmetric=symmetric,
            strategy="group" if group else "channel",
            group_size=group or None,
        ),
    )
    package = PackedQuantizationCompressor
    dense = package.decompress(dict(tensors), theirs)["weight"]
    assert dense.dtype == dtype and torch.equal(dense, grid.dense(dtype))
    # It divides in the dtype of the weights, and bfloat16 is too coarse for 8 bits.
    state = {"weight": grid.dense(torch.float32), "weight_scale": grid.scales.float()}
    if not symmetric:
        middle = 1 << (width - 1)
        state["weight_zero_point"] = (grid.zeros.int() - middle).to(torch.int8)
    made = package.compress(state, theirs)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[k], tensors[k]) for k in tensors if k != "weight_scale")


def test_dense_weights_are_rounded_once():
    grid = grid_of(2, 33, 100, 8, 32, False, torch.float16)
    zero = grid.zeros.double().repeat_interleave(32, 1)[:, :100]
    exact = grid.scales.double().repeat_interleave(32, 1)[:, :100] * (grid.codes.double() - zero)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(grid.dense(dtype), exact.to(dtype))  # float32 holds these products


# ---- a second reader, written from the text of docs/format.md ----


def stream(words, count, width):
    """Codes out of int32 words: bit i * width + b of the stream is bit b of code i."""
    raw = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    every = np.unpackbits(raw, bitorder="little")[: count * width].reshape(count, width)
    return (every.astype(int) << np.arange(width)).sum(axis=1)


def by_the_book(entry, tensors, rows, cols):
    """float64 weights of a module of quant_method distaya."""
    width, group = entry["bits"], entry["group"] or cols
    zeros = np.full((rows, -(-cols // group)), 2 ** (width - 1))
    if not entry["symmetric"]:
        columns = np.asarray(tensors["weight_zero_point"]).T
        zeros = np.stack([stream(column, rows, width) for column in columns], axis=1)
    zero = zeros[:, np.arange(cols) // group]
    scale = tensors["weight_scale"].double().numpy()[:, np.arange(cols) // group]
    if entry["encoding"] == "pack-quantized":
        packed = np.asarray(tensors["weight_packed"])
        codes = np.stack([stream(row, cols, width) for row in packed])
    else:
        mask = np.unpackbits(np.asarray(tensors["weight_mask"]), axis=1, bitorder="little")
        values = np.asarray(tensors["weight_values"])
        each = iter(np.stack([values & 15, values >> 4], axis=1).reshape(-1))
        codes = np.array([[next(each) if mask[r, k] else zero[r, k] for k in range(cols)]
                          for r in range(rows)])  # fmt: skip
    return scale * (codes - zero)


@pytest.mark.parametrize(
    "width, encoding",
    [(3, "pack-quantized"), (4, "bitmask"), (4, "pack-quantized"), (8, "pack-quantized")],
)
@pytest.mark.parametrize("group, symmetric", [(32, False), (0, True), (64, False), (0, False)])
def test_a_stranger_can_read_it(width, encoding, group, symmetric):
    rows, cols = 19, 77
    grid = grid_of(3, rows, cols, width, group, symmetric, torch.float32, pruned=0.4)
    scheme = ModuleScheme(width, group, symmetric, encoding)
    expected = by_the_book(own.entry(scheme), scheme.encode(grid), rows, cols)
    assert np.array_equal(grid.dense(torch.float32).double().numpy(), expected.astype(np.float32))


def test_the_example_in_the_document():
    text = DOC.read_text(encoding="utf-8").split("### Example")[1].split("\n## ")[0]

    def rows_of(pattern):
        return [[float(x) for x in row.split()] for row in re.findall(pattern, text, re.M)]

    grids = rows_of(r"^ {4}(?:codes)? +((?:\d+ ){7}\d+) +scale")
    scales = [float(x) for x in re.findall(r"scale (\S+) +zero", text)]
    zeros = [int(x) for x in re.findall(r"zero (\d+)$", text, re.M)]
    weights = rows_of(r"^ {4}((?:-?\d+ ){7}-?\d+)$")
    grid = Grid(torch.tensor(grids).to(torch.uint8), torch.tensor(scales)[:, None],
                torch.tensor(zeros).to(torch.uint8)[:, None], 4, 0)  # fmt: skip
    assert grid.dense(torch.float32).tolist() == weights

    def told(name):
        block = re.search(rf"^ {{4}}{name} +(.*(?:\n {{8,}}.*)*)", text, re.M)[1]
        return [int(x, 16) for x in block.split()]

    packed = ModuleScheme(4, 0, False).encode(grid)
    for name in ("weight_packed", "weight_zero_point"):
        assert [x & 0xFFFFFFFF for x in packed[name].flatten().tolist()] == told(name)
    masked = ModuleScheme(4, 0, False, "bitmask").encode(grid)
    for name in ("weight_mask", "weight_values"):
        assert masked[name].flatten().tolist() == told(name)


def test_the_configs_in_the_document_are_read():
    blocks = re.findall(r"```json\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    ours, standard = (read_scheme(json.loads("{" + block + "}")) for block in blocks)
    assert ours.for_module("model.embed_tokens", is_embedding=True).kind == "int8"
    assert ours.for_module("model.layers.0.self_attn.q_proj").encoding == "bitmask"
    assert ours.for_module("lm_head") is None
    assert standard.for_module("model.layers.0.mlp.up_proj") == ModuleScheme(4, 128, True)
    assert standard.for_module("lm_head") is None


# ---- configs ----


def test_what_we_write_is_what_we_read():
    modules = {
        "a.q": ModuleScheme(4, 128, True), "a.k": ModuleScheme(4, 0, False),
        "a.v": ModuleScheme(8, 0, True, kind="int8"),
    }  # fmt: skip
    one = dict.fromkeys(modules, ModuleScheme(4, 64, True))
    for held in (modules, one):
        about = compressed.write(held, ["lm_head", "a.o"])
        scheme = read_scheme({"quantization_config": about})
        assert {name: scheme.for_module(name) for name in held} == held
        assert scheme.for_module("lm_head") is None is scheme.for_module("a.o")
        parsed = QuantizationConfig.model_validate(about)  # the real package takes it
        assert len(parsed.config_groups) == len(set(held.values()))
    extra = {"e": ModuleScheme(4, 32, False, "bitmask", "int4-out", (2, 4)),
             "f": ModuleScheme(3, 0, True, kind="int3")}  # fmt: skip
    scheme = read_scheme({"quantization_config": own.write(modules | extra)})
    assert {name: scheme.for_module(name) for name in modules | extra} == modules | extra
    old = {name: ModuleScheme(4, g, True, "gptq", offset=1) for name, g in
           (("a.q", 128), ("a.k", 128), ("a.v", 0))}  # fmt: skip
    scheme = read_scheme({"quantization_config": gptq.write(old, ["a.o", "lm_head"])})
    assert {name: scheme.for_module(name) for name in old} == old
    assert scheme.for_module("lm_head") is None is scheme.for_module("a.o")


def test_several_groups_and_kinds_of_targets():
    about = standard()
    eight = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
    row = {"num_bits": 4, "strategy": "channel", "actorder": "weight", "observer": "mse"}
    about["config_groups"]["a"] = {"targets": [r"re:.*down_proj$"], "weights": eight}
    about["config_groups"]["b"] = {"targets": ["x.mlp.down_proj", "Embedding"], "weights": row}
    about["ignore"] += [r"re:.*layers\.0\."]
    scheme = read_scheme({"quantization_config": about})
    assert scheme.for_module("x.up_proj") == ModuleScheme(4, 128)
    assert scheme.for_module("y.mlp.down_proj") == ModuleScheme(8, 0, False, kind="int8")
    assert scheme.for_module("x.mlp.down_proj") == ModuleScheme(4, 0)  # a name before a pattern
    assert scheme.for_module("emb", is_embedding=True) == ModuleScheme(4, 0)
    assert scheme.for_module("model.layers.0.mlp.down_proj") is None
    assert scheme.for_module("lm_head") is None
    ordered = read_scheme({"quantization_config": standard(actorder="group")})
    assert ordered.for_module("x").indexed


def test_gptq_configs():
    about = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
    about |= {"checkpoint_format": None, "modules_in_block_to_quantize": None, "use_exllama": True}
    held = read_scheme({"quantization_config": about}).for_module("x")
    assert held == ModuleScheme(4, 128, True, "gptq", offset=1)
    about |= {"checkpoint_format": "gptq_v2", "group_size": -1, "sym": False, "bits": 8,
              "dynamic": {r"-:.*k_proj": {}, r"+:.*v_proj": {"bits": 4}}}  # fmt: skip
    scheme = read_scheme({"quantization_config": about})
    assert scheme.for_module("x") == ModuleScheme(8, 0, False, "gptq", "int8")
    assert scheme.for_module("a.k_proj") is None is scheme.for_module("lm_head")
    assert scheme.for_module("a.v_proj") == ModuleScheme(4, 0, False, "gptq")
    about |= {"modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]], "dynamic": None}
    scheme = read_scheme({"quantization_config": about})
    assert scheme.for_module("l.0.mlp.up_proj") and not scheme.for_module("l.0.mlp.gate_proj")
