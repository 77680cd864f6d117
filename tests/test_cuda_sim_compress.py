"""A whole compression and a step of decoding on the CUDA kernels, in the simulator.

The driver runs as on a GPU (results looked at late) and every op calls its CUDA twin, so what the
driver hands to the kernels (strides, work spaces, dtypes, views of stacks) meets the doors and the
checks that it would meet there.
"""

import csv

import packed_folders
import pytest
import syncs
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CohereConfig

from distaya_ext.compress import calibrate, compress, ferry
from distaya_ext.errors import InputError
from distaya_ext.formats import ModuleScheme
from distaya_ext.measure.decode import StaticDecode
from distaya_ext.runtime import load

METHODS = {
    "joint": tiny.recipe("sparsegpt", nm="2:4", bits=4, group=32, format="distaya"),
    "unstructured": tiny.recipe("sparsegpt", sparsity=0.5, bits=4, group=32, format="distaya"),
    "activation": tiny.recipe("gptq", bits=4, group=32, order="activation"),
    "wanda": tiny.recipe("wanda", sparsity=0.5),
    "dass": tiny.recipe("dass", nm="2:4", dass={"permute": True, "dense_neurons": 0.1}),
    "dass-update": tiny.recipe(
        "dass",
        nm="2:4",
        dass={"permute": True, "dense_neurons": 0.1, "update": True, "direction": "inputs"},
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = CohereConfig(**{**tiny.FAMILIES["cohere"].to_dict(), "num_hidden_layers": 1})
    return tiny.make(tmp_path_factory.mktemp("model") / "source", config, dtype=torch.bfloat16)


def losses(folder):
    with open(folder / "layers.csv", encoding="utf-8") as file:
        return {r["module"]: (r["loss"], float(r["sparsity"])) for r in csv.DictReader(file)}


@pytest.mark.parametrize("method", METHODS)
def test_compression_on_the_cuda_kernels(tmp_path, source, method, simulator, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    compress(source, tmp_path / "cpu", METHODS[method], tiny.windows())
    monkeypatch.setattr(ferry, "runs_late", lambda device: True)
    with simulator.use():
        compress(source, tmp_path / "sim", METHODS[method], tiny.windows())
    ours, theirs = losses(tmp_path / "sim"), losses(tmp_path / "cpu")
    assert ours.keys() == theirs.keys()
    for name, (loss, sparsity) in ours.items():
        assert sparsity == pytest.approx(theirs[name][1], abs=0.01), name
        if loss:
            assert float(loss) == pytest.approx(float(theirs[name][0]), rel=0.02), name
    assert load(tmp_path / "sim") is not None


@pytest.mark.parametrize("method", ["joint", "unstructured", "wanda"])
def test_a_nan_reaches_every_kernel_and_is_told_at_the_end(
    tmp_path, method, simulator, monkeypatch
):
    """Late, kernels work on what is not finite before anybody looks; they must stay in bounds."""
    monkeypatch.setattr(ferry, "runs_late", lambda device: True)
    config = CohereConfig(
        **{
            **tiny.FAMILIES["cohere"].to_dict(),
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
        }
    )
    source = tiny.make(tmp_path / "source", config, dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = 3e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    calibration = tiny.windows(8)
    calibration.ids[calibration.ids == 5] = 6
    calibration.ids[7, 3] = 5
    words = r"layers\.0\.self_attn\.q_proj .* language 'fr'"
    with simulator.use(), pytest.raises(InputError, match=words):
        compress(source, tmp_path / "out", METHODS[method], calibration)
    assert not (tmp_path / "out").exists()


def test_a_step_of_decoding_on_the_cuda_kernels(tmp_path, source, simulator):
    scheme = ModuleScheme(4, 32, True, kind="int4-2:4")
    folder, _ = packed_folders.write(
        source, tmp_path / "packed", scheme, method="distaya", pattern="2:4", embed_bits=8
    )
    model = load(folder, dtype="bfloat16", exact=True)
    ids = torch.tensor([[5, 9, 11]])
    with torch.inference_mode():
        cpu = StaticDecode(model, ids, 2)
        cpu.step()
        with simulator.use():
            sim = StaticDecode(model, ids, 2)
            with syncs.Recorder() as recorder:
                sim.step()
    assert recorder.found == []
    assert (cpu.logits - sim.logits).abs().max() <= 0.02 * cpu.logits.abs().max()
