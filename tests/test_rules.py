"""Rules for single Linears: what each gets, that stacks share a Hessian, and how it is stored."""

import csv
import json

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_compress import logits_of, weights_of
from test_late import as_on_a_gpu, files  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import distaya_ext
from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import budget, calibrate, compress
from distaya_ext.compress.packing import Packing
from distaya_ext.compress.plan import groups, make_plan, shares_statistics
from distaya_ext.compress.solve import Statistic, solve
from distaya_ext.errors import UsageError
from distaya_ext.models import describe
from distaya_ext.recipe import Recipe, Rule

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
    fields = {"bits": 4, "group": 32, **more}
    return Recipe(model="tiny", method="gptq", modules=rules, **fields)


def refused(call, *words):
    with pytest.raises(UsageError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


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
    run = lambda: compress(checkpoint.folder, tmp_path / "out", mixed(rules), tiny.windows())  # noqa: E731
    refused(run, *words)
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


def test_rules_that_repeat_the_recipe_change_no_bit(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere2"])
    plain = tiny.recipe("sparsegpt", nm="2:4", bits=4, group=32, format="distaya")
    ruled = mixed([{"match": "proj", "nm": "2:4", "bits": 4}], bits=3, format="distaya")
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
    one, two = (budget.working_bytes(checkpoint, shared=shared) for shared in (False, True))
    assert 4 * 64 * 64 <= two - one <= 4 * 96 * 96
    one, two = (budget.device_bytes(checkpoint, 10, shared=shared) for shared in (False, True))
    assert 0 <= two - one <= 4 * 96 * 96
    asked = []
    least = budget.least_bytes
    monkeypatch.setattr(
        budget, "least_bytes", lambda c, *, shared=False: asked.append(shared) or least(c)
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


# ---- what is stored ----


@pytest.mark.parametrize(
    "rules, more, form",
    [
        ([{"match": "q_proj", "bits": 8, "group": 0}], {}, "pack-quantized"),
        ([{"match": "q_proj", "dense": True}], {}, "pack-quantized"),
        ([{"match": "q_proj", "nm": "2:4"}], {}, "pack-quantized"),  # floats with zeros
        ([{"match": "q_proj", "bits": 3}], {}, "distaya"),
        ([{"match": "q_proj", "nm": "2:4", "bits": 4}], {}, "distaya"),  # a bitmask is smaller
        ([{"match": "q_proj", "sparsity": 0.1, "bits": 4}], {}, "pack-quantized"),  # it is not
        ([{"match": "q_proj", "nm": "2:4", "bits": 8}], {}, "pack-quantized"),
        ([{"match": "q_proj", "nm": "2:4", "bits": 4}], {"format": "pack-quantized"},
         "pack-quantized"),
        ([{"match": "q_proj", "bits": 8}], {"embed_bits": 8}, "distaya"),
        ([{"match": "proj", "bits": 5}], {}, "dense"),
        ([{"match": "proj", "dense": True}], {}, "dense"),
        ([{"match": "proj", "dense": True}], {"embed_bits": 8}, "distaya"),
        ([{"match": "proj", "sparsity": 0.5}], {}, "dense"),
        ([{"match": "down", "bits": 8, "group": 64}], {}, "distaya"),  # 96 inputs: a ragged group
        ([{"match": "down", "bits": 8, "group": 0}], {"group": 64}, "pack-quantized"),
        ([{"match": "q_proj", "bits": 8}], {"format": "dense"}, "dense"),
    ],
)  # fmt: skip
def test_which_format_is_chosen(tmp_path, rules, more, form):
    checkpoint = checkpoint_of(tmp_path)
    recipe = mixed(rules, **more)
    packing = Packing(recipe, make_plan(recipe, checkpoint, 3), checkpoint)
    assert packing.format == form, packing.notices


def test_bits_that_nothing_packs_stay_floats_beside_packed_ones(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    recipe = mixed([{"match": r"layers\.1\..*o_proj", "bits": 5}])
    report = compress(checkpoint.folder, tmp_path / "out", recipe, tiny.windows())
    assert report.format == "pack-quantized"
    (notice,) = [message for message in report.notices if "packed form" in message]
    assert "5 bits" in notice and "1 tensor (model.layers.1.self_attn.o_proj)" in notice
    tensors = weights_of(tmp_path / "out")
    W = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert len(W[0].unique()) > 16 and len(W[0, :32].unique()) <= 32  # 5 bits per 32 inputs
    assert "model.layers.0.self_attn.o_proj.weight_packed" in tensors
    assert next(m for m in report.modules if m.module.endswith("1.self_attn.o_proj")).bits == 5


def settled(recipe, checkpoint):
    depth = checkpoint.config.num_hidden_layers
    return Packing(recipe, make_plan(recipe, checkpoint, depth), checkpoint).plan


@pytest.mark.parametrize("form", ["auto", "distaya"])
def test_mixed_folders_hold_what_was_solved(tmp_path, form):
    checkpoint = checkpoint_of(tmp_path, "llama", dtype=torch.bfloat16)
    recipe, calibration = mixed(MIXED, format=form), tiny.windows()
    report = compress(checkpoint.folder, tmp_path / "out", recipe, calibration)
    plan = settled(recipe, checkpoint)
    expected = walked(checkpoint.folder, plan, calibration).state_dict()
    written = open_checkpoint(tmp_path / "out", packed=True)
    encodings = {}
    for name in checkpoint.linears():
        W = expected[f"{name}.weight"]
        if name in written.stored:
            encodings[name] = written.stored[name].scheme
            got = written.grid(name).dense(torch.bfloat16)
        else:
            got = written.read([f"{name}.weight"])[f"{name}.weight"]
        assert torch.equal(got, W), name
    assert report.format == written.scheme.method == "distaya"
    assert report.file_bytes == pytest.approx(report.predicted_bytes, rel=0.01)
    assert report.notices == [m for m in report.notices if "few" in m]

    def seen(name):
        scheme = encodings.get(f"model.layers.{name}")
        return scheme and (scheme.bits, scheme.encoding, scheme.group)

    assert seen("0.self_attn.q_proj") == (4, "bitmask", 32)
    assert seen("0.self_attn.k_proj") is None
    assert seen("0.self_attn.v_proj") == (8, "pack-quantized", 0)
    assert seen("0.mlp.gate_proj") == (4, "bitmask", 32)
    assert seen("0.mlp.down_proj") is None
    assert seen("1.mlp.gate_proj") == (3, "pack-quantized", 32)
    assert seen("2.mlp.gate_proj") == (4, "pack-quantized", 32)
    down = next(m for m in report.modules if m.module == "model.layers.0.mlp.down_proj")
    assert (down.bits, down.bytes, down.sparsity) == (None, 2 * 64 * 96, 0.5)
    model = distaya_ext.load(tmp_path / "out", exact=True)
    ids = tiny.windows(2).ids
    dense = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    dense.load_state_dict(expected)
    assert torch.allclose(logits_of(model, ids), logits_of(dense, ids), atol=0.05)


def test_stock_transformers_load_a_mixed_standard_folder(tmp_path):
    pytest.importorskip("compressed_tensors")
    checkpoint = checkpoint_of(tmp_path, "llama", dtype=torch.bfloat16)
    recipe, calibration = mixed(STANDARD, drop_layers=[1]), tiny.windows()
    report = compress(checkpoint.folder, tmp_path / "out", recipe, calibration)
    assert report.format == "pack-quantized" and report.source_layers == (0, 2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tiny.windows(2).ids
    ours = distaya_ext.load(tmp_path / "out", exact=True)
    assert torch.allclose(logits_of(stock, ids), logits_of(ours, ids), atol=0.05)
    dropped = open_checkpoint(checkpoint.folder).without([1])
    plan = Packing(recipe, make_plan(recipe, dropped, 3), dropped).plan
    compress(checkpoint.folder, tmp_path / "less", tiny.recipe("dense", drop_layers=[1]))
    expected = walked(tmp_path / "less", plan, calibration)
    assert torch.equal(logits_of(stock, ids), logits_of(expected, ids))


def test_the_recipe_written_repeats_the_run(tmp_path):
    """From the command line, with texts, on the bundled model, to the last bit."""
    from importlib.resources import files as resources

    nano = resources("distaya_ext") / "assets"
    recipe = Recipe(
        model=str(nano / "nano-aya"), method="gptq", bits=4, group=64, modules=MIXED,
        drop_layers=[6], skip=[r"layers\.7\.mlp\.down"],
        calibration={"path": str(nano / "texts" / "calibration"), "tokens": 4096, "window": 64},
    )  # fmt: skip
    recipe.to_yaml(tmp_path / "mine.yaml")
    run, out, again = CliRunner(), tmp_path / "out", tmp_path / "again"
    for file, to in ((tmp_path / "mine.yaml", out), (out / "recipe.yaml", again)):
        said = run.invoke(app, ["compress", "--recipe", str(file), "--out", str(to), "--quiet"])
        assert said.exit_code == 0, said.output
    assert Recipe.from_yaml(out / "recipe.yaml") == recipe
    assert weights_of(again).keys() == weights_of(out).keys()
    assert all(torch.equal(weights_of(again)[k], v) for k, v in weights_of(out).items())
    for name in ("config.json", "recipe.yaml"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    with open(out / "layers.csv", newline="") as file:
        rows = {row["module"]: row for row in csv.DictReader(file)}
    assert rows["model.layers.0.mlp.up_proj"]["pattern"] == "4:8"
    assert rows["model.layers.0.mlp.up_proj"]["method"] == "sparsegpt"
    assert rows["model.layers.1.mlp.up_proj"]["bits"] == "3"
    assert rows["model.layers.0.mlp.down_proj"]["bits"] == ""
    assert rows["model.layers.6.self_attn.q_proj"]["source_layer"] == "7"
    assert "model.layers.6.mlp.down_proj" not in rows
    said = run.invoke(app, ["inspect", str(out), "--json"])
    facts = json.loads(said.stdout)
    assert facts["layers"] == 7 and len(facts["linears"]) == 49
    assert {linear["bits"] for linear in facts["linears"]} >= {3, 4, 8, None}
    texts = str(nano / "texts" / "evaluation")
    plain = tmp_path / "plain"
    for command in (
        ["eval", str(out), "--texts", texts, "--tokens", "1024", "--window", "64", "--json"],
        ["export", str(out), "--out", str(plain), "--to", "dense"],
        ["generate", str(out), "Once", "--max-new-tokens", "4"],
        ["bench", "model", str(out), "--prompt", "8", "--new", "2", "--runs", "1"],
    ):
        said = run.invoke(app, command)
        assert said.exit_code == 0 and said.stdout, (command[0], said.output)
    assert len(AutoModelForCausalLM.from_pretrained(plain).model.layers) == 7


def test_a_run_of_dense_rules_alone_gathers_nothing(tmp_path):
    """All stages of a layer may be dense; layers behind it are still compressed."""
    checkpoint = checkpoint_of(tmp_path, "cohere")
    recipe = mixed([{"match": r"layers\.0\.", "dense": True}])
    report = compress(checkpoint.folder, tmp_path / "out", recipe, tiny.windows())
    assert len(report.modules) == 7 and {m.source_layer for m in report.modules} == {1}
    before, after = weights_of(checkpoint.folder), weights_of(tmp_path / "out")
    for name in before:
        if ".layers.0." in name:
            assert torch.equal(before[name], after[name])
