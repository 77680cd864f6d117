"""compress() into packed folders: stock transformers load them, every byte is accounted for."""

import csv
import json
from importlib import resources

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig
from typer.testing import CliRunner

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import compress
from distaya_ext.errors import UsageError
from distaya_ext.export import export
from distaya_ext.recipe import Recipe

RECIPES = {
    "2:4": {"nm": "2:4", "bits": 4, "group": 32},
    "gptq": {"method": "gptq", "bits": 4, "group": 32},
    "gptq-order": {"method": "gptq", "bits": 4, "group": 32, "order": "activation"},
    "row": {"method": "gptq", "bits": 8, "group": 0, "order": "activation"},
    "ragged": {"method": "rtn", "bits": 4, "group": 64, "scale": "mse"},  # does not divide 96
    "wanda": {"method": "wanda", "sparsity": 0.5, "bits": 4, "group": 32},
}


def recipe_of(**fields):
    return tiny.recipe(fields.pop("method", "sparsegpt"), **fields)


def weight_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def stock(folder, dtype, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", ["2:4", "gptq", "gptq-order", "row", "wanda"])
def test_stock_transformers_load_what_we_write(tmp_path, key, dtype):
    """Its logits are those of the dense export, bit for bit: a weight is one product, which float32
    holds before it is rounded, so both sides round the same number once."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=dtype)
    out = tmp_path / "out"
    report = compress(source, out, recipe_of(**RECIPES[key]), tiny.windows())
    assert report.format == "pack-quantized"
    export(out, tmp_path / "dense", "dense")
    ids = tiny.windows(2).ids
    packed, dense = stock(out, dtype), stock(tmp_path / "dense", dtype)
    assert any(name.endswith("weight_packed") for name in packed.state_dict())
    got, expected = logits(packed, ids), logits(dense, ids)
    assert torch.isfinite(got).all() and torch.equal(got, expected)
    assert not torch.equal(got, logits(stock(source, dtype), ids))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_asymmetric_ones_load_in_stock_transformers_as_the_notice_says(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    out = tmp_path / "out"
    report = compress(source, out, recipe_of(**RECIPES["gptq"], symmetric=False), tiny.windows())
    assert any("CompressedTensorsConfig(dequantize=True)" in notice for notice in report.notices)
    checkpoint = open_checkpoint(out, packed=True)
    assert not any(held.scheme.symmetric for held in checkpoint.stored.values())
    dense = CompressedTensorsConfig(dequantize=True)
    model = stock(out, torch.bfloat16, quantization_config=dense)
    for name in checkpoint.stored:
        held = checkpoint.grid(name).dense(torch.bfloat16)
        assert torch.equal(model.get_submodule(name).weight, held)


@pytest.mark.parametrize("family", ["cohere2", "gemma3_text", "qwen2", "llama-bias"])
def test_families_heads_and_biases(tmp_path, family):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family], dtype=torch.bfloat16)
    out = tmp_path / "out"
    compress(source, out, recipe_of(**RECIPES["2:4"]), tiny.windows())
    export(out, tmp_path / "dense", "dense")
    ids = tiny.windows(2).ids
    pair = [logits(stock(folder, torch.bfloat16), ids) for folder in (out, tmp_path / "dense")]
    assert torch.equal(*pair)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    kept = {name for name in before if name in after}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name.rpartition(".")[0] for name in before.keys() - kept} == set(
        open_checkpoint(out, packed=True).stored
    )


def test_two_kinds_of_matrices_in_one_standard_folder(tmp_path):
    """64 inputs are one group, 128 are two: two config groups that name their modules."""
    config = LlamaConfig(**{**tiny.FAMILIES["llama"].to_dict(), "intermediate_size": 128})
    source = tiny.make(tmp_path / "source", config, dtype=torch.bfloat16)
    out = tmp_path / "out"
    compress(source, out, recipe_of(method="gptq", bits=4, group=64), tiny.windows())
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [3, 18]
    export(out, tmp_path / "dense", "dense")
    ids = tiny.windows(2).ids
    pair = [logits(stock(folder, torch.bfloat16), ids) for folder in (out, tmp_path / "dense")]
    assert torch.equal(*pair)


def test_the_walk_saw_the_weights_that_the_file_means(tmp_path):
    """The same grids, written dense: the file's codes and scales give those weights exactly."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    seen = {}

    def on_event(event):
        seen.setdefault(type(event).__name__, []).append(event)

    for key in ("2:4", "gptq-order", "wanda"):
        out = tmp_path / key.replace(":", "of")
        report = compress(source, out, recipe_of(**RECIPES[key]), tiny.windows(), on_event=on_event)
        checkpoint = open_checkpoint(out, packed=True)
        for module in report.modules:
            W = checkpoint.grid(module.module).dense(torch.bfloat16)
            assert module.zeros == int((W == 0).sum())
            if key == "2:4":
                assert int((W.view(-1, 4) != 0).sum(1).max()) <= 2
    assert len(seen["Saved"]) == 3
    for planned, saved in zip(seen["Planned"], seen["Saved"], strict=True):
        assert planned.format == "pack-quantized"
        assert saved.bytes == pytest.approx(planned.bytes, rel=0.1)  # headers are a tenth here


@pytest.mark.parametrize("pruning", [{"nm": "2:4"}, {"sparsity": 0.6}, {}], ids=str)
def test_int8_embedding_and_bitmasks_are_ours(tmp_path, pruning):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    out = tmp_path / "out"
    method = "sparsegpt" if pruning else "gptq"
    recipe = recipe_of(method=method, bits=4, group=32, embed_bits=8, **pruning)
    report = compress(source, out, recipe, tiny.windows())
    assert report.format == "distaya"
    checkpoint = open_checkpoint(out, packed=True)
    assert checkpoint.scheme.method == "distaya" and len(checkpoint.stored) == 23
    encodings = {held.scheme.encoding for held in checkpoint.stored.values()}
    assert encodings == ({"bitmask", "pack-quantized"} if pruning else {"pack-quantized"})
    dense = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        grid = checkpoint.grid(name)
        W = dense[f"{name}.weight"].float()
        # Half a step, and as much again since the range is cut at 127.5 steps of a rounded scale.
        bound = grid.scales.float() * (0.5 + 127.5 * 2**-8) + 2**-8 * W.abs()
        assert bool(((grid.dense(torch.float32) - W).abs() <= bound).all())
        assert report.ends[name]["bits"] == 8
    kinds = {held.scheme.kind for held in checkpoint.stored.values()}
    expected = {"2:4": "int4-2:4", None: "int4-mask"}[pruning.get("nm")] if pruning else "int4"
    assert kinds == {"int8", expected}


def test_a_tied_embedding_is_stored_once(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    recipe = Recipe(model="m", method="dense", embed_bits=8)
    compress(source, tmp_path / "out", recipe)
    checkpoint = open_checkpoint(tmp_path / "out", packed=True)
    assert list(checkpoint.stored) == ["model.embed_tokens"] and checkpoint.tied
    assert not any(name.startswith("lm_head") for name in checkpoint.entries)


def test_layers_see_the_rounded_embedding(tmp_path):
    """embed_bits calibrates as the model whose embedding was rounded before does."""
    config = LlamaConfig(**{**tiny.FAMILIES["llama"].to_dict(), "tie_word_embeddings": True})
    source = tiny.make(tmp_path / "source", config, dtype=torch.bfloat16)
    compress(source, tmp_path / "e", Recipe(model="m", method="dense", embed_bits=8))
    export(tmp_path / "e", tmp_path / "rounded", "dense")
    fields = {**RECIPES["gptq"], "symmetric": True}
    compress(tmp_path / "rounded", tmp_path / "a", recipe_of(**fields), tiny.windows())
    compress(source, tmp_path / "b", recipe_of(**fields, embed_bits=8), tiny.windows())
    a, b = (open_checkpoint(tmp_path / name, packed=True) for name in "ab")
    for name in a.stored:
        assert torch.equal(a.grid(name).codes, b.grid(name).codes)


SIZES = [*RECIPES.values(), {"nm": "2:4", "bits": 4, "group": 32, "embed_bits": 8},
         {"sparsity": 0.5, "bits": 4, "group": 0, "format": "distaya"},
         {"method": "gptq", "bits": 3, "group": 32}, {"method": "rtn", "bits": 5, "group": 32},
         {"sparsity": 0.5}]  # fmt: skip


@pytest.mark.parametrize("fields", SIZES, ids=str)
@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_sizes_are_those_predicted(tmp_path, family, fields):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family], dtype=torch.bfloat16)
    out = tmp_path / "out"
    report = compress(source, out, recipe_of(**fields), tiny.windows())
    size = weight_bytes(out)
    assert report.file_bytes == size == pytest.approx(report.predicted_bytes, rel=0.01)
    checkpoint = open_checkpoint(out, packed=True)
    for module in report.modules:
        held = [e.nbytes for k, e in checkpoint.entries.items()
                if k.rpartition(".")[0] == module.module and not k.endswith(".bias")]  # fmt: skip
        assert module.bytes == sum(held)
        assert module.bits_per_weight == 8 * module.bytes / (module.rows * module.columns)
    totals = json.loads((out / "results.json").read_text())
    assert totals["totals"]["bytes"] == sum(module.bytes for module in report.modules)
    assert totals["totals"]["bits_per_weight"] == report.bits_per_weight
    found = totals["size"]
    assert found["file_bytes"] == size and found["format"] == report.format
    embed = found["ends"]["model.embed_tokens"]
    assert embed["bits"] == (8 if "embed_bits" in fields else 16)
    with open(out / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bytes"]) for row in rows] == [module.bytes for module in report.modules]
    assert float(rows[0]["bits_per_weight"]) == pytest.approx(report.modules[0].bits_per_weight)


def test_what_a_weight_takes(tmp_path):
    """4 bits (a bitmask at half: 3) and a bfloat16 scale per group; the shape is 16 bytes."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    make = {"pack": {"method": "rtn", "bits": 4, "group": 32},
            "mask": {"method": "magnitude", "nm": "2:4", "bits": 4, "group": 64,
                     "symmetric": True, "format": "distaya"}}  # fmt: skip
    bits = {}
    for name, fields in make.items():
        report = compress(source, tmp_path / name, recipe_of(**fields), tiny.windows())
        module = next(m for m in report.modules if m.module.endswith("0.self_attn.q_proj"))
        bits[name] = module.bits_per_weight - 8 * 16 / 4096
    assert bits["pack"] == 4 + 16 / 32
    assert 3 + 16 / 64 - 0.1 < bits["mask"] <= 3 + 16 / 64  # rounding makes a few more zeros


def test_which_format_is_chosen(tmp_path):
    ragged = LlamaConfig(**{**tiny.FAMILIES["llama"].to_dict(), "intermediate_size": 90})
    plain = tiny.make(tmp_path / "plain", tiny.FAMILIES["llama"])
    odd = tiny.make(tmp_path / "odd", ragged)
    chosen = {
        "pack-quantized": [(plain, {"bits": 4, "group": 32}), (plain, {"bits": 8, "group": 128})],
        "distaya": [(plain, {"bits": 3}), (odd, {"bits": 4, "group": 64}),
                    (plain, {"bits": 4, "format": "distaya"})],
        "dense": [(plain, {"bits": 5}), (plain, {"bits": 4, "format": "dense"})],
    }  # fmt: skip
    for name, runs in chosen.items():
        for index, (source, fields) in enumerate(runs):
            out = tmp_path / f"{name}{index}"
            report = compress(source, out, recipe_of(method="rtn", **fields))
            assert report.format == name
            about = json.loads((out / "config.json").read_text()).get("quantization_config", {})
            method = about.get("quant_method")
            assert method == {"pack-quantized": "compressed-tensors"}.get(
                name, name if name == "distaya" else None
            )
            told = " ".join(report.notices)
            assert ("5 bits have no packed form" in told) == (fields["bits"] == 5)
            assert ("which groups of 64 do not divide" in told) == (source == odd)
    with pytest.raises(UsageError, match=r"cannot hold this model: .*90 inputs, .*groups of 64"):
        fields = {"method": "rtn", "bits": 4, "group": 64, "format": "pack-quantized"}
        compress(odd, tmp_path / "x", recipe_of(**fields))
    assert not (tmp_path / "x").exists()


def test_skipped_modules_are_ignored_by_name(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    out = tmp_path / "out"
    recipe = recipe_of(**RECIPES["gptq"], skip=[r"layers\.0\.", "o_proj"])
    compress(source, out, recipe, tiny.windows())
    about = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(about["ignore"]) == 1 + 7 + 2 and "lm_head" in about["ignore"]
    assert len(open_checkpoint(out, packed=True).stored) == 12
    export(out, tmp_path / "dense", "dense")
    ids = tiny.windows(2).ids
    pair = [logits(stock(folder, torch.bfloat16), ids) for folder in (out, tmp_path / "dense")]
    assert torch.equal(*pair)
    compress(source, tmp_path / "none", recipe_of(**RECIPES["gptq"], skip=["proj"]), tiny.windows())
    assert "quantization_config" not in json.loads((tmp_path / "none/config.json").read_text())


def test_nano_aya(tmp_path):
    """The bundled model: stock logits equal the dense export's, at the size its bits promise."""
    with resources.as_file(resources.files("distaya_ext") / "assets" / "nano-aya") as source:
        recipe = Recipe(model="nano", method="magnitude", nm="2:4", bits=4, group=128)
        report = compress(source, tmp_path / "std", recipe)
        small = recipe.model_copy(update={"embed_bits": 8})
        own = compress(source, tmp_path / "own", small)
        before = weight_bytes(source)
    for found, out in ((report, tmp_path / "std"), (own, tmp_path / "own")):
        assert weight_bytes(out) == pytest.approx(found.predicted_bytes, rel=0.01)
    assert report.bits_per_weight == pytest.approx(4 + 16 / 128, rel=0.01)
    assert weight_bytes(tmp_path / "own") < 0.3 * before
    export(tmp_path / "std", tmp_path / "dense", "dense")
    ids = torch.arange(5, 69).view(2, 32)
    pair = [stock(tmp_path / name, torch.bfloat16) for name in ("std", "dense")]
    assert torch.equal(*(logits(model, ids) for model in pair))


def test_the_command_line(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    out = tmp_path / "out"

    def distaya(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    flags = ["--method", "magnitude", "--sparsity", "2:4", "--bits", 4, "--embed-bits", 8]
    result = distaya("compress", source, "--out", out, *flags, "--group", 32, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["size"]["format"] == "distaya" and "bits per weight (distaya)" in result.stderr
    facts = json.loads(distaya("inspect", out, "--json").stdout)
    assert facts["quantised"] == "distaya, 14 matrices of the layers"
    assert facts["can_be_compressed"].startswith("no, it is quantised already; 14 matrices")
    assert facts["bits_per_weight"] == pytest.approx(found["totals"]["bits_per_weight"], abs=1e-3)
    parameters = sum(p.numel() for p in stock(source, torch.bfloat16).parameters())
    assert facts["parameters"] == parameters
    *linears, embed = facts["linears"]
    assert {(x["bits"], x["pattern"], x["encoding"], x["kind"]) for x in linears} == {
        (4, "2:4", "bitmask", "int4-2:4")
    }
    assert (embed["module"], embed["bits"], embed["kind"]) == ("model.embed_tokens", 8, "int8")
    assert embed["bytes"] == 97 * 64 + 97 * 2 + 16
    assert "bitmask" in distaya("inspect", out, "--modules").stdout
    for flags, words in (
        (["--bits", 4, "--format", "zip"], ["'zip'"]),
        (["--embed-bits", 4], ["embed_bits", "8"]),
        (["--bits", 4, "--embed-bits", 8, "--format", "pack-quantized"], ["int8 embedding"]),
        (["--bits", 3, "--format", "pack-quantized"], ["3 bits", "4, 8"]),
        (["--bits", 6, "--format", "distaya"], ["6 bits", "3, 4, 8"]),
        (["--method", "magnitude", "--sparsity", 0.5, "--format", "distaya"], ["how many bits"]),
    ):
        result = distaya("compress", source, "--out", tmp_path / "no", *flags)
        assert result.exit_code == 2 and all(word in result.stderr for word in words), result.stderr
    alone = distaya("compress", source, "--out", tmp_path / "alone", "--embed-bits", 8)
    assert alone.exit_code == 0, alone.stderr
    again = distaya("compress", out, "--out", tmp_path / "no", "--method", "rtn", "--bits", 4)
    assert again.exit_code == 3 and "already quantised (distaya)" in again.stderr
