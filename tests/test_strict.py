"""Nothing silent: what a run could not do as asked is counted, shown, and fatal under --strict."""

import csv
import json
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from speaking import save_model, save_texts
from typer.testing import CliRunner

import distaya_ext
from distaya_ext import doctor
from distaya_ext.chain.events import StepStarted
from distaya_ext.cli.app import app
from distaya_ext.cli.progress import Reporter
from distaya_ext.compress import compress, events
from distaya_ext.compress.fallbacks import Fallback, Fallbacks, of_module
from distaya_ext.errors import NumericsError
from distaya_ext.ops import machine, obs
from distaya_ext.quant import Quant
from distaya_ext.recipe import Recipe
from distaya_ext.runtime import SlowKernelWarning, slow_paths


def edit(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def silence(tensors):
    """All norms give 0, so no Linear ever sees anything."""
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.zero_()


def fallbacks(out):
    return json.loads((out / "results.json").read_text())["fallbacks"]


def distaya(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """A model, with a tokenizer and texts, of which all Hessians have rank 0."""
    root = tmp_path_factory.mktemp("silent")
    save_model(root / "model", seed=1)
    save_texts(root / "texts", repeat=8)
    edit(root / "model", silence)
    return root


def run(root, out, *more):
    return distaya(
        "compress", root / "model", "--out", out, "--calib", root / "texts", "--tokens", 480,
        "--window", 16, *more,
    )  # fmt: skip


# ---- a total failure: the promise of this file ----

METHODS = {"prune": ("--sparsity", "2:4"), "round": ("--bits", "4"), "wanda": ("--method", "wanda",
           "--sparsity", "0.5")}  # fmt: skip


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_all_hessians_of_rank_0_exit_4_when_strict(silent, tmp_path, flags):
    result = run(silent, tmp_path / "out", *flags, "--strict")
    assert result.exit_code == 4, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert (
        "5 modules are degraded (rank_zero in 5): model.layers.0.self_attn.q_proj: none of" in line
    )
    assert not (tmp_path / "out").exists() and result.stdout == ""


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_all_hessians_of_rank_0_are_shouted_without_strict(silent, tmp_path, quiet):
    result = run(silent, tmp_path / "out", "--sparsity", "2:4", *quiet)
    assert result.exit_code == 0, result.stderr
    assert "numerical failure" in result.stderr and "╔" in result.stderr
    assert "14 of 14 modules are degraded" in result.stderr
    assert "degraded: rank_zero in 14 modules: no input was ever active" in result.stderr
    told = fallbacks(tmp_path / "out")
    assert told["kinds"] == {"rank_zero": 14} and told["total"] is True
    assert (told["degraded"], told["of"]) == (14, 14)
    with open(tmp_path / "out" / "layers.csv", newline="") as file:
        assert all(row["fallbacks"].startswith("rank_zero=") for row in csv.DictReader(file))


def test_a_healthy_run_has_nothing_to_tell(tmp_path):
    source, seen = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"]), []
    report = compress(
        source, tmp_path / "out", tiny.recipe(quality="default"), tiny.windows(),
        on_event=seen.append, strict=True,
    )  # fmt: skip
    told = fallbacks(tmp_path / "out")
    expected = {"kinds": {}, "modules": [], "degraded": 0, "of": 14, "total": False}
    assert told == expected == report.summary()["fallbacks"]
    assert not any(isinstance(event, events.FellBack) for event in seen)


def test_a_chain_is_strict_about_what_an_earlier_run_kept(silent, tmp_path):
    """The compression of a run without strict is kept beside the output; strict then refuses it."""
    texts = {"path": str(silent / "texts"), "window": 16, "tokens": 480}
    recipe = Recipe(
        model=str(silent / "model"), sparsity=0.5, calibration=texts,
        evaluate={"path": str(silent / "texts"), "window": 16, "tokens": 96},
    )  # fmt: skip

    def stop(event):
        if isinstance(event, StepStarted) and event.name == "evaluate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(recipe.model, tmp_path / "out", recipe, on_event=stop)
    seen = []
    for _ in range(2):
        with pytest.raises(NumericsError, match=r"^14 modules are degraded"):
            compress(recipe.model, tmp_path / "out", recipe, on_event=seen.append, strict=True)
    assert not (tmp_path / "out").exists()
    done = compress(recipe.model, tmp_path / "out", recipe, on_event=seen.append)
    assert done.kept == ["compress"] and fallbacks(tmp_path / "out")["total"] is True
    assert sum(isinstance(event, events.FellBack) and event.total for event in seen) == 3


# ---- half dead ----


def test_columns_never_seen_keep_their_rounded_value(tmp_path):
    """Not zero: they may be features of a language that the texts have little of."""
    dead = [1, 4, 5, 30, 63]
    source = edit(
        tiny.make(tmp_path / "source", tiny.FAMILIES["llama"]),
        lambda t: t["model.layers.0.input_layernorm.weight"].index_fill_(0, torch.tensor(dead), 0),
    )
    W = load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    recipe = tiny.recipe("gptq", bits=4, group=0, quality="plain", format="dense")
    report = compress(source, tmp_path / "out", recipe, tiny.windows())
    got = load_file(tmp_path / "out" / "model.safetensors")
    expected, *_ = obs.quantize(W, Quant(4, 0, symmetric=False))
    assert torch.equal(got["model.layers.0.self_attn.q_proj.weight"][:, dead], expected[:, dead])
    assert bool(expected[:, dead].any())
    found = [e for e in report.fallbacks.found if e.kind == "rtn_columns"]
    assert [e.module.rpartition(".")[2] for e in found] == ["q_proj", "k_proj", "v_proj"]
    assert found[0].what == "5 of 64 inputs never seen" and not found[0].degraded  # under 10 %


def test_half_dead_is_degraded_but_not_total(tmp_path):
    source = edit(
        tiny.make(tmp_path / "source", tiny.FAMILIES["llama"]),
        lambda t: t["model.layers.1.input_layernorm.weight"][::2].zero_(),
    )
    seen = []
    report = compress(source, tmp_path / "out", tiny.recipe(), tiny.windows(), on_event=seen.append)
    (event,) = [e for e in seen if isinstance(e, events.FellBack)]
    assert (event.degraded, event.of, event.total) == (3, 21, False)
    assert event.lines == (
        (
            "rtn_columns in 3 modules: inputs that no text reached, whose weights were only "
            "rounded (worst model.layers.1.self_attn.q_proj: 32 of 64 inputs never seen)",
            True,
        ),
    )
    assert report.fallbacks.of("model.layers.1.self_attn.k_proj") == "rtn_columns=32"
    with pytest.raises(NumericsError, match=r"^3 modules are degraded \(rtn_columns in 3\)"):
        compress(source, tmp_path / "b", tiny.recipe(), tiny.windows(), strict=True)


def test_a_kept_layer_that_is_degraded_fails_the_strict_run_that_goes_on(tmp_path):
    """Killed behind a layer that is degraded: the same command with --strict stops at once."""
    source = edit(
        tiny.make(tmp_path / "source", tiny.FAMILIES["llama"]),
        lambda t: t["model.layers.0.input_layernorm.weight"][::2].zero_(),
    )

    def stop(event):
        if isinstance(event, events.LayerStart) and event.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", tiny.recipe(), tiny.windows(), on_event=stop)
    with pytest.raises(NumericsError, match="3 modules are degraded"):
        compress(source, tmp_path / "out", tiny.recipe(), tiny.windows(), strict=True)
    report = compress(source, tmp_path / "out", tiny.recipe(), tiny.windows())
    assert report.fallbacks.of("model.layers.0.self_attn.k_proj") == "rtn_columns=32"


# ---- kinds and their lines ----


def of(**fields):
    base = {"floored": 0, "dead": 0, "learns": True, "aims": False}
    return [(e.kind, e.degraded) for e in of_module("m", 1000, 5000, **(base | fields))]


def test_where_the_lines_are():
    assert of() == of(dead=1000, learns=False) == []
    # LayerNorm subtracts the mean: H of Cohere is singular by one, and that is normal
    assert of(floored=1) == of(floored=10) == [("pivot_floor", False)]
    assert of(floored=11) == [("pivot_floor", True)]
    assert of(dead=100) == [("rtn_columns", False)] and of(dead=101) == [("rtn_columns", True)]
    assert of(dead=1000, aims=True) == [("rank_zero", True)]
    few = list(of_module("m", 64, 64, floored=0, dead=0, learns=True, aims=True))
    assert [(e.kind, e.what) for e in few] == [("aim_off", "64 tokens for 64 inputs")]
    assert not list(of_module("m", 64, 65, floored=0, dead=0, learns=True, aims=True))


def test_one_floored_pivot_of_a_narrow_matrix_is_normal():
    (one,) = of_module("m", 32, 999, floored=1, dead=0, learns=True, aims=False)
    (two,) = of_module("m", 32, 999, floored=2, dead=0, learns=True, aims=False)
    assert (one.degraded, two.degraded) == (False, True)


def test_singular_hessians_without_damping_are_counted(tmp_path):
    """Next to no damping: 48 tokens span 48 of 64 directions, the rest has no pivot of its own."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    recipe = tiny.recipe(damp=1e-9, quality="plain")
    report = compress(source, tmp_path / "out", recipe, tiny.windows(2))
    found = [e for e in report.fallbacks.found if e.kind == "pivot_floor"]
    assert found and all(e.degraded for e in found) and found[0].count >= 15


def test_fewer_tokens_than_inputs_switch_the_aim_off(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    report = compress(source, tmp_path / "out", tiny.recipe(quality="default"), tiny.windows(2))
    off = [e.module for e in report.fallbacks.found if e.kind == "aim_off"]
    assert len(off) == 21 and report.fallbacks.total(21)


def test_training_that_cannot_hold_anything_out_is_told(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    report = compress(source, tmp_path / "out", tiny.recipe(quality="high"), tiny.windows(6))
    found = [e for e in report.fallbacks.found if e.kind == "untrained"]
    assert [e.module for e in found] == [f"model.layers.{i}" for i in range(3)]
    assert all(e.degraded and "fewer than 8 calibration windows" in e.what for e in found)


def test_slower_kernels_are_counted_and_not_degraded(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    with machine.use_isa("portable"):
        report = compress(source, tmp_path / "out", tiny.recipe(), tiny.windows(), strict=True)
    (slow,) = report.fallbacks.found
    assert (slow.kind, slow.module, slow.count, slow.degraded) == ("slow_kernel", "all", 21, False)
    assert fallbacks(tmp_path / "out")["kinds"] == {"slow_kernel": 21}


# ---- slow kernels of a loaded model ----


@pytest.fixture(scope="module")
def packed(silent, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    rtn = ("--method", "rtn", "--bits", "4", "--format", "distaya")
    assert distaya("compress", silent / "model", "--out", out, *rtn).exit_code == 0
    return out


def test_slow_kernels_are_told_where_a_model_is_loaded(packed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = distaya_ext.load(packed)
    assert slow_paths(model) == []
    with machine.use_isa("portable"):
        words = r"^14 modules run slower than they could: 14 on portable kernels of a processor"
        with pytest.warns(SlowKernelWarning, match=words):
            distaya_ext.load(packed)
        found = slow_paths(model)
        report = doctor.report()["slow paths"]
    assert [path.module for path in found][:1] == ["model.layers.0.self_attn.q_proj"]
    assert report["on cpu"].startswith("every packed product: portable kernels")
    assert doctor.report()["slow paths"] == {"on cpu": "none"}


def test_gate_and_up_that_cannot_be_one_kernel_are_slow(packed):
    model = distaya_ext.load(packed)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    (found,) = slow_paths(model)
    assert found.module == "model.layers.1.mlp" and "instead of in one kernel" in found.what


@pytest.mark.parametrize("command", ["generate", "eval", "bench"])
def test_commands_tell_of_slow_kernels_and_strict_fails(silent, packed, command):
    arguments = {
        "generate": ("generate", packed, "water", "--max-new-tokens", 2),
        "eval": ("eval", packed, "--texts", silent / "texts", "--window", 16, "--tokens", 96),
        "bench": ("bench", "model", packed, "--prompt", 4, "--new", 2, "--runs", 1),
    }[command]
    fast = distaya(*arguments, "--strict")
    assert fast.exit_code == 0 and "slower than they could" not in fast.stderr, fast.stderr
    with machine.use_isa("portable"):
        told = distaya(*arguments)
        strict = distaya(*arguments, "--strict")
    assert told.exit_code == 0 and "note: 14 modules run slower" in told.stderr, told.stderr
    assert strict.exit_code == 4 and "Error: 14 modules run slower" in strict.stderr


def test_inspect_tells_what_a_run_fell_back_on(silent, tmp_path):
    run(silent, tmp_path / "out", "--sparsity", "2:4")
    told = distaya("inspect", tmp_path / "out")
    assert "fallbacks: 14 of 14 modules degraded; rank_zero in 14" in told.stdout
    told = distaya("verify", tmp_path / "out")
    assert told.exit_code == 0, told.stdout  # the folder is what it says it is
    assert "note: the run that made it says: 14 of 14 modules degraded" in told.stdout


# ---- told ----


def test_what_is_written_is_read_back():
    held = Fallbacks([Fallback("a", "rtn_columns", 3, "3 of 9", True)])
    told = json.loads(json.dumps(held.summary(4)))
    assert Fallbacks.read(told) == held
    with pytest.raises(NumericsError, match=r"^1 module is degraded \(rtn_columns in 1\): a: 3 of"):
        Fallbacks.read(told).refuse()
    Fallbacks.read({}).refuse()


def test_the_sentence_names_the_first_and_counts_the_rest():
    held = Fallbacks([Fallback(str(i), "rank_zero", 9, "none", True) for i in range(7)])
    assert (
        held.sentence()
        == "7 modules are degraded (rank_zero in 7): 0: none; 1: none; 2: none and 4 more"
    )
    assert held.total(13) and not held.total(14)


def test_quiet_hides_what_is_normal_only(capsys):
    lines = (("bad", True), ("fine", False))
    for quiet in (False, True):
        with Reporter(quiet) as reporter:
            reporter.on_event(events.FellBack(lines, 1, 9, False))
        told = capsys.readouterr().err
        assert "degraded: bad" in told and ("note: fine" in told) is not quiet
        assert "numerical failure" not in told
