"""Gradients through packed products: what they are, what they keep, and that nobody gets them
unasked."""

import packed_folders
import pytest
import tiny
import torch
import trained
from packed_folders import w4
from torch import nn
from transformers import AutoModelForCausalLM

import distaya_ext
from distaya_ext.formats import ModuleScheme
from distaya_ext.runtime import PackedGLU, PackedLinear

EPS = 2.0**-24
SCHEMES = {
    "int4": (w4(), None),
    "asymmetric": (w4(32, False), None),
    "2:4": (w4(), "2:4"),
    "mask": (w4(encoding="bitmask", kind="int4-mask"), "half"),
    "int8": (ModuleScheme(8, 32, True, kind="int8"), None),
    "int3": (ModuleScheme(3, 32, True, kind="int3"), None),
}


def module(name="int4", rows=96, cols=64, bias=True, seed=0) -> PackedLinear:
    scheme, pattern = SCHEMES[name]
    rng = torch.Generator().manual_seed(seed)
    W = packed_folders.prune(torch.randn(rows, cols, generator=rng), pattern)
    b = nn.Parameter(torch.randn(rows, generator=rng)) if bias else None
    packed = PackedLinear(scheme, rows, cols, b)
    packed.take(scheme.encode(packed_folders.grid_of(W, scheme, torch.bfloat16)), name)
    return distaya_ext.trainable(packed)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradient_is_that_of_the_dense_product(name):
    packed = module(name)
    W = packed.dequantize(torch.float32)
    x, dy = draw(3, 5, 64).requires_grad_(), draw(3, 5, 96, seed=2)
    y = packed(x)
    y.backward(dy)
    assert (y.double() - (x.double() @ W.double().t() + packed.bias.double())).abs().max() < 1e-4
    dx, db = dy.double() @ W.double(), dy.double().sum((0, 1))
    # Sums of 96 and of 15 products in float32.
    assert (x.grad - dx).abs().max() <= 96 * EPS * (dy.double().abs() @ W.double().abs()).max()
    assert (packed.bias.grad - db).abs().max() <= 15 * EPS * dy.abs().sum((0, 1)).max()


def test_a_step_along_the_gradient_changes_the_product_as_it_says():
    """y is linear in x, so a difference of any length is its derivative, up to rounding."""
    packed, h = module("2:4"), draw(4, 64, seed=3)
    x, dy = draw(4, 64).requires_grad_(), draw(4, 96, seed=4)
    (packed(x) * dy).sum().backward()
    with torch.no_grad():
        change = float(((packed(x + h) - packed(x)).double() * dy).sum())
    assert change == pytest.approx(float((x.grad * h).double().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_weight_and_the_result_once(dtype):
    packed = module(bias=False)
    x, dy = draw(7, 64).to(dtype).requires_grad_(), draw(7, 96, seed=2).to(dtype)
    packed(x).backward(dy)
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, dy @ packed.dequantize(dtype))


def test_nothing_dense_is_kept_for_the_backward_pass():
    packed, kept = module(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(draw(4, 64).requires_grad_())
    assert kept == []


def test_training_is_asked_for_and_can_be_taken_back():
    packed, x = module(), draw(2, 64).requires_grad_()
    exact = packed(x)
    distaya_ext.trainable(packed, False)
    with pytest.raises(RuntimeError, match=r"cannot be trained through.*distaya_ext\.trainable"):
        packed(x)
    with torch.no_grad():
        assert not torch.equal(packed(x), exact)  # 8-bit activations again
        packed.exact = True
        assert torch.equal(packed(x), exact)


def test_autocast_rounds_the_input_as_for_a_dense_linear():
    packed, x = module(), draw(5, 64).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert torch.equal(y, packed(x.detach().bfloat16()))


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_has_the_gradient_of_the_cpu(name):
    packed = module(name)
    x, dy = draw(9, 64).requires_grad_(), draw(9, 96, seed=2)
    packed(x).backward(dy)
    there = x.detach().cuda().requires_grad_()
    packed.cuda()(there).backward(dy.cuda())
    torch.testing.assert_close(there.grad.cpu(), x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", trained.FAMILIES)
def test_a_model_has_the_gradient_of_its_dense_twin(tmp_path, family):
    """Also through tied int8 heads, biases, and gated MLPs that otherwise are one kernel."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    folder, twin = packed_folders.write(
        source, tmp_path / "out", w4(), method="distaya", pattern="2:4", embed_bits=8
    )
    packed = distaya_ext.trainable(distaya_ext.load(folder, dtype="float32"))
    dense = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    glus = [m for m in packed.modules() if isinstance(m, PackedGLU)]
    assert glus and not any(glu.fused() for glu in glus)
    found = []
    for model in (packed, dense):
        rows = model.get_input_embeddings()(trained.IDS).detach().requires_grad_()
        out = model(inputs_embeds=rows, labels=trained.IDS, use_cache=False)
        out.loss.backward()
        found.append((out.loss.detach(), rows.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3 * found[1][1].std())
    distaya_ext.trainable(packed, False)
    assert all(glu.fused() for glu in glus)


def test_the_trainer_of_transformers_takes_what_was_switched_on(tmp_path):
    from transformers import Trainer, TrainingArguments

    parts = trained.prepared(trained.folder(tmp_path, "llama-bias", "2:4 int4"), train="full")
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    Trainer(parts.model, arguments)
    distaya_ext.trainable(parts.model, False)
    with pytest.raises(ValueError, match="quantized"):
        Trainer(parts.model, arguments)
