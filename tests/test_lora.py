"""What learns in a model: LoRA, masked LoRA, full weights, scales, norms and embeddings."""

import importlib.util

import pytest
import torch
import trained
from torch import nn

import distaya_ext
from distaya_ext.errors import InputError, UsageError
from distaya_ext.runtime.modules import PackedLinear
from distaya_ext.train.choose import weights
from distaya_ext.train.learned import is_pruned, rounded
from distaya_ext.train.parts import prepare
from distaya_ext.train.scales import ScaledLinear
from distaya_ext.train.spec import TrainSpec

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


def lora_of(model, name=Q):
    layer = model.get_submodule(name)
    return layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def filled(parts):
    """A and B that are not 0, drawn."""
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parts.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return parts


@pytest.mark.parametrize("kind", ["dense", "2:4", "2:4 int4"])
def test_lora_begins_as_the_model_itself(root, kind):
    path = trained.folder(root, "llama-bias", kind)
    before = trained.logits(distaya_ext.load(path, exact=True))
    random_state = torch.random.get_rng_state()
    parts = trained.prepared(path, rank=8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    learnt = parts.trainable()
    assert len(learnt) == 2 * 14 and all(p.dtype == torch.float32 for p in learnt.values())
    assert all(".lora_A." in name or ".lora_B." in name for name in learnt)
    assert not parts.model.lm_head.weight.requires_grad
    glu = kind == "2:4 int4"  # there gate and up were one kernel, and are two with LoRA beside
    if glu:
        torch.testing.assert_close(trained.logits(parts.model), before, rtol=0.02, atol=0.01)
    else:
        assert torch.equal(trained.logits(parts.model), before)
    rows, cols = 64, 64
    _, A, B = lora_of(parts.model)
    assert A.shape == (8, cols) and B.shape == (rows, 8) and not B.any()
    A = A.detach()
    assert float(A.abs().max()) <= cols**-0.5 and float(A.std()) > 0.4 * cols**-0.5
    again, other = (trained.prepared(path, rank=8, seed=seed) for seed in (3, 4))
    assert torch.equal(lora_of(again.model)[1], A) and not torch.equal(lora_of(other.model)[1], A)


def test_shares_count_packed_weights(root):
    dense, packed = (
        trained.prepared(trained.folder(root, "cohere", kind), rank=2)
        for kind in ("dense", "embed int8")
    )
    assert weights(dense.model) == weights(packed.model)
    assert dense.count == packed.count == sum(p.numel() for p in packed.trainable().values())
    assert packed.share == packed.count / weights(packed.model)


def test_lora_beside_a_kernel_is_the_formula(root):
    parts = filled(trained.prepared(trained.folder(root, "qwen2", "2:4 int4"), "float32", alpha=8))
    layer, A, B = lora_of(parts.model)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    base = layer.base_layer
    assert isinstance(base, PackedLinear)
    A, B = (part.to(base.stored).double() for part in (A, B))  # as they are stored
    W = base.dequantize(torch.float32).double() + 8 / 4 * B @ A
    want = x.double() @ W.t() + base.bias.double()
    assert (
        base.stored == torch.bfloat16 and (layer(x) - want).abs().max() <= 1e-5 * want.abs().max()
    )


def test_lora_of_a_pruned_matrix_is_masked(root):
    parts = filled(trained.prepared(trained.folder(root, "qwen2", "2:4"), "float32", alpha=8))
    layer, A, B = lora_of(parts.model)
    W, bias = layer.base_layer.weight, layer.base_layer.bias
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    dy = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    y = layer(x)
    y.backward(dy)
    ours = [x.grad, A.grad, B.grad]
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B)]
    xd, Ad, Bd = leaves
    effective = W.double() + (W != 0) * (8 / 4 * Bd @ Ad)
    want = xd @ effective.t() + bias.double()
    want.backward(dy.double())
    assert (y - want).abs().max() <= 1e-5 * want.abs().max()
    for got, leaf in zip(ours, leaves, strict=True):
        assert (got - leaf.grad).abs().max() <= 1e-5 * leaf.grad.abs().max()
    assert torch.equal(layer.get_delta_weight("default") != 0, W != 0)


@pytest.mark.parametrize("kind", ["2:4", "2:4 int4"])
def test_autocast_and_checkpointing_train_as_without(root, kind):
    path = trained.folder(root, "llama-bias", kind, torch.float32)
    gradients = {}
    for how in ("plain", "checkpointing", "autocast"):
        parts = filled(trained.prepared(path))
        parts.model.train()
        if how == "checkpointing":
            parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            loss = parts.model(input_ids=trained.IDS, labels=trained.IDS, use_cache=False).loss
        loss.backward()
        gradients[how] = torch.cat([p.grad.flatten() for p in parts.trainable().values()])
    assert torch.equal(gradients["checkpointing"], gradients["plain"])
    error = (gradients["autocast"] - gradients["plain"]).norm() / gradients["plain"].norm()
    assert 0 < error < 0.05


def test_targets_choose_by_name(root):
    path = trained.folder(root, "llama-bias", "2:4 int4")
    parts = trained.prepared(path, targets=["q_proj$", r"layers\.1\.mlp\.down", "^lm_head$"])
    names = {name.rpartition(".lora_")[0] for name in parts.trainable()}
    assert names == {Q, Q.replace("0", "1"), "model.layers.1.mlp.down_proj", "lm_head"}
    with pytest.raises(UsageError, match="no Linear of the model is found by nowhere"):
        trained.prepared(path, targets=["nowhere"])
    tied = trained.folder(root, "cohere", "dense")
    with pytest.raises(UsageError, match="lm_head is tied to the embedding"):
        trained.prepared(tied, targets=["lm_head"])


@pytest.mark.parametrize("family", ["cohere", "llama-bias"])
def test_full_training_keeps_zeros_and_ties(root, family):
    path = trained.folder(root, family, "2:4")
    parts = trained.prepared(path, train="full")
    before, model = trained.tensors(path), parts.model
    names = dict(model.named_parameters())
    assert sorted(parts.trainable()) == sorted(names)
    assert all(p.dtype == torch.float32 for p in names.values())
    losses = trained.learn(parts, steps=4)
    assert losses[-1] < losses[0]
    for name, W in before.items():
        now = parts.learned().tensors[name]
        assert not torch.equal(now, W.float()), name
        if is_pruned(W):
            assert torch.equal(now == 0, W == 0), name
    tied = family == "cohere"
    head, rows = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.dtype == rows.dtype == torch.bfloat16
    assert torch.equal(head, rows) == tied and ("lm_head.weight" in parts.learned().tensors) != tied


def test_full_training_of_a_quantised_model_is_of_what_is_dense(root):
    parts = trained.prepared(trained.folder(root, "qwen2", "embed int8"), train="full")
    kept = {n: m.packed.clone() for n, m in parts.model.named_modules() if hasattr(m, "packed")}
    assert parts.notices == ["16 quantised matrices keep their weights and do not learn"]
    names = set(parts.learned().tensors)
    assert {name.rpartition(".")[2] for name in names} == {"weight", "bias"}
    assert f"{Q}.bias" in names and "model.norm.weight" in names and f"{Q}.weight" not in names
    trained.learn(parts)
    assert all(torch.equal(parts.model.get_submodule(n).packed, held) for n, held in kept.items())


@pytest.mark.parametrize("kind", ["half int4", "embed int8"])
def test_scales_learn_and_codes_do_not(root, kind):
    path = trained.folder(root, "llama-bias", kind)
    model = distaya_ext.load(path, dtype="float32", exact=True)
    packed = model.get_submodule(Q)
    codes = packed.dequantize(torch.float32) != 0
    parts = prepare(model, TrainSpec(train="scales"))
    layer = parts.model.get_submodule(Q)
    assert isinstance(layer, ScaledLinear) and torch.equal(
        layer.dense(layer.scales()), packed.dequantize(torch.float32)
    )
    m = layer.log_multiplier
    with torch.no_grad():
        m.copy_(0.3 * torch.randn(m.shape, generator=torch.Generator().manual_seed(1)))
    scales = layer.scales()
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scales, (layer.given * m.exp()).bfloat16())
    W = layer.dense(scales)
    assert torch.equal(W != 0, codes)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    dy = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    layer(x).backward(dy)
    # d y / d m of one group is its part of the product.
    dm = torch.stack(
        [((x @ (W * part).t()) * dy).sum(0) for part in torch.eye(2).repeat_interleave(32, 1)], 1
    )
    torch.testing.assert_close(m.grad, dm.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, dy @ W, rtol=1e-4, atol=1e-4)
    assert trained.learn(parts, steps=3)[-1] < 4.6


def test_norms_and_embeddings_learn_beside_lora(root):
    path = trained.folder(root, "cohere", "2:4 int4")
    parts = trained.prepared(path, also=["norms", "embeddings"])
    trained.learn(parts)
    found, model = parts.learned(), parts.model
    assert set(found.tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    }
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(UsageError, match="the embedding is quantised"):
        trained.prepared(trained.folder(root, "cohere", "embed int8"), also=["embeddings"])
    with pytest.raises(UsageError, match="no quantised Linears"):
        trained.prepared(trained.folder(root, "cohere", "dense"), also=["scales"])
    with pytest.raises(UsageError, match=r"nothing would learn.*no quantised Linears"):
        trained.prepared(trained.folder(root, "cohere", "dense"), train="scales")


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("2:4 int4", {"also": ["norms", "scales"]}),
        ("2:4", {"train": "full"}),
        ("dense", {"also": ["embeddings"]}),
    ],
)
def test_state_goes_round(root, kind, fields):
    path = trained.folder(root, "cohere", kind)
    one, two = trained.prepared(path, **fields), trained.prepared(path, **fields)
    trained.learn(one)
    state = one.state()
    assert list(state) == list(two.trainable())
    two.load_state(state)
    assert torch.equal(trained.logits(one.model), trained.logits(two.model))
    trained.learn(one)
    assert any(not torch.equal(state[n], p) for n, p in one.trainable().items())  # copies
    name, tensor = next(iter(state.items()))
    with pytest.raises(InputError, match=f"{name} is in only one of the two"):
        two.load_state({n: t for n, t in state.items() if n != name})
    with pytest.raises(InputError, match=" and the model has"):
        two.load_state(state | {name: tensor[:1, :1] if tensor.dim() > 1 else tensor[:1]})


def test_lora_that_is_there_goes_on_or_is_refused(root):
    path = trained.folder(root, "cohere", "2:4 int4")
    parts = filled(trained.prepared(path, targets=["q_proj"]))
    before = lora_of(parts.model)[1].clone()
    more = prepare(parts.model, TrainSpec(rank=4))
    assert len(more.trainable()) == 2 * 14
    assert torch.equal(lora_of(more.model)[1], before)
    with pytest.raises(UsageError, match="LoRA of rank 4 and alpha 4 already, and rank 8"):
        prepare(parts.model, TrainSpec(rank=8))


def test_without_peft_there_is_one_sentence(root, monkeypatch):
    path = trained.folder(root, "cohere", "dense")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"LoRA needs peft.*pip install 'distaya-ext\[train\]'"):
        trained.prepared(path)


def test_rounding_keeps_a_pattern():
    old = torch.tensor([[0.0, 1.0, -2.0, 0.0]], dtype=torch.float16)
    new = torch.tensor([[1e-3, 1e-9, -1e-9, 0.0]])
    found = rounded(new, old, True)
    assert found.tolist() == [[0.0, 2.0**-14, -(2.0**-14), 0.0]]
    assert torch.equal(rounded(new, old, False), new.half())
    assert not is_pruned(torch.ones(40, 40)) and not is_pruned(torch.zeros(9))
    assert is_pruned(nn.functional.pad(torch.ones(16, 15), (1, 0)))  # 15:16
