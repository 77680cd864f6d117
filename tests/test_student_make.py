"""Students cut out of their teachers: which weights stay, and that transformers reads them back."""

import json
from itertools import pairwise

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.errors import InputError, UsageError
from distaya_ext.students import make_student
from distaya_ext.students.importance import best, by_activation
from distaya_ext.students.layers import spread

CPU = torch.device("cpu")
# Every family narrower in all ways at once; cohere2 computes its heads' width and needs fewer.
WIDTHS = {name: {"hidden": 32, "intermediate": 48, "heads": 2} for name in tiny.FAMILIES}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {name: tiny.make(root / name, config) for name, config in tiny.FAMILIES.items()}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_narrower_and_shallower_student_reloads_bit_for_bit(family, teachers, tmp_path):
    made = make_student(
        teachers[family], tmp_path / "s", layers=1, texts=tiny.windows(), **WIDTHS[family]
    )
    stored = load_file(tmp_path / "s" / "model.safetensors")
    model = load(tmp_path / "s")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    untied = {id(p): p for p in model.parameters()}.values()
    assert made.parameters == sum(p.numel() for p in untied)
    assert made.bytes == sum(t.nbytes for t in stored.values())
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    assert shape == (1, 32, 48) and config.num_attention_heads == 2
    attention = model.model.layers[0].self_attn
    teacher = load(teachers[family]).model.layers[0].self_attn
    assert attention.head_dim == teacher.head_dim and attention.scaling == teacher.scaling
    ids = tiny.windows(2, 9).ids
    with_cache = model.generate(ids, max_new_tokens=5, do_sample=False)
    without = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without) and torch.isfinite(logits(model, ids)).all()
    open_checkpoint(tmp_path / "s")  # our strict reader agrees, too


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_is_lost_when_what_goes_did_nothing(family, teachers, tmp_path):
    """Dead neurons and channels are found, and the student is the teacher but for rounding. A
    LayerNorm over dead channels too has another mean, so there only neurons go.
    """
    teacher = load(teachers[family])
    centred = "cohere" in family
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp.down_proj.weight[:, 1::2] = 0
            layer.mlp.gate_proj.weight[1::2] = 0
            layer.mlp.up_proj.weight[1::2] = 0
            if layer.mlp.up_proj.bias is not None:
                layer.mlp.up_proj.bias[1::2] = 0
    if not centred:
        _silence(teacher, torch.arange(1, 64, 2))
    teacher.save_pretrained(tmp_path / "t")
    asked = {"intermediate": 48} | ({} if centred else {"hidden": 32})
    made = make_student(tmp_path / "t", tmp_path / "s", texts=tiny.windows(4), **asked)
    if not centred:
        assert made.channels == list(range(0, 64, 2))
        assert max(fit.error for fit in made.norms.values()) < 1e-6
    ids = tiny.windows(3, 17).ids
    before, after = logits(teacher, ids), logits(load(tmp_path / "s"), ids)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_a_layernorm_loses_its_mean(teachers, tmp_path):
    made = make_student(teachers["cohere"], tmp_path / "s", hidden=32, texts=tiny.windows(4))
    assert all(1e-4 < fit.error < 0.5 for fit in made.norms.values())
    assert list(made.norms) == [
        "model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.norm"
    ]  # fmt: skip


def _silence(model, dead):
    """These channels of the residual stream are zero everywhere; the others are large, so that the
    epsilon of a norm does not show.
    """
    gemma = "gemma" in model.config.model_type
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)[:, dead] = 0
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].endswith(("o_proj", "down_proj")):
                parameter.mul_(30)[dead] = 0
            elif name.endswith("norm.weight") and parameter.shape == (64,):
                parameter[dead] = -1.0 * gemma


def test_layers_that_stay_are_the_teachers(teachers, tmp_path):
    made = make_student(teachers["cohere2"], tmp_path / "s", layers=[0, 3])
    old, new = (load_file(f / "model.safetensors") for f in (teachers["cohere2"], tmp_path / "s"))
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name.replace("layers.1.", "layers.3.")])
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    note = json.loads((tmp_path / "s" / "student.json").read_text())
    assert note["layers"] == [0, 3] == list(made.shape.layers) and note["layers_by"] == "named"


def test_a_number_of_layers_keeps_the_influential(teachers, tmp_path):
    """With texts by block influence, or by another score of distaya_ext.influence."""
    teacher = load(teachers["llama"])
    teacher.model.layers[0].self_attn.o_proj.weight.data.zero_()  # then layer 0 does nothing
    teacher.model.layers[0].mlp.down_proj.weight.data.zero_()
    teacher.save_pretrained(tmp_path / "t")
    windows = tiny.windows(4)
    for by in (None, "bi"):
        out = tmp_path / f"s-{by}"
        made = make_student(tmp_path / "t", out, layers=2, texts=windows, layers_by=by)
        assert made.shape.layers == (1, 2) and made.layers_by == (by or "kl")
    ids = tiny.windows(2, 9).ids
    torch.testing.assert_close(logits(load(out), ids), logits(teacher, ids))
    made = make_student(tmp_path / "t", tmp_path / "s", layers=2)
    assert made.shape.layers == (0, 2) and made.layers_by == "spread"


def test_neurons_by_hand(teachers, tmp_path):
    """mean |act(gate) * up| over all tokens decides, and rows and columns go together."""
    teacher, windows = load(teachers["llama"]), tiny.windows()
    seen = []
    mlp = teacher.model.layers[1].mlp
    mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(teacher, windows.ids)
    scores = seen[0].reshape(-1, 96).double().abs().mean(dim=0)
    found = by_activation(open_checkpoint(teachers["llama"]), windows, CPU)
    torch.testing.assert_close(found.neurons[1], scores, rtol=1e-5, atol=0)
    kept = scores.topk(40).indices.sort().values
    make_student(teachers["llama"], tmp_path / "s", intermediate=40, texts=windows)
    new = load_file(tmp_path / "s" / "model.safetensors")
    start = "model.layers.1.mlp"
    assert torch.equal(new[f"{start}.up_proj.weight"], mlp.up_proj.weight[kept])
    assert torch.equal(new[f"{start}.gate_proj.weight"], mlp.gate_proj.weight[kept])
    assert torch.equal(new[f"{start}.down_proj.weight"], mlp.down_proj.weight[:, kept])


def test_channels_and_norms_by_hand(teachers, tmp_path):
    teacher, windows = load(teachers["qwen2"]), tiny.windows()
    ins, outs = {}, {}
    for name, module in teacher.named_modules():
        if name.endswith("norm"):

            def note(module, args, out, name=name):
                ins[name], outs[name] = (x.reshape(-1, 64).double() for x in (args[0], out))

            module.register_forward_hook(note)
    logits(teacher, windows.ids)
    scores = torch.stack([y.abs().mean(dim=0) for y in outs.values()]).mean(dim=0)
    kept = best(scores, 32)
    made = make_student(teachers["qwen2"], tmp_path / "s", hidden=32, texts=windows)
    assert made.channels == kept.tolist() and len(made.norms) == 5
    new = load_file(tmp_path / "s" / "model.safetensors")
    for name, x in ins.items():
        w = teacher.get_submodule(name).weight.double()[kept]
        z = w * x[:, kept] / (x[:, kept].square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        y = outs[name][:, kept]
        g = (y * z).sum() / z.square().sum()
        torch.testing.assert_close(new[f"{name}.weight"].double(), g * w, rtol=1e-5, atol=1e-6)
        error = ((y - g * z).square().sum() / y.square().sum()).detach()
        assert made.norms[name].error == pytest.approx(error.item(), rel=1e-3)


def test_groups_of_heads_go_together(teachers, tmp_path):
    teacher, windows = load(teachers["qwen2"]), tiny.windows()
    seen = []
    teacher.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].reshape(-1, 2, 2, 16).double())
    )
    logits(teacher, windows.ids)
    group = int(seen[0].norm(dim=-1).sum(dim=(0, 2)).argmax())
    make_student(teachers["qwen2"], tmp_path / "s", heads=2, texts=windows)
    new = load_file(tmp_path / "s" / "model.safetensors")
    attention, start = teacher.model.layers[0].self_attn, "model.layers.0.self_attn"
    for part, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        here = slice(rows * group, rows * (group + 1))
        module = attention.get_submodule(part)
        assert torch.equal(new[f"{start}.{part}.weight"], module.weight[here])
        assert torch.equal(new[f"{start}.{part}.bias"], module.bias[here])
    here = slice(32 * group, 32 * (group + 1))
    assert torch.equal(new[f"{start}.o_proj.weight"], attention.o_proj.weight[:, here])


def test_without_texts_weights_or_chance_decide(teachers, tmp_path):
    sizes = {"hidden": 32, "intermediate": 48}
    files = []
    for out, by, seed in (("a", "magnitude", 0), ("b", "random", 1), ("c", "random", 1)):
        made = make_student(teachers["llama"], tmp_path / out, by=by, seed=seed, **sizes)
        assert made.width_by == by and made.norms == {} and made.tokens == 0
        files.append((tmp_path / out / "model.safetensors").read_bytes())
    assert files[1] == files[2] != files[0]
    with pytest.raises(UsageError, match="seen on texts and none are given"):
        make_student(teachers["llama"], tmp_path / "d", **sizes)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("count", "left", "kept"), [(8, 6, 6), (8, 2, 2), (9, 9, 9), (5, 1, 1)])
def test_spread_keeps_both_ends(count, left, kept):
    found = spread(count, left)
    assert len(found) == kept and found[0] == 0 and found[-1] == (count - 1 if left > 1 else 0)
    steps = {b - a for a, b in pairwise(found)}
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("family", "asked", "words"),
    [
        ("llama", {}, "would be its teacher"),
        ("llama", {"layers": 4}, "4 layers cannot be cut out of the teacher's 3"),
        ("llama", {"layers": 2, "layers_by": "age"}, "layers_by 'age' is none of kl, ppl, bi"),
        ("llama", {"layers": [0, 7]}, "not different layers of the teacher's 3, from 0 to 2"),
        ("llama", {"layers": [1, 1]}, "not different layers"),
        ("llama", {"layers": []}, "at least one must stay"),
        ("llama", {"hidden": 128}, "hidden of 128 cannot be cut out of the teacher's 64"),
        ("llama", {"hidden": 30}, "transformers builds no llama of hidden size 30 and 4 heads"),
        ("llama", {"heads": 3}, "heads of 3 are no whole groups: 2 query heads share"),
        ("llama", {"intermediate": 0}, "intermediate of 0 cannot be cut"),
        ("llama", {"hidden": 32, "by": "luck"}, "by 'luck' is none of activation"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(family, asked, words, teachers, tmp_path):
    with pytest.raises(UsageError, match=words) as refused:
        make_student(teachers[family], tmp_path / "s", texts=tiny.windows(), **asked)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_outputs_and_folders_that_are_not_ours_stay(teachers, tmp_path):
    with pytest.raises(InputError, match="is the model folder itself"):
        make_student(teachers["llama"], teachers["llama"], layers=1, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not written by distaya"):
        make_student(teachers["llama"], tmp_path / "mine", layers=1, overwrite=True)
    make_student(teachers["llama"], tmp_path / "s", layers=1)
    with pytest.raises(InputError, match="not empty"):
        make_student(teachers["llama"], tmp_path / "s", layers=2)
    make_student(teachers["llama"], tmp_path / "s", layers=2, overwrite=True)
    assert load(tmp_path / "s").config.num_hidden_layers == 2
