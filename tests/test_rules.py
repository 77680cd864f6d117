"""Rules for single Linears: what each gets, that stacks share a Hessian, and how it is stored."""

from functools import partial

import pytest
import refusing
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_compress import logits_of, weights_of
from test_late import as_on_a_gpu, files  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import budget, calibrate, compress
from distaya_ext.compress.plan import groups, make_plan, shares_statistics
from distaya_ext.compress.solve import solve
from distaya_ext.compress.statistic import Statistic
from distaya_ext.errors import UsageError
from distaya_ext.models import describe
from distaya_ext.recipe import Recipe, Rule

refused = partial(refusing.refused, UsageError)

# Every choice that a search makes, all over one layer and different from layer to layer.
MIXED = [
    {"match": r"layers\.0\.self_attn\.q_proj", "nm": "2:4", "bits": 4},
    {"match": r"layers\.0\.self_attn\.k_proj", "dense": True},
    {"match": r"layers\.0\.self_attn\.v_proj", "bits": 8, "group": 0},
    {"match": r"layers\.0\.mlp\.gate_proj", "sparsity": 0.5, "bits": 4},
    {"match": r"layers\.0\.mlp\.up_proj", "nm": "4:8", "bits": 4},
    {"match": r"layers\.0\.mlp\.down_proj", "nm": "2:4"},
    {"match": r"layers\.1\..*(gate|up|q)_proj", "bits": 3},
]
# What pack-quantized says: 4 and 8 bits, groups that divide all columns, floats beside them.
STANDARD = [
    {"match": r"(q|gate)_proj", "bits": 8, "group": 0},
    {"match": r"layers\.0\.self_attn\.k_proj", "dense": True},
    {"match": r"down_proj", "nm": "2:4"},
]


def mixed(rules, **more):
    fields = {"bits": 4, "group": 32, "quality": "plain", **more}
    return Recipe(model="tiny", method="gptq", modules=rules, **fields)


def walked(folder, plan, calibration):
    """The weights compress() must find, the slow way: every Linear group with its own Hessian."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    architecture = describe(model.config)
    for index, layer in enumerate(model.get_submodule(architecture.layers)):
        for stage in architecture.stages:
            stacks = groups(plan, f"{architecture.layers}.{index}", stage.names)
            for names in stacks:
                own = plan[f"{architecture.layers}.{index}.{names[0]}"]
                linears = [layer.get_submodule(name) for name in names]
                statistic = Statistic("hessian", linears[0].in_features, torch.device("cpu"))
                first = layer.get_submodule(stage.names[0])
                hook = first.register_forward_pre_hook(
                    lambda module, args, to=statistic: to.add(args[0].flatten(0, 1))
                )
                for ids in calibration.chunks():
                    logits_of(model, ids)
                hook.remove()
                solution = solve([linear.weight.data for linear in linears], own, statistic)
                parts = solution.W.split([linear.out_features for linear in linears])
                for linear, W in zip(linears, parts, strict=True):
                    linear.weight.data = W.clone()
    return model


# ---- the recipe ----


@st.composite
def rules(draw):
    match = draw(st.sampled_from([r"q_proj$", r"layers\.(0|1)\.", "ümlaut", "."]))
    if draw(st.booleans()):
        return Rule(match=match, dense=True)
    bits = draw(st.sampled_from([None, 2, 3, 4, 8, 16]))
    shape = draw(st.sampled_from([{"sparsity": 0.0}, {"sparsity": 0.5}, {"nm": "2:4"}, {}]))
    if bits in (None, 16) and not shape:
        bits = 5
    group = draw(st.sampled_from([None, 0, 32])) if bits not in (None, 16) else None
    return Rule(match=match, bits=bits, group=group, **shape)


@given(st.lists(rules(), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_yaml_round_trip(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = mixed(found, drop_layers=[4, 2])
    recipe.to_yaml(path)
    again = Recipe.from_yaml(path)
    assert again == recipe and again.modules == found and again.drop_layers == [2, 4]


def test_what_a_rule_says():
    assert Rule(match="a", bits=16) == Rule(match="a", dense=True)
    assert Rule(match="a", bits=16, nm="2:4") == Rule(match="a", nm="2:4")
    assert Rule(match="a", sparsity="2:4").nm_pair == (2, 4)
    assert Rule(match="a", sparsity=124).nm_pair == (2, 4)  # 2:4 as YAML 1.1 reads it
    assert Rule(match="a", sparsity=0.0).model_dump() == {"match": "a", "sparsity": 0.0}
    assert Rule(match="a", bits=4, group=0).model_dump() == {"match": "a", "bits": 4, "group": 0}
    plain = Recipe(model="m", method="sparsegpt", sparsity=0.5, bits=16)
    assert plain == Recipe(model="m", method="sparsegpt", sparsity=0.5)
    assert plain.modules == [] and plain.drop_layers == []


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"modules": [{"match": "a"}]}, ["rule 1 of modules", "says nothing", "dense: true"]),
        ({"modules": [{"bits": 4}]}, ["rule 1 of modules", "lacks 'match'"]),
        ({"modules": [{"match": "a", "bits": 4}, {"match": "(", "bits": 4}]},
         ["rule 2 of modules", "'('", "regular expression"]),
        ({"modules": [{"match": "a", "dense": True, "nm": "2:4", "bits": 4}]},
         ["dense: true", "nm and bits", "left out"]),
        ({"modules": [{"match": "a", "sparsity": 0.5, "nm": "2:4"}]}, ["0.5", "2:4", "not both"]),
        ({"modules": [{"match": "a", "nm": "2:4", "group": 32}]}, ["group 32", "needs bits"]),
        ({"modules": [{"match": "a", "bits": 4, "group": 7}]}, ["group 7", "0, 32, 64, 128"]),
        ({"modules": [{"match": "a", "bits": 9}]}, ["rule 1 of modules", "9"]),
        ({"modules": [{"match": "a", "bit": 4}]}, ["'bit'", "did you mean 'bits'"]),
        ({"modules": [{"match": "a", "nm": "4:2"}]}, ["'4:2'", "N < M"]),
        ({"modules": {"match": "a"}}, ["modules", "list"]),
        ({"modules": ["a"]}, ["rule 1 of modules", "'a'"]),
        ({"modules": [{"match": "a", "bits": 3}], "format": "pack-quantized"},
         ["rule 1 of modules", "3 bits", "4, 8 bits"]),
        ({"modules": [{"match": "a", "bits": 5}], "format": "distaya"}, ["5 bits", "3, 4, 8"]),
        ({"modules": [{"match": "a", "bits": 2}], "embed_bits": 8}, ["2 bits", "distaya"]),
        ({"modules": [{"match": "a", "nm": "2:4"}], "order": "activation"},
         ["rule 1 of modules", "activation", "2:4"]),
        ({"modules": [{"match": "a", "bits": 4}], "method": "rtn"}, ["sparsegpt", "gptq", "rtn"]),
        ({"modules": [{"match": "a", "dense": True}], "method": "dense", "bits": None},
         ["sparsegpt", "method dense"]),
        ({"modules": [{"match": "a", "dense": True}], "method": "wanda", "nm": "2:4"}, ["wanda"]),
    ],
)  # fmt: skip
def test_rules_that_cannot_be(fields, words):
    refused(lambda: Recipe(**{"model": "m", "method": "gptq", "bits": 4, **fields}), *words)


# ---- the plan ----


def checkpoint_of(tmp_path, family="llama", **more):
    return open_checkpoint(tiny.make(tmp_path / "source", tiny.FAMILIES[family], **more))


def test_first_match_wins_and_skip_wins_over_all(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    recipe = Recipe(
        model="m", method="sparsegpt", nm="2:4", bits=4, group=64, skip=[r"layers\.2\..*q_proj"],
        modules=[
            {"match": r"layers\.2\.", "bits": 8, "group": 0},
            {"match": r"q_proj$", "sparsity": 0.25},
            {"match": r"o_proj$", "dense": True},
            {"match": "v_proj", "nm": "4:8", "bits": 3},
        ],
    )  # fmt: skip
    plan = make_plan(recipe, checkpoint, 3)
    assert len(plan) == 3 * 7 - 1 - 2  # one skipped, o_proj of two layers dense
    assert list(plan) == [name for name in checkpoint.linears() if name in plan]

    def found(name):
        own = plan[f"model.layers.{name}"]
        return own.method, own.sparsity, own.nm, own.bits, own.group

    assert found("0.self_attn.k_proj") == ("sparsegpt", None, (2, 4), 4, 64)
    assert found("2.self_attn.o_proj") == ("gptq", None, None, 8, 0)
    assert found("1.self_attn.q_proj") == ("sparsegpt", 0.25, None, None, 64)
    assert found("1.self_attn.v_proj") == ("sparsegpt", None, (4, 8), 3, 64)
    assert "model.layers.2.self_attn.q_proj" not in plan
    assert "model.layers.0.self_attn.o_proj" not in plan
    assert groups(plan, "model.layers.0", describe(checkpoint.config).stages[0].names) == [
        ["self_attn.q_proj"], ["self_attn.k_proj"], ["self_attn.v_proj"]
    ]  # fmt: skip
    assert shares_statistics(plan, checkpoint)
    assert not shares_statistics(make_plan(mixed([]), checkpoint, 3), checkpoint)


def test_patterns_mean_the_layers_of_the_source(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    recipe = mixed(
        [{"match": r"layers\.2\.mlp", "bits": 8}, {"match": r"layers\.1\.", "nm": "2:4"}],
        skip=[r"layers\.2\..*q_proj"], drop_layers=[1],
    )  # fmt: skip
    plan = make_plan(recipe, checkpoint.without([1]), 3)
    assert {name.split(".")[2] for name in plan} == {"0", "1"}
    assert plan["model.layers.1.mlp.up_proj"].bits == 8
    assert plan["model.layers.1.self_attn.k_proj"].bits == 4
    assert "model.layers.1.self_attn.q_proj" not in plan
    assert all(own.nm is None for own in plan.values())


@pytest.mark.parametrize(
    "rules, words",
    [
        ([{"match": "nothing", "bits": 8}], ["rule 1", "'nothing'", "none of the 21 Linears"]),
        ([{"match": "q_proj", "bits": 8}, {"match": "head", "bits": 8}], ["rule 2", "'head'"]),
        ([{"match": "proj", "bits": 8}, {"match": "q_proj", "dense": True}],
         ["rule 2", "'q_proj'", "too late", "all of the 3 Linears"]),
    ],
)  # fmt: skip
def test_rules_without_effect(tmp_path, rules, words):
    checkpoint = checkpoint_of(tmp_path)
    recipe, out = mixed(rules), tmp_path / "out"
    refused(lambda: compress(checkpoint.folder, out, recipe, tiny.windows()), *words)
    assert not (tmp_path / "out").exists()


# ---- the maths ----


@pytest.mark.parametrize("family", ["cohere", "llama", "gemma2", "qwen3"])
def test_every_stack_sees_the_whole_hessian(tmp_path, family, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    checkpoint, calibration = checkpoint_of(tmp_path, family), tiny.windows()
    recipe = mixed(MIXED, format="dense")
    plan = make_plan(recipe, checkpoint, checkpoint.config.num_hidden_layers)
    expected = walked(checkpoint.folder, plan, calibration)
    report = compress(checkpoint.folder, tmp_path / "out", recipe, calibration)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert [m.module for m in report.modules] == [n for n in checkpoint.linears() if n in plan]
    for module in report.modules:
        own = plan[module.module]
        assert (module.bits, module.method, module.pattern) == (own.bits, own.method, own.pattern)
        assert (module.pattern is None) == (own.method == "gptq") and module.loss > 0
        zeros = weights_of(tmp_path / "out")[f"{module.module}.weight"] == 0
        assert module.zeros == int(zeros.sum())
        if own.nm is not None:
            n, m = own.nm
            assert int(zeros.reshape(module.rows, -1, m).sum(dim=2).min()) >= m - n


@pytest.mark.parametrize("quality", ["plain", "default"])
def test_rules_that_repeat_the_recipe_change_no_bit(tmp_path, quality):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere2"])
    same = {"group": 32, "format": "distaya", "quality": quality}
    plain = tiny.recipe("sparsegpt", nm="2:4", bits=4, **same)
    ruled = mixed([{"match": "proj", "nm": "2:4", "bits": 4}], bits=3, **same)
    reports = [
        compress(source, tmp_path / name, recipe, tiny.windows())
        for name, recipe in (("plain", plain), ("ruled", ruled))
    ]
    found, expected = weights_of(tmp_path / "ruled"), weights_of(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [m.loss for m in reports[0].modules] == [m.loss for m in reports[1].modules]


def test_a_hessian_is_copied_only_for_more_readers():
    x, shared = torch.randn(40, 16), Statistic("hessian", 16, torch.device("cpu"), readers=3)
    alone = Statistic("hessian", 16, torch.device("cpu"))
    shared.add(x)
    alone.add(x)
    first, second, third = (shared.matrix() for _ in range(3))
    assert len({H.data_ptr() for H in (first, second, third)}) == 3
    expected = alone.matrix()
    assert all(torch.equal(H, expected) for H in (first, second, third))
    first.zero_()
    assert torch.equal(third, expected)
    assert shared._matrix is None and alone._matrix is None  # given up with the last reader


def test_a_shared_hessian_counts_once_and_takes_memory(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(tmp_path)
    one, two = (
        budget.working_bytes(checkpoint, needs=budget.Needs(shared=shared))
        for shared in (False, True)
    )
    assert 4 * 64 * 64 <= two - one <= 4 * 96 * 96
    one, two = (
        budget.device_bytes(checkpoint, 10, needs=budget.Needs(shared=shared))
        for shared in (False, True)
    )
    assert 0 <= two - one <= 4 * 96 * 96
    asked = []
    least = budget.least_bytes
    monkeypatch.setattr(
        budget, "least_bytes", lambda c, needs: asked.append(needs.shared) or least(c)
    )
    tensors = weights_of(checkpoint.folder)
    tensors["model.layers.1.input_layernorm.weight"][5] = 0.0  # q, k and v see a dead column
    save_file(tensors, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    single = compress(checkpoint.folder, tmp_path / "a", mixed([]), tiny.windows())
    split = mixed([{"match": "k_proj", "bits": 8}])
    ruled = compress(checkpoint.folder, tmp_path / "b", split, tiny.windows())
    assert asked == [False, True]
    assert ruled.dead == single.dead == 1 and ruled.floored == single.floored
    assert [m.dead for m in ruled.modules] == [int(7 <= i < 10) for i in range(21)]


@pytest.mark.parametrize(
    "fields",
    [
        {"modules": MIXED, "format": "distaya"},
        {"modules": STANDARD, "drop_layers": [1]},
        {"modules": MIXED[:3], "drop_layers": [2], "order": "activation", "format": "dense"},
    ],
    ids=["mixed", "standard, a layer less", "in activation order"],
)
def test_no_layer_waits_and_every_file_is_the_same(tmp_path, fields, monkeypatch, request):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    rules = fields.pop("modules")
    if fields.get("order"):
        rules = rules[1:]
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"], dtype=torch.bfloat16)
    recipe = mixed(rules, **fields)
    compress(source, tmp_path / "now", recipe, tiny.windows())
    found = request.getfixturevalue("as_on_a_gpu")
    compress(source, tmp_path / "late", recipe, tiny.windows())
    assert len(found) >= 2 and not any(found), "a layer read a value"
    assert files(tmp_path / "late") == files(tmp_path / "now")


def test_stacks_share_what_they_aim_at(tmp_path):
    """Quality default: splitting a stage into stacks of the same pattern moves no gptq weight.

    gptq rows do not touch one another, so the only way to differ is another Hessian or aim.
    """
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    fields = {"quality": "default", "format": "dense", "group": 32}
    whole = compress(source, tmp_path / "a", mixed([], **fields), tiny.windows())
    # k_proj of the last layer at 8 bits instead of 4: nothing else of its stage may change.
    split = mixed([{"match": r"layers\.2\..*k_proj", "bits": 8}], **fields)
    ruled = compress(source, tmp_path / "b", split, tiny.windows())
    before, after = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    for name in ("q_proj", "v_proj"):
        key = f"model.layers.2.self_attn.{name}.weight"
        assert torch.equal(before[key], after[key]), name
    key = "model.layers.2.self_attn.k_proj.weight"
    assert not torch.equal(before[key], after[key])
    loss = [
        next(m for m in report.modules if m.module == key.removesuffix(".weight")).loss
        for report in (whole, ruled)
    ]
    assert loss[1] < loss[0] / 10
