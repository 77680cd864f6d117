"""The recipe: what is accepted survives a file, what cannot run is refused in one sentence."""

from functools import partial

import pytest
import refusing
from hypothesis import given, settings
from hypothesis import strategies as st

from distaya_ext.errors import UsageError
from distaya_ext.recipe import (
    MAX_YAML_BYTES,
    PRUNING,
    CalibrationSpec,
    DassSpec,
    DropSpec,
    EvaluateSpec,
    HealSpec,
    Recipe,
    parse_nm,
    parse_size,
    parse_sparsity,
)

refused = partial(refusing.refused, UsageError)


@st.composite
def dass_options(draw, groups):
    share = draw(st.floats(0.0, 1.0, exclude_max=True))
    options = {
        "alpha": draw(st.floats(0.0, 4.0)),
        "direction": draw(st.sampled_from(["outputs", "inputs"])),
        "update": draw(st.booleans()),
        "permute": (groups or share > 0) and draw(st.booleans()),
    }
    return options | {"dense_neurons": share if options["permute"] else 0.0}


@st.composite
def steps_beside(draw, **fields):
    """Layers by number or by score, healing and evaluation."""
    layers = st.lists(st.integers(0, 40), unique=True, max_size=3)
    specs = st.builds(DropSpec, count=st.integers(1, 9), score=st.sampled_from(["kl", "bi"]))
    shares = st.builds(DropSpec, share=st.sampled_from([0.25, 0.1]), protect=st.just([0, -1]))
    found = {"drop_layers": draw(layers | specs | shares)}
    if fields.get("bits") in (None, 3, 4, 8) and fields.get("format") != "dense":
        found["heal"] = draw(st.none() | st.integers(1, 9) | st.builds(
            HealSpec, steps=st.integers(1, 9), rank=st.integers(1, 64), path=st.none() | st.text(),
            loss=st.fixed_dictionaries({"kl": st.floats(0.1, 9.0)}),
        ))  # fmt: skip
    evaluations = st.builds(
        EvaluateSpec, path=st.text(min_size=1), per_line=st.booleans(),
        gate=st.fixed_dictionaries({}, optional={"max_gap": st.floats(0.0, 9.0)}),
        continuations=st.integers(0, 9),
    )  # fmt: skip
    return found | {"evaluate": draw(st.none() | evaluations)}


@st.composite
def recipes(draw):
    methods = ["sparsegpt", "wanda", "magnitude", "ria", "dass", "gptq", "rtn"]
    method = draw(st.sampled_from(methods))
    fields = {"model": draw(st.text(min_size=1, max_size=20)), "method": method}
    if method in PRUNING:
        if draw(st.booleans()):
            fields["sparsity"] = draw(st.floats(0.0, 1.0, exclude_max=True))
        else:
            m = draw(st.integers(2, 32))
            fields["nm"] = f"{draw(st.integers(1, m - 1))}:{m}"
        fields["bits"] = draw(st.none() | st.integers(2, 8))
        if method == "dass":
            fields["dass"] = draw(dass_options("nm" in fields))
    else:
        fields["bits"] = draw(st.integers(2, 8))
    fields["group"] = draw(st.sampled_from([0, 32, 64, 128]))
    fields["symmetric"] = draw(st.none() | st.booleans())
    if fields["bits"] in (None, 3, 4, 8):
        fields["embed_bits"] = draw(st.sampled_from([None, 8]))
    if fields["bits"] in (4, 8) and not fields.get("embed_bits"):
        fields["format"] = draw(st.sampled_from(["auto", "dense", "pack-quantized", "distaya"]))
    fields["skip"] = draw(
        st.lists(st.sampled_from(["q_proj$", r"layers\.0\.", "ümlaut"]), max_size=3)
    )
    fields["calibration"] = CalibrationSpec(path=draw(st.none() | st.text(max_size=9)), tokens=4096)
    return Recipe(**fields, **draw(steps_beside(**fields)))


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_yaml_round_trip(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.to_yaml(path)
    assert Recipe.from_yaml(path) == recipe


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sparcity": 0.5}, ["'sparcity'", "'sparsity'"]),
        ({"zzzz": 1}, ["'zzzz'", "known are model, method"]),
        ({"sparsity": 0.5, "calibration": {"token": 9}}, ["calibration", "'token'", "'tokens'"]),
        ({"sparsity": 0.5, "calibration": {"tokens": 9}}, ["9 tokens", "window of 256"]),
        ({"sparsity": 0.5, "calibration": 7}, ["calibration", "7"]),
        ({"sparsity": 1.0}, ["sparsity", "1.0", "less than 1"]),
        ({"sparsity": -0.1}, ["sparsity", "-0.1"]),
        ({"sparsity": float("nan")}, ["sparsity", "nan"]),
        ({"sparsity": 0.5, "nm": "2:4"}, ["0.5", "2:4", "not both"]),
        ({"nm": "4:2"}, ["'4:2'", "N < M"]),
        ({"nm": "0:4"}, ["'0:4'"]),
        ({"nm": "2:64"}, ["'2:64'", "32"]),
        ({"nm": "two:four"}, ["'two:four'"]),
        ({"sparsity": 0.5, "bits": 9}, ["bits", "9"]),
        ({"sparsity": 0.5, "bits": 1}, ["bits", "1"]),
        ({"sparsity": 0.5, "group": 48}, ["group 48", "0, 32, 64, 128"]),
        ({"sparsity": 0.5, "damp": 0.0}, ["damp", "0.0"]),
        ({"sparsity": 0.5, "max_ram": "8"}, ["'8'", "8GiB"]),
        ({"sparsity": 0.5, "skip": ["("]}, ["'('", "regular expression"]),
        ({"method": "obs", "sparsity": 0.5}, ["method", "'obs'", "sparsegpt"]),
        ({"method": "sparsegpt"}, ["sparsegpt", "0.5", "2:4"]),
        ({"method": "gptq"}, ["gptq", "2 to 8"]),
        ({"method": "rtn", "bits": 4, "sparsity": 0.5}, ["rtn", "does not prune"]),
        ({"method": "dense", "bits": 4}, ["dense", "4"]),
        ({"nm": "2:4", "order": "activation"}, ["activation", "2:4"]),
        ({"method": "wanda", "sparsity": 0.5, "order": "activation"}, ["activation", "wanda"]),
        ({"sparsity": 0.5, "order": "group"}, ["order group", "2:4"]),
        ({"nm": "2:4", "order": "block"}, ["order block", "0.5"]),
        ({"sparsity": 0.0, "order": "block"}, ["order block", "0.5"]),
        ({"method": "ria", "nm": "2:4", "order": "group"}, ["order group", "ria"]),
        ({"sparsity": 0.5, "seed": 3}, ["'seed'", "calibration"]),
        ({"sparsity": 0.5, "embed_bits": 4}, ["embed_bits", "4", "8"]),
        ({"sparsity": 0.5, "bits": 4, "format": "gptq"}, ["format", "'gptq'", "'distaya'"]),
        ({"sparsity": 0.5, "format": "distaya"}, ["distaya", "quantised", "bits"]),
        ({"sparsity": 0.5, "format": "pack-quantized"}, ["pack-quantized", "quantised"]),
        ({"sparsity": 0.5, "embed_bits": 8, "format": "dense"}, ["dense", "int8 embedding"]),
        ({"method": "gptq", "bits": 3, "format": "pack-quantized"}, ["3 bits", "4, 8 bits"]),
        ({"method": "gptq", "bits": 5, "embed_bits": 8}, ["5 bits", "distaya holds 3, 4, 8"]),
    ],
)
def test_what_cannot_run(fields, words):
    refused(lambda: Recipe(**{"model": "m", **fields}), *words)


def test_model_is_needed():
    refused(lambda: Recipe(sparsity=0.5), "'model'")


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\ufeff", "ü", "猫"])
def test_any_name_survives_the_file(tmp_path, mark):
    recipe = Recipe(model=f"a{mark}b", sparsity=0.5)
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == recipe
    assert mark in recipe.to_yaml() or mark not in "ü猫"


@pytest.mark.parametrize("line", ["nm: 2:4", "nm: '2:4'", "sparsity: 2:4", "sparsity: '2:4'"])
def test_patterns_quoted_or_not(tmp_path, line):
    """YAML 1.1 reads an unquoted 2:4 as the base-60 number 124."""
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\n{line}\n")
    assert Recipe.from_yaml(path).nm_pair == (2, 4)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"model: [1", ["line 1"]),
        (b"- a\n- b\n", ["mapping", "list"]),
        (b"", ["mapping", "NoneType"]),
        (b"1: 2\n", ["mapping"]),
        (b"model: m\nsparsity: 0.5\nsparsity: 0.6\n", ["'sparsity' is given twice", "line 3"]),
        (b"? [a]\n: 1\n", ["plain YAML"]),
        (b"model: 2024-13-45\n", ["r.yaml", "month"]),
        (b"model: m\nbits: " + b"9" * 5000 + b"\n", ["r.yaml", "digits"]),
        (b"model: \xff\n", ["UTF-8", "byte 7"]),
        (b"model: !!python/object/apply:os.system ['true']\n", ["plain YAML"]),
        (b"a: &a [1]\n" + b"b: [" + b"*a, " * 40 + b"]\n", ["aliases"]),
        (b"#" * (MAX_YAML_BYTES + 1), ["larger"]),
        (b"[" * (MAX_YAML_BYTES - 1), ["r.yaml", "deeper than 16"]),
        (b"model: m\nsparsitty: 0.5\n", ["r.yaml", "'sparsitty'", "'sparsity'"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    refused(lambda: Recipe.from_yaml(path), *words)


def test_missing_file(tmp_path):
    refused(lambda: Recipe.from_yaml(tmp_path / "none.yaml"), "none.yaml", "cannot be read")


@pytest.mark.parametrize(
    "text, size", [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert Recipe(model="m", sparsity=0.5, max_ram=text).max_ram_bytes == size


@pytest.mark.parametrize("text", ["", "8", "GiB", "-1GB", "0.1B", "8 Gigabytes"])
def test_sizes_that_are_none(text):
    refused(lambda: parse_size(text), repr(text))


def test_sparsity_flag():
    assert parse_sparsity("0.5") == {"sparsity": 0.5}
    assert parse_sparsity("50%") == {"sparsity": 0.5}
    assert parse_sparsity("4:8") == {"nm": "4:8"}
    assert parse_nm("31:32") == (31, 32)
    for text in ("half", "1", "-0.5", "3:2", "nan"):
        refused(lambda text=text: parse_sparsity(text), text)


def test_dass_has_options_of_its_own():
    updates = Recipe(model="m", method="dass", nm="2:4", dass={"update": True}, quality="default")
    assert updates.effort == "default"
    refused(
        lambda: Recipe(model="m", method="dass", nm="2:4", quality="default"),
        "has no sweep",
        "dass",
    )
    assert Recipe(model="m", method="dass", nm="2:4").dass == DassSpec()
    assert Recipe(model="m", nm="2:4").dass is None
    recipe = Recipe(model="m", method="dass", nm="2:4", dass={"update": True, "permute": True})
    assert (recipe.dass.direction, recipe.dass.update, recipe.dass.permute) == (
        "outputs",
        True,
        True,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dense_neurons": 0.1}, ["dass: dense_neurons (0.1)", "permute: true"]),
        ({"dense_neurons": 1.0, "permute": True}, ["dense_neurons", "less than 1"]),
        ({"dense_neurons": -0.1}, ["dense_neurons", "greater than or equal to 0"]),
        ({"direction": "rows"}, ["direction", "'outputs' or 'inputs'"]),
        ({"alpha": -1}, ["alpha -1", "greater than or equal to 0"]),
        ({"updat": True}, ["updat", "did you mean 'update'?"]),
    ],
)
def test_dass_options_that_cannot_run(options, words):
    refused(lambda: Recipe(model="m", method="dass", nm="2:4", dass=options), *words)


def test_dass_options_that_do_not_fit_the_rest():
    refused(lambda: Recipe(model="m", method="dass"), "dass prunes: say how much")
    refused(lambda: Recipe(model="m", nm="2:4", dass={}), "for method dass, not sparsegpt")
    refused(lambda: Recipe(model="m", sparsity=0.5, permute=True), "permute balances", "N:M")
    refused(lambda: Recipe(model="m", method="wanda", nm="2:4", permute=True), "permute balances")
    permute = {"permute": True}
    refused(
        lambda: Recipe(model="m", method="dass", sparsity=0.5, dass=permute), "nothing to permute"
    )
