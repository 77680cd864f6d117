"""What calibration may be, what overflows are told, and where activations wait."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CohereConfig

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import Calibration, budget, calibrate, compress
from distaya_ext.compress.ferry import Checks
from distaya_ext.compress.store import Store
from distaya_ext.errors import InputError, ResourceError, UsageError

ASSETS = Path(distaya_ext.__file__).parent / "assets"


def test_folder_of_texts_in_many_languages(tmp_path):
    """The shipped model on the shipped texts: as many windows in every language."""
    recipe = tiny.recipe("wanda", calibration={"tokens": 23 * 64, "window": 32, "seed": 1})
    seen = []
    report = compress(
        ASSETS / "nano-aya",
        tmp_path / "out",
        recipe,
        ASSETS / "texts" / "calibration",
        on_event=seen.append,
    )
    assert len(report.tokens_per_language) == 23
    assert set(report.tokens_per_language.values()) == {64}
    assert report.proof.kind == "whole" and report.proof.exact
    assert report.sparsity == 0.5
    assert "tokenizer.json" in {path.name for path in (tmp_path / "out").iterdir()}


def test_model_that_overflows_is_refused_before_the_work(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"own logits are not finite .* overflow in float32"):
        compress(source, tmp_path / "out", tiny.recipe(), tiny.windows())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_activations_that_overflow_name_layer_and_language(tmp_path):
    """Only windows of one language hold the token, so the proof on the first windows passes."""
    config = CohereConfig(**{**tiny.FAMILIES["cohere"].to_dict(), "tie_word_embeddings": False})
    source = tiny.make(tmp_path / "source", config)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = 3e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    calibration = tiny.windows(8)
    calibration.ids[calibration.ids == 5] = 6
    calibration.ids[5:8:2, 3] = 5  # two windows: one would be left out
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj .* language 'fr'"):
        compress(source, tmp_path / "out", tiny.recipe(), calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_check_activations_names_where_and_which_language():
    calibration = tiny.windows(8)
    x, checks = torch.zeros(4, tiny.WINDOW, 8), Checks(late=False)
    calibrate.check_activations(x, 0, "model.layers.3.mlp.down_proj", calibration, checks)
    x[3, 2, 1] = float("inf")
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.down_proj .* language 'fr'"):
        calibrate.check_activations(x, 0, "model.layers.3.mlp.down_proj", calibration, checks)


@pytest.mark.parametrize(
    ("ids", "languages", "words"),
    [
        (torch.zeros(0, 24, dtype=torch.int64), [], "0 windows of 24 tokens; too few"),
        (torch.zeros(4, 1, dtype=torch.int64), ["en"] * 4, "4 windows of 1 tokens; too few"),
        (torch.zeros(4, 8), ["en"] * 4, "int64"),
        (torch.zeros(4, 8, dtype=torch.int64), ["en"] * 3, "3 languages"),
        (torch.full((4, 8), 97), ["en"] * 4, "token 97, but the model's embedding has 97 rows"),
        (torch.full((4, 8), -1), ["en"] * 4, "token -1"),
    ],
)
def test_calibration_that_cannot_be_used(tmp_path, ids, languages, words):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    with pytest.raises(InputError, match=words):
        compress(source, tmp_path / "out", tiny.recipe(), Calibration(ids, languages))
    assert not (tmp_path / "out").exists()


def test_calibration_texts_are_needed_and_need_a_tokenizer(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    with pytest.raises(UsageError, match="method wanda needs calibration texts"):
        compress(source, tmp_path / "out", tiny.recipe("wanda"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.txt").write_text("one sentence\n" * 50)
    wanda = tiny.recipe("wanda", calibration={"tokens": 320, "window": 32})
    with pytest.raises(InputError, match="model folder source has no tokenizer; it needs"):
        compress(source, tmp_path / "out", wanda, tmp_path / "texts")


def test_too_little_memory_is_said_before_the_work(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    with pytest.raises(UsageError, match=r"needs at least 0\.\d+ GiB .* allows 0\.10 GiB"):
        compress(source, tmp_path / "out", tiny.recipe(max_ram="0.1GiB"), tiny.windows())


def test_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"writes 0\.00 GiB .* only 0\.00 GiB are free"):
        compress(source, tmp_path / "out", tiny.recipe(), tiny.windows())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_a_limit_activations_spill_beyond_a_quarter_of_the_memory(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny.make(tmp_path / "source", tiny.FAMILIES["llama"]))
    monkeypatch.setattr(budget, "physical_bytes", lambda: 400)
    free = budget.Budget(checkpoint, None)
    assert (free.spills(100), free.spills(101)) == (False, True)


@pytest.mark.parametrize("spill", [False, True])
def test_store(tmp_path, spill):
    store = Store(tmp_path if spill else None)
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(5)
    store.put("pair", (a, None, b))
    store.put("one", a)
    got = store.get("pair")
    assert torch.equal(got[0], a) and got[1] is None and torch.equal(got[2], b)
    assert len(list(tmp_path.rglob("*.bin"))) == (3 if spill else 0)
    store.put("one", b)
    assert torch.equal(store.get("one"), b) and "one" in store
    store.clear()
    assert "one" not in store and list(tmp_path.rglob("*.bin")) == []
