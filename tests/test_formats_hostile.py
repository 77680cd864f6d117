"""Configs and tensors that lie: one sentence each, whatever is wrong with them."""

import pytest
import torch
from grids import grid_of, refused, standard

from distaya_ext.formats import Grid, ModuleScheme, read_scheme


def ours(**entry):
    whole = {"bits": 4, "group": 128, "symmetric": True, **entry}
    return {"quant_method": "distaya", "version": 1, "modules": {"m": whole}}


def grouped(**group):
    about = standard()
    about["config_groups"]["group_0"].update(group)
    return about


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
BAD = {
    "no mapping": ("int4", ["must be a mapping", "str"]),
    "unknown method": ({"quant_method": "awq"}, ["'awq'", "compressed-tensors, gptq, distaya"]),
    "no method": ({"bits": 4}, ["None"]),
    "method a list": ({"quant_method": ["gptq"]}, ["['gptq']"]),
    "two methods": ({**ours(), "config_groups": {}}, ["claims", "config_groups"]),
    "two methods too": ({**standard(), "bits": 4}, ["claims", "bits of gptq"]),
    "version 2": ({**ours(), "version": 2}, ["version '2'", "version 1"]),
    "version true": ({**ours(), "version": True}, ["version 'True'"]),
    "no version": ({"quant_method": "distaya", "modules": {}}, ["version 'None'"]),
    "no modules": ({**ours(), "modules": {}}, ["no modules"]),
    "modules a list": ({**ours(), "modules": []}, ["modules", "must be dict"]),
    "entry a number": ({**ours(), "modules": {"m": 4}}, ["must be a mapping, not int"]),
    "own key": ({**ours(), "extra": 1}, ["unknown key 'extra'"]),
    "entry key": (ours(extra=1), ["unknown key 'extra'"]),
    "own bits": (ours(bits=5), ["5 bits", "3 and 4 and 8"]),
    "bits a text": (ours(bits="4"), ["bits", "'4'", "must be int"]),
    "bits true": (ours(bits=True), ["bits", "must be int"]),
    "bits huge": (ours(bits=10**30), ["bits"]),
    "own group": (ours(group=100), ["groups of 100"]),
    "group negative": (ours(group=-1), ["groups of -1"]),
    "symmetric a number": (ours(symmetric=1), ["symmetric", "must be bool"]),
    "encoding": (ours(encoding="zip"), ["'zip'"]),
    "bitmask of 8 bits": (ours(bits=8, encoding="bitmask"), ["bitmask of 8 bits"]),
    "kind": (ours(kind="int9"), ["'int9'"]),
    "kind of other bits": (ours(kind="int8"), ["'int8'", "4 bits"]),
    "nm without kind": (ours(nm=[2, 4]), ["nm", "int4-out"]),
    "kind without nm": (ours(kind="int4-out"), ["nm None"]),
    "nm backwards": (ours(kind="int4-out", nm=[4, 2]), ["4:2"]),
    "nm of texts": (ours(kind="int4-out", nm=["2", "4"]), ["whole numbers"]),
    "format": ({**standard(), "format": "marlin-24"}, ["'marlin-24'"]),
    "status": ({**standard(), "quantization_status": "initialized"}, ["'initialized'"]),
    "cache": ({**standard(), "kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
    "sparsity": (
        {**standard(), "sparsity_config": {"format": "sparse-24-bitmask"}},
        ["sparsity_config"],
    ),
    "no groups": ({**standard(), "config_groups": {}}, ["no config_groups"]),
    "group a list": ({**standard(), "config_groups": {"a": ["Linear"]}}, ["mapping, not list"]),
    "activations": (grouped(input_activations={"num_bits": 8}), ["input_activations"]),
    "no targets": (grouped(targets=[]), ["no targets"]),
    "target a number": (grouped(targets=[3]), ["3", "no text"]),
    "no weights": (grouped(weights=None), ["weights", "must be dict"]),
    "broken pattern": (grouped(targets=["re:("]), ["'('", "regular expression"]),
    "slow pattern": (grouped(targets=["re:(a+)+$"]), ["repeats a group"]),
    "slow pattern too": (grouped(targets=["re:" + ".*" * 9 + "x"]), ["repetitions"]),
    "long pattern": (grouped(targets=["re:" + "a" * 600]), ["500 characters"]),
    "3 bits": (standard(num_bits=3), ["3 bits", "4 and 8"]),
    "float": (standard(type="float"), ["'float'"]),
    "dynamic": (standard(dynamic=True), ["dynamic"]),
    "strategy": (standard(strategy="tensor", group_size=None), ["'tensor'"]),
    "strategy and size": (standard(strategy="channel"), ["'channel'", "128"]),
    "group of 16": (standard(group_size=16), ["groups of 16"]),
    "unknown option": (standard(zero_points="none"), ["'zero_points'"]),
    "order": (standard(actorder="random"), ["'random'"]),
    "gptq bits": ({**GPTQ, "bits": 3}, ["3 bits", "4 and 8"]),
    "gptq format": ({**GPTQ, "checkpoint_format": "marlin"}, ["'marlin'"]),
    "gptq marlin": ({**GPTQ, "is_marlin_format": True}, ["marlin"]),
    "gptq group": ({**GPTQ, "group_size": 0}, ["groups of -1"]),
    "gptq pattern": ({**GPTQ, "dynamic": {"-:(a*)*": {}}}, ["repeats a group"]),
    "gptq override": ({**GPTQ, "dynamic": {"a": {"rank": 3}}}, ["'rank'"]),
    "gptq list": ({**GPTQ, "modules_in_block_to_quantize": [[3]]}, ["3", "no text"]),
}


@pytest.mark.parametrize("case", BAD)
def test_configs_that_cannot_be(case):
    about, words = BAD[case]
    refused(lambda: read_scheme({"quantization_config": about}), *words)


def test_no_quantisation_and_an_old_key():
    assert read_scheme({"model_type": "llama"}) is None
    refused(lambda: read_scheme({"compression_config": standard()}), "compression_config")
    both = {"compression_config": standard(), "quantization_config": standard()}
    refused(lambda: read_scheme(both), "compression_config beside a quantization_config")


# ---- tensors that lie ----


def damaged(scheme, change, *words, rows=24, cols=96):
    grid = grid_of(5, rows, cols, scheme.bits, scheme.group, scheme.symmetric, pruned=0.5, low=1)
    tensors = scheme.encode(grid)
    change(tensors)
    refused(lambda: scheme.decode(tensors, rows, cols, "the.module"), "the.module", *words)


DENSE, MASK = ModuleScheme(4, 32, False), ModuleScheme(4, 32, False, "bitmask")
OLD = ModuleScheme(4, 32, True, "gptq", offset=1)
ORDERED = ModuleScheme(4, 32, True, indexed=True)
LIES = {
    "absent": (DENSE, lambda t: t.pop("weight_scale"), ["weight_scale is absent"]),
    "too many": (
        DENSE,
        lambda t: t.update(weight=torch.zeros(24, 96)),
        [".weight does not belong"],
    ),
    "dtype": (
        DENSE,
        lambda t: t.update(weight_packed=t["weight_packed"].long()),
        ["int64", "int32"],
    ),
    "shape": (
        DENSE,
        lambda t: t.update(weight_packed=t["weight_packed"][:, 1:]),
        ["24x11", "24x12"],
    ),
    "flat": (DENSE, lambda t: t.update(weight_packed=t["weight_packed"][0]), ["shape 12", "24x12"]),
    "scale dtype": (
        DENSE,
        lambda t: t.update(weight_scale=t["weight_scale"].double()),
        ["float64"],
    ),
    "scale nan": (
        DENSE,
        lambda t: t["weight_scale"][7].fill_(torch.nan),
        ["NaN or infinity", "row 7"],
    ),
    "scale inf": (
        MASK,
        lambda t: t["weight_scale"][0].fill_(torch.inf),
        ["NaN or infinity", "row 0"],
    ),
    "scale negative": (DENSE, lambda t: t["weight_scale"][9].neg_(), ["negative", "row 9"]),
    "shape lies": (
        DENSE,
        lambda t: t["weight_shape"].fill_(1 << 62),
        ["4611686018427387904", "24x96"],
    ),
    "shape negative": (MASK, lambda t: t["weight_shape"].neg_(), ["-24x-96", "24x96"]),
    "zeros dtype": (
        DENSE,
        lambda t: t.update(weight_zero_point=t["weight_zero_point"].to(torch.int8)),
        ["int8"],
    ),
    "mask": (MASK, lambda t: t["weight_mask"].fill_(255), ["keeps 2304 weights", "1152 bytes"]),
    "values short": (
        MASK,
        lambda t: t.update(weight_values=t["weight_values"][:-1]),
        ["weight_values"],
    ),
    "values empty": (MASK, lambda t: t.update(weight_values=t["weight_values"][:0]), ["it has 0"]),
    "values 2-d": (
        MASK,
        lambda t: t.update(weight_values=t["weight_values"][None]),
        ["one dimension"],
    ),
    "g_idx": (
        ORDERED,
        lambda t: t["weight_g_idx"][5].fill_(2),
        ["column 5", "group 2", "desc_act"],
    ),
    "gptq g_idx": (OLD, lambda t: t.update(g_idx=t["g_idx"].flip(0)), ["column 0", "group 2"]),
    "gptq zero": (OLD, lambda t: t["qzeros"].fill_(-1), ["qzeros", "15", "row 0"]),
    "gptq symmetric": (
        OLD,
        lambda t: t["qzeros"].fill_(0),
        ["symmetric", "zero 1", "instead of 8"],
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_tensors_that_lie(case):
    scheme, change, words = LIES[case]
    damaged(scheme, change, *words)


def test_a_mask_that_keeps_columns_past_the_last():
    damaged(MASK, lambda t: t["weight_mask"][3, -1].fill_(0x80), "past 93", "row 3", cols=93)


def test_grids_that_cannot_be_encoded():
    grid = grid_of(1, 8, 64, 4, 32, False)
    refused(lambda: ModuleScheme(4, 64, False).encode(grid), "group 32", "group 64")
    refused(lambda: ModuleScheme(4, 32, True).encode(grid), "cannot be stored")
    grid.codes[3, 3] = 16
    refused(lambda: ModuleScheme(4, 32, False).encode(grid), "codes", "16", "row 3", "end at 15")
    zero = grid_of(1, 8, 64, 4, 32, False)
    zero.zeros[0, 0] = 0
    old = ModuleScheme(4, 32, False, "gptq", offset=1)
    refused(lambda: old.encode(zero), "zero of 0", "gptq_v2")
    short = Grid(grid.codes[:, :32], grid.scales, None, 4, 32)
    refused(lambda: short.check("x"), "8x32", "[8, 1]", "[8, 2]")
