"""quant_method distaya in plain transformers: either import order, nothing else changed, fast."""

import os
import subprocess
import sys
from pathlib import Path

import packed_folders
import pytest
import tiny
import torch
from packed_folders import w4
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CohereForCausalLM

import distaya_ext
from distaya_ext.errors import InputError, UsageError

IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    source = tiny.make(root / "dense", tiny.FAMILIES["cohere"])
    return packed_folders.write(source, root / "out", w4(), method="distaya", embed_bits=8)[0]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    root = tmp_path_factory.mktemp("stock")
    source = tiny.make(root / "dense", tiny.FAMILIES["llama"])
    return packed_folders.write(source, root / "out", w4())[0]


def run(code: str, *arguments) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(3, 12)[None]).logits
print(type(model.model.layers[0].mlp).__name__, logits.double().sum().item())
import transformers.quantizers.auto as table
import inspect
assert "def register_quantizer" in inspect.getsource(table)  # its loader is its own again
assert table.__spec__.loader is table.__loader__
assert type(table.__loader__).__module__ == "_frozen_importlib_external", table.__loader__
assert not any(type(f).__module__.startswith("distaya") for f in sys.meta_path)
"""
ORDERS = {
    "distaya_ext first": "import distaya_ext",
    "transformers first": "import transformers.quantizers\nimport distaya_ext",
    "transformers, lazily": "import transformers\nimport distaya_ext",
    "twice": "import distaya_ext\nfrom distaya_ext.runtime import register_when_imported as again\n"
    "again()\nagain()\nimport transformers.quantizers\nagain()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_plain_from_pretrained_in_either_order(folder, order):
    kind, total = run(ORDERS[order] + LOAD, folder).split()
    with torch.no_grad():
        want = distaya_ext.load(folder)(IDS).logits.double().sum().item()
    assert kind == "PackedGLU" and float(total) == want


def test_nothing_else_changes_in_transformers():
    code = """
import sys
if sys.argv[1] == "with":
    import distaya_ext
from transformers.quantizers import auto
import transformers
for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
    print([f"{k} {v.__module__}.{v.__name__}" for k, v in table.items() if k != "distaya"])
print(sorted(name for name in vars(auto) if not name.startswith("__")))
"""
    assert run(code, "with") == run(code, "without")


def test_importing_is_fast_and_brings_no_transformers():
    code = """
import time, torch
start = time.perf_counter()
import distaya_ext, sys
assert "transformers" not in sys.modules and "compressed_tensors" not in sys.modules
print(time.perf_counter() - start)
"""
    assert min(float(run(code)) for _ in range(3)) < 1.0  # 0.2 s on an idle machine


def test_plain_models_save_and_load_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in again.parameters())
    assert distaya_ext.resident_bytes(again) == distaya_ext.resident_bytes(model)


def test_no_warning_about_unused_or_missing_weights(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_without_its_head(folder):
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(IDS).last_hidden_state
        whole = distaya_ext.load(folder)
        assert torch.equal(states, whole.model(IDS).last_hidden_state)


def test_a_stock_method_is_still_loaded_by_stock_code(stock):
    model = AutoModelForCausalLM.from_pretrained(stock)
    assert type(model.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_what_our_hooks_refuse(folder):
    with pytest.raises(InputError, match="safetensors files"):
        CohereForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(folder), state_dict={}
        )
    from distaya_ext.runtime.quantizer import FolderConfig, PackedQuantizer

    quantizer = PackedQuantizer(FolderConfig(quant_method="distaya"))
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}
    with pytest.raises(UsageError, match="one device, not on 0, cpu"):
        quantizer.update_device_map({"model.layers.0": 0, "lm_head": "cpu"})
