"""What is written is what was trained: every family and format, then the folder loaded again."""

import json
import sys
from pathlib import Path

import pytest
import torch
import trained
from transformers import AutoModelForCausalLM

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.errors import DistayaError, InputError, UsageError
from distaya_ext.evaluate import load as evaluate_load
from distaya_ext.export import export
from distaya_ext.train import merge
from distaya_ext.train.learned import Learned, is_pruned
from distaya_ext.train.parts import prepare
from distaya_ext.train.spec import TrainSpec

PACKED = ("half int4", "2:4 int4", "embed int8")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


def written(path, out, **fields):
    """Train, write, and return the parts, the account and the logits before writing."""
    parts = trained.prepared(path, **fields)
    trained.learn(parts)
    want = trained.logits(parts.model)
    return parts, parts.write(open_checkpoint(path, packed=True), out), want


def same_but(before: Path, after: Path, changed) -> None:
    """Tensors of the two folders are the same, those of `changed` are not."""
    one, two = trained.tensors(before), trained.tensors(after)
    assert sorted(one) == sorted(two)
    assert {name for name in one if not torch.equal(one[name], two[name])} == set(changed)


CASES = [(family, "2:4 int4") for family in trained.FAMILIES]
CASES += [("llama-bias", "half int4"), ("cohere", "embed int8"), ("gemma", "embed int8")]


@pytest.mark.parametrize("family, kind", CASES)
def test_lora_stays_beside_codes_and_loads_again_bit_for_bit(root, tmp_path, family, kind):
    path, out = trained.folder(root, family, kind), tmp_path / "out"
    parts, report, want = written(path, out)
    same_but(path, out, [])
    assert report.merged == report.replaced == report.scales == []
    assert report.beside == list(parts.learned().low_rank)
    assert report.checked == len(open_checkpoint(path, packed=True).stored)
    again = distaya_ext.load(out, exact=True)
    assert torch.equal(trained.logits(again), want)
    assert not torch.equal(trained.logits(distaya_ext.load(path, exact=True)), want)
    assert not any(p.requires_grad for p in again.parameters())
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (
        report.adapter_bytes == size
        and report.file_bytes == (out / "model.safetensors").stat().st_size
    )
    source = open_checkpoint(path, packed=True)
    shapes = {name: merge.linear_shapes(source)[name] for name in source.linears()}
    added = (
        8
        * sum(4 * 2 * (r + c) for r, c in shapes.values())
        / sum(r * c for r, c in shapes.values())
    )
    assert report.bits_per_weight == pytest.approx(report.bits_per_weight_before + added)


@pytest.mark.parametrize("family", trained.FAMILIES)
def test_pruned_weights_take_lora_under_their_mask(root, tmp_path, family):
    path, out = trained.folder(root, family, "2:4"), tmp_path / "out"
    _, report, want = written(path, out)
    linears = open_checkpoint(path).linears()
    same_but(path, out, [f"{name}.weight" for name in linears])
    assert report.merged == report.masked and sorted(report.merged) == sorted(linears)
    assert report.checked == len(linears) and not (out / "adapter").exists()
    before, after = trained.tensors(path), trained.tensors(out)
    assert all(torch.equal(before[n] == 0, after[n] == 0) for n in before)
    # The masked product rounds W + mask * B A as writing does: to the dtype of the folder, once.
    assert torch.equal(trained.logits(distaya_ext.load(out)), want)
    assert torch.equal(trained.logits(AutoModelForCausalLM.from_pretrained(out)), want)


def test_dense_weights_take_lora(root, tmp_path):
    path, out = trained.folder(root, "qwen2", "dense", torch.float32), tmp_path / "out"
    parts, report, want = written(path, out)
    assert len(report.merged) == 14 and report.masked == [] and report.checked == 0
    got = trained.logits(distaya_ext.load(out))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    low, W = parts.learned().low_rank[Q], trained.tensors(path)[f"{Q}.weight"]
    literal = W.double() + low.alpha / low.rank * low.B.double() @ low.A.double()
    assert (trained.tensors(out)[f"{Q}.weight"] - literal).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["dense", "2:4"])
def test_full_training_is_written_as_it_ran(root, tmp_path, kind):
    path, out = trained.folder(root, "cohere", kind), tmp_path / "out"
    _, report, want = written(path, out, train="full")
    same_but(path, out, trained.tensors(path))
    assert sorted(report.replaced) == sorted(trained.tensors(path))
    before, after = trained.tensors(path), trained.tensors(out)
    assert all(torch.equal(before[n] == 0, after[n] == 0) for n in before if is_pruned(before[n]))
    assert torch.equal(trained.logits(distaya_ext.load(out)), want)


@pytest.mark.parametrize("kind", PACKED)
def test_new_scales_and_old_codes(root, tmp_path, kind):
    path, out = trained.folder(root, "llama-bias", kind), tmp_path / "out"
    parts, report, want = written(path, out, train="scales")
    stored = open_checkpoint(path, packed=True).stored
    learnt = [name for name in stored if name != "model.embed_tokens"]
    same_but(path, out, [f"{name}.weight_scale" for name in learnt])
    assert sorted(report.scales) == sorted(learnt) and not (out / "adapter").exists()
    got = trained.logits(distaya_ext.load(out, exact=True))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)  # bfloat16; the GLU is fused again
    scales = trained.tensors(out)[f"{Q}.weight_scale"]
    assert torch.equal(scales, parts.learned().scales[Q])


def test_everything_at_once(root, tmp_path):
    path, out = trained.folder(root, "cohere2", "half int4"), tmp_path / "out"
    also = ["norms", "embeddings", "scales"]
    _, report, want = written(path, out, also=also)
    assert len(report.beside) == len(report.scales) == 28 and len(report.replaced) == 6
    torch.testing.assert_close(
        trained.logits(distaya_ext.load(out, exact=True)), want, rtol=0.05, atol=0.005
    )
    summary = json.loads((out / "merge.json").read_text())
    assert summary == report.summary() and summary["adapter_bytes"] > 0
    assert any("AutoModel of transformers alone would leave it out" in n for n in report.notices)
    assert "distaya export --to dense" in (out / "adapter" / "README.md").read_text()


def test_our_loaders_never_leave_an_adapter_out(root, tmp_path, monkeypatch):
    path, out = trained.folder(root, "cohere", "2:4 int4"), tmp_path / "out"
    _, _, want = written(path, out)
    evaluating = sys.modules["distaya_ext.evaluate.load"]
    monkeypatch.setattr(evaluating, "load_tokenizer", lambda *args: None)
    loaded = evaluate_load(out, dtype="bfloat16", exact=True)
    assert torch.equal(trained.logits(loaded.model), want)
    more = loaded.model.generate(trained.IDS, max_new_tokens=4, do_sample=False, use_cache=True)
    again = loaded.model.generate(trained.IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert more.shape == (2, 16) and torch.equal(more, again)
    with pytest.warns(UserWarning, match=r"out has an adapter.*use distaya_ext\.load"):
        AutoModelForCausalLM.from_pretrained(out)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the adapter in out needs peft"):
        distaya_ext.load(out)


def test_a_folder_with_an_adapter_trains_on(root, tmp_path):
    path, out, more = trained.folder(root, "cohere", "2:4 int4"), tmp_path / "1", tmp_path / "2"
    _, _, want = written(path, out)
    parts = prepare(distaya_ext.load(out), TrainSpec(rank=4))
    assert torch.equal(trained.logits(parts.model), want)
    trained.learn(parts)
    then = trained.logits(parts.model)
    parts.write(open_checkpoint(out, packed=True), more)
    assert torch.equal(trained.logits(distaya_ext.load(more, exact=True)), then)
    assert not torch.equal(then, want)
    bare = prepare(distaya_ext.load(path), TrainSpec(train="full"))
    with pytest.raises(InputError, match="which would be lost"):
        bare.write(open_checkpoint(out, packed=True), tmp_path / "3")


def test_exports_take_the_adapter_along(root, tmp_path):
    path, out = trained.folder(root, "cohere", "half int4"), tmp_path / "out"
    _, _, want = written(path, out)
    found = export(out, tmp_path / "dense", "dense")
    assert any("LoRA of 14 matrices is merged" in notice for notice in found.notices)
    got = trained.logits(distaya_ext.load(tmp_path / "dense"))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.005)
    found = export(out, tmp_path / "gptq", "gptq")
    assert any("stays beside gptq" in notice for notice in found.notices)
    assert torch.equal(trained.logits(distaya_ext.load(tmp_path / "gptq", exact=True)), want)


def test_what_is_not_as_it_must_be_is_never_published(root, tmp_path, monkeypatch):
    path, out = trained.folder(root, "cohere", "2:4"), tmp_path / "out"
    parts = trained.prepared(path)
    trained.learn(parts)
    source = open_checkpoint(path, packed=True)
    real = merge.rounded
    monkeypatch.setattr(merge, "rounded", lambda new, old, keep: real(new, old, False) + 1)
    with pytest.raises(DistayaError, match="is not what it must be after writing"):
        parts.write(source, out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="stop"):
        parts.write(source, out, extra=lambda folder, report: stop())
    assert list(tmp_path.iterdir()) == []
    parts.write(source, out, extra=lambda folder, report: (folder / "note.txt").write_text("here"))
    assert (out / "note.txt").read_text() == "here"
    with pytest.raises(InputError, match="not empty"):
        parts.write(source, out)
    parts.write(source, out, overwrite=True)


def stop():
    raise RuntimeError("stop")


def test_codes_that_changed_are_found(root, tmp_path):
    path, out = trained.folder(root, "cohere", "2:4 int4"), tmp_path / "out"
    written(path, out)
    source = open_checkpoint(path, packed=True)
    learned = Learned(merge.read_adapter(out / "adapter", source).low_rank)
    assert merge.check(source, out, learned) == 14
    with pytest.raises(InputError, match="the adapter beside the weights is not what was learnt"):
        merge.check(source, out)

    def flip(tensors):
        tensors[f"{Q}.weight_packed"][0, 0] += 1

    trained.packed_folders.edit_tensors(out, flip)
    with pytest.raises(InputError, match=f"{Q}.weight_packed is not what it must be"):
        merge.check(source, out, learned)


def test_what_belongs_to_another_model_is_refused(root, tmp_path):
    parts = trained.prepared(trained.folder(root, "cohere", "dense"))
    other = open_checkpoint(trained.folder(root, "gemma", "dense"), packed=True)
    with pytest.raises(InputError, match="does not fit the model in gemma-source"):
        parts.write(other, tmp_path / "out")
    full = trained.prepared(trained.folder(root, "cohere", "dense"), train="full")
    with pytest.raises(InputError, match="does not fit the model in"):
        full.write(other, tmp_path / "out")
