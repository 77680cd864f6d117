"""Packed models: every family and format against its dense twin, and what a module must survive."""

import copy
import pickle

import packed_folders
import pytest
import tiny
import torch
from packed_folders import w4
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import distaya_ext
from distaya_ext.errors import InputError, UsageError
from distaya_ext.formats import ModuleScheme
from distaya_ext.runtime import PackedEmbedding, PackedGLU, PackedHead, PackedLinear

EPS = 2.0**-24
IDS = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """make(family, method, pattern, ...) -> (packed folder, dense twin), each made once."""
    root, made = tmp_path_factory.mktemp("packed"), {}

    def make(family="llama", scheme=None, **options):
        scheme = scheme or w4()
        key = (family, scheme, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            source = root / family
            if not source.exists():
                tiny.make(source, tiny.FAMILIES[family])
            made[key] = packed_folders.write(
                source, root / f"{family}-{len(made)}", scheme, **options
            )
        return made[key]

    return make


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def twin_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def close(got, want, depth):
    """Two fp32 forward passes that add in different orders.

    A sum of K products is off by K eps times the sum of their sizes at most; K <= 96 here. Through
    `depth` layers of four such steps the errors add, and norms bring them back to the scale of the
    activations: 4 depth K eps of the largest logit, twice for the two models.
    """
    assert got.shape == want.shape and got.dtype == want.dtype
    limit = 8 * depth * 96 * EPS * float(want.abs().max())
    assert float((got - want).abs().max()) <= limit


def near(got, want):
    """W4A8: activations are off by up to half a step of max / 127, uniformly: max / 440 rms.

    The largest of a block of 32 gaussians is about 2.1 rms, so each product is off by 0.5 % of its
    rms; over the 7 * 4 products of a small model these add as in a random walk to 2.5 %. Measured
    over the families: at most 2 %.
    """
    error = (got.double() - want.double()).square().mean().sqrt()
    assert 0 < error <= 0.05 * want.double().square().mean().sqrt()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_equals_its_dense_twin(folders, family):
    folder, twin = folders(family, method="distaya", embed_bits=8)
    want = logits(twin_of(twin))
    model = distaya_ext.load(folder, dtype="float32", exact=True)
    close(logits(model), want, model.config.num_hidden_layers)
    assert distaya_ext.set_exact(model, False) > 7
    near(logits(model), want)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    tied = model.config.tie_word_embeddings
    assert isinstance(model.get_output_embeddings(), PackedHead) == tied
    layers = model.config.num_hidden_layers
    assert sum(isinstance(m, PackedGLU) and m.fused() for m in model.modules()) == layers
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 7 * layers + (not tied)


FORMATS = {
    "row": ("pack-quantized", w4(0), None),
    "asymmetric": ("pack-quantized", w4(32, False), None),
    "8 bits": ("pack-quantized", ModuleScheme(8, 32, True, kind="int8"), None),
    "2:4": ("pack-quantized", w4(), "2:4"),
    "out 2:4": ("pack-quantized", w4(), "out 2:4"),
    "gptq": ("gptq", w4(32, encoding="gptq", offset=1), None),
    "gptq asymmetric": ("gptq", w4(32, False, encoding="gptq"), None),
    "3 bits": ("distaya", ModuleScheme(3, 32, True, kind="int3"), None),
    "bitmask": ("distaya", w4(encoding="bitmask", kind="int4-mask"), "half"),
    "named out": ("distaya", w4(kind="int4-out", nm=(2, 4)), "out 2:4"),
}
KINDS = {"2:4": "int4-2:4", "out 2:4": "int4-out", "bitmask": "int4-mask", "3 bits": "int3"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_equals_its_dense_twin(folders, name):
    method, scheme, pattern = FORMATS[name]
    folder, twin = folders("llama", scheme, method=method, pattern=pattern)
    model = distaya_ext.load(folder, dtype="float32", exact=True)
    close(logits(model), logits(twin_of(twin)), model.config.num_hidden_layers)
    if name in KINDS:
        kinds = {m.format.kind for m in model.modules() if isinstance(m, PackedLinear)}
        assert kinds == {KINDS[name]}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_saved_loads_again_bit_for_bit(folders, name, tmp_path):
    method, scheme, pattern = FORMATS[name]
    folder, _ = folders("llama", scheme, method=method, pattern=pattern)
    model = distaya_ext.load(folder)
    model.save_pretrained(tmp_path / "again")
    one, two = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert sorted(one) == sorted(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    again = distaya_ext.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(folders, dtype):
    folder, _ = folders("gemma2", method="distaya", embed_bits=8)
    model = distaya_ext.load(folder, dtype=dtype)
    assert model.dtype == dtype and logits(model).dtype == dtype
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(logits(distaya_ext.load(folder, dtype=name)), logits(model))
    moved = distaya_ext.load(folder, dtype="float32").to(dtype)
    # Equal but for transformers' rotary tables, which to() rounds and loading does not.
    torch.testing.assert_close(logits(moved), logits(model), rtol=0.05, atol=0.05)
    assert moved.dtype == dtype
    buffers = [m.packed for m in moved.modules() if isinstance(m, PackedLinear)]
    assert all(b.dtype == torch.uint8 for b in buffers)
    with pytest.raises(ValueError, match="not supported for quantized"):
        moved.half()


def test_auto_dtype_is_that_of_the_folder(tmp_path):
    source = tiny.make(tmp_path / "dense", tiny.FAMILIES["qwen3"], dtype=torch.bfloat16)
    folder, _ = packed_folders.write(source, tmp_path / "out", w4())
    assert distaya_ext.load(folder).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="'int8' is none of auto"):
        distaya_ext.load(folder, dtype="int8")
    with pytest.raises(UsageError, match="tpu"):
        distaya_ext.load(folder, device="tpu")


def test_a_dense_folder_loads_as_transformers_loads_it(tmp_path):
    source = tiny.make(tmp_path / "dense", tiny.FAMILIES["cohere"])
    want = logits(AutoModelForCausalLM.from_pretrained(source))
    assert torch.equal(logits(distaya_ext.load(source, exact=True)), want)


def test_state_dict_is_what_the_folder_holds(folders):
    folder, _ = folders("cohere", method="distaya", embed_bits=8)
    model = distaya_ext.load(folder)
    state = model.state_dict()
    held = load_file(folder / "model.safetensors")
    assert sorted(state) == sorted(held)
    assert all(torch.equal(state[name], held[name]) for name in held)
    pruned, _ = folders("cohere", method="distaya", embed_bits=8, pattern="2:4")
    other = distaya_ext.load(pruned)
    assert not torch.equal(logits(other), logits(model))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(logits(other), logits(model))
    del state["model.layers.0.mlp.up_proj.weight_scale"]
    state["model.layers.1.mlp.up_proj.weight_shape"] = torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*up_proj.weight_scale") as caught:
        other.load_state_dict(state)
    assert "weight_shape says 1x2" in str(caught.value)


@pytest.mark.parametrize("family", ["cohere", "llama-bias"])
def test_copies_give_the_same_and_are_their_own(folders, family):
    folder, _ = folders(family, method="distaya", embed_bits=8)
    model = distaya_ext.load(folder)
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        other.get_input_embeddings().packed.zero_()
        assert not torch.equal(logits(other), want)
        assert torch.equal(logits(model), want)
        if family == "cohere":
            assert other.lm_head.embedding is other.get_input_embeddings()


def test_generate_with_a_cache_equals_the_twin(folders):
    folder, twin = folders("cohere2", method="distaya", embed_bits=8)
    model = distaya_ext.load(folder, dtype="float32", exact=True)
    ways = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **ways), twin_of(twin).generate(IDS, **ways))
    beams = model.generate(IDS, num_beams=2, **ways)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_compiled_without_a_break(folders, family):
    folder, _ = folders(family, method="distaya", embed_bits=8)
    model = distaya_ext.load(folder, exact=True)
    body = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(body), logits(model), rtol=1e-4, atol=1e-5)


def test_no_gradient_passes(folders):
    folder, _ = folders()
    model = distaya_ext.load(folder)
    want = logits(model)
    assert torch.equal(model(input_ids=IDS).logits, want)  # without no_grad: nothing asks for one
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights cannot be trained through"):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, want)


@pytest.mark.cuda
def test_on_a_gpu(folders):
    folder, twin = folders("gemma2", method="distaya", embed_bits=8)
    want = logits(twin_of(twin))
    model = distaya_ext.load(folder, device="cuda", dtype="float32")
    close(logits(model, IDS.cuda()).cpu(), want, 2)
    text = model.generate(IDS.cuda(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    back = model.to("cpu")
    distaya_ext.set_exact(back)
    close(logits(back), want, 2)
    assert torch.equal(
        back.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0), text.cpu()
    )
    plain = AutoModelForCausalLM.from_pretrained(folder).to("cuda")
    assert {t.device.type for t in [*plain.parameters(), *plain.buffers()]} == {"cuda"}


def test_sizes_are_told(folders):
    folder, twin = folders("cohere", method="distaya", embed_bits=8)
    model, dense = distaya_ext.load(folder), twin_of(twin)
    held = [m for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    tables = {id(b): b.numel() * b.element_size() for b in dense.buffers()}
    want = sum(m.weights().nbytes for m in held) + rest + sum(tables.values())
    assert distaya_ext.resident_bytes(model) == want
    assert model.get_memory_footprint() == want
    weights = sum(p.numel() for p in dense.parameters()) - sum(m.rows * m.cols for m in held)
    assert model.num_parameters() == weights  # those that are parameters: norms


@pytest.mark.parametrize("way", ["ours", "plain", "swapped"])
def test_a_dense_head_is_not_copied_for_the_last_token(folders, way):
    """torch copies a weight that needs no gradient where the input is a slice (and calls bmm)."""
    folder, _ = folders(method="distaya" if way == "plain" else "pack-quantized")
    if way == "ours":
        model = distaya_ext.load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = distaya_ext.use_kernels(model) if way == "swapped" else model
    head = model.get_output_embeddings()
    x = torch.randn(2, 5, head.in_features, dtype=model.dtype)
    for last in (x[:1, -1:], x[:, -1:], x[:, -3:]):
        with torch.no_grad(), torch.profiler.profile() as seen:
            y = head(last)
        calls = {event.key for event in seen.key_averages()}
        assert "aten::mm" in calls and "aten::bmm" not in calls
        assert torch.equal(y, torch.nn.functional.linear(last.contiguous(), head.weight))


def test_hooks_on_a_part_of_a_fused_mlp_are_called(folders):
    folder, _ = folders()
    model = distaya_ext.load(folder, dtype="float32", exact=True)
    want, seen = logits(model), []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args))
    close(logits(model), want, 3)
    assert len(seen) == 1


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations(tmp_path, act):
    config = copy.deepcopy(tiny.FAMILIES["llama"])
    config.hidden_act = act
    folder, twin = packed_folders.write(
        tiny.make(tmp_path / "dense", config), tmp_path / "out", w4()
    )
    model = distaya_ext.load(folder, dtype="float32", exact=True)
    assert any(isinstance(m, PackedGLU) for m in model.modules()) == (act != "relu")
    close(logits(model), logits(twin_of(twin)), 3)


def test_made_dense_again(folders):
    folder, twin = folders("gemma3_text", method="distaya", embed_bits=8)
    model = distaya_ext.load(folder, dtype="float32").dequantize()
    assert torch.equal(logits(model), logits(twin_of(twin)))
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())  # as those of any dense model


def spoil(folder, tmp_path, change):
    """A copy of the folder with changed tensors."""
    import shutil

    other = tmp_path / "spoilt"
    shutil.copytree(folder, other)
    packed_folders.edit_tensors(other, change)
    return other


GATE = "model.layers.1.mlp.gate_proj"
SPOILT = {
    "absent": (lambda t: t.pop(f"{GATE}.weight_scale"), [f"{GATE}.weight_scale", "absent"]),
    "shape": (
        lambda t: t.update({f"{GATE}.weight_packed": torch.zeros(96, 9, dtype=torch.int32)}),
        [f"{GATE}.weight_packed", "96x9", "96x8"],
    ),
    "type": (
        lambda t: t.update({f"{GATE}.weight_packed": torch.zeros(96, 8, dtype=torch.int64)}),
        [f"{GATE}.weight_packed", "int64"],
    ),
    "told shape": (
        lambda t: t.update({f"{GATE}.weight_shape": torch.tensor([64, 96])}),
        [GATE, "64x96", "96x64"],
    ),
    "NaN": (
        lambda t: t[f"{GATE}.weight_scale"].fill_(float("nan")),
        [f"{GATE}.weight_scale", "NaN"],
    ),
    "both": (
        lambda t: t.update({f"{GATE}.weight": torch.zeros(96, 64)}),
        [GATE, f"{GATE}.weight"],
    ),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("plain", [False, True])
def test_hostile_folders_end_in_one_sentence(folders, tmp_path, name, plain):
    change, words = SPOILT[name]
    folder, _ = folders("llama", method="distaya")
    other = spoil(folder, tmp_path, change)
    load = AutoModelForCausalLM.from_pretrained if plain else distaya_ext.load
    with pytest.raises(InputError) as caught:
        load(other)
    sentence = str(caught.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_a_pattern_that_the_codes_break_is_told(folders, tmp_path):
    folder, _ = folders("llama", w4(kind="int4-2:4"), method="distaya", pattern="2:4")

    def change(tensors):
        tensors[f"{GATE}.weight_packed"][3, 2] = 0x11111111

    with pytest.raises(InputError, match=rf"{GATE} cannot be packed as int4-2:4: .*row 3"):
        distaya_ext.load(spoil(folder, tmp_path, change))


def test_modules_and_versions_that_do_not_exist(folders, tmp_path):
    import json
    import shutil

    folder, _ = folders("llama", method="distaya")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    for change, words in (
        ({"version": 99}, ["version", "99"]),
        ({"modules": {**about["modules"], "model.nothing": about["modules"][GATE]}}, ["nothing"]),
        ({"config_groups": {}}, ["config_groups"]),
    ):
        other = tmp_path / f"other-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, other)
        packed_folders.edit_config(other, quantization_config={**about, **change})
        for load in (AutoModelForCausalLM.from_pretrained, distaya_ext.load):
            with pytest.raises(InputError) as caught:
                load(other)
            assert all(word in str(caught.value) for word in words), caught.value
