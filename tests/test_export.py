"""export(): every packed folder in every other format, codes bit for bit; what lies is refused."""

import json
import shutil

import pytest
import tiny
import torch
from damage import edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import compress
from distaya_ext.errors import InputError, UsageError
from distaya_ext.export import export

Q = "model.layers.1.self_attn.q_proj"
SOURCES = {
    "standard": {"bits": 4, "group": 32},
    "asymmetric": {"bits": 4, "group": 32, "symmetric": False},
    "rows": {"bits": 8, "group": 0, "symmetric": False},
    "ours": {"bits": 4, "group": 32, "embed_bits": 8},
    "mask": {"bits": 4, "group": 32, "embed_bits": 8, "method": "magnitude", "nm": "2:4"},
    "three": {"bits": 3, "group": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model packed in every way, GPTQ (written by export) included."""
    root = tmp_path_factory.mktemp("packed")
    source = tiny.make(root / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    (source / "LICENSE").write_text("free")
    (source / "quantize_config.json").write_text("{}")
    for name, fields in SOURCES.items():
        method = {"method": "rtn", **fields}
        compress(source, root / name, tiny.recipe(**method))
    for name in ("standard", "asymmetric", "rows"):
        export(root / name, root / f"gptq-{name}", "gptq")
    return root


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tensors_of(folder):
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def same_codes(a, b):
    """Every module that b holds packed means the same numbers in a."""
    a, b = open_checkpoint(a, packed=True), open_checkpoint(b, packed=True)
    for name in b.stored:
        x, y = a.grid(name), b.grid(name)
        assert torch.equal(x.codes, y.codes) and torch.equal(x.scales, y.scales), name
        assert (x.zeros is None) == (y.zeros is None)
        assert x.zeros is None or torch.equal(x.zeros, y.zeros)
    return len(b.stored)


PACKED = ("standard", "asymmetric", "rows", "ours", "mask", "gptq-standard", "gptq-asymmetric",
          "gptq-rows")  # fmt: skip


@pytest.mark.parametrize("to", ["pack-quantized", "gptq"])
@pytest.mark.parametrize("name", PACKED)
def test_codes_are_carried_over(folders, tmp_path, name, to):
    found = export(folders / name, tmp_path / "out", to)
    assert same_codes(folders / name, tmp_path / "out") == 21
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    after = tensors_of(tmp_path / "out")
    assert ends <= after.keys() and all(after[k].dtype == torch.bfloat16 for k in ends)
    told = [notice for notice in found.notices if "becomes dense bfloat16" in notice]
    assert len(told) == (2 if name in ("ours", "mask") else 0)
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    back = export(tmp_path / "out", tmp_path / "back", "pack-quantized")
    assert same_codes(folders / name, tmp_path / "back") == 21 == back.modules


@pytest.mark.parametrize("name", [*PACKED, "three"])
def test_dense_weights_are_what_the_codes_mean(folders, tmp_path, name):
    export(folders / name, tmp_path / "out", "dense")
    checkpoint = open_checkpoint(folders / name, packed=True)
    before, after = tensors_of(folders / "source"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        module = key.removesuffix(".weight")
        if module in checkpoint.stored:
            assert torch.equal(tensor, checkpoint.grid(module).dense(torch.bfloat16))
        else:
            assert torch.equal(tensor, before[key])
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    open_checkpoint(tmp_path / "out")  # and it can be compressed again


def test_same_format_gives_the_same_tensors(folders, tmp_path):
    for name, to in (("standard", "pack-quantized"), ("rows", "pack-quantized"),
                     ("gptq-standard", "gptq"), ("gptq-rows", "gptq")):  # fmt: skip
        export(folders / name, tmp_path / name, to)
        a, b = tensors_of(folders / name), tensors_of(tmp_path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_gptq_tensors_by_the_book(folders):
    """The published layout, element by element: v1 stores zero - 1, everything has inputs first."""
    for name, offset in (("standard", 1), ("asymmetric", None)):
        about = json.loads((folders / f"gptq-{name}" / "config.json").read_text())
        about = about["quantization_config"]
        if offset is None:
            offset = {"gptq": 1, "gptq_v2": 0}[about["checkpoint_format"]]
        assert about["bits"] == 4 and about["group_size"] == 32 and not about["desc_act"]
        t, grid = tensors_of(folders / f"gptq-{name}"), open_checkpoint(folders / name, packed=True)
        grid = grid.grid(Q)
        k, n = torch.arange(64)[:, None], torch.arange(64)[None, :]
        codes = (t[f"{Q}.qweight"][k // 8, n] >> (4 * (k % 8))) & 15
        group = torch.arange(2)[:, None]
        zeros = ((t[f"{Q}.qzeros"][group, n // 8] >> (4 * (n % 8))) & 15) + offset
        assert torch.equal(codes.T, grid.codes)
        assert torch.equal(t[f"{Q}.scales"].T, grid.scales)
        assert torch.equal(zeros.T, torch.full((64, 2), 8) if grid.zeros is None else grid.zeros)
        assert t[f"{Q}.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_a_zero_of_zero_needs_the_second_version(folders, tmp_path):
    for zero, version in ((1, "gptq"), (0, "gptq_v2")):
        folder = shutil.copytree(folders / "asymmetric", tmp_path / f"z{zero}")
        edit_tensors(lambda t: [v.fill_(0x11111111) for k, v in t.items() if "zero_point" in k])(
            folder
        )
        if zero == 0:  # one row of one group
            edit_tensors(lambda t: t[f"{Q}.weight_zero_point"][0, 0].fill_(0x11111110))(folder)
        export(folder, tmp_path / version, "gptq")
        about = json.loads((tmp_path / version / "config.json").read_text())
        assert about["quantization_config"]["checkpoint_format"] == version
        same_codes(folder, tmp_path / version)


def test_modules_left_dense_stay_out_of_gptq(folders, tmp_path):
    recipe = tiny.recipe("rtn", bits=4, group=32, skip=["k_proj", r"layers\.0\.mlp"])
    compress(folders / "source", tmp_path / "some", recipe)
    export(tmp_path / "some", tmp_path / "gptq", "gptq")
    assert same_codes(tmp_path / "some", tmp_path / "gptq") == 15
    about = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert len(about["dynamic"]) == 6 and all(key.startswith("-:") for key in about["dynamic"])


def test_biases_of_zero_that_gptq_writers_add(folders, tmp_path):
    folder = shutil.copytree(folders / "gptq-standard", tmp_path / "m")
    edit_tensors(lambda t: t.update({f"{Q}.bias": torch.zeros(64, dtype=torch.float16)}))(folder)
    assert f"{Q}.bias" not in open_checkpoint(folder, packed=True).entries
    edit_tensors(lambda t: t[f"{Q}.bias"][3].fill_(1))(folder)
    with pytest.raises(InputError, match=r"q_proj\.bias, which the model"):
        open_checkpoint(folder, packed=True)


def test_float16_scales_in_a_bfloat16_model(folders, tmp_path):
    """As other people's GPTQ checkpoints have them."""
    folder = shutil.copytree(folders / "gptq-standard", tmp_path / "m")

    def halve(tensors):
        for key in tensors:
            if key.endswith(".scales"):
                tensors[key] = tensors[key].half()

    edit_tensors(halve)(folder)
    export(folder, tmp_path / "out", "pack-quantized")
    assert tensors_of(tmp_path / "out")[f"{Q}.weight_scale"].dtype == torch.float16
    same_codes(folder, tmp_path / "out")


def test_shards_are_read_and_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("distaya_ext.export._SHARD", 20_000)
    first = export(folders / "mask", tmp_path / "a", "pack-quantized")
    second = export(tmp_path / "a", tmp_path / "b", "gptq")
    assert first.shards > 2 and second.shards > 2
    assert same_codes(folders / "mask", tmp_path / "b") == 21
    total = sum(t.nbytes for t in tensors_of(tmp_path / "b").values())
    assert total == second.bytes


def test_what_cannot_be_said(folders, tmp_path):
    for to in ("gptq", "pack-quantized"):
        with pytest.raises(UsageError, match=f"{to} cannot hold .*q_proj, 64x64 of 3 bits"):
            export(folders / "three", tmp_path / "out", to)
    with pytest.raises(UsageError, match="'awq' is none of dense, pack-quantized, gptq"):
        export(folders / "three", tmp_path / "out", "awq")
    with pytest.raises(InputError, match="not quantised, so there is nothing to export"):
        export(folders / "source", tmp_path / "out", "dense")
    with pytest.raises(InputError, match="is the model folder itself"):
        export(folders / "ours", folders / "ours", "dense", overwrite=True)
    only = tiny.recipe("dense", embed_bits=8)
    compress(folders / "source", tmp_path / "only", only)
    with pytest.raises(UsageError, match="nothing of this model can be stored as gptq"):
        export(tmp_path / "only", tmp_path / "out", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["only"]


def test_odd_rows_do_not_fit_the_words_of_gptq(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(**{**tiny.FAMILIES["llama"].to_dict(), "intermediate_size": 100})
    source = tiny.make(tmp_path / "source", config)
    compress(source, tmp_path / "rows", tiny.recipe("rtn", bits=4, group=0))
    with pytest.raises(UsageError, match=r"100x64 of 4 bits .*words of 32 bits"):
        export(tmp_path / "rows", tmp_path / "out", "gptq")


def test_the_command_line(folders, tmp_path):
    result = distaya("export", folders / "mask", "--to", "gptq", "--out", tmp_path / "o", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["modules"] == 23 and len(found["notices"]) == 2 and found["to"] == "gptq"
    assert "modules 23/23" in result.stderr and "note: gptq holds no quantised" in result.stderr
    result = distaya("export", folders / "mask", "--to", "gptq", "--out", tmp_path / "o")
    assert result.exit_code == 3 and "not empty" in result.stderr and result.stdout == ""
    over = distaya("export", folders / "gptq-rows", "--to", "dense", "--out", tmp_path / "o",
                   "--overwrite", "--quiet")  # fmt: skip
    assert over.exit_code == 0 and over.stderr == "" and over.stdout.strip() == str(tmp_path / "o")
    facts = json.loads(distaya("inspect", folders / "gptq-rows", "--json").stdout)
    assert facts["quantised"] == "gptq, 21 matrices of the layers"
    assert {(x["bits"], x["group"], x["encoding"], x["kind"]) for x in facts["linears"]} == {
        (8, 0, "gptq", "int8")
    }
    facts = json.loads(distaya("inspect", folders / "standard", "--json").stdout)
    assert {(x["bits"], x["encoding"], x["kind"]) for x in facts["linears"]} == {
        (4, "pack-quantized", "int4")
    }
    assert distaya("export", folders / "mask", "--to", "dense").exit_code == 2


# ---- hostile folders, through the command line ----


def only_dense(folder):
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        drop(suffix)(folder)
    put(weight=torch.zeros(64, 64))(folder)


def add_head(folder):
    edit_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(97, 64)}))(folder)


def put(**tensors):
    return edit_tensors(lambda t: t.update({f"{Q}.{k}": v for k, v in tensors.items()}))


def drop(suffix):
    return edit_tensors(lambda t: t.pop(f"{Q}.{suffix}"))


def change(suffix, how):
    return edit_tensors(lambda t: how(t[f"{Q}.{suffix}"]))


def config(**about):
    def damage(folder):
        path = folder / "config.json"
        whole = json.loads(path.read_text())
        whole["quantization_config"].update(about)
        path.write_text(json.dumps(whole))

    return damage


def twice(folder):
    path = folder / "config.json"
    text = path.read_text().rstrip().removesuffix("}")
    path.write_text(text + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}')


def ghost(folder):
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    modules = whole["quantization_config"]["modules"]
    modules["model.layers.9.mlp.up_proj"] = modules[Q]
    path.write_text(json.dumps(whole))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-500])


def unknown_dtype(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_packed"] = tensors[f"{Q}.weight_packed"].view(torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


HOSTILE = {
    "packed absent": ("standard", drop("weight_packed"), [f"{Q}.weight_packed is absent"]),
    "zeros absent": ("asymmetric", drop("weight_zero_point"), ["weight_zero_point is absent"]),
    "zeros too many": ("standard", put(weight_zero_point=torch.zeros(8, 2, dtype=torch.int32)),
                       ["weight_zero_point does not belong"]),
    "both": ("standard", put(weight=torch.zeros(64, 64)), [f"{Q}.weight beside its packed"]),
    "only dense": ("standard", only_dense, ["holds", f"{Q}.weight"]),
    "dtype": ("standard", unknown_dtype, ["weight_packed is float32", "int32"]),
    "shape": ("standard", put(weight_packed=torch.zeros(64, 9, dtype=torch.int32)),
              ["64x9", "64x64 matrix", "64x8"]),
    "shape lies": ("mask", change("weight_shape", lambda t: t.fill_(2**62)), ["weight_shape says"]),
    "scale nan": ("mask", change("weight_scale", lambda t: t[3].fill_(torch.nan)), ["NaN"]),
    "scale negative": ("ours", change("weight_scale", lambda t: t[5].neg_()), ["negative"]),
    "mask full": ("mask", change("weight_mask", lambda t: t.fill_(255)), ["keeps 4096 weights"]),
    "values lost": ("mask", put(weight_values=torch.zeros(1, dtype=torch.uint8)), ["it has 1"]),
    "twice": ("ours", twice, ["'quantization_config' is given twice"]),
    "two methods": ("ours", config(config_groups={"a": 1}), ["claims", "config_groups"]),
    "version": ("ours", config(version=2), ["version '2'", "reads version 1"]),
    "method": ("ours", config(quant_method="awq"), ["'awq'"]),
    "other method": ("standard", config(quant_method="distaya"), ["claims to be distaya"]),
    "ghost module": ("ours", ghost, ["model.layers.9.mlp.up_proj", "no matrix of this model"]),
    "gptq read as v2": ("gptq-standard", config(checkpoint_format="gptq_v2"), ["zero 7", "of 8"]),
    "gptq order": ("gptq-standard", change("g_idx", lambda t: t.copy_(t.flip(0))), ["desc_act"]),
    "gptq bits": ("gptq-standard", config(bits=8), ["qweight", "16x64"]),
    "group": ("standard", config(config_groups={"g": {"targets": ["Linear"], "weights": {
              "num_bits": 4, "group_size": 64, "strategy": "group"}}}), ["weight_scale", "64x2"]),
    "quantises nothing": ("standard", config(config_groups={"g": {"targets": ["Conv2d"],
                          "weights": {"num_bits": 4, "group_size": 32}}}), ["no matrix"]),
    "truncated": ("mask", truncate, ["promises", "download it again"]),
    "head too many": ("ours", add_head, ["lm_head is quantised", "lm_head.weight beside"]),
    "config a list": ("ours", edit_json("config.json", quantization_config=[1]), ["mapping"]),
    "sizes that overflow": ("ours", edit_json("config.json", hidden_size=1 << 40), ["config.json"]),
    "rows that overflow": ("mask", edit_json("config.json", vocab_size=1 << 60), ["config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(folders, tmp_path, case):
    name, damage, words = HOSTILE[case]
    folder = shutil.copytree(folders / name, tmp_path / "m")
    damage(folder)
    for command in (["inspect", folder], ["export", folder, "--to", "dense", "--out", "o", "-q"]):
        result = distaya(*command)
        assert result.exit_code == 3, (result.stderr, result.exception)
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert "Traceback" not in result.stderr and result.stdout == ""
        assert all(word in line for word in words), line
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_tied_head_beside_a_packed_embedding(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    compress(source, tmp_path / "m", tiny.recipe("dense", embed_bits=8))
    edit_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(97, 64)}))(tmp_path / "m")
    with pytest.raises(InputError, match=r"lm_head\.weight beside the quantised embedding"):
        open_checkpoint(tmp_path / "m", packed=True)
