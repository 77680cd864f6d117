"""The dense twin against two whole models: its stream, and what each stage is told to aim at."""

import lockstep
import pytest
import tiny
import torch
from safetensors.torch import load_file

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import budget, calibrate, compress

FAMILIES = ("cohere", "cohere2", "llama", "qwen2", "gemma", "gemma2", "gemma3_text")
POST_NORMS = ("gemma2", "gemma3_text")
CHUNKS = 3  # of 5, 5 and 2 windows
PLANS = {
    "half": {"sparsity": 0.5},
    "2:4+int4": {"nm": "2:4", "bits": 4, "group": 32},
    "int3": {"method": "gptq", "bits": 3, "group": 32},
    "skips": {"sparsity": 0.5, "skip": [r"o_proj$", r"layers\.0\.mlp", r"1\.self_attn\.q_proj"]},
    "rules": {
        "nm": "2:4",
        "modules": [
            {"match": r"layers\.1\.mlp\.down_proj", "dense": True},
            {"match": r"k_proj$", "bits": 4, "group": 32},
            {"match": r"0\.self_attn\.o_proj", "sparsity": 0.7},
        ],
    },
}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)


def watched(tmp_path, monkeypatch, family, plan="half", dtype=torch.float32, **more):
    """A run whose pairs are noted."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family], dtype=dtype)
    calibration = tiny.windows()
    watch = lockstep.Watch(source, calibration).on(monkeypatch)
    compress(source, tmp_path / "out", _recipe(plan, **more), calibration)
    return watch


def _recipe(plan, **more):
    return tiny.recipe(**{"quality": "default", "format": "dense", **PLANS[plan], **more})


def check_stream(watch, family):
    """The hidden states after each layer are those of the dense model, bit by bit."""
    layers = tiny.FAMILIES[family].num_hidden_layers
    assert [(at, chunk) for at, chunk, _ in watch.hidden] == [
        (at, chunk) for at in range(layers) for chunk in range(CHUNKS)
    ]
    moved = 0
    for at, chunk, got in watch.hidden:
        ids = list(watch.calibration.chunks())[chunk]
        want, now = (
            lockstep.observe(model, watch.architecture, at, ids)[""][1]
            for model in (watch.dense, watch.now)
        )
        assert torch.equal(got, want), (at, chunk)
        moved += not torch.equal(now, want)
    assert moved == len(watch.hidden)  # and the compressed stream is another one


def wanted(watch, pair):
    """Y as the docstring of twin.py has it, in float64, and a bound on what is lost on the way.

    Every sum of k + 1 terms in float32 loses at most k roundings of the sum of their sizes, and
    one more when it is rounded to the stream's dtype; the terms themselves must be right to the
    last bit.
    """
    (name,) = pair.stage.names
    terms = [pair.dense[name][1].double()]
    if watch.architecture.adds:
        terms += [pair.dense[""][0].double(), -pair.now[""][0].double()]
        before = watch.architecture.linears()
        before = before[: before.index(name)]
        for block in watch.architecture.blocks:
            inside = [n for n in watch.architecture.linears() if n.startswith(block + ".")]
            if all(n in before for n in inside):
                terms += [pair.dense[block][1].double(), -pair.now[block][1].double()]
    size, y = sum(t.abs() for t in terms), sum(terms)
    last = torch.finfo(pair.y.dtype).eps / 2
    return y, (len(terms) - 1) * 2.0**-24 * size + last * (y.abs() + 1e-5 * size), len(terms)


def check_pairs(watch, family):
    """x is the input now; y the dense input, or the sum above where a block ends."""
    ends, most = 0, 0
    for pair in watch.pairs:
        name = pair.stage.names[0]
        assert torch.equal(pair.x, pair.now[name][0]), (pair.layer, name)
        if name.endswith(("o_proj", "down_proj")):
            y, bound, terms = wanted(watch, pair)
            assert pair.y.dtype == pair.x.dtype
            assert bool(((pair.y.double() - y).abs() <= bound).all()), (pair.layer, name)
            ends, most = ends + 1, max(most, terms)
        else:
            assert torch.equal(pair.y, pair.dense[name][0]), (pair.layer, name)
    assert ends
    # Attention is over when down_proj is solved, in parallel blocks and in sequential ones.
    assert most == (1 if family in POST_NORMS else 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_and_aims_of_every_family(tmp_path, monkeypatch, small_chunks, family):
    watch = watched(tmp_path, monkeypatch, family)
    assert watch.architecture.adds == (family not in POST_NORMS)
    layers, stages = tiny.FAMILIES[family].num_hidden_layers, watch.architecture.stages
    assert [(p.layer, p.stage, p.chunk) for p in watch.pairs] == [
        (at, stage, chunk) for at in range(layers) for stage in stages for chunk in range(CHUNKS)
    ]
    check_stream(watch, family)
    check_pairs(watch, family)


@pytest.mark.parametrize("plan", ["2:4+int4", "int3"])
@pytest.mark.parametrize("family", ["cohere", "llama", "gemma2"])
def test_whatever_is_done_to_the_other(tmp_path, monkeypatch, small_chunks, family, plan):
    """Rounded, and trained: what training does to a layer after its twin has run is not followed
    here, so pairs are checked in the first layer only.
    """
    watch = watched(tmp_path, monkeypatch, family, plan, quality="high")
    check_stream(watch, family)
    watch.pairs = [pair for pair in watch.pairs if pair.layer == 0]
    check_pairs(watch, family)


@pytest.mark.parametrize("plan", ["skips", "rules"])
@pytest.mark.parametrize("family", ["cohere", "llama", "gemma2"])
def test_linears_that_stay_dense(tmp_path, monkeypatch, small_chunks, family, plan):
    watch = watched(tmp_path, monkeypatch, family, plan)
    check_stream(watch, family)
    check_pairs(watch, family)


@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_sixteen_bits(tmp_path, monkeypatch, small_chunks, family):
    watch = watched(tmp_path, monkeypatch, family, dtype=torch.bfloat16)
    check_stream(watch, family)
    check_pairs(watch, family)


@pytest.mark.parametrize("plan", ["half", "skips", "rules"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_linear_runs_once_per_token(tmp_path, monkeypatch, small_chunks, family, plan):
    watch = watched(tmp_path, monkeypatch, family, plan)
    tokens = watch.calibration.tokens
    each = dict.fromkeys(watch.architecture.linears(), tokens)
    assert watch.runs == [each] * tiny.FAMILIES[family].num_hidden_layers


@pytest.mark.parametrize("quality", ["default", "high"])
@pytest.mark.parametrize("family", ["cohere", "llama", "gemma3_text"])
def test_stores_on_disk_change_no_bit(tmp_path, small_chunks, family, quality):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family], dtype=torch.bfloat16)
    least = budget.least_bytes(
        open_checkpoint(source), budget.Needs(twin=True, trains=quality == "high")
    )
    found = []
    for name, more in {"disk": {"max_ram": f"{least}B"}, "memory": {}}.items():
        recipe = _recipe("half", quality=quality, **more)
        report = compress(source, tmp_path / name, recipe, tiny.windows())
        assert report.spilled == (name == "disk")
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_no_twin_where_nothing_is_aimed_at(tmp_path, monkeypatch, small_chunks):
    watch = watched(tmp_path, monkeypatch, "cohere", quality="plain")
    assert not watch.runs and not watch.pairs and not watch.hidden
