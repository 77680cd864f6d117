"""use_kernels on models that stock transformers and compressed-tensors loaded."""

import packed_folders
import pytest
import tiny
import torch
from packed_folders import w4
from transformers import AutoModelForCausalLM

import distaya_ext
from distaya_ext.errors import InputError, UsageError
from distaya_ext.formats import ModuleScheme
from distaya_ext.runtime import PackedGLU, PackedLinear

IDS = torch.arange(3, 20)[None]
FORMATS = {
    "group": (w4(), None),
    "row": (w4(0), None),
    # no asymmetric one: compressed-tensors 0.20 cannot load packed zeros (it expects them unpacked)
    "8 bits": (ModuleScheme(8, 32, True, kind="int8"), None),
    "2:4": (w4(), "2:4"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("swap") / "dense", tiny.FAMILIES["llama-bias"])


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return packed_folders.write(source, tmp_path_factory.mktemp("swap") / "out", w4())[0]


def stock(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", FORMATS)
def test_a_stock_model_runs_on_our_kernels(source, tmp_path, name):
    scheme, pattern = FORMATS[name]
    folder, _ = packed_folders.write(source, tmp_path / "out", scheme, pattern=pattern)
    want = logits(stock(folder))  # decompressed by its first forward
    model = distaya_ext.use_kernels(stock(folder), exact=True)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14
    assert sum(isinstance(m, PackedGLU) for m in model.modules()) == 2
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert torch.equal(logits(model), logits(distaya_ext.load(folder, exact=True)))
    kinds = {m.format.kind for m in model.modules() if isinstance(m, PackedLinear)}
    # tiles of these small matrices are half padding, which a mask leaves out
    dense = {"int4", "int4-mask"}
    assert kinds <= {"8 bits": {"int8"}, "2:4": {"int4-2:4"}}.get(name, dense)


def test_swapped_models_save_for_stock_transformers(folder, tmp_path):
    model = distaya_ext.use_kernels(stock(folder, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits(stock(tmp_path / "again", dtype=torch.bfloat16)),
        logits(stock(folder, dtype=torch.bfloat16)),
    )
    assert torch.equal(logits(distaya_ext.load(tmp_path / "again")), logits(model))
    state = stock(folder, dtype=torch.bfloat16).state_dict()
    ours = model.state_dict()
    assert sorted(state) == sorted(ours)
    assert all(torch.equal(state[name], ours[name]) for name in state)


def test_what_we_load_saves_for_stock_transformers_too(folder, tmp_path):
    distaya_ext.load(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(stock(tmp_path / "again")), logits(stock(folder)))


def test_nothing_to_swap(source, folder):
    model = stock(folder)
    logits(model)
    with pytest.raises(UsageError, match=r"made dense already.*right after from_pretrained"):
        distaya_ext.use_kernels(model)
    with pytest.raises(UsageError, match="holds no packed compressed-tensors weights"):
        distaya_ext.use_kernels(stock(source))
    swapped = distaya_ext.use_kernels(stock(folder))
    with pytest.raises(UsageError, match="runs on packed weights already"):
        distaya_ext.use_kernels(swapped)


def test_a_spoilt_tensor_is_told_and_the_model_stays_usable(folder):
    model, want = stock(folder), logits(stock(folder))
    gate = model.model.layers[1].mlp.gate_proj
    whole = gate.weight_shape.data.clone()
    gate.weight_shape.data = torch.tensor([1, 2])
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj\.weight_shape says 1x2"):
        distaya_ext.use_kernels(model)
    gate.weight_shape.data = whole
    distaya_ext.use_kernels(model, exact=True)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_generate_after_the_swap(folder):
    model = distaya_ext.use_kernels(stock(folder), exact=True)
    ways = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **ways), stock(folder).generate(IDS, **ways))
