"""Method dass end to end: on every family against a literal walk, and what permuting may change."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from distaya_ext.compress import compress, glu
from distaya_ext.compress.ferry import Checks
from distaya_ext.compress.settings import from_recipe
from distaya_ext.compress.statistic import Statistic
from distaya_ext.errors import InputError, UsageError
from distaya_ext.models import Architecture, Stage, describe
from distaya_ext.ops import dass
from distaya_ext.recipe import Recipe
from distaya_ext.runtime import load

IDS = tiny.windows(2).ids
LEGAL = {"direction": "inputs", "permute": True, "update": True}


def weights_of(folder):
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def logits_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def run(tmp_path, family="llama", options=None, name="out", **fields):
    """The weights before and after, and the report."""
    source = tmp_path / "source"
    if not source.exists():
        tiny.make(source, tiny.FAMILIES[family])
    recipe = tiny.recipe("dass", dass=options or {}, **fields)
    report = compress(source, tmp_path / name, recipe, tiny.windows())
    return weights_of(source), weights_of(tmp_path / name), report


def mlp(layer):
    return [f"model.layers.{layer}.{name}.weight" for name in glu.PARTS]


def layers_of(weights):
    return range(sum(name.endswith("mlp.gate_proj.weight") for name in weights))


def literal_walk(folder, pattern):
    """The published method with the whole model in memory, one layer after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer in model.model.layers:
        down, squares = layer.mlp.down_proj, []
        hook = down.register_forward_pre_hook(
            lambda module, args, to=squares: to.append(args[0].flatten(0, 1).double().square())
        )
        with torch.no_grad():
            model(input_ids=tiny.windows().ids, use_cache=False)
        hook.remove()
        norm = torch.cat(squares).mean(0).sqrt().float()
        parts = (layer.mlp.gate_proj, layer.mlp.up_proj, down)
        masks = dass.masks(*(part.weight.data for part in parts), norm, **pattern)
        for part, mask in zip(parts, masks, strict=True):
            part.weight.data *= mask
    return model.state_dict()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_as_published(tmp_path, family):
    for name, pattern in {"nm": {"nm": (2, 4)}, "share": {"sparsity": 0.5}}.items():
        fields = {"nm": "2:4"} if name == "nm" else {"sparsity": 0.5}
        before, after, report = run(tmp_path, family, name=name, **fields)
        expected = literal_walk(tmp_path / "source", pattern)
        compressed = {f"{module.module}.weight" for module in report.modules}
        assert compressed == {n for layer in layers_of(before) for n in mlp(layer)}
        for key in before:
            assert torch.equal(after[key], expected[key]), (name, key)
            assert torch.equal(after[key], before[key]) == (key not in compressed), (name, key)
        assert report.sparsity == 0.5
        assert any("all other Linears stay dense" in notice for notice in report.notices)
        for layer in layers_of(before):
            gate, up, down = (after[key] != 0 for key in mlp(layer))
            if name == "nm":
                assert bool((gate.view(-1, 4, gate.shape[1]).sum(1) == 2).all())
                assert bool((up.view(-1, 4, up.shape[1]).sum(1) == 2).all())
                assert bool((down.view(len(down), -1, 4).sum(2) == 2).all())
            else:
                assert bool(
                    (2 * gate.sum(0) == len(gate)).all() and (2 * up.sum(0) == len(up)).all()
                )
                assert bool((2 * down.sum(1) == down.shape[1]).all())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_permuting_changes_no_logit(tmp_path, family):
    """Nothing pruned: neurons move (with their biases), the model stays the same function."""
    options = {"permute": True, "dense_neurons": 0.3}
    before, after, _ = run(tmp_path, family, options, sparsity=0.0)
    for layer in layers_of(before):
        gate, up, down = mlp(layer)
        order = (before[gate][:, None] == after[gate][None]).all(2).float().argmax(0)
        assert torch.equal(order.sort().values, torch.arange(96))
        assert not torch.equal(order, torch.arange(96))
        assert torch.equal(before[up][order], after[up])
        assert torch.equal(before[down][:, order], after[down])
        for name in (gate, up):
            bias = name.replace("weight", "bias")
            assert (bias in before) == (family == "llama-bias")
            if bias in before:
                assert torch.equal(before[bias][order], after[bias])
    dense, moved = logits_of(tmp_path / "source"), logits_of(tmp_path / "out")
    assert float((dense - moved).abs().max()) <= 1e-5 * float(dense.abs().max())


@pytest.mark.parametrize("family", ["cohere2", "llama-bias", "gemma3_text"])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("direction", ["outputs", "inputs"])
def test_dense_neurons_stand_at_the_end_of_a_legal_pattern(tmp_path, family, update, direction):
    options = {**LEGAL, "direction": direction, "update": update, "dense_neurons": 0.13}
    before, after, report = run(tmp_path, family, options, nm="2:4")
    live = 96 - 12  # 13 % of 96 neurons, cut to whole groups
    for layer in layers_of(before):
        gate, up, down = (after[key] != 0 for key in mlp(layer))
        assert bool(gate[live:].all() and up[live:].all() and down[:, live:].all())
        for part in (gate[:live], up[:live]):
            lines = part.t() if direction == "outputs" else part
            assert bool((lines.reshape(len(lines), -1, 4).sum(2) == 2).all())
        assert bool((down[:, :live].reshape(len(down), -1, 4).sum(2) == 2).all())
    assert report.sparsity == pytest.approx(0.5 * live / 96)
    assert (report.loss is not None) == update
    attention = [key for key in before if "self_attn" in key]
    assert attention and all(torch.equal(before[key], after[key]) for key in attention)


def test_an_update_makes_up_for_what_the_same_masks_cost(tmp_path):
    _, plain, _ = run(tmp_path, nm="2:4", name="plain")
    _, updated, report = run(tmp_path, options={"update": True}, nm="2:4", name="updated")
    gate, up, _ = mlp(0)  # before anything differs, both see the same activations
    for key in (gate, up):
        assert torch.equal(plain[key] != 0, updated[key] != 0)
        assert not torch.equal(plain[key], updated[key])
    assert all(module.loss > 0 for module in report.modules)
    dense = logits_of(tmp_path / "source")
    errors = [(logits_of(tmp_path / name) - dense).square().mean() for name in ("plain", "updated")]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("options", [{"update": True}, {**LEGAL, "dense_neurons": 0.13}], ids=str)
def test_an_update_may_aim_at_the_dense_model(tmp_path, options):
    """quality default keeps the masks of the first layer and refits what they leave."""
    source, plain, _ = run(tmp_path, "cohere2", options, nm="2:4", name="plain")
    _, aimed, report = run(tmp_path, "cohere2", options, nm="2:4", quality="default", name="aimed")
    gate, up, _down = mlp(0)
    for key in (gate, up):
        assert torch.equal(plain[key] != 0, aimed[key] != 0)
        assert not torch.equal(plain[key], aimed[key])
    live = 84 if "dense_neurons" in options else 96
    for layer in layers_of(source):
        kept = aimed[mlp(layer)[2]] != 0
        assert bool((kept[:, :live].reshape(len(kept), -1, 4).sum(2) == 2).all())
        assert bool(kept[:, live:].all())
    assert report.sparsity == pytest.approx(live / 192)
    assert all(module.loss > 0 for module in report.modules)


def test_along_inputs_the_sweep_of_sparsegpt_chooses(tmp_path):
    _, ours, _ = run(tmp_path, "llama", {"direction": "inputs", "update": True}, nm="2:4")
    recipe = tiny.recipe("sparsegpt", nm="2:4", skip=["self_attn"], quality="plain")
    compress(tmp_path / "source", tmp_path / "gpt", recipe, tiny.windows())
    theirs = weights_of(tmp_path / "gpt")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sparsegpt_may_permute_as_well(tmp_path):
    """With attention skipped it is what dass does along inputs; with it, only more is pruned."""
    _, ours, _ = run(tmp_path, "llama-bias", LEGAL, nm="2:4")
    fields = {"nm": "2:4", "permute": True, "quality": "plain"}
    said = {}
    for name, skip in (("mlp", ["self_attn"]), ("all", []), ("down", ["gate_proj"])):
        recipe = tiny.recipe("sparsegpt", skip=skip, **fields)
        report = compress(tmp_path / "source", tmp_path / name, recipe, tiny.windows())
        said[name] = [notice for notice in report.notices if notice.startswith("permute")]
    assert said["mlp"] == said["all"] == []
    assert said["down"] == [
        "permute moves neurons only where all three matrices of an MLP are compressed and "
        "mlp.down_proj is pruned to N:M, so they stay where they are in layer 0 (mlp.gate_proj not "
        "compressed), layer 1 (mlp.gate_proj not compressed)"
    ]
    theirs = weights_of(tmp_path / "mlp")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    source, whole = weights_of(tmp_path / "source"), weights_of(tmp_path / "all")
    torn = weights_of(tmp_path / "down")
    for layer in layers_of(source):
        bias = mlp(layer)[0].replace("weight", "bias")
        assert torch.equal(whole[bias].sort().values, source[bias].sort().values)
        assert not torch.equal(whole[bias], source[bias])
        assert torch.equal(torn[bias], source[bias])  # gate stays, so all neurons do
        for name in mlp(layer):
            assert bool(((whole[name] != 0).reshape(-1, 4).sum(1) <= 2).all())


def test_permute_says_where_a_rule_stops_it(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    rules = [
        {"match": r"layers\.1\.mlp\.down_proj", "sparsity": 0.5},
        {"match": r"layers\.2\.mlp", "dense": True},
    ]
    recipe = tiny.recipe("sparsegpt", nm="2:4", permute=True, quality="plain", modules=rules)
    report = compress(source, tmp_path / "out", recipe, tiny.windows())
    (said,) = [notice for notice in report.notices if notice.startswith("permute")]
    assert said.endswith("in layer 1 (mlp.down_proj without an N:M pattern)")


@pytest.mark.parametrize("direction", ["outputs", "inputs"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_balancing_prunes_less(tmp_path, family, direction):
    """Of the Wanda scores of down and, along outputs, of the scores of gate and up as well."""
    model = AutoModelForCausalLM.from_config(tiny.FAMILIES[family])
    layer, options = model.model.layers[0], {"permute": True, "direction": direction}
    settings = from_recipe(tiny.recipe("dass", nm="2:4", dass=options))
    plan = {f"layer.{name}": settings for name in glu.PARTS}
    mlp = glu.of("layer", layer, plan, Checks(late=False))
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    before = [layer.get_submodule(name).weight.data.clone() for name in glu.PARTS]
    with torch.no_grad():
        y = layer.mlp(x)
        squares = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: squares.append(args[0].square().mean(0))
        )
        layer.mlp(x)
        hook.remove()
    stage = next(s for s in describe(tiny.FAMILIES[family]).stages if glu.GATE in s.names)
    statistic = Statistic("norms", 64, x.device)
    statistic.add(x)
    mlp.see(stage, x)
    mlp.masks([glu.GATE, glu.UP], statistic)
    with torch.no_grad():
        torch.testing.assert_close(layer.mlp(x), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    norm = squares[0].sqrt()
    here = torch.arange(96)
    down = (before[2].abs() * norm).t().contiguous()
    kept = {
        "down": down,
        "gate": dass.gate_up(before[0], norm),
        "up": dass.gate_up(before[1], norm),
    }
    ratio = {
        name: float(dass.pruned_mass(S, mlp.order, (2, 4)) / dass.pruned_mass(S, here, (2, 4)))
        for name, S in kept.items()
    }
    assert ratio["down"] < (0.97 if direction == "inputs" else 1)
    if direction == "outputs":
        assert sum(ratio.values()) < 3 * 0.99


@pytest.mark.parametrize(
    "options",
    [{}, {"update": True}, {"permute": True}, {**LEGAL, "dense_neurons": 0.13}],
    ids=["paper", "update", "permute", "legal"],
)
def test_with_bits_and_packed(tmp_path, options):
    """Rounded beside the mask or in the same sweep; the folder loads and gives its own logits."""
    before, _, report = run(tmp_path, "cohere", options, nm="2:4", bits=4, group=32)
    assert report.format == "pack-quantized"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any("self_attn" in name for name in config["ignore"])
    run(tmp_path, "cohere", options, nm="2:4", bits=4, group=32, format="dense", name="dense")
    dense = weights_of(tmp_path / "dense")
    for layer in layers_of(before):
        for key in mlp(layer):
            levels = [row.unique().numel() for part in dense[key].split(32, 1) for row in part]
            assert max(levels) <= 16
            assert float((dense[key] == 0).float().mean()) >= 0.43
    run(tmp_path, "cohere", options, nm="2:4", bits=4, group=32, format="distaya", name="own")
    model = load(tmp_path / "own", exact=True)
    with torch.inference_mode():
        assert bool(model(input_ids=IDS, use_cache=False).logits.isfinite().all())


def test_same_bits_again_and_for_any_thread_count(tmp_path):
    before, found = torch.get_num_threads(), []
    try:
        for k, threads in enumerate((1, 1, 2)):
            torch.set_num_threads(threads)
            options = {**LEGAL, "direction": "outputs", "dense_neurons": 0.13}
            found.append(run(tmp_path, "cohere", options, nm="2:4", name=f"out{k}")[1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_the_written_recipe_repeats_the_run(tmp_path):
    _, first, _ = run(tmp_path, options={**LEGAL, "dense_neurons": 0.13}, nm="2:4")
    recipe = Recipe.from_yaml(tmp_path / "out" / "recipe.yaml")
    compress(tmp_path / "source", tmp_path / "again", recipe, tiny.windows())
    again = weights_of(tmp_path / "again")
    assert all(torch.equal(again[name], first[name]) for name in first)


# ---- what cannot run ----


def test_patterns_that_do_not_fit_the_neurons(tmp_path):
    for nm, options, words in (
        (
            "2:5",
            {},
            r"pattern 2:5 along neurons needs a multiple of 5; .*layers.0.mlp.gate_proj has 96",
        ),
        (
            "3:12",
            {"direction": "inputs"},
            r"pattern 3:12 along inputs needs a multiple of 12; .* has 64",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path, options=options, nm=nm)
        assert not (tmp_path / "out").exists()


def test_skip_may_not_tear_a_permuted_mlp_apart(tmp_path):
    with pytest.raises(UsageError, match=r"takes model\.layers\.1\.mlp\.down_proj alone"):
        run(tmp_path, options=LEGAL, nm="2:4", skip=[r"layers\.1\.mlp\.down_proj"])
    before, after, report = run(tmp_path, options=LEGAL, nm="2:4", skip=[r"layers\.1\.mlp"])
    assert all(torch.equal(before[key], after[key]) for key in mlp(1))
    assert len(report.modules) == 6


@pytest.mark.parametrize("name", glu.PARTS)
def test_one_matrix_may_be_skipped(tmp_path, name):
    for update in (False, True):
        before, after, report = run(
            tmp_path, options={"update": update}, nm="2:4", skip=[name], name=f"out{update}"
        )
        assert len(report.modules) == 6
        for layer in range(3):
            for key in mlp(layer):
                assert torch.equal(before[key], after[key]) == (name in key)


def test_a_layer_without_a_gated_mlp_is_refused():
    plain = Architecture("plain", (Stage(("self_attn.q_proj",)), Stage(("mlp.down_proj",))))
    with pytest.raises(UsageError, match=r"layers of plain have no mlp.gate_proj, mlp.up_proj"):
        glu.linears(plain)
    assert glu.linears(describe(tiny.FAMILIES["llama"])) == glu.PARTS


def test_an_activation_without_a_kernel_is_refused(tmp_path):
    config = LlamaConfig(**{**tiny.FAMILIES["llama"].to_dict(), "hidden_act": "relu"})
    tiny.make(tmp_path / "source", config)
    with pytest.raises(
        InputError, match=r"gated by silu, gelu, gelu_tanh can be judged, not of one gated by ReLU"
    ):
        run(tmp_path, nm="2:4")
    assert not (tmp_path / "out").exists()
