"""PEFT adapters of anyone, read and merged, and what is refused of them."""

import json
import shutil

import pytest
import torch
import trained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.errors import InputError, UsageError
from distaya_ext.train.adapter import read_adapter
from distaya_ext.train.merge import merge_adapter

Q = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{Q}.lora_A.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def theirs(root):
    """An adapter that PEFT made and saved of the dense model: two ranks, one alpha of its own."""
    out = root / "theirs"
    model = AutoModelForCausalLM.from_pretrained(trained.folder(root, "qwen2", "dense"))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12},
        use_rslora=True,
    )
    torch.manual_seed(4)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(out)
    return out


def distaya(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def copied(theirs, tmp_path, config=None, tensors=None):
    out = tmp_path / "adapter"
    shutil.copytree(theirs, out)
    if config is not None:
        path = out / "adapter_config.json"
        held = json.loads(path.read_text())
        held.update(config)
        path.write_text(json.dumps(held))
    if tensors is not None:
        held = load_file(out / "adapter_model.safetensors")
        tensors(held)
        save_file(held, out / "adapter_model.safetensors")
    return out


def test_merging_is_what_peft_does(root, theirs, tmp_path):
    dense, out = trained.folder(root, "qwen2", "dense"), tmp_path / "out"
    done = distaya("merge", dense, theirs, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["merged"]) == 6 and found["beside"] == [] and found["notices"] == []
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    want = PeftModel.from_pretrained(model, theirs).merge_and_unload().state_dict()
    for name, tensor in trained.tensors(out).items():
        # PEFT's sum in float32; ours is rounded to bfloat16, half of 2^-7 of the number at most.
        assert ((tensor.float() - want[name]).abs() <= 2.0**-8 * want[name].abs() + 1e-7).all()


def test_merging_keeps_zeros_and_says_what_they_cost(root, theirs, tmp_path):
    sparse, out = trained.folder(root, "qwen2", "2:4"), tmp_path / "out"
    report = merge_adapter(sparse, theirs, out)
    assert sorted(report.masked) == sorted(report.merged) and report.checked == 14
    before, after = trained.tensors(sparse), trained.tensors(out)
    assert all(torch.equal(before[n] == 0, after[n] == 0) for n in before)
    (notice,) = report.notices
    assert 40 < float(notice.split()[0]) < 60  # half of the weights are 0


def test_merging_into_quantised_weights_keeps_the_adapter_beside(root, theirs, tmp_path):
    packed, out = trained.folder(root, "qwen2", "2:4 int4"), tmp_path / "out"
    done = distaya("merge", packed, theirs, "--out", out)
    assert done.exit_code == 0 and done.stdout.strip() == str(out)
    assert "6 with LoRA beside" in done.stderr and "note: 6 quantised" in done.stderr
    ours = trained.logits(distaya_ext.load(out, dtype="float32", exact=True))
    twin = AutoModelForCausalLM.from_pretrained(packed.parent / "twin", dtype=torch.float32)
    # A standard folder, which PEFT itself loads; ours is theirs in bfloat16, as the scales are.
    for adapter, within in ((theirs, 1e-2), (out / "adapter", 1e-4)):
        other = PeftModel.from_pretrained(twin, adapter)
        torch.testing.assert_close(ours, trained.logits(other), rtol=within, atol=within)
        twin = other.unload()
    looked = distaya("inspect", out)
    assert "LoRA of rank 2 and 4 beside 6 matrices" in looked.stdout


def test_a_second_adapter_adds_up(root, theirs, tmp_path):
    packed, one, two = trained.folder(root, "qwen2", "2:4 int4"), tmp_path / "1", tmp_path / "2"
    merge_adapter(packed, theirs, one)
    merge_adapter(one, theirs, two)
    single, double = (
        read_adapter(f / "adapter", open_checkpoint(f, packed=True)) for f in (one, two)
    )
    for name, low in single.low_rank.items():
        assert double.low_rank[name].rank == 2 * low.rank
        size = 2 * (low.B.abs().float() * low.scaling) @ low.A.abs().float()
        within = 3 * 2**-9 * size + 1e-7  # A and B times their factor, in bfloat16
        assert ((double.low_rank[name].delta() - 2 * low.delta()).abs() <= within).all()
    merge_adapter(one, one / "adapter", tmp_path / "same")
    again = read_adapter(tmp_path / "same" / "adapter", open_checkpoint(one, packed=True))
    assert all(torch.equal(again.low_rank[n].A, e.A) for n, e in single.low_rank.items())


def test_keeping_the_adapter_alone(root, tmp_path):
    sparse, out = trained.folder(root, "cohere", "2:4"), tmp_path / "adapter"
    parts = trained.prepared(sparse, also=["norms"])
    trained.learn(parts)
    parts.write_adapter(out)
    parts.write(open_checkpoint(sparse, packed=True), tmp_path / "direct")
    report = merge_adapter(sparse, out, tmp_path / "merged")
    assert report.notices == [] and len(report.replaced) == 3
    one, two = (trained.tensors(tmp_path / name) for name in ("direct", "merged"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError, match="not empty"):
        parts.write_adapter(out)
    parts.write_adapter(out, overwrite=True)
    full = trained.prepared(sparse, train="full")
    with pytest.raises(UsageError, match="no LoRA to keep"):
        full.write_adapter(tmp_path / "no")
    packed = trained.folder(root, "cohere", "2:4 int4")
    with pytest.raises(UsageError, match="cannot hold the scales of 14 matrices"):
        trained.prepared(packed, also=["scales"]).write_adapter(tmp_path / "no")


CONFIGS = {
    "DoRA": ({"use_dora": True}, "uses use_dora, which is more than"),
    "another method": ({"peft_type": "IA3"}, "is 'IA3'; only LORA"),
    "rank 0": ({"r": 0}, "has rank 0; it must be 1 or more"),
    "alpha": ({"lora_alpha": -1}, "lora_alpha -1; it must be above 0"),
    "alpha that no float holds": ({"lora_alpha": 10**400}, "above 0 and below 1e"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "began with 'pissa', which changed the weights"),
    "biases": ({"bias": "all"}, "trains biases"),
    "experts": ({"target_parameters": ["w"]}, "uses target_parameters"),
    "what comes": ({"use_something_new": 1}, "uses use_something_new"),
    "more targets": ({"target_modules": ["q_proj", "o_proj"]}, "2 modules .*o_proj.* no LoRA"),
    "other ranks": ({"r": 3}, "rank 3 of a 64x64 matrix needs 3x64 and 64x3"),
    "slow pattern": ({"alpha_pattern": {"(a+)+$": 1}}, "repeats a group"),
    "no mapping": ({"rank_pattern": [1]}, "rank_pattern of the adapter must be a mapping"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_that_are_more_than_lora_are_refused(root, theirs, tmp_path, name):
    change, sentence = CONFIGS[name]
    adapter = copied(theirs, tmp_path, config=change)
    with pytest.raises(InputError, match=sentence):
        merge_adapter(trained.folder(root, "qwen2", "dense"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def renamed(old, new):
    return lambda held: held.update({new: held.pop(old)})


TENSORS = {
    "lost": (lambda held: held.pop(A), f"lacks {Q}.lora_A.weight"),
    "shape": (lambda held: held.update({A: held[A][:, :32].clone()}), "is A 4x32 and B 64x4"),
    "unknown": (
        renamed(A, A.replace("layers.0", "layers.7")),
        "updates model.layers.7.* no Linear",
    ),
    "NaN": (lambda held: held[A].fill_(torch.nan), "NaN or infinity"),
    "integers": (lambda held: held.update({A: held[A].int()}), "is torch.int32, no float"),
    "DoRA": (renamed(A, f"base_model.model.{Q}.lora_magnitude_vector"), "only A and B of Linears"),
    "whole": (renamed(A, "base_model.model.model.norm.weight"), "norm.weight, which has no place"),
    "empty": (lambda held: held.clear(), "holds no LoRA for them"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_adapters_with_wrong_tensors_are_refused(root, theirs, tmp_path, name):
    change, sentence = TENSORS[name]
    adapter = copied(theirs, tmp_path, tensors=change)
    with pytest.raises(InputError, match=sentence):
        merge_adapter(trained.folder(root, "qwen2", "dense"), adapter, tmp_path / "out")


def test_adapters_of_other_models_and_no_adapters_are_refused(root, theirs, tmp_path):
    dense, out = trained.folder(root, "qwen2", "dense"), tmp_path / "out"
    done = distaya("merge", trained.folder(root, "gemma", "dense"), theirs, "--out", out)
    assert done.exit_code == 3 and "matrix needs" in done.stderr
    done = distaya("merge", dense, tmp_path / "nowhere", "--out", out)
    assert done.exit_code == 3 and "is no adapter folder" in done.stderr
    done = distaya("merge", dense, dense, "--out", out)
    assert done.exit_code == 3 and "has no adapter_config.json" in done.stderr
    adapter = copied(theirs, tmp_path)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="is damaged"):
        merge_adapter(dense, adapter, out)
    weights.unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        merge_adapter(dense, adapter, out)
    assert not out.exists()


def test_an_adapter_beside_dense_weights_is_loaded_or_refused(root, theirs, tmp_path):
    both, out = tmp_path / "both", tmp_path / "out"
    shutil.copytree(trained.folder(root, "qwen2", "dense"), both)
    shutil.copytree(theirs, both / "adapter")
    with pytest.raises(InputError, match=r"adapter beside its weights.*merge both both/adapter"):
        open_checkpoint(both)
    merge_adapter(both, both / "adapter", out)
    got, want = (trained.logits(distaya_ext.load(f, dtype="float32")) for f in (out, both))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.01)  # merged weights are bfloat16
    assert not (out / "adapter").exists() and open_checkpoint(out).adapter is None


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_is_refused(root, tmp_path):
    dense = trained.folder(root, "cohere", "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputError, match="lm_head, which is tied to the embedding"):
        merge_adapter(dense, tmp_path / "adapter", tmp_path / "out")
