"""The table of bad inputs, row by row: what a user hands in, what a command says, what stays.

Every test goes through a command or a public function. A refusal is one sentence with the names and
numbers in it, an exit code of its own, and nothing written, replaced or lost. Rows that have a file
of their own are listed in SECURITY.md.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from damage import (
    INDEX,
    UP,
    WEIGHTS,
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
from safetensors.torch import load_file
from speaking import SENTENCES
from strangers import INPUT, USAGE, both_refuse, compress, contents, distaya, evaluate, one_sentence
from transformers import LlamaConfig

import distaya_ext

PACKAGE = Path(distaya_ext.__file__).parent
SHARD = "model-00002-of-00003.safetensors"


# ---- names that lead out of the folder ----


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors"])
def test_row_shard_path_above_or_absolute(place, name):
    """An index entry is a plain file name or it is refused, by its own words."""
    edit_index(lm_head__weight=name)(place / "model")
    both_refuse(place, INPUT, repr(name), "leads out of its folder", "only plain names")


def test_row_shard_is_a_link_out_of_the_folder(place):
    link_out(WEIGHTS)(place / "model")
    both_refuse(place, INPUT, WEIGHTS, "link that leaves the model folder")


def test_row_shard_is_a_link_to_itself(place):
    (place / "model" / WEIGHTS).unlink()
    (place / "model" / WEIGHTS).symlink_to(WEIGHTS)
    both_refuse(place, INPUT, WEIGHTS, "link")


def test_row_links_of_a_hub_cache_into_its_blobs_are_followed(place):
    """models--*/snapshots/REV/file -> models--*/blobs/HASH is how hubs store models."""
    blobs, snapshot = (place / "models--a--b" / name for name in ("blobs", "snapshots/abc"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((place / "model").iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    result = distaya("compress", snapshot, "--out", place / "out", "--method", "rtn", "--bits", 4)
    assert result.exit_code == 0, result.stderr


# ---- index and shards that disagree ----


def test_row_index_without_metadata_is_accepted(place):
    edit_index()(place / "model")
    assert "metadata" not in json.loads((place / "model" / INDEX).read_text())
    assert compress(place).exit_code == 0 and evaluate(place).exit_code == 0


def test_row_index_promises_tensors_that_no_shard_holds(place):
    edit_index(ghost__weight=SHARD, phantom__weight=SHARD)(place / "model")
    both_refuse(place, INPUT, "promises 2 tensors", "ghost.weight", "phantom.weight")


def test_row_shard_holds_a_tensor_that_the_index_lacks(place):
    forget_in_index(place / "model")
    both_refuse(place, INPUT, "model.norm.weight", "which the index does not place there")


def test_row_missing_shards_are_told_all_at_once(place):
    lose_shards(place / "model")
    both_refuse(place, INPUT, "2 of 3 shards are missing", "model-00001-of", "model-00002-of")


# ---- damaged files ----


def test_row_truncated_later_shard_is_found_before_any_work(place):
    """Sizes of all shards are compared with their headers first: texts are not even looked at."""
    shard(place / "model")
    last = place / "model" / "model-00003-of-00003.safetensors"
    size = last.stat().st_size
    os.truncate(last, size - 7)
    shutil.rmtree(place / "texts")
    words = [last.name, f"promises {size} bytes", f"has {size - 7}", "download it again"]
    before = contents(place)
    one_sentence(compress(place), INPUT, *words)
    one_sentence(distaya("inspect", place / "model"), INPUT, *words)
    assert contents(place) == before


def test_row_all_truncated_shards_are_told_at_once(place):
    shard(place / "model")
    for path in sorted((place / "model").glob("model-*.safetensors"))[:2]:
        os.truncate(path, path.stat().st_size - 1)
    both_refuse(place, INPUT, "2 of 3 shards are damaged", "model-00001-of", "model-00002-of")


DAMAGED = {
    "cut off": (truncate, ["promises"]),
    "no bytes": (write(WEIGHTS, b""), ["0 bytes"]),
    "huge header": (header(b"{}", 1 << 60), ["18 bytes"]),
    "unknown dtype": (
        header(b'{"x":{"dtype":"Q7","shape":[1],"data_offsets":[0,8]}}'),
        ["Q7", "69 bytes"],
    ),
    "a pickle by another name": (write(WEIGHTS, b"\x80\x04\x95" + b"x" * 40), ["43 bytes"]),
    "a web page": (write(WEIGHTS, b"<html>Not Found</html>"), ["22 bytes"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_row_truncated_shard_huge_header_unknown_dtype(place, case):
    """The file, its size and what to do; safetensors' own reason where sizes say nothing."""
    damage, words = DAMAGED[case]
    damage(place / "model")
    both_refuse(place, INPUT, f"{WEIGHTS} is damaged", "download it again", *words)


def test_row_wrong_shape_or_dtype_is_found_before_any_work(place):
    """Every header against the architecture, before texts are read or weights are touched."""
    shutil.rmtree(place / "texts")
    shape = edit_tensors(lambda t: t.update({UP: torch.zeros(63, 32)}))
    shape(place / "model")
    one_sentence(compress(place), INPUT, UP, "63x32", "64x32")
    edit_tensors(lambda t: t.update({UP: torch.zeros(64, 32, dtype=torch.int8)}))(place / "model")
    one_sentence(compress(place), INPUT, UP, "F32, BF16, F16")
    edit_tensors(lambda t: t.pop(UP))(place / "model")
    one_sentence(compress(place), INPUT, "lacks 1 tensor", UP)


# ---- values ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_weights_that_are_not_finite(place, value):
    """Layer and row are told, by the read that streams the weights."""
    poison(value)(place / "model")
    both_refuse(place, INPUT, UP, "NaN or infinity", "row 3 of 64")


def test_row_there_is_no_way_to_allow_weights_that_are_not_finite(place):
    """--allow-nonfinite is off for good: one NaN makes every logit NaN, and with it every loss,
    score and verdict that we could print."""
    poison(float("nan"))(place / "model")
    one_sentence(compress(place, "--allow-nonfinite"), USAGE, "--allow-nonfinite")
    (place / "r.yaml").write_text("allow_nonfinite: true\n")
    one_sentence(compress(place, "--recipe", place / "r.yaml"), USAGE, "'allow_nonfinite'")


# ---- code ----


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "old.ckpt"])
def test_row_pickled_weights_are_refused_with_the_conversion_command(place, name):
    rename(WEIGHTS, name)(place / "model")
    command = "from_pretrained('MODEL').save_pretrained('OUT')"
    both_refuse(place, INPUT, name, "can run code", "refused", "python -c", command)


def test_row_pickles_beside_safetensors_are_never_opened(place):
    (place / "model" / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert compress(place).exit_code == 0
    assert not list((place / "out").glob("*.bin"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_row_remote_code_is_refused(place, file):
    edit_json(file, auto_map={"AutoModel": "m.M", "AutoTokenizer": ["t.T", None]})(place / "model")
    (place / "model" / "m.py").write_text("raise SystemExit('code of the model was run')")
    both_refuse(place, INPUT, file, "auto_map", "never run")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/any", "flash_attention_2", {"": "a/b"}])
def test_row_kernels_named_by_a_config_are_refused(place, key, value):
    """transformers would download and load a compiled kernel of that name."""
    edit_json("config.json", **{key: value})(place / "model")
    both_refuse(place, INPUT, "config.json", key, "code from elsewhere")


def test_row_an_adapter_nobody_asked_for_is_refused(place):
    """transformers attaches it to the weights that were checked, or loads another model for it."""
    write("adapter_config.json", b'{"base_model_name_or_path": "owner/name"}')(place / "model")
    both_refuse(place, INPUT, "adapter_config.json", "unasked", "distaya merge")


# ---- calibration texts ----


TEXTS = {
    "empty file": ("en.txt", b"", ["en.txt is empty"]),
    "blank lines": ("en.txt", b" \n\n", ["en.txt is empty"]),
    "one token": ("en.txt", b"c\n", ["too little text", "16 tokens", "en 2 tokens"]),
    "unknown language": ("klingon.txt", b"a\n", ["klingon.txt", "such as en, zh-Hant or fil"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_row_texts_too_short_or_of_unknown_language(place, case):
    """Every language must fill one window: the minimum, with the count of who does not."""
    name, data, words = TEXTS[case]
    write(name, data)(place / "texts")
    both_refuse(place, INPUT, *words)


def test_row_odd_documents_are_counted_per_language(place):
    records = [{"text": line} for line in SENTENCES["es"] * 8] + [{"text": "x"}] * 2
    records += [{"text": ""}, {"text": " \n"}, {"text": "\u3000"}]
    (place / "texts" / "es.txt").unlink()
    (place / "texts" / "es.jsonl").write_text("\n".join(map(json.dumps, records)))
    result = compress(place)
    assert result.exit_code == 0, result.stderr
    for told in (
        "repeat an earlier one: en 21, es 22, ja 21",
        "text, left out: es 3",
        "single token: es 2",
    ):
        assert told in result.stderr, result.stderr
    found = json.loads((place / "out" / "results.json").read_text())["calibration"]["languages"]
    counts = {k: v for k, v in found["es"].items() if k.endswith("_documents")}
    assert counts == {"duplicate_documents": 22, "empty_documents": 3, "one_token_documents": 2}
    assert found["en"]["one_token_documents"] == 0


# ---- shapes that do not divide ----


@pytest.mark.parametrize("group", [32, 128])
def test_row_columns_that_no_group_divides(tmp_path, group):
    """50 columns in groups of 32 or 128: the tail has a scale of its own and every weight is within
    half a step of it. No matrix is skipped."""
    config = LlamaConfig(num_hidden_layers=1, **{**tiny.SIZES, "intermediate_size": 50})
    model, out = tiny.make(tmp_path / "model", config), tmp_path / "out"
    rtn = ("compress", model, "--out", out, "--method", "rtn", "--bits", 4, "--group", group)
    assert distaya(*rtn, "--json").exit_code == 0
    assert distaya("export", out, "--out", tmp_path / "dense", "--to", "dense").exit_code == 0
    name = "model.layers.0.mlp.down_proj"
    W, V = (load_file(x / WEIGHTS)[f"{name}.weight"] for x in (model, tmp_path / "dense"))
    scales = load_file(out / WEIGHTS)[f"{name}.weight_scale"].float()
    assert scales.shape == (64, -(-50 // group))
    step = scales.repeat_interleave(group, 1)[:, :50]
    assert ((W - V).abs() <= 0.51 * step).all() and (V[:, 32:] != 0).any()


def test_row_columns_that_no_pattern_divides(healthy):
    for pattern, unit in (("3:7", 7), ("5:9", 9)):
        result = compress(healthy, "--sparsity", pattern)
        one_sentence(result, USAGE, pattern, f"divisible by {unit}", "has 32")
    assert not (healthy / "out").exists()


# ---- tokenizer ----


TOKENIZERS = {
    "missing": (remove("tokenizer.json"), ["has no tokenizer", "tokenizer.json"]),
    "of a larger model": (
        change_tokenizer(lambda t: t["model"]["vocab"].update(extra=300)),
        ["goes up to token 300", "300 rows", "not the model's"],
    ),
    "no JSON": (write("tokenizer.json", b"{"), ["tokenizer of model cannot be read"]),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_row_tokenizer_missing_or_of_another_vocabulary(place, case):
    damage, words = TOKENIZERS[case]
    damage(place / "model")
    both_refuse(place, INPUT, *words)


def test_row_the_hash_of_the_tokenizer_is_stored(place):
    def stored() -> str:
        assert compress(place, "--overwrite").exit_code == 0
        held = json.loads((place / "out" / "results.json").read_text())
        return held["calibration"]["tokenizer"]

    first = stored()
    assert re.fullmatch("[0-9a-f]{32}", first) and stored() == first
    edit_json("tokenizer_config.json", note="another")(place / "model")
    assert stored() != first
