"""What a hostile stranger hands in, through the command line: one sentence, exit code 2 or 3.

Every case damages a copy of a healthy model, of its texts or of a recipe and runs `compress` (and
`eval` where it reads the same thing). Nothing may be left at or beside the output folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import (
    INDEX,
    UP,
    WEIGHTS,
    Damage,
    change_tokenizer,
    edit_index,
    edit_json,
    edit_tensors,
    forget_in_index,
    header,
    link_out,
    lose_shards,
    poison,
    remove,
    rename,
    shard,
    truncate,
    write,
)
from strangers import INPUT, USAGE, both_refuse, compress, distaya, evaluate, one_sentence

from distaya_ext.compress import budget

I64 = b'{"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}'
ALIEN = b'{"x":{"dtype":"Q7","shape":[1],"data_offsets":[0,8]}}'
MODELS: dict[str, tuple[Damage, list[str]]] = {
    # names that lead out of the folder
    "shard above": (edit_index(lm_head__weight="../x.safetensors"), ["'../x.safetensors'"]),
    "shard absolute": (edit_index(lm_head__weight="/x.safetensors"), ["'/x.safetensors'"]),
    "shard is a link": (link_out(WEIGHTS), [WEIGHTS, "link", "leaves the model folder"]),
    "config is a link": (link_out("config.json"), ["config.json", "leaves the model folder"]),
    # index and shards that disagree
    "promised tensor": (
        edit_index(ghost__weight="model-00001-of-00003.safetensors"),
        ["promises 1 tensor", "ghost.weight"],
    ),
    "tensor not in index": (forget_in_index, ["model.norm.weight", "index"]),
    "shards lost": (lose_shards, ["2 of 3 shards are missing", "model-00001", "model-00002"]),
    "index names a pickle": (edit_index(x="x.bin"), ["'x.bin'", "pickles"]),
    "index of another shape": (
        lambda m: (shard(m), write(INDEX, b"{}")(m)),
        [INDEX, "no weight_map"],
    ),
    # damaged files
    "truncated": (truncate, [WEIGHTS, "promises", "download it again"]),
    "no bytes": (write(WEIGHTS, b""), [WEIGHTS, "0 bytes", "download it again"]),
    "huge header": (header(b"{}", 1 << 60), [WEIGHTS, "damaged", "download it again"]),
    "unknown dtype": (header(ALIEN), [WEIGHTS, "damaged", "download it again"]),
    "foreign tensors": (header(I64), ["config.json asks for 2 decoder layers"]),
    # shapes, dtypes, names
    "wrong shape": (
        edit_tensors(lambda t: t.update({UP: torch.zeros(63, 32)})),
        [UP, "63x32", "64x32"],
    ),
    "wrong dtype": (
        edit_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        [UP, "F32, BF16, F16"],
    ),
    "tensor lost": (edit_tensors(lambda t: t.pop(UP)), ["lacks 1 tensor", UP]),
    "tensor too many": (
        edit_tensors(lambda t: t.update({"model.extra.weight": torch.zeros(1)})),
        ["model.extra.weight", "has not"],
    ),
    "layers": (edit_json("config.json", num_hidden_layers=3), ["3 decoder layers", "holds 2"]),
    # values
    "nan": (poison(float("nan")), [UP, "NaN or infinity", "row 3 of 64"]),
    "inf": (poison(float("-inf")), [UP, "NaN or infinity", "row 3 of 64"]),
    # code
    "pickle": (rename(WEIGHTS, "pytorch_model.bin"), ["pytorch_model.bin", "save_pretrained"]),
    "remote code": (
        edit_json("config.json", auto_map={"AutoModel": "m.M"}),
        ["auto_map", "never run"],
    ),
    # config.json
    "no config": (remove("config.json"), ["has no config.json"]),
    "config no json": (write("config.json", b"{"), ["config.json", "not valid JSON"]),
    "config digits": (
        write("config.json", b'{"n": ' + b"9" * 5000 + b"}"),
        ["config.json", "digits"],
    ),
    "type unknown": (edit_json("config.json", model_type="gpt2"), ["'gpt2'", "cohere2"]),
    "type a list": (edit_json("config.json", model_type=["cohere"]), ["model_type ['cohere']"]),
    "dtype a list": (
        edit_json("config.json", dtype=["float32"]),
        ["config.json", "not usable"],
    ),
    "number lost": (edit_json("config.json", logit_scale=None), ["None for logit_scale"]),
    "quantised": (
        edit_json("config.json", quantization_config={"quant_method": "bitsandbytes"}),
        ["quantised", "bitsandbytes"],
    ),
    "quantised oddly": (edit_json("config.json", quantization_config="int4"), ["quanti"]),
    "empty vocabulary": (edit_json("config.json", vocab_size=0), ["config.json", "built"]),
    # tokenizer
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ["has no tokenizer", "tokenizer.json", "tokenizer.model"],
    ),
    "only its config": (remove("tokenizer.json"), ["has no tokenizer", "tokenizer.json"]),
    "only its vocabulary": (remove("tokenizer_config.json"), ["_token", "300 rows"]),
    "tokenizer broken": (write("tokenizer.json", b"{"), ["tokenizer of model cannot be read"]),
    "tokenizer setting": (
        edit_json("tokenizer_config.json", model_max_length="x"),
        ["tokenizer of model cannot be read"],
    ),
    "generation setting": (
        edit_json("generation_config.json", pad_token_id="x"),
        ["transformers cannot load it"],
    ),
    "tokenizer empty": (
        change_tokenizer(lambda t: t["model"].update(vocab={}, merges=[])),
        ["tokenizer of model"],
    ),
    "tokenizer too large": (
        change_tokenizer(lambda t: t["model"]["vocab"].update(extra=300)),
        ["goes up to token 300", "300 rows"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(place, case):
    damage, words = MODELS[case]
    damage(place / "model")
    both_refuse(place, INPUT, *words)


def test_companion_link_is_told_before_the_work(place):
    """README.md is only copied, at the end: too late to find a link that leads out."""
    (place / "model" / "README.md").write_text("card")
    link_out("README.md")(place / "model")
    one_sentence(compress(place), INPUT, "README.md", "leaves the model folder")
    assert not (place / "out").exists()


def test_index_without_metadata_is_accepted(place):
    edit_index()(place / "model")
    assert compress(place).exit_code == 0


@pytest.mark.parametrize("command", ["compress", "eval", "inspect", "generate"])
@pytest.mark.parametrize(
    "model, words", [("nowhere", ["nowhere"]), ("model/config.json", ["is a file"]), ("", ["hub"])]
)
def test_paths_that_are_no_model(place, command, model, words):
    rest = {"compress": ["--out", place / "out", "--method", "rtn", "--bits", 4]}
    rest |= {"eval": ["--texts", place / "texts"], "inspect": [], "generate": ["hello"]}
    name = place / model if model else "a/b/c"
    one_sentence(distaya(command, name, *rest[command]), INPUT, *words)


TEXTS: dict[str, tuple[Damage, list[str]]] = {
    "no folder": (shutil.rmtree, ["texts", "does not exist"]),
    "no file": (lambda t: [p.unlink() for p in t.iterdir()], ["holds no", "<lang>.txt"]),
    "empty": (write("en.txt", b""), ["en.txt", "empty"]),
    "blank": (write("en.txt", b" \n\n"), ["en.txt", "empty"]),
    "one word": (write("en.txt", b"cat\n"), ["too little text", "16 tokens", "en "]),
    "unknown language": (write("English.txt", b"cat\n"), ["English.txt", "language code"]),
    "not UTF-8": (write("en.txt", b"fine\nbr\xc3\n"), ["en.txt line 2", "not UTF-8", "byte 7"]),
    "NUL": (write("en.txt", b"a\0b\n"), ["en.txt line 1", "NUL"]),
    "no json": (write("fr.jsonl", b'{"text": \n'), ["fr.jsonl line 1", "JSON"]),
    "json without text": (write("fr.jsonl", b'{"t": "a"}\n'), ["fr.jsonl line 1", '"text"']),
    "json digits": (write("fr.jsonl", b"9" * 5000 + b"\n"), ["fr.jsonl line 1", "JSON"]),
    "no parquet": (write("fr.parquet", b"PAR1"), ["fr.parquet", "parquet"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(place, case):
    damage, words = TEXTS[case]
    damage(place / "texts")
    both_refuse(place, INPUT, *words)


def test_repeated_text_is_told_and_counted(place):
    result = compress(place)
    assert result.exit_code == 0
    assert "note: documents that repeat an earlier one: en 21, es 21, ja 21" in result.stderr
    told = json.loads((place / "out" / "results.json").read_text())["notices"]
    assert any("en 21" in notice for notice in told)


def test_too_few_tokens_for_all_languages(place):
    one_sentence(compress(place, "--tokens", 47), INPUT, "47 tokens", "3 languages", "48 tokens")
    one_sentence(evaluate(place, "--tokens", 47), INPUT, "47 tokens", "3 languages", "48 tokens")


def test_windows_longer_than_the_positions(place):
    words = ["129 tokens", "128 positions"]
    one_sentence(compress(place, "--window", 129, "--tokens", 4096), USAGE, *words)
    one_sentence(evaluate(place, "--window", 129), USAGE, *words)


def test_activations_that_overflow(place):
    """One weight so large that its layer's output is infinite."""
    edit_tensors(lambda t: t[UP].fill_(3e38))(place / "model")
    one_sentence(compress(place), INPUT, "own logits are not finite", "overflow in float32")
    one_sentence(evaluate(place), INPUT, "NaN or infinite logits", "language")


def test_pattern_and_columns(place):
    one_sentence(compress(place, "--sparsity", "3:7"), USAGE, "3:7", "divisible by 7", "has 32")
    assert not (place / "out").exists()


RECIPES: dict[str, tuple[bytes, list[str]]] = {
    "unknown key": (b"sparsty: 0.5\n", ["'sparsty'", "'sparsity'"]),
    "unknown inner key": (b"calibration: {token: 5}\n", ["'token'", "'tokens'"]),
    "key of calibration": (b"seed: 5\n", ["'seed'", "under calibration"]),
    "key given twice": (b"bits: 4\nbits: 3\n", ["r.yaml", "'bits' is given twice", "line 2"]),
    "tag": (b"model: !!python/object/apply:os.system ['true']\n", ["r.yaml", "plain YAML"]),
    "bomb": (b"a: &a [1]\nb: [" + b"*a, " * 40 + b"]\n", ["r.yaml", "aliases"]),
    "not UTF-8": (b"model: \xff\n", ["r.yaml", "UTF-8"]),
    "no mapping": (b"- 1\n", ["r.yaml", "mapping"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(place, case):
    data, words = RECIPES[case]
    (place / "r.yaml").write_bytes(data)
    one_sentence(compress(place, "--recipe", place / "r.yaml"), USAGE, *words)
    assert not (place / "out").exists()


def test_skip_pattern_that_matches_nothing(place):
    (place / "r.yaml").write_text("skip: [o_porj]\n")
    result = compress(place, "--recipe", place / "r.yaml")
    one_sentence(result, USAGE, "'o_porj'", "none of the 14")


def occupied(place: Path) -> Path:
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("mine")
    return place / "out"


def linked(place: Path) -> Path:
    (place / "real").mkdir()
    (place / "out").symlink_to(place / "real")
    return place / "out"


def a_file(place: Path) -> Path:
    (place / "out").write_text("mine")
    return place / "out"


@pytest.mark.parametrize(
    "prepare, flags, words",
    [
        (occupied, [], ["out is not empty", "--overwrite"]),
        (occupied, ["--overwrite"], ["not written by distaya"]),
        (linked, ["--overwrite"], ["is not a folder"]),
        (a_file, ["--overwrite"], ["is not a folder"]),
        (lambda place: a_file(place) / "x", [], ["cannot be made", "out is no folder"]),
        (lambda place: place / "model", ["--overwrite"], ["is the model folder"]),
        (lambda place: place, ["--overwrite"], ["holds the model folder"]),
    ],
)
def test_outputs(place, prepare, flags, words):
    out = prepare(place)
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    one_sentence(compress(place, "--out", out, *flags), INPUT, *words)
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before


def test_output_is_refused_before_anything_is_read(place):
    shutil.rmtree(place / "texts")
    (place / "model" / WEIGHTS).unlink()
    occupied(place)
    one_sentence(compress(place), INPUT, "out is not empty")


def test_folders_made_for_a_failed_run_are_taken_away(place):
    result = compress(place, "--out", place / "a" / "b" / "out", "--sparsity", "3:7")
    one_sentence(result, USAGE, "3:7")
    assert not (place / "a").exists()
    assert compress(place, "--out", place / "a" / "b" / "out").exit_code == 0
    assert [path.name for path in (place / "a" / "b").iterdir()] == ["out"]


@pytest.mark.parametrize("command", [compress, evaluate])
def test_devices(place, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_sentence(command(place, "--device", "cuda"), USAGE, "cuda", "no CUDA GPU")
    one_sentence(command(place, "--device", "tpu"), USAGE, "'tpu'", "cpu or cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    one_sentence(command(place, "--device", "cuda:7"), USAGE, "cuda:7", "1 CUDA GPU")


def test_prompt_that_is_no_text(place):
    result = distaya("generate", place / "model", "bad \udcff byte")
    one_sentence(result, USAGE, "prompt", "UTF-8", "character 4")


def test_a_disk_too_full_is_told_before_the_work(place, monkeypatch):
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    one_sentence(compress(place), 5, "0.00 GiB are free")
    assert not (place / "out").exists()


def test_the_recipe_beside_the_result_repeats_it_bit_for_bit(place):
    assert compress(place, "--seed", 3, "--bits", 4, "--group", 32).exit_code == 0
    first = place / "out"
    again = distaya("compress", "--recipe", first / "recipe.yaml", "--out", place / "again")
    assert again.exit_code == 0, again.stderr
    for name in (WEIGHTS, "recipe.yaml"):
        assert (first / name).read_bytes() == (place / "again" / name).read_bytes()
    other = compress(place, "--out", place / "other", "--seed", 4, "--bits", 4, "--group", 32)
    assert other.exit_code == 0
    assert (first / WEIGHTS).read_bytes() != (place / "other" / WEIGHTS).read_bytes()
