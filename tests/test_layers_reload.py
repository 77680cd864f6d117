"""Folders of fewer layers in an interpreter that never heard of this package, and DistAya's way of
dropping layers, which left gaps in the numbers and random layers after reloading.
"""

import json
import subprocess
import sys
from importlib.resources import files

import loud
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import compress, events
from distaya_ext.errors import InputError
from distaya_ext.models import describe
from distaya_ext.models.depth import remove_layers
from distaya_ext.recipe import Recipe

# name: (family or None for the bundled model, layers, dropped, dtype)
CASES = {
    "cohere": ("cohere", 5, [1, 2], torch.float32),
    "cohere-16": ("cohere-qk-norm", 5, [0, 4], torch.bfloat16),
    "cohere2-irregular": ("cohere2", 8, [0, 5], torch.float32),
    "cohere2-no-full": ("cohere2", 5, [3], torch.float32),
    "cohere2-period": ("cohere2", 8, [4, 5, 6, 7], torch.bfloat16),
    "llama": ("llama", 5, [4], torch.float32),
    "qwen2": ("qwen2", 5, [0, 1], torch.float32),
    "qwen3": ("qwen3", 5, [2, 3], torch.bfloat16),
    "gemma": ("gemma", 5, [1, 3], torch.float32),
    "gemma2": ("gemma2", 6, [1, 2], torch.float32),
    "gemma3": ("gemma3_text", 6, [2, 3], torch.float32),
    "nano-aya": (None, 8, [2, 5], torch.bfloat16),
}

PLAIN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor({ids})
for folder in map(Path, sys.argv[2:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    found = dict(logits=logits)
    for cache in (True, False):
        how = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, use_cache=cache)
        found["cached" if cache else "uncached"] = model.generate(ids, **how)
    save_file(found, Path(sys.argv[1]) / (folder.name + ".safetensors"))
assert not any(name.startswith("distaya") for name in sys.modules)
"""
IDS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(5))


def saved_numbers(folder):
    """Numbers of the layers that a folder's files hold."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("model.layers.")]  # noqa: SIM118
    return sorted({int(name.split(".")[2]) for name in names})


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every case: source folder, written folder, and what a fresh interpreter made of it."""
    root, outs = tmp_path_factory.mktemp("reload"), tmp_path_factory.mktemp("out")
    sources = {}
    for name, (family, layers, dropped, dtype) in CASES.items():
        if family is None:
            sources[name] = files("distaya_ext") / "assets" / "nano-aya"
        else:
            config = loud.config(family, layers)
            sources[name] = tiny.make(root / name, config, dtype=dtype)
        recipe = Recipe(model=str(sources[name]), method="dense", drop_layers=dropped)
        compress(sources[name], outs / name, recipe)
    said = tmp_path_factory.mktemp("said")
    code = PLAIN.format(ids=IDS.tolist())
    folders = [str(outs / name) for name in CASES]
    run = subprocess.run(
        [sys.executable, "-c", code, str(said), *folders], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {
        name: (sources[name], outs / name, load_file(said / f"{name}.safetensors"))
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_reloads_to_the_last_bit(reloaded, name):
    source, out, found = reloaded[name]
    _, layers, dropped, dtype = CASES[name]
    left = [i for i in range(layers) if i not in dropped]
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    whole = model(input_ids=IDS, use_cache=False).logits
    remove_layers(model, describe(model.config), left)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    torch.set_num_threads(before)
    assert found["logits"].dtype == expected.dtype == dtype
    assert torch.equal(found["logits"], expected) and bool(expected.isfinite().all())
    assert not torch.equal(whole, expected)  # the layers that went did something
    if dtype is torch.float32 or name == "nano-aya":
        assert torch.equal(found["cached"], found["uncached"])
    assert torch.equal(found["cached"][:, : IDS.shape[1]], IDS)
    assert saved_numbers(out) == list(range(len(left)))
    written, original = (json.loads((f / "config.json").read_text()) for f in (out, source))
    assert written["num_hidden_layers"] == len(left)
    if original.get("layer_types") is not None:
        assert written["layer_types"] == [original["layer_types"][i] for i in left]
    assert open_checkpoint(out).config.num_hidden_layers == len(left)


def test_distayas_way_is_refused_and_ours_is_not(tmp_path):
    """delattr on the ModuleList leaves layers 0, 2, 4, 5 of 6: transformers reads that without an
    error, with layers 1 and 3 random and 4 and 5 gone. Our reader names the numbers.
    """
    source = tiny.make(tmp_path / "source", loud.config("cohere", 6))
    model = AutoModelForCausalLM.from_pretrained(source)
    whole = loud.without(source, [1, 3])
    for index in (1, 3):
        delattr(model.model.layers, str(index))
    model.config.num_hidden_layers = 4
    model.save_pretrained(tmp_path / "gaps")
    assert saved_numbers(tmp_path / "gaps") == [0, 2, 4, 5]

    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "gaps", output_loading_info=True
        )
        for number, key in ((1, "missing_keys"), (5, "unexpected_keys")):
            assert any(f".{number}." in name for name in info[key])
        with torch.no_grad():
            logits.append(plain.eval()(input_ids=IDS, use_cache=False).logits)
    assert not torch.equal(*logits)  # the model depends on the seed it is read under

    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "gaps")
    told = str(caught.value)
    assert "layers 0 to 3" in told and "lacks 1, 3 and holds 4, 5" in told and "\n" not in told
    with pytest.raises(InputError, match="lacks 1, 3"):
        compress(tmp_path / "gaps", tmp_path / "x", tiny.recipe("dense"))
    assert not (tmp_path / "x").exists()

    compress(source, tmp_path / "ours", tiny.recipe("dense", drop_layers=[1, 3]))
    assert saved_numbers(tmp_path / "ours") == [0, 1, 2, 3]
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = whole(input_ids=IDS, use_cache=False).logits
        assert torch.equal(ours.eval()(input_ids=IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("dropped, told", [([0, 5], True), ([4, 5, 6, 7], False), ([], False)])
def test_what_readers_that_count_would_run_wrongly_is_told(tmp_path, dropped, told):
    source = tiny.make(tmp_path / "source", loud.config("cohere2", 8))
    said: list[events.Event] = []
    recipe = tiny.recipe("dense", drop_layers=dropped)
    report = compress(source, tmp_path / "out", recipe, on_event=said.append)
    notices = [event.message for event in said if isinstance(event, events.Notice)]
    assert report.notices == notices and len(notices) == told
    assert all("layer_types" in message and "llama.cpp" in message for message in notices)


@pytest.mark.parametrize("config, held", [(4, [0, 1, 2]), (2, [0, 1, 2]), (3, [1, 2, 3])])
def test_numbers_of_layers_that_do_not_fit_the_config(tmp_path, config, held):
    source = tiny.make(tmp_path / "model", loud.config("llama", max(*held, 2) + 1))
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: t for name, t in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) in held
    }  # fmt: skip
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": config}))
    with pytest.raises(InputError) as caught:
        open_checkpoint(source)
    words = ["lacks 0 and holds 3"] if config == 3 else [f"asks for {config}", "holds 3"]
    assert all(word in str(caught.value) for word in words), caught.value
