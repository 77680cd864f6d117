"""Layers left out: the folder is the model without them, to the last bit, in plain transformers."""

import copy
import csv
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_compress import logits_of, weights_of, whole_model_walk
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import budget, compress
from distaya_ext.compress import proof as proofs
from distaya_ext.compress.settings import from_recipe
from distaya_ext.errors import UsageError
from distaya_ext.evaluate.load import load as load_for_eval
from distaya_ext.export import export
from distaya_ext.models import describe
from distaya_ext.models.depth import cut_json, layers_left
from distaya_ext.recipe import Recipe

DROP = (1, 2)
KINDS = ["sliding_attention", "full_attention"]


def deeper(family, layers=5, **more):
    """The configuration of a tiny family with more layers, of which kinds alternate unevenly."""
    config = copy.deepcopy(tiny.FAMILIES[family])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None and not family.startswith("qwen"):
        config.layer_types = [KINDS[i in (2, 4)] for i in range(layers)]
    if family.startswith("qwen"):  # the last three layers slide
        config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 8, 2
        config.layer_types = [KINDS[i < 2] for i in range(layers)]
    for key, value in more.items():
        setattr(config, key, value)
    return config


def removed_in_memory(folder, dropped):
    """The source model with modules taken out of its list, the plain way."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = model.config
    left = [i for i in range(config.num_hidden_layers) if i not in dropped]
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in left])
    config.num_hidden_layers = len(left)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in left]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    return model


def generated(model, ids, **more):
    found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **more)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_folder_is_the_model_without_the_layers(tmp_path, family):
    source, out = tiny.make(tmp_path / "source", deeper(family)), tmp_path / "out"
    report = compress(source, out, tiny.recipe("dense", drop_layers=DROP))
    expected = removed_in_memory(source, DROP)
    got, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert got.config.num_hidden_layers == len(got.model.layers) == 3
    assert getattr(got.config, "layer_types", None) == getattr(expected.config, "layer_types", None)
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    ids = tiny.windows(2).ids
    assert torch.equal(logits_of(got, ids), logits_of(expected, ids))
    # Three kept layers of five differ from any other choice.
    others = removed_in_memory(source, (2, 3))
    assert not torch.equal(logits_of(others, ids), logits_of(expected, ids))
    # Each layer finds its own place in a cache, and sliding windows are those of its kind.
    with_cache, without = (generated(got.eval(), ids, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache, generated(expected, ids, use_cache=True))
    assert report.dropped_layers == [1, 2] and report.source_layers == (0, 3, 4)
    assert [m.source_layer for m in report.modules] == [i for i in (0, 3, 4) for _ in range(7)]


@pytest.mark.parametrize("family", ["cohere2", "gemma3_text", "qwen3", "mistral"])
def test_what_is_compressed_saw_the_shallower_model(tmp_path, family):
    source, out = tiny.make(tmp_path / "source", deeper(family)), tmp_path / "out"
    recipe = tiny.recipe("sparsegpt", drop_layers=DROP, quality="plain")
    calibration = tiny.windows()
    report = compress(source, out, recipe, calibration)
    assert report.proof.kind == "whole" and report.proof.exact
    compress(source, tmp_path / "shallow", tiny.recipe("dense", drop_layers=DROP))
    expected = whole_model_walk(tmp_path / "shallow", from_recipe(recipe), calibration)
    got = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert (out / "config.json").read_bytes() == (tmp_path / "shallow" / "config.json").read_bytes()


def test_the_proof_of_a_part_leaves_the_layers_out_too(tmp_path, monkeypatch):
    source = tiny.make(tmp_path / "source", deeper("cohere2"))
    monkeypatch.setattr(budget, "_WHOLE_PROOF", 0)
    recipe = tiny.recipe("wanda", drop_layers=[1])
    report = compress(source, tmp_path / "out", recipe, tiny.windows())
    assert report.proof.kind == "truncated" and report.proof.exact
    # sliding, full, sliding, full: two layers show every kind.
    assert (
        report.proof.layers
        == 2
        == proofs.truncated_depth(AutoConfig.from_pretrained(tmp_path / "out"))
    )


def test_a_whole_proof_needs_room_for_the_whole_source(tmp_path):
    checkpoint = open_checkpoint(tiny.make(tmp_path / "source", deeper("llama")))
    shallow = checkpoint.without(DROP)
    assert shallow.left_out == 2 * (checkpoint.nbytes - shallow.nbytes) // 2 > 0
    assert shallow.nbytes + shallow.left_out == checkpoint.nbytes
    assert shallow.source_layers == (0, 3, 4)
    again = shallow.without([1])
    assert again.source_layers == (0, 4)
    name = "model.layers.1.mlp.up_proj.weight"
    old = "model.layers.4.mlp.up_proj.weight"
    assert torch.equal(again.read([name])[name], checkpoint.read([old])[old])
    assert checkpoint.config.num_hidden_layers == 5  # that of the source is untouched


def test_errors_name_tensors_as_the_source_does(tmp_path):
    source = tiny.make(tmp_path / "source", deeper("llama"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][4, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.up_proj\.weight holds NaN"):
        compress(source, tmp_path / "out", tiny.recipe("magnitude", drop_layers=DROP))
    # One in a layer that is left out harms nobody.
    recipe = tiny.recipe("magnitude", drop_layers=[3])
    assert len(compress(source, tmp_path / "other", recipe).modules) == 28


@pytest.mark.parametrize(
    "config, dropped, changed, gone",
    [
        # the pattern of the hub's Cohere2 files: an int from which the kinds follow
        (
            {"sliding_window_pattern": 4, "num_hidden_layers": 8},
            (0, 5),
            {"layer_types": [KINDS[i in (3, 7)] for i in (1, 2, 3, 4, 6, 7)]},
            ["sliding_window_pattern"],
        ),
        # a whole period goes: the pattern holds for what stays
        (
            {"sliding_window_pattern": 4, "num_hidden_layers": 8},
            (4, 5, 6, 7),
            {"layer_types": [KINDS[i == 3] for i in range(4)], "sliding_window_pattern": 4},
            [],
        ),
    ],
)
def test_cohere2_by_its_pattern(tmp_path, config, dropped, changed, gone):
    base = deeper("cohere2", layers=8, layer_types=[KINDS[i % 4 == 3] for i in range(8)])
    source = tiny.make(tmp_path / "source", base)
    raw = json.loads((source / "config.json").read_text())
    del raw["layer_types"]
    (source / "config.json").write_text(json.dumps(raw | config))
    compress(source, tmp_path / "out", tiny.recipe("dense", drop_layers=dropped))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 8 - len(dropped)
    assert {key: written.get(key) for key in changed} == changed
    assert not set(gone) & written.keys()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tiny.windows(2).ids
    assert torch.equal(logits_of(got, ids), logits_of(removed_in_memory(source, dropped), ids))


def test_lists_by_layer_and_other_lists():
    raw = {
        "num_hidden_layers": 2, "eos_token_id": [1, 2], "architectures": ["A", "B"],
        "windows": [7, None], "max_window_layers": 1, "rope": {"long_factor": [1.0, 2.0]},
    }  # fmt: skip
    config = AutoConfig.for_model("qwen2", num_hidden_layers=2, use_sliding_window=True,
                                  max_window_layers=1)  # fmt: skip
    assert cut_json(raw, config, (1,)) == raw | {
        "num_hidden_layers": 1, "windows": [None], "max_window_layers": 0,
        "layer_types": ["sliding_attention"],
    }  # fmt: skip
    assert raw["num_hidden_layers"] == 2
    assert cut_json(raw, config, (0,))["max_window_layers"] == 1


@pytest.mark.parametrize(
    "dropped, words",
    [
        ([5], ["layer 5", "has 5, from 0 to 4"]),
        ([0, 1, 2, 3, 4], ["all 5 layers", "at least one must stay"]),
    ],
)
def test_layers_that_cannot_go(tmp_path, dropped, words):
    source = tiny.make(tmp_path / "source", deeper("llama"))
    with pytest.raises(UsageError) as caught:
        compress(source, tmp_path / "out", tiny.recipe("dense", drop_layers=dropped))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


def test_a_layer_named_twice():
    with pytest.raises(UsageError, match="names layer 3 twice"):
        Recipe(model="m", method="dense", drop_layers=[3, 1, 3])
    with pytest.raises(UsageError, match="names layer 3 twice"):
        layers_left(5, [3, 3])
    with pytest.raises(UsageError, match="drop_layers"):
        Recipe(model="m", method="dense", drop_layers=[-1])
    assert Recipe(model="m", method="dense", drop_layers=[4, 1]).drop_layers == [1, 4]


@pytest.mark.parametrize("form", ["pack-quantized", "distaya"])
def test_packed_folders(tmp_path, form):
    """Reading, running, exporting and looking at packed folders of fewer layers."""
    source = tiny.make(tmp_path / "source", deeper("cohere2"), dtype=torch.bfloat16)
    recipe = tiny.recipe("gptq", bits=4, group=32, format=form, drop_layers=DROP)
    report = compress(source, tmp_path / "out", recipe, tiny.windows())
    assert report.predicted_bytes == pytest.approx(report.file_bytes, rel=0.01)
    checkpoint = open_checkpoint(tmp_path / "out", packed=True)
    assert len(checkpoint.stored) == 21
    model = distaya_ext.load(tmp_path / "out", exact=True)
    ids = tiny.windows(2).ids
    assert torch.equal(
        generated(model, ids, use_cache=True), generated(model, ids, use_cache=False)
    )
    export(tmp_path / "out", tmp_path / "plain", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.layer_types == model.config.layer_types == [KINDS[i] for i in (0, 0, 1)]
    assert torch.allclose(logits_of(plain, ids), logits_of(model, ids), atol=0.05)


def test_the_command_line(tmp_path):
    """--drop-layers alone is a run of method dense; the recipe it writes repeats it."""
    source, run = tiny.make(tmp_path / "source", deeper("llama")), CliRunner()
    out, again = tmp_path / "out", tmp_path / "again"
    said = run.invoke(app, ["compress", str(source), "--out", str(out), "--drop-layers", "3, 1"])
    assert said.exit_code == 0, said.output
    assert "2 layers left out, 3 written" in said.output
    recipe = Recipe.from_yaml(out / "recipe.yaml")
    assert recipe.method == "dense" and recipe.drop_layers == [1, 3]
    with open(out / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[7]["module"], rows[7]["source_layer"]) == ("model.layers.1.self_attn.q_proj", "2")
    assert json.loads((out / "results.json").read_text())["dropped_layers"] == [1, 3]
    said = run.invoke(app, ["compress", "--recipe", str(out / "recipe.yaml"), "--out", str(again)])
    assert said.exit_code == 0, said.output
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()
    found, expected = weights_of(again), weights_of(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    said = run.invoke(app, ["inspect", str(out), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["layers"] == 3
    for wrong in ("", "a", "1,,2", "-1", "1-3"):
        said = run.invoke(app, ["compress", str(source), "--out", "x", f"--drop-layers={wrong}"])
        assert said.exit_code == 2 and "no list of layer numbers" in said.output, wrong


def test_nano_aya_is_evaluated(tmp_path):
    """The bundled model without a layer: read, scored and told apart by the evaluation."""
    from importlib.resources import files

    source = files("distaya_ext") / "assets" / "nano-aya"
    recipe = Recipe(model=str(source), method="dense", drop_layers=[3])
    compress(source, tmp_path / "out", recipe)
    loaded = load_for_eval(tmp_path / "out")
    assert describe(loaded.model.config).model_type == "cohere"
    assert len(loaded.model.model.layers) == 7
    result = distaya_ext.evaluate(
        tmp_path / "out",
        distaya_ext.read_texts(files("distaya_ext") / "assets" / "texts" / "evaluation"),
        against=source, tokens=2048, window=64,
    )  # fmt: skip
    assert result.gap > 0
