"""Runs with rules for single Linears: the format they choose, what it holds, and its readers."""

import csv
import json

import pytest
import tiny
import torch
from test_compress import logits_of, weights_of
from test_rules import MIXED, STANDARD, checkpoint_of, mixed, walked
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import compress
from distaya_ext.compress.packing import Packing
from distaya_ext.compress.plan import make_plan
from distaya_ext.recipe import Recipe


@pytest.mark.parametrize(
    "rules, more, form",
    [
        ([{"match": "q_proj", "bits": 8, "group": 0}], {}, "pack-quantized"),
        ([{"match": "q_proj", "dense": True}], {}, "pack-quantized"),
        ([{"match": "q_proj", "nm": "2:4"}], {}, "pack-quantized"),  # floats with zeros
        ([{"match": "q_proj", "bits": 3}], {}, "distaya"),
        ([{"match": "q_proj", "nm": "2:4", "bits": 4}], {}, "distaya"),  # a bitmask is smaller
        ([{"match": "q_proj", "sparsity": 0.1, "bits": 4}], {}, "pack-quantized"),  # it is not
        ([{"match": "q_proj", "nm": "2:4", "bits": 8}], {}, "pack-quantized"),
        ([{"match": "q_proj", "nm": "2:4", "bits": 4}], {"format": "pack-quantized"},
         "pack-quantized"),
        ([{"match": "q_proj", "bits": 8}], {"embed_bits": 8}, "distaya"),
        ([{"match": "proj", "bits": 5}], {}, "dense"),
        ([{"match": "proj", "dense": True}], {}, "dense"),
        ([{"match": "proj", "dense": True}], {"embed_bits": 8}, "distaya"),
        ([{"match": "proj", "sparsity": 0.5}], {}, "dense"),
        ([{"match": "down", "bits": 8, "group": 64}], {}, "distaya"),  # 96 inputs: a ragged group
        ([{"match": "down", "bits": 8, "group": 0}], {"group": 64}, "pack-quantized"),
        ([{"match": "q_proj", "bits": 8}], {"format": "dense"}, "dense"),
    ],
)  # fmt: skip
def test_which_format_is_chosen(tmp_path, rules, more, form):
    checkpoint = checkpoint_of(tmp_path)
    recipe = mixed(rules, **more)
    packing = Packing(recipe, make_plan(recipe, checkpoint, 3), checkpoint)
    assert packing.format == form, packing.notices


def test_bits_that_nothing_packs_stay_floats_beside_packed_ones(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    recipe = mixed([{"match": r"layers\.1\..*o_proj", "bits": 5}])
    report = compress(checkpoint.folder, tmp_path / "out", recipe, tiny.windows())
    assert report.format == "pack-quantized"
    (notice,) = [message for message in report.notices if "packed form" in message]
    assert "5 bits" in notice and "1 tensor (model.layers.1.self_attn.o_proj)" in notice
    tensors = weights_of(tmp_path / "out")
    W = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert len(W[0].unique()) > 16 and len(W[0, :32].unique()) <= 32  # 5 bits per 32 inputs
    assert "model.layers.0.self_attn.o_proj.weight_packed" in tensors
    assert next(m for m in report.modules if m.module.endswith("1.self_attn.o_proj")).bits == 5


def settled(recipe, checkpoint):
    depth = checkpoint.config.num_hidden_layers
    return Packing(recipe, make_plan(recipe, checkpoint, depth), checkpoint).plan


@pytest.mark.parametrize("form", ["auto", "distaya"])
def test_mixed_folders_hold_what_was_solved(tmp_path, form):
    checkpoint = checkpoint_of(tmp_path, "llama", dtype=torch.bfloat16)
    recipe, calibration = mixed(MIXED, format=form), tiny.windows()
    report = compress(checkpoint.folder, tmp_path / "out", recipe, calibration)
    plan = settled(recipe, checkpoint)
    expected = walked(checkpoint.folder, plan, calibration).state_dict()
    written = open_checkpoint(tmp_path / "out", packed=True)
    encodings = {}
    for name in checkpoint.linears():
        W = expected[f"{name}.weight"]
        if name in written.stored:
            encodings[name] = written.stored[name].scheme
            got = written.grid(name).dense(torch.bfloat16)
        else:
            got = written.read([f"{name}.weight"])[f"{name}.weight"]
        assert torch.equal(got, W), name
    assert report.format == written.scheme.method == "distaya"
    assert report.file_bytes == pytest.approx(report.predicted_bytes, rel=0.01)
    assert report.notices == [m for m in report.notices if "few" in m]

    def seen(name):
        scheme = encodings.get(f"model.layers.{name}")
        return scheme and (scheme.bits, scheme.encoding, scheme.group)

    assert seen("0.self_attn.q_proj") == (4, "bitmask", 32)
    assert seen("0.self_attn.k_proj") is None
    assert seen("0.self_attn.v_proj") == (8, "pack-quantized", 0)
    assert seen("0.mlp.gate_proj") == (4, "bitmask", 32)
    assert seen("0.mlp.down_proj") is None
    assert seen("1.mlp.gate_proj") == (3, "pack-quantized", 32)
    assert seen("2.mlp.gate_proj") == (4, "pack-quantized", 32)
    down = next(m for m in report.modules if m.module == "model.layers.0.mlp.down_proj")
    assert (down.bits, down.bytes, down.sparsity) == (None, 2 * 64 * 96, 0.5)
    model = distaya_ext.load(tmp_path / "out", exact=True)
    ids = tiny.windows(2).ids
    dense = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    dense.load_state_dict(expected)
    assert torch.allclose(logits_of(model, ids), logits_of(dense, ids), atol=0.05)


def test_stock_transformers_load_a_mixed_standard_folder(tmp_path):
    pytest.importorskip("compressed_tensors")
    checkpoint = checkpoint_of(tmp_path, "llama", dtype=torch.bfloat16)
    recipe, calibration = mixed(STANDARD, drop_layers=[1]), tiny.windows()
    report = compress(checkpoint.folder, tmp_path / "out", recipe, calibration)
    assert report.format == "pack-quantized" and report.source_layers == (0, 2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tiny.windows(2).ids
    ours = distaya_ext.load(tmp_path / "out", exact=True)
    assert torch.allclose(logits_of(stock, ids), logits_of(ours, ids), atol=0.05)
    dropped = open_checkpoint(checkpoint.folder).without([1])
    plan = Packing(recipe, make_plan(recipe, dropped, 3), dropped).plan
    compress(checkpoint.folder, tmp_path / "less", tiny.recipe("dense", drop_layers=[1]))
    expected = walked(tmp_path / "less", plan, calibration)
    assert torch.equal(logits_of(stock, ids), logits_of(expected, ids))


def test_the_recipe_written_repeats_the_run(tmp_path):
    """From the command line, with texts, on the bundled model, to the last bit."""
    from importlib.resources import files as resources

    nano = resources("distaya_ext") / "assets"
    recipe = Recipe(
        model=str(nano / "nano-aya"), method="gptq", bits=4, group=64, modules=MIXED,
        drop_layers=[6], skip=[r"layers\.7\.mlp\.down"],
        calibration={"path": str(nano / "texts" / "calibration"), "tokens": 4096, "window": 64},
    )  # fmt: skip
    recipe.to_yaml(tmp_path / "mine.yaml")
    run, out, again = CliRunner(), tmp_path / "out", tmp_path / "again"
    for file, to in ((tmp_path / "mine.yaml", out), (out / "recipe.yaml", again)):
        said = run.invoke(app, ["compress", "--recipe", str(file), "--out", str(to), "--quiet"])
        assert said.exit_code == 0, said.output
    assert Recipe.from_yaml(out / "recipe.yaml") == recipe
    assert weights_of(again).keys() == weights_of(out).keys()
    assert all(torch.equal(weights_of(again)[k], v) for k, v in weights_of(out).items())
    for name in ("config.json", "recipe.yaml"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    with open(out / "layers.csv", newline="") as file:
        rows = {row["module"]: row for row in csv.DictReader(file)}
    assert rows["model.layers.0.mlp.up_proj"]["pattern"] == "4:8"
    assert rows["model.layers.0.mlp.up_proj"]["method"] == "sparsegpt"
    assert rows["model.layers.1.mlp.up_proj"]["bits"] == "3"
    assert rows["model.layers.0.mlp.down_proj"]["bits"] == ""
    assert rows["model.layers.6.self_attn.q_proj"]["source_layer"] == "7"
    assert "model.layers.6.mlp.down_proj" not in rows
    said = run.invoke(app, ["inspect", str(out), "--json"])
    facts = json.loads(said.stdout)
    assert facts["layers"] == 7 and len(facts["linears"]) == 49
    assert {linear["bits"] for linear in facts["linears"]} >= {3, 4, 8, None}
    texts = str(nano / "texts" / "evaluation")
    plain = tmp_path / "plain"
    for command in (
        ["eval", str(out), "--texts", texts, "--tokens", "1472", "--window", "64", "--json"],
        ["export", str(out), "--out", str(plain), "--to", "dense"],
        ["generate", str(out), "Once", "--max-new-tokens", "4"],
        ["bench", "model", str(out), "--prompt", "8", "--new", "2", "--runs", "1"],
    ):
        said = run.invoke(app, command)
        assert said.exit_code == 0 and said.stdout, (command[0], said.output)
    assert len(AutoModelForCausalLM.from_pretrained(plain).model.layers) == 7


def test_a_run_of_dense_rules_alone_gathers_nothing(tmp_path):
    """All stages of a layer may be dense; layers behind it are still compressed."""
    checkpoint = checkpoint_of(tmp_path, "cohere")
    recipe = mixed([{"match": r"layers\.0\.", "dense": True}])
    report = compress(checkpoint.folder, tmp_path / "out", recipe, tiny.windows())
    assert len(report.modules) == 7 and {m.source_layer for m in report.modules} == {1}
    before, after = weights_of(checkpoint.folder), weights_of(tmp_path / "out")
    for name in before:
        if ".layers.0." in name:
            assert torch.equal(before[name], after[name])
