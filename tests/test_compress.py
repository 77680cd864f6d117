"""The streaming driver end to end, against an independent walk with the whole model in memory."""

import csv
import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import budget, calibrate, compress, events
from distaya_ext.compress.settings import from_recipe
from distaya_ext.compress.solve import solve
from distaya_ext.compress.statistic import Statistic
from distaya_ext.errors import InputError, UsageError
from distaya_ext.models import describe

METHODS = {
    "sparsegpt": {"sparsity": 0.5},
    "sparsegpt-2:4": {"nm": "2:4"},
    "sparsegpt-joint": {"nm": "2:4", "bits": 4, "group": 32},
    "wanda": {"sparsity": 0.5},
    "ria": {"sparsity": 0.5},
    "magnitude": {"nm": "2:4"},
    "wanda+bits": {"sparsity": 0.5, "bits": 4, "group": 32},
    "gptq": {"bits": 4, "group": 32},
    "gptq-activation": {"bits": 4, "group": 0, "order": "activation"},
    "rtn": {"bits": 4, "group": 32},
    "dense": {},
}


def recipe_of(key, **more):
    name = key.split("-")[0].split("+")[0]
    return tiny.recipe(name, **METHODS[key], **more)


def weights_of(folder):
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def whole_model_walk(folder, settings, calibration):
    """What compress() must find, the slow way: the whole model, one full forward per stage."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    architecture = describe(model.config)
    for layer in model.get_submodule(architecture.layers):
        for stage in architecture.stages:
            linears = [layer.get_submodule(name) for name in stage.names]
            statistic = Statistic(settings.statistic, linears[0].in_features, torch.device("cpu"))
            hook = linears[-1].register_forward_pre_hook(
                lambda module, args, to=statistic: to.add(args[0].flatten(0, 1))
            )
            for ids in calibration.chunks():
                logits_of(model, ids)
            hook.remove()
            solution = solve([linear.weight.data for linear in linears], settings, statistic)
            for linear, W in zip(
                linears, solution.W.split([m.out_features for m in linears]), strict=True
            ):
                linear.weight.data = W.clone()
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_against_the_whole_model(tmp_path, family, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)  # 12 windows: chunks of 5, 5, 2
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    calibration, out = tiny.windows(), tmp_path / "out"
    recipe = tiny.recipe("sparsegpt", quality="plain")
    report = compress(source, out, recipe, calibration)

    expected = whole_model_walk(source, from_recipe(recipe), calibration)
    got = AutoModelForCausalLM.from_pretrained(out)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    ids = tiny.windows(2).ids
    assert torch.equal(logits_of(got, ids), logits_of(expected, ids))

    before, after = weights_of(source), weights_of(out)
    assert before.keys() == after.keys()
    compressed = {f"{module.module}.weight" for module in report.modules}
    layers, linears = tiny.FAMILIES[family].num_hidden_layers, 7
    assert len(compressed) == layers * linears
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in compressed), name
    tied = tiny.FAMILIES[family].tie_word_embeddings
    assert ("lm_head.weight" in after) == (not tied)
    for module in report.modules:
        assert module.zeros == int((after[f"{module.module}.weight"] == 0).sum())
    # One stack, one threshold per block: half of every stack, exactly.
    for stage in describe(tiny.FAMILIES[family]).stages:
        rows = [m for m in report.modules if m.module.endswith(stage.names) and ".0." in m.module]
        assert 2 * sum(m.zeros for m in rows) == sum(m.rows * m.columns for m in rows)
    assert report.sparsity == 0.5


@pytest.mark.parametrize("key", METHODS)
def test_every_method(tmp_path, key):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    recipe, calibration, out = recipe_of(key, format="dense"), tiny.windows(), tmp_path / "out"
    report = compress(source, out, recipe, calibration)
    after, settings = weights_of(out), from_recipe(recipe)
    linears = [after[f"{module.module}.weight"] for module in report.modules]
    assert len(linears) == 14
    for W in linears:
        if settings.nm:
            assert int((W.reshape(-1, 4) != 0).sum(dim=1).max()) <= 2
        if settings.bits and settings.group:
            groups = W.split(settings.group, dim=1)
            levels = [row.unique().numel() for group in groups for row in group]
            assert max(levels) <= 2**settings.bits
    if settings.sparsity is not None and settings.bits is None:
        assert report.sparsity == 0.5
    if key == "dense":
        before = weights_of(source)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (report.loss is not None) == (settings.statistic == "hessian")
    if report.loss is not None:
        assert all(0 < m.relative_loss < 1 for m in report.modules)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(("quality", "streams"), [("plain", 1), ("default", 2)])
def test_each_linear_runs_once_per_token(tmp_path, monkeypatch, quality, streams):
    """Once in every stream: the compressed layers', and the dense ones' where they are aimed at."""
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 4 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere2"])
    calls = []
    forward = torch.nn.Linear.forward

    def counted(self, x):
        calls.append(x.shape[0])
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)

    def on_event(event):
        if isinstance(event, events.Proved):
            calls.clear()

    recipe = tiny.recipe(quality=quality)
    compress(source, tmp_path / "out", recipe, tiny.windows(10), on_event=on_event)
    layers, linears = 4, 7
    assert len(calls) == streams * layers * linears * 3  # chunks of 4, 4 and 2 windows
    assert sum(calls) == streams * layers * linears * 10


def test_spilling_to_disk_changes_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 4 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["gemma3_text"], dtype=torch.bfloat16)
    least = budget.least_bytes(open_checkpoint(source), budget.Needs(twin=True))
    spilled = compress(source, tmp_path / "a", tiny.recipe(max_ram=f"{least}B"), tiny.windows())
    free = compress(source, tmp_path / "b", tiny.recipe(), tiny.windows())
    assert (spilled.spilled, free.spilled) == (True, False)
    assert (spilled.proof.kind, free.proof.kind) == ("truncated", "whole")
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "source"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_again_and_for_any_thread_count(tmp_path, dtype):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for run, threads in enumerate((1, 1, 2)):
            torch.set_num_threads(threads)
            out = tmp_path / f"out{run}"
            compress(source, out, tiny.recipe(nm="2:4", bits=4), tiny.windows())
            results.append(weights_of(out))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_compressed_weights_keep_the_stored_dtype(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["qwen3"], dtype=torch.bfloat16)
    compress(source, tmp_path / "out", tiny.recipe(), tiny.windows())
    assert {t.dtype for t in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_skipped_modules_stay_dense_and_still_run(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    out = tmp_path / "out"
    recipe = tiny.recipe(skip=[r"layers\.0\.", r"o_proj$", r"layers\.1\.self_attn\.q_proj"])
    report = compress(source, out, recipe, tiny.windows())
    assert {m.module for m in report.modules} == {
        f"model.layers.{i}.{name}"
        for i in (1, 2)
        for name in describe(tiny.FAMILIES["llama"]).linears()
        if not name.endswith("o_proj") and (i, name) != (1, "self_attn.q_proj")
    }
    before, after = weights_of(source), weights_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{m.module}.weight" for m in report.modules}


def test_output_folder_and_reports(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    (source / "LICENSE").write_text("free")
    seen, out = [], tmp_path / "out"
    report = compress(source, out, tiny.recipe(), tiny.windows(), on_event=seen.append)
    names = {path.name for path in out.iterdir()}
    expected = {"config.json", "LICENSE", "layers.csv", "model.safetensors", "recipe.yaml"}
    assert expected | {"results.json"} <= names
    with open(out / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["module"] for row in rows] == [m.module for m in report.modules]
    assert rows[0]["shape"] == "64x64"
    assert float(rows[0]["loss"]) == pytest.approx(report.modules[0].loss, rel=1e-5)
    results = json.loads((out / "results.json").read_text())
    assert results["totals"]["sparsity"] == 0.5
    assert results["totals"]["modules"] == 21
    assert results["calibration"]["tokens_per_language"] == {"en": 144, "fr": 144}
    assert results["proof"]["kind"] == "whole" and results["proof"]["exact"] is True
    assert str(tmp_path) not in json.dumps(results)
    kinds = [type(event).__name__ for event in seen]
    assert kinds.count("LayerStart") == kinds.count("LayerDone") == 3
    assert kinds.count("StageDone") == 12
    assert kinds[:3] == ["Calibrated", "Notice", "Proved"] and kinds[-1] == "Saved"
    assert seen[0].tokens == 288 and seen[0].tokens_per_language == {"en": 144, "fr": 144}
    assert "288 calibration tokens are few" in seen[1].message
    assert report.notices == [seen[1].message] == results["notices"]


def test_overwriting_is_refused_unless_asked_and_ours(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["qwen2"])
    recipe, calibration, out = tiny.recipe("magnitude"), tiny.windows(), tmp_path / "out"
    compress(source, out, recipe, calibration)
    first = weights_of(out)
    with pytest.raises(InputError, match="not empty"):
        compress(source, out, recipe, calibration)
    compress(source, out, tiny.recipe("rtn", bits=3, format="dense"), calibration, overwrite=True)
    second = weights_of(out)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match="model folder itself"):
        compress(source, source, recipe, calibration, overwrite=True)


def test_dead_columns_keep_their_weights(tmp_path):
    """A column that calibration never saw is counted and rounded like the others, not zeroed."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("layers.1.mlp.up_proj.weight"):
            tensors[name][[3, 50]] = 0  # so the input of down_proj is 0 there
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    recipe = tiny.recipe("gptq", bits=8, group=0, format="dense")
    report = compress(source, out, recipe, tiny.windows())
    dead = {m.module: m.dead for m in report.modules if m.dead}
    assert dead == {"model.layers.1.mlp.down_proj": 2}
    assert report.dead == 2
    name = "model.layers.1.mlp.down_proj.weight"
    W, Q = tensors[name][:, [3, 50]], weights_of(out)[name][:, [3, 50]]
    assert (W - Q).abs().max() < 0.02 * W.abs().max()


def test_methods_without_statistics_need_no_texts(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["mistral"])
    report = compress(source, tmp_path / "out", tiny.recipe("magnitude"))
    assert report.proof is None and report.tokens == 0
    assert all(2 * m.zeros == m.rows * m.columns for m in report.modules)


def test_skip_pattern_that_matches_nothing(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    with pytest.raises(UsageError, match="matches none of the 21"):
        compress(source, tmp_path / "out", tiny.recipe(skip=["o_porj"]), tiny.windows())


def test_pattern_that_does_not_divide_the_columns(tmp_path):
    config = LlamaConfig(**{**tiny.FAMILIES["llama"].to_dict(), "intermediate_size": 90})
    source = tiny.make(tmp_path / "source", config)
    with pytest.raises(UsageError, match="divisible by 4; this Linear has 90"):
        compress(source, tmp_path / "out", tiny.recipe(nm="2:4"), tiny.windows())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unknown_device(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    for device in ("gpu3", "meta"):
        with pytest.raises(UsageError, match="use cpu or cuda"):
            compress(source, tmp_path / "out", tiny.recipe(), tiny.windows(), device=device)


def test_head_that_contradicts_its_tie(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["gemma"])
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"ties lm_head\.weight"):
        compress(source, tmp_path / "out", tiny.recipe("magnitude"), None)


def test_a_run_interrupted_in_its_first_layer_leaves_nothing_behind(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])

    def stop(event):
        if isinstance(event, events.LayerDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", tiny.recipe(), tiny.windows(), on_event=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_second_hub_style_copy_gives_the_same_result(tmp_path):
    """Sharded in, one file out: where tensors lie makes no difference."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name in ("source", "sharded"):
        compress(tmp_path / name, tmp_path / f"out-{name}", tiny.recipe(), tiny.windows())
    a, b = weights_of(tmp_path / "out-source"), weights_of(tmp_path / "out-sharded")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    shutil.rmtree(tmp_path / "out-source")


@pytest.mark.cuda
@pytest.mark.parametrize("key", ["sparsegpt-joint", "gptq-activation", "wanda"])
def test_gpu_result_is_as_good_as_the_cpus(tmp_path, key):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere2"])
    calibration, reports = tiny.windows(), {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        recipe = recipe_of(key, format="dense")
        reports[device] = compress(source, out, recipe, calibration, device=device)
    assert reports["cuda"].sparsity == pytest.approx(reports["cpu"].sparsity, abs=1e-3)
    if reports["cpu"].loss is not None:
        assert reports["cuda"].loss == pytest.approx(reports["cpu"].loss, rel=0.02)
    ids = tiny.windows(2).ids
    cpu, gpu, dense = (
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name), ids)
        for name in ("cpu", "cuda", "source")
    )
    assert (gpu - cpu).norm() < 0.2 * (dense - cpu).norm()
