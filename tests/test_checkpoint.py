"""The strict reader and the writer: every bad folder gets one clear sentence."""

import json
import shutil

import huggingface_hub
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from distaya_ext.checkpoint import ShardWriter, open_checkpoint
from distaya_ext.errors import InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("llama"), tiny.FAMILIES["llama"])


@pytest.fixture
def single(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def sharded(single):
    """The same model in four shards with an index."""
    tensors = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    writer = ShardWriter(single, shard_bytes=sum(t.nbytes for t in tensors.values()) // 3)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert len(writer.finish()) == 4
    return single


def refused(folder, *words):
    """Opening fails with one sentence that holds all the words."""
    with pytest.raises(InputError) as caught:
        checkpoint = open_checkpoint(folder)
        checkpoint.read(checkpoint.entries)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_reads_what_was_saved(single):
    checkpoint = open_checkpoint(single)
    tensors = load_file(single / "model.safetensors")
    assert set(checkpoint.entries) == set(tensors)
    assert checkpoint.dtype == torch.float32
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in checkpoint.read(tensors).items():
        assert torch.equal(tensor, tensors[name])


def test_shards_read_like_one_file(original, sharded):
    expected = load_file(original / "model.safetensors")
    got = open_checkpoint(sharded).read(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_index_without_metadata_is_accepted(sharded):
    edit_json(sharded / INDEX, lambda index: index.pop("metadata"))
    open_checkpoint(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".."]
)
def test_shard_outside_the_folder(sharded, name):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    refused(sharded, name)


def test_link_out_of_the_folder(single, tmp_path):
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.move(single / "model.safetensors", elsewhere)
    (single / "model.safetensors").symlink_to(elsewhere)
    refused(single, "model.safetensors", "link", "leaves the model folder")


def test_hub_cache_links_into_blobs_are_followed(single, tmp_path):
    entry = tmp_path / "models--a--b"
    snapshot, blobs = entry / "snapshots" / "abc", entry / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(single.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    open_checkpoint(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(single / "model.safetensors")
    refused(snapshot, "leaves the model folder")


def test_all_missing_shards_are_told_at_once(sharded):
    for i in (2, 4):
        (sharded / f"model-0000{i}-of-00004.safetensors").unlink()
    refused(sharded, "2 of 4 shards are missing", "model-00002-of", "model-00004-of")


def test_index_promises_an_absent_tensor(sharded):
    first = "model-00001-of-00004.safetensors"
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"ghost.weight": first}))
    refused(sharded, "index promises 1 tensor", "ghost.weight")


def test_shard_holds_a_tensor_the_index_does_not_know(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(sharded, "model.norm.weight", "index")


def test_index_without_weight_map(sharded):
    (sharded / INDEX).write_text("{}")
    refused(sharded, INDEX, "no weight_map")


def test_index_naming_a_pickle(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"a": "a.bin"}))
    refused(sharded, "a.bin", "pickles are not read")


def test_index_naming_no_file(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"a": 3}))
    refused(sharded, "names no file for a")


def test_lost_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "4 .safetensors files", INDEX)


@pytest.mark.parametrize("keep", [0, 5, 400, 60_000])
def test_truncated_file(single, keep):
    path = single / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    refused(single, "model.safetensors is damaged", f"{keep}", "download it again")
    if keep == 60_000:
        refused(single, f"promises {size} bytes and the file has {keep}")


def test_header_of_absurd_length(single):
    path = single / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    refused(single, "model.safetensors is damaged", "download it again")


def test_missing_tensors(single):
    edit_tensors(
        single, lambda t: [t.pop(n) for n in list(t) if n.endswith("layers.1.mlp.up_proj.weight")]
    )
    refused(single, "lacks 1 tensor", "model.layers.1.mlp.up_proj.weight")


def test_unexpected_tensor(single):
    edit_tensors(single, lambda t: t.update({"model.layers.1.mlp.extra.weight": torch.zeros(2)}))
    refused(single, "model.layers.1.mlp.extra.weight", "has not")


def test_wrong_shape(single):
    edit_tensors(single, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    refused(single, "model.norm.weight", "shape 63", "asks for 64")


def test_wrong_dtype(single):
    edit_tensors(
        single, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    )
    refused(single, "model.norm.weight", "not stored as one of F32, BF16, F16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(single, value):
    def poison(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][17, 5] = value

    edit_tensors(single, poison)
    refused(single, "model.layers.2.mlp.down_proj.weight", "NaN or infinity", "row 17 of 64")


def test_rotary_tables_of_old_files_are_tolerated_and_dropped(single):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(single, lambda t: t.update({name: torch.ones(8)}))
    assert name not in open_checkpoint(single).entries


def test_tied_head_may_be_absent_an_untied_one_not(tmp_path, single):
    tied = tiny.make(tmp_path / "gemma", tiny.FAMILIES["gemma"])
    assert "lm_head.weight" not in open_checkpoint(tied).entries
    edit_tensors(single, lambda t: t.pop("lm_head.weight"))
    refused(single, "lacks 1 tensor", "lm_head.weight")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_only(single, name):
    (single / "model.safetensors").rename(single / name)
    refused(single, name, "refused", "save_pretrained")


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    refused(single, "no .safetensors weights")


def test_empty_folder(tmp_path):
    refused(tmp_path, "is empty")


def test_no_config(single):
    (single / "config.json").unlink()
    refused(single, "has no config.json")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1]", b"[" * 200_000])
def test_config_that_is_no_json_object(single, text):
    (single / "config.json").write_bytes(text)
    refused(single, "config.json")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("auto_map", {"AutoModel": "code.Model"}, "remote code is never run"),
        ("model_type", "gpt2", "'gpt2' is not supported"),
        ("quantization_config", {"quant_method": "gptq"}, "already quantised (gptq)"),
        ("dtype", "int8", "int8"),
        ("hidden_size", "wide", "not usable"),
        ("num_attention_heads", 0, "config.json"),
        ("num_hidden_layers", 2, "asks for 2 decoder layers; the checkpoint holds 3"),
        ("num_hidden_layers", 0, "asks for 0 decoder layers"),
        ("num_hidden_layers", 10**9, "asks for 1000000000 decoder layers"),
        ("vocab_size", 98, "asks for 98x64"),
    ],
)
def test_config_that_cannot_be(single, key, value, word):
    edit_json(single / "config.json", lambda config: config.update({key: value}))
    refused(single, word)


def test_config_without_model_type(single):
    edit_json(single / "config.json", lambda config: config.pop("model_type"))
    refused(single, "model_type None is not supported")


def test_path_that_is_no_folder_or_hub_id(single, tmp_path):
    refused(tmp_path / "nowhere", "neither an existing folder nor a hub id")
    refused(single / "config.json", "is a file")


def test_hub_download_fetches_no_code_and_no_pickles(single, monkeypatch):
    seen = {}

    def download(repo, **kwargs):
        seen.update(kwargs, repo=repo)
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_checkpoint("owner/name", offline=True)
    assert seen["repo"] == "owner/name"
    assert seen["local_files_only"] is True
    assert not any(p.endswith((".py", ".bin", ".pt")) or p == "*" for p in seen["allow_patterns"])
    assert "*.safetensors" in seen["allow_patterns"]


def test_hub_id_that_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"owner/name is no local folder.*offline"):
        open_checkpoint("owner/name", offline=True)
