"""Folders that others wrote: by the compressed-tensors package itself, and GPTQ as published."""

import json

import pytest
import tiny
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import compress
from distaya_ext.export import export

MLP = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=False)
REST = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "source"
    return tiny.make(folder, tiny.FAMILIES["llama"], dtype=torch.bfloat16)


def quantise(model):
    """What a quantiser of that package leaves: scales and zero points beside the weights."""
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args = module.quantization_scheme.weights
        parts = module.weight.data.float().view(len(module.weight), -1, args.group_size or 1)
        if not args.group_size:
            parts = parts.flatten(1).unsqueeze(1)
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        if args.symmetric:
            module.weight_scale.data.copy_(torch.maximum(-low, high) / 127)
        else:
            scale = (high - low) / 15
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_((-8 - low / scale).round().clamp(-8, 7))
        module.quantization_status = QuantizationStatus.FROZEN


def test_a_folder_that_the_package_compressed(source, tmp_path):
    """Two groups, a pattern before a class, asymmetric zeros, ignored modules: every weight is the
    one that the package decompresses."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    groups = {
        "a": QuantizationScheme(targets=["re:.*mlp.*"], weights=MLP),
        "b": QuantizationScheme(targets=["Linear"], weights=REST),
    }
    ignore = ["lm_head", "re:.*o_proj"]
    config = QuantizationConfig(config_groups=groups, ignore=ignore, format="pack-quantized")
    apply_quantization_config(model, config)
    quantise(model)
    package = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    package.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    package.update_config(tmp_path / "theirs")
    about = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    assert {"version", "transform_config", "sparsity_config"} <= about.keys()
    package.decompress_model(model)
    checkpoint = open_checkpoint(tmp_path / "theirs", packed=True)
    assert len(checkpoint.stored) == 3 * 6  # all but o_proj
    widths = {name: held.scheme.bits for name, held in checkpoint.stored.items()}
    assert all(bits == (4 if ".mlp." in name else 8) for name, bits in widths.items())
    export(tmp_path / "theirs", tmp_path / "dense", "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name in checkpoint.stored:
        assert torch.equal(dense[f"{name}.weight"], model.get_submodule(name).weight), name


def test_our_folder_after_stock_transformers_saved_it(source, tmp_path):
    compress(source, tmp_path / "ours", tiny.recipe("rtn", bits=4, group=32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (open_checkpoint(tmp_path / name, packed=True) for name in ("ours", "theirs"))
    assert ours.stored.keys() == theirs.stored.keys()
    for name in ours.stored:
        a, b = ours.grid(name), theirs.grid(name)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


def shifted(values, bits, along):
    """values int64, `32 // bits` neighbours along a dimension to an int32, the first lowest."""
    per = 32 // bits
    parts = values.transpose(0, along).reshape(-1, per, values.shape[1 - along])
    words = (parts << (bits * torch.arange(per))[None, :, None]).sum(1)
    return words.to(torch.int32).transpose(0, along).contiguous()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
def test_gptq_as_published(source, tmp_path, bits, symmetric, version):
    """A folder made without our code: float16 scales in a bfloat16 model, biases of zero, stray
    settings of its writer."""
    tensors, expected = load_file(source / "model.safetensors"), {}
    make = torch.Generator().manual_seed(0)
    names = [k.removesuffix(".weight") for k in tensors if "_proj.weight" in k]
    for name in names:
        W = tensors.pop(f"{name}.weight")
        rows, cols = W.shape
        group = 32
        codes = torch.randint(0, 1 << bits, (cols, rows), generator=make)
        scales = torch.rand(cols // group, rows, generator=make).half()
        zeros = torch.full((cols // group, rows), 1 << (bits - 1))
        if not symmetric:
            zeros = torch.randint(1, (1 << bits) - 1, (cols // group, rows), generator=make)
        g_idx = torch.arange(cols) // group
        weights = scales.double()[g_idx] * (codes - zeros[g_idx])
        expected[name] = weights.T.float().bfloat16()  # these products are exact in float32
        stored = zeros - int(version != "gptq_v2")
        tensors |= {
            f"{name}.qweight": shifted(codes, bits, 0), f"{name}.qzeros": shifted(stored, bits, 1),
            f"{name}.scales": scales, f"{name}.g_idx": g_idx.to(torch.int32),
            f"{name}.bias": torch.zeros(rows, dtype=torch.float16),
        }  # fmt: skip
    folder = tmp_path / "m"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True, "sym": symmetric,
        "checkpoint_format": version, "damp_percent": 0.1, "dataset": None, "true_sequential": True,
        "model_seqlen": 2048, "modules_in_block_to_quantize": None, "use_exllama": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "dense", "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert len(expected) == 21
    for name, weights in expected.items():
        assert torch.equal(dense[f"{name}.weight"], weights), name
    assert not any(key.endswith(".bias") for key in dense)
