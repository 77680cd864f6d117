"""distaya search on tiny random models: every family, every budget, the file it promises."""

import json

import numpy as np
import pytest
import torch
import yaml
from speaking import save_model, save_texts
from tiny import FAMILIES, VOCAB, WINDOW, make
from typer.testing import CliRunner

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.cli.app import app
from distaya_ext.compress import Calibration, compress
from distaya_ext.errors import InputError, ResourceError, UsageError
from distaya_ext.evaluate import load
from distaya_ext.recipe import CalibrationSpec, Recipe
from distaya_ext.search import DEFAULT, Options, search
from distaya_ext.search.candidate import Space
from distaya_ext.search.choices import Costs, parse_choices
from distaya_ext.search.objective import parse_weights
from distaya_ext.search.prepare import make_units
from distaya_ext.search.rules import patterns, to_recipe

FEW = "bf16,int8,int4,int3,mask-50+int4"


def windows(count: int = 24) -> Calibration:
    """Random tokens; two languages in turn."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (count, WINDOW), generator=generator)
    return Calibration(ids, [("en", "fr")[i % 2] for i in range(count)])


def options(**fields) -> Options:
    """A small search."""
    fields.setdefault("choices", FEW)
    fields.setdefault("search_tokens", 8 * WINDOW)
    fields.setdefault("group", 32)
    fields.setdefault("quality", "plain")
    spec = CalibrationSpec(tokens=16 * WINDOW, window=WINDOW)
    return Options(calibration=spec, **fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("search") / "llama", FAMILIES["llama"], dtype=torch.bfloat16
    )


def file_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---- what it finds ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_recipe_that_runs_within_the_budget(tmp_path, family):
    model = make(tmp_path / "model", FAMILIES[family], dtype=torch.bfloat16)
    drop = FAMILIES[family].num_hidden_layers > 2
    found = search(model, windows(), options(bits_per_weight=4.0, per="stage", drop=drop))
    assert found.exact
    report = compress(model, tmp_path / "out", found.recipe, windows())
    checkpoint = open_checkpoint(model)
    shapes = [checkpoint.entries[f"{name}.weight"].shape for name in checkpoint.linears()]
    weights = sum(rows * columns for rows, columns in shapes)
    held = sum(module.bytes for module in report.modules)
    dense = {name for name, choice in found.allocation.items() if choice == "bf16"}
    held += sum(checkpoint.entries[f"{name}.weight"].nbytes for name in dense)
    assert 8 * held <= 4.0 * weights
    assert load_forward(tmp_path / "out")


def load_forward(folder) -> bool:
    """Whether the written folder runs and gives finite logits."""
    from distaya_ext import load as load_model

    logits = load_model(folder)(input_ids=windows().ids[:2]).logits
    return bool(logits.isfinite().all())


@pytest.mark.parametrize("embed_bits", [None, 8])
def test_a_file_of_the_target_size_is_written(tmp_path, llama, embed_bits):
    whole = file_bytes(llama)
    for share in (0.5, 0.7, 0.9):
        target = int(share * whole)
        asked = options(target_size=target, embed_bits=embed_bits, drop=True)
        found = search(llama, windows(), asked)
        out = tmp_path / f"{share}"
        compress(llama, out, found.recipe, windows())
        assert file_bytes(out) <= found.best.bytes <= target
        # Bitmasks count with all that pruning leaves; the rest of the estimate is exact but for
        # the length of a header.
        if "mask-50+int4" not in found.allocation.values():
            assert found.best.bytes - file_bytes(out) < 60 * len(found.allocation)


def test_choices_of_different_groups_keep_theirs(tmp_path, llama):
    """The group of the recipe itself is one choice's; rules must not inherit it."""
    asked = options(bits_per_weight=3.9, choices="int3-g32,int3-g0,int4,int4-g0", group=64)
    found = search(llama, windows(), asked)
    assert len(set(found.allocation.values())) > 2
    compress(llama, tmp_path / "out", found.recipe, windows())
    assert 0 <= found.best.bytes - file_bytes(tmp_path / "out") < 60 * len(found.allocation)
    held = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = {"int3-g32": 32, "int3-g0": 0, "int4": 64, "int4-g0": 0}
    for name, choice in found.allocation.items():
        columns = open_checkpoint(llama).entries[f"{name}.weight"].shape[1]
        wanted = groups[choice] if groups[choice] < columns else 0
        assert held["modules"][name]["group"] == wanted


def test_a_recipe_leaves_the_fields_it_is_made_from_alone(llama):
    """They serve every budget of a walk."""
    fields = {"model": str(llama), "group": 128}
    costs = Costs(open_checkpoint(llama), parse_choices("int4-g32,int3"), fields)
    space = Space(costs, make_units(costs, "matrix"), whole_files=True, drop=False)
    made = [to_recipe(space, space.uniform(choice), fields) for choice in costs.choices]
    assert [(recipe.bits, recipe.group) for recipe in made] == [(4, 32), (3, 128)]
    assert fields == {"model": str(llama), "group": 128}


def test_the_recipe_beats_uniform_choices_of_no_more_bytes(llama):
    found = search(llama, windows(48), options(bits_per_weight=6.0, search_tokens=24 * WINDOW))
    rivals = [row for row in found.rows[1:] if row.bytes <= found.best.bytes]
    assert {row.name for row in rivals} == {"int4", "int3", "mask-50+int4"}
    assert found.best.objective < min(row.objective for row in rivals)
    assert [row.bytes for row in found.rows[1:]] == sorted(r.bytes for r in found.rows[1:])[::-1]
    assert next(row for row in found.rows if row.name == "bf16").kl == 0.0


def test_the_same_search_gives_the_same_recipe(llama):
    asked = options(bits_per_weight=5.0, polish=4)
    first, second = (search(llama, windows(), asked) for _ in range(2))
    assert first.recipe == second.recipe
    assert first.rows == second.rows
    assert yaml.safe_load(first.recipe.to_yaml()) == yaml.safe_load(second.recipe.to_yaml())


def test_swaps_are_taken_only_when_measured_to_help(llama):
    plain = search(llama, windows(), options(bits_per_weight=4.6))
    polished = search(llama, windows(), options(bits_per_weight=4.6, polish=12))
    assert polished.decided <= plain.decided
    assert (polished.accepted > 0) == (polished.allocation != plain.allocation)
    assert polished.budget["used_bytes"] <= polished.budget["bytes"]


def test_the_table_measures_what_the_recipe_makes(tmp_path, llama):
    """The uniform int8 row against the folder that compress() writes, on the same windows."""
    cut = windows(24)
    found = search(llama, cut, options(bits_per_weight=9.5, choices="int8,int4"))
    int8 = next(row for row in found.rows if row.name == "int8")
    fields = {"bits": 8, "group": 32, "format": "distaya", "quality": "plain"}
    recipe = Recipe(model=str(llama), method="gptq", **fields)
    # The Hessian windows are all but the last two of each language for the search.
    compress(llama, tmp_path / "int8", recipe, Calibration(cut.ids[:16], cut.languages[:16]))
    dense, packed = (whole_model(folder) for folder in (llama, tmp_path / "int8"))
    with torch.no_grad():
        base, own = (m(input_ids=cut.ids[-4:]).logits.log_softmax(-1) for m in (dense, packed))
    kl = float((base.exp() * (base - own)).sum(-1).mean())
    assert int8.kl == pytest.approx(
        kl, rel=0.25
    )  # the streams differ: dense here, compressed there


def whole_model(folder):
    from distaya_ext import load as load_model

    return load_model(folder, dtype="float32", exact=True)


def test_stages_take_fewer_measurements(llama):
    matrix = search(llama, windows(), options(bits_per_weight=5.0))
    stage = search(llama, windows(), options(bits_per_weight=5.0, per="stage"))
    assert (matrix.cost["variants"], stage.cost["variants"]) == (3 * 7 * 4, 3 * 4 * 4)
    assert (
        stage.allocation["model.layers.1.self_attn.q_proj"]
        == (stage.allocation["model.layers.1.self_attn.v_proj"])
    )


def test_a_harmless_layer_is_dropped(tmp_path):
    """A layer whose outputs are zero adds nothing to the stream; leaving it out is free."""
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path / "model", FAMILIES["llama"], dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layer = model.model.layers[1]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer.get_submodule(name).weight.data.zero_()
    model.save_pretrained(folder)
    found = search(folder, windows(), options(bits_per_weight=6.0, drop=True))
    assert found.dropped == [1]
    assert found.recipe.drop_layers == [1]
    assert not any(name.startswith("model.layers.1.") for name in found.allocation)
    compress(folder, tmp_path / "out", found.recipe, windows())
    assert open_checkpoint(tmp_path / "out", packed=True).config.num_hidden_layers == 2


# ---- budgets that cannot be, or need nothing ----


def test_an_impossible_size_names_the_nearest(llama):
    with pytest.raises(UsageError, match=r"smallest that these choices reach is \d+ bytes") as told:
        search(llama, windows(), options(target_size=1000))
    least = int(str(told.value).split("reach is ")[1].split(" ")[0])
    with pytest.raises(UsageError, match="cannot be met"):
        search(llama, windows(), options(target_size=least - 1))
    found = search(llama, windows(), options(target_size=least))
    assert found.budget["used_bytes"] == least


def test_an_impossible_width_names_the_nearest(llama):
    with pytest.raises(UsageError, match=r"reach is \d+\.\d+ bits per weight") as told:
        search(llama, windows(), options(bits_per_weight=1.0))
    least = float(str(told.value).split("reach is ")[1].split(" ")[0])
    found = search(llama, windows(), options(bits_per_weight=least))
    assert found.best.bits_per_weight <= least


def test_a_budget_that_holds_the_model_leaves_it_alone(tmp_path, llama):
    found = search(llama, windows(), options(target_size="1GB"))
    assert found.recipe.method == "dense"
    assert found.best.objective == 0.0
    assert any("nothing has to be compressed" in notice for notice in found.notices)
    compress(llama, tmp_path / "out", found.recipe)
    assert file_bytes(tmp_path / "out") <= found.best.bytes


def test_memory_that_is_too_small_is_refused(llama):
    with pytest.raises(ResourceError, match=r"holds the whole model in memory: it needs .* GiB"):
        search(llama, windows(), options(bits_per_weight=5.0, max_ram="100MB"))


def test_three_windows_a_language_are_needed(llama):
    with pytest.raises(InputError, match="the texts give 2 windows in en; a search needs 3"):
        search(llama, windows(4), options(bits_per_weight=5.0))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "say how small"),
        ({"target_size": "1GB", "bits_per_weight": 3.0}, "say how small"),
        ({"bits_per_weight": 0.0}, "0 bits per weight"),
        ({"bits_per_weight": 3.0, "per": "row"}, "neither matrix nor stage"),
        ({"bits_per_weight": 3.0, "polish": -1}, "polish at least 0"),
    ],
)
def test_options_that_say_nothing_or_two_things(fields, says):
    with pytest.raises(UsageError, match=says):
        Options(**fields)


# ---- words ----


def test_choices_are_read():
    found = parse_choices("bf16, int8,int3-g64,2:4+int4,mask-60+int4-g0")
    assert [c.fields() for c in found] == [
        {},
        {"bits": 8},
        {"bits": 3, "group": 64},
        {"nm": "2:4", "bits": 4},
        {"sparsity": 0.6, "bits": 4, "group": 0},
    ]


def test_the_least_of_the_default_choices_is_three_bits_and_a_scale_per_row(llama):
    fields = {"model": str(llama), "group": 64}
    costs = Costs(open_checkpoint(llama), parse_choices(DEFAULT), fields)
    least = {c.name: costs.linear(costs.names[-1], c, header=False) for c in costs.choices}
    rows, columns = costs.shape(costs.names[-1])
    assert min(least, key=least.get) == "int3-g0"
    assert least["bf16"] == 2 * rows * columns
    assert least["int3-g0"] == rows * (columns * 3 // 8 + 2) + (rows * 3 + 31) // 32 * 4 + 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int5", "files hold 3, 4, 8 bits"),
        ("2:4+int8", "pruning saves nothing with 8"),
        ("2:4", "is not bf16"),
        ("int4-g16", "groups are"),
        ("mask-00+int4", "1 to 99"),
        ("5:4+int4", "N:M with 0 < N < M"),
        ("int4,int4", "given twice"),
        ("", "is not bf16"),
    ],
)
def test_choices_that_cannot_be(text, says):
    with pytest.raises(UsageError, match=says):
        parse_choices(text)


def test_weights_are_read():
    assert [parse_weights(t) for t in ("mean", "worst", "max", "0.25")] == [0.0, 0.5, 1.0, 0.25]
    for text in ("median", "-0.1", "nan"):
        with pytest.raises(UsageError, match="is none of mean, worst, max"):
            parse_weights(text)


def test_patterns_match_these_names_and_no_others():
    import re

    every = [f"model.layers.{i}.{n}" for i in range(12) for n in ("mlp.up_proj", "mlp.down_proj")]
    rng = np.random.default_rng(0)
    for _ in range(20):
        wanted = {name for name in every if rng.random() < 0.4}
        made = patterns(sorted(wanted), "model.layers")
        assert {n for n in every if any(re.search(p, n) for p in made)} == wanted
        assert len(made) <= 2


# ---- the command ----


def test_the_command_writes_a_recipe_that_compress_takes(tmp_path):
    model, texts = save_model(tmp_path / "model"), save_texts(tmp_path / "texts", repeat=40)
    common = ["--tokens", 1024, "--window", 16, "--search-tokens", 384, "--group", 32, "--quiet"]
    arguments = ["search", model, "--calib", texts, "--bits-per-weight", 6, "--json", *common]
    arguments += ["--out", tmp_path / "recipe.yaml", "--choices", "int8,int4,int3", "--polish", 2]
    arguments += ["--quality", "plain"]
    ran = CliRunner().invoke(app, [str(a) for a in arguments])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["rows"][0]["searched"]
    assert {row["name"] for row in told["rows"]} == {"recipe", "int8", "int4", "int3"}
    out = tmp_path / "out"
    ran = CliRunner().invoke(
        app, ["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out), "--quiet"]
    )
    assert ran.exit_code == 0, ran.output
    assert file_bytes(out) <= told["rows"][0]["bytes"]
    assert load(out).model is not None


def test_the_command_prints_table_and_recipe(tmp_path):
    model, texts = save_model(tmp_path / "model"), save_texts(tmp_path / "texts", repeat=40)
    arguments = ["search", model, "--calib", texts, "--target-size", "60KB", "--tokens", 1024]
    arguments += ["--window", 16, "--search-tokens", 384, "--group", 32, "--choices", "int8,int4"]
    ran = CliRunner().invoke(app, [str(a) for a in arguments])
    assert ran.exit_code == 0, ran.output
    assert "all int8" in ran.stdout
    assert "objective = 0.5 * mean + 0.5 * worst" in ran.stdout
    assert "method: gptq" in ran.stdout
    assert "variants measured" in ran.stderr
