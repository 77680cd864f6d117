"""Quality levels in whole runs: what they gain, that plain is the published sweep, every family."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from test_compress import logits_of, weights_of
from transformers import AutoModelForCausalLM

import distaya_ext
from distaya_ext import Recipe, compress, read_texts
from distaya_ext.compress import calibrate
from distaya_ext.errors import UsageError
from distaya_ext.evaluate import cut_lines, evaluate_loaded, load
from distaya_ext.models import describe
from distaya_ext.ops.hessian import Hessian
from distaya_ext.ops.obs import Quant, obs
from distaya_ext.texts import windows

ASSETS = Path(distaya_ext.__file__).parent / "assets"
NANO = ASSETS / "nano-aya"
QUALITIES = ("plain", "default", "high")
PASSAGES = 4  # per language
PLANS = {
    "half": {"sparsity": 0.5},
    "2:4": {"nm": "2:4"},
    "2:4+int4": {"nm": "2:4", "bits": 4, "group": 32},
    "int3": {"method": "gptq", "bits": 3, "group": 32},
}


# ---- what the levels gain ----


@pytest.fixture(scope="module")
def deltas(tmp_path_factory) -> dict[tuple[str, str], float]:
    """(plan, quality) -> NLL per token more than the dense model's, on texts it never saw."""
    root = tmp_path_factory.mktemp("levels")
    dense = load(NANO)
    texts = read_texts(ASSETS / "texts" / "calibration")
    drawn = windows(texts, dense.tokenizer, tokens=23 * 256, window=256)
    models, names = [], [("2:4", q) for q in QUALITIES[:2]] + [("2:4+int4", q) for q in QUALITIES]
    for number, (plan, quality) in enumerate(names):
        fields = PLANS[plan] if plan == "2:4" else {**PLANS[plan], "group": 128, "format": "dense"}
        out = root / str(number)
        compress(NANO, out, Recipe(model=str(NANO), quality=quality, **fields), drawn)
        models.append(load(out))
    texts = read_texts(ASSETS / "texts" / "evaluation", parallel=True)
    few = {lang: lines[:PASSAGES] for lang, lines in texts.items()}
    samples = cut_lines(few, dense.tokenizer, longest=2048)
    found = evaluate_loaded(models, samples, base=dense)
    return {name: f.nll - f.base_nll for name, f in zip(names, found, strict=True)}


@pytest.mark.parametrize("plan", ["2:4", "2:4+int4"])
def test_default_beats_plain(deltas, plan):
    """It was 0.65 of plain when this was written; windows drawn by another seed move it by 0.02."""
    assert 0 < deltas[plan, "default"] < 0.85 * deltas[plan, "plain"]


def test_high_is_not_worse_than_default(deltas):
    """It was 0.93 of default when this was written."""
    assert 0 < deltas["2:4+int4", "high"] <= deltas["2:4+int4", "default"]


# ---- plain ----


def published(folder, fields, calibration):
    """The whole model in memory, one full forward per stage, and one sweep of ops.obs towards the
    dense weights.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    architecture = describe(model.config)
    nm = (2, 4) if "nm" in fields else None
    quant = None
    if "bits" in fields:
        quant = Quant(fields["bits"], fields["group"], scale_dtype=torch.float32)
    for layer in model.get_submodule(architecture.layers):
        for stage in architecture.stages:
            linears = [layer.get_submodule(name) for name in stage.names]
            hessian = Hessian(linears[0].in_features)
            hook = linears[0].register_forward_pre_hook(
                lambda module, args, to=hessian: to.add(args[0].flatten(0, 1))
            )
            for ids in calibration.chunks():
                logits_of(model, ids)
            hook.remove()
            W = torch.cat([linear.weight.data for linear in linears])
            found = obs(W, hessian.finish(), sparsity=fields.get("sparsity"), nm=nm, quant=quant)
            parts = found.W.split([linear.out_features for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.data = part.clone()
    return model


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["cohere", "llama", "gemma2"])
def test_plain_is_the_published_sweep(tmp_path, monkeypatch, family, plan):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    recipe = tiny.recipe(**PLANS[plan], quality="plain", format="dense", symmetric=False)
    compress(source, tmp_path / "out", recipe, tiny.windows())
    want = published(source, PLANS[plan], tiny.windows()).state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


# ---- recipes ----


@pytest.mark.parametrize("plan", ["2:4", "2:4+int4"])
@pytest.mark.parametrize("quality", [None, *QUALITIES])
def test_quality_is_written_down_and_repeats(tmp_path, quality, plan):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    recipe = tiny.recipe(**PLANS[plan], quality=quality)
    compress(source, tmp_path / "one", recipe, tiny.windows())
    written = yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())
    again = Recipe.from_yaml(tmp_path / "one" / "recipe.yaml")
    assert again.effort == (quality or "default")
    assert quality is None or written["quality"] == quality
    compress(source, tmp_path / "two", again, tiny.windows())
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_quality_changes_the_weights(tmp_path):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["llama"])
    for quality in (None, *QUALITIES):
        compress(source, tmp_path / str(quality), tiny.recipe(quality=quality), tiny.windows())
    found = {q: weights_of(tmp_path / str(q)) for q in (None, *QUALITIES)}
    pairs = ((None, "default"), ("plain", "default"), ("default", "high"))
    for name in found["plain"]:
        same = [torch.equal(found[a][name], found[b][name]) for a, b in pairs]
        assert same == [True, *[not name.endswith("proj.weight")] * 2], name


@pytest.mark.parametrize("quality", ["default", "high"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "rtn", "dense"])
def test_quality_without_a_sweep_is_refused(method, quality):
    fields = {"bits": 4} if method == "rtn" else {}
    with pytest.raises(UsageError) as caught:
        tiny.recipe(method, quality=quality, **fields)
    sentence = str(caught.value)
    assert "\n" not in sentence and quality in sentence and method in sentence
    assert tiny.recipe(method, quality="plain", **fields).effort == "plain"


# ---- every family ----


@pytest.mark.parametrize("plan", ["2:4", "2:4+int4", "int3"])
@pytest.mark.parametrize("quality", ["default", "high"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(tmp_path, family, quality, plan):
    """The file holds what the run ended with: N:M counts, codes, scales, logits that are finite."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family], dtype=torch.bfloat16)
    form = "dense" if plan == "2:4" else "distaya"
    recipe = tiny.recipe(**PLANS[plan], quality=quality, format=form)
    report = compress(source, tmp_path / "out", recipe, tiny.windows())
    assert report.format == form and len(report.modules) == 7 * len(
        AutoModelForCausalLM.from_pretrained(source).get_submodule("model.layers")
    )
    model = distaya_ext.load(tmp_path / "out") if form == "distaya" else None
    model = model or AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert bool(logits_of(model, tiny.windows(2).ids).isfinite().all())
    assert report.loss > 0 and all(0 < m.relative_loss < 1 for m in report.modules)
    if plan == "2:4":
        stored = weights_of(tmp_path / "out")
        for module in report.modules:
            groups = stored[f"{module.module}.weight"].view(module.rows, -1, 4)
            assert int((groups != 0).sum(2).max()) <= 2
    if plan != "int3":
        assert all(2 * m.zeros >= m.rows * m.columns for m in report.modules)
